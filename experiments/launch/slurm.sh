#!/usr/bin/env bash
set -euo pipefail
usage="On GPU nodes of a Slurm cluster, one process per node. Install first: pip install -e '.[gpu]'

  experiments/launch/slurm.sh --nodes=4 [options] -- MODULE [flags of the experiment]

  --nodes          number of nodes
  --gpus=8         of a node
  --time=24:00:00  limit; two minutes before it the run saves, ends and is queued again
  --partition=, --account=, --job=lladax   as the cluster wants them
  --dry_run        print the command only

A job that is preempted, or that lost a node, is queued again by Slurm and resumes. Let --workdir lie
on a file system that all nodes see."
options="nodes gpus time partition account job"; required="nodes"
nodes="" gpus=8 time=24:00:00 partition="" account="" job=lladax
cd "$(dirname "$0")/../.."
source experiments/launch/read_options.sh

# TERM to the processes: the run saves and ends in order (status 0); the batch script, which gets USR1
# at the same moment, has the job queued again.
script="#!/bin/bash
trap 'again=yes' USR1
srun --kill-on-bad-exit=1 $(on_every_host "${arguments[@]}") &
wait \$!
status=\$?
if [ -n \"\$again\" ]; then pkill -TERM -P \$\$; wait; scontrol requeue \$SLURM_JOB_ID; fi
exit \$status"
if [ "$dry_run" = yes ]; then echo "$script"; echo; fi
command=(sbatch --job-name="$job" --nodes="$nodes" --ntasks-per-node=1 --gpus-per-node="$gpus"
         --time="$time" --requeue --open-mode=append --signal=B:USR1@120
         ${partition:+--partition="$partition"} ${account:+--account="$account"})
if [ "$dry_run" = yes ]; then show "${command[@]}"; else "${command[@]}" <<< "$script"; fi
