#!/usr/bin/env bash
set -euo pipefail
usage="On all hosts of a TPU VM slice that exists, over gcloud.

  experiments/launch/tpu_vm.sh --name=SLICE --zone=ZONE [options] -- MODULE [flags of the experiment]

  --name, --zone   of the slice; make one with 'gcloud compute tpus queued-resources create'
  --project=       if not gcloud's own
  --repository=    what the hosts clone; default: the origin of this clone
  --revision=      commit that they run; default: the one that is checked out here
  --dry_run        print the command only

The run goes on in the background (log: ~/lladax.log of each host); the same command starts it again,
and it resumes. Let --workdir lie in a bucket that all hosts see: gs://..."
options="name zone project repository revision"; required="name zone"
name="" zone="" project="" repository="" revision=""
cd "$(dirname "$0")/../.."
source experiments/launch/read_options.sh

repository=${repository:-$(git remote get-url origin 2>/dev/null || true)}
revision=${revision:-$(git rev-parse HEAD 2>/dev/null || true)}
[ -n "$repository" ] || fail "this clone has no origin; say --repository=URL"
[ -n "$revision" ] || fail "no commit is checked out here; say --revision=COMMIT"

on_host="set -e
[ -d ~/lladax ] || git clone --quiet $(printf %q "$repository") ~/lladax
cd ~/lladax && git fetch --quiet && git checkout --quiet $(printf %q "$revision")
pip install --quiet -e '.[tpu]'
pkill -TERM -f '[p]ython -m $module' && sleep 30 || true
nohup $(on_every_host "${arguments[@]}") > ~/lladax.log 2>&1 < /dev/null &"

run gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" ${project:+--project="$project"} \
  --worker=all --command="$on_host"
