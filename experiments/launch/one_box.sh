#!/usr/bin/env bash
set -euo pipefail
usage="On this machine: its GPUs, its TPUs or its CPU.

  experiments/launch/one_box.sh [options] -- MODULE [flags of the experiment]

  --processes=1    processes that train together; one drives all devices, which is what one wants but
                   for trying out what several hosts do
  --restarts=0     how often to start again after an end that is not in order; the run resumes
  --extra=         first: pip install -e '.[EXTRA]' (gpu, tpu, or demo for a CPU)
  --port=12345     where the processes meet
  --dry_run        print the commands only

Example: experiments/launch/one_box.sh --restarts=3 -- experiments.tiny_text --workdir=runs/tiny"
options="processes restarts extra port"; required=""
processes=1 restarts=0 extra="" port=12345
cd "$(dirname "$0")/../.."
source experiments/launch/read_options.sh

[ -z "$extra" ] || run pip install -e ".[$extra]"

start() {  # all processes; fails if one of them does, after ending the others
  if [ "$processes" = 1 ]; then run python -m "$module" "${arguments[@]}"; return; fi
  local pids=() index status=0
  for ((index = 0; index < processes; index++)); do
    command=(python -m "$module" --distributed --coordinator="localhost:$port"
             --num_processes="$processes" --process_id="$index" "${arguments[@]}")
    if [ "$dry_run" = yes ]; then show "${command[@]}"; else "${command[@]}" & pids+=($!); fi
  done
  [ "$dry_run" = no ] || return 0
  trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT
  for index in "${!pids[@]}"; do
    # A process that lost another cannot go on, and notices by itself only after a while.
    wait -n || { status=$?; kill -KILL "${pids[@]}" 2>/dev/null || true; }
  done
  return $status
}

for ((attempt = 0; ; attempt++)); do
  if start; then exit 0; else status=$?; fi
  # 2: a mistake in the command; 130: Ctrl-C. Starting again would not help.
  if [ "$attempt" -ge "$restarts" ] || [ "$status" = 2 ] || [ "$status" = 130 ]; then exit "$status"; fi
  echo "ended with status $status; starting again ($((attempt + 1)) of $restarts)" >&2
done
