#!/usr/bin/env bash
set -euo pipefail
usage="On TPU slices of a GKE cluster, by xpk (pip install xpk). The files of this clone go with it.

  experiments/launch/gke.sh --cluster=NAME --tpu_type=v5p-128 [options] -- MODULE [flags]

  --cluster        made by 'xpk cluster create'
  --tpu_type       of one slice
  --workload=      name of the job; default: the module's, with the time
  --slices=1       number of slices
  --restarts=10    how often the job starts again after a host was lost; the run resumes
  --image=python:3.11   that the files are put on
  --zone=, --project=   if not gcloud's own
  --dry_run        print the command only

Let --workdir lie in a bucket: gs://... Look at a job: xpk workload list --cluster=NAME"
options="cluster tpu_type workload slices restarts image zone project"; required="cluster tpu_type"
cluster="" tpu_type="" workload="" slices=1 restarts=10 image=python:3.11 zone="" project=""
cd "$(dirname "$0")/../.."
source experiments/launch/read_options.sh

short=${module##*.}
workload=${workload:-$(echo "${short//_/-}" | cut -c1-20)-$(date +%m%d%H%M)}
run xpk workload create --cluster="$cluster" --workload="$workload" --tpu-type="$tpu_type" \
  --num-slices="$slices" --max-restarts="$restarts" --base-docker-image="$image" --script-dir=. \
  ${zone:+--zone="$zone"} ${project:+--project="$project"} \
  --command="pip install -e '.[tpu]' && $(on_every_host "${arguments[@]}")"
