# Sourced by the launchers: options of the form --name=value, then -- and what to run.
#
#   defaults: shell variables with the options' names, set before this is sourced
#   options:  their names; `required`: those that must not be empty
#   usage:    printed by --help
# After it: $module and the array $arguments, `dry_run`, and `run`, which runs or only prints.

dry_run=no
fail() { echo "error: $1 (--help says more)" >&2; exit 2; }
show() { printf '%q ' "$@"; echo; }
run() { if [ "$dry_run" = yes ]; then show "$@"; else "$@"; fi; }

while [ $# -gt 0 ]; do
  case "$1" in
    --) shift; break ;;
    --help) echo "$usage"; exit 0 ;;
    --dry_run) dry_run=yes ;;
    --*=*)
      option=${1%%=*}; option=${option#--}
      case " $options " in
        *" $option "*) printf -v "$option" '%s' "${1#*=}" ;;
        *) fail "no option --$option; there are: $options dry_run" ;;
      esac ;;
    *) fail "$1: expected --name=value, or -- and a module to run" ;;
  esac
  shift
done
for option in $required; do [ -n "${!option}" ] || fail "--$option=... is missing"; done
[ $# -gt 0 ] || fail "nothing to run; for example: -- experiments.pretrain_llada_moe --workdir=runs/moe"
module=$1; shift
arguments=("$@")

# What every host runs, quoted for a shell; --distributed has the hosts find each other.
on_every_host() {
  local quoted
  quoted=$(printf ' %q' "$@")
  echo "python -m $module --distributed${quoted% }"
}
