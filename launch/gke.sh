#!/usr/bin/env bash
# A training run on GKE's TPU slices: fills in launch/gke_jobset.yaml, applies it, follows its logs, deletes it.
# launch/gke.sh --help lists the commands; launch/README.md walks through them.
set -euo pipefail
program=launch/gke.sh
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=common.sh
. "$here/common.sh"

usage() {
  cat <<'TEXT'
usage: launch/gke.sh COMMAND --name=NAME [options] [-- STAGE --config=... --workdir=/work/...]

apply     start `dnd STAGE ... --multihost` on every host; the arguments follow after --
status    the JobSet: how far, restarts
logs      follow the logs of all hosts
delete    stop the run (SIGTERM: it saves) and remove it; apply with the same arguments goes on

--name          of the JobSet
--namespace     default: kubectl's
--image         apply: container image, built from launch/Dockerfile
--accelerator   apply: tpu-v4-podslice, tpu-v5-lite-podslice, tpu-v5p-slice, tpu-v6e-slice, ...
--topology      apply: of one slice, as of its node pool: 4x4, 2x2x4, ...
--chips         apply: TPU chips of one host (default 4, or all of a smaller slice)
--slices        apply: how many slices, one node pool each (default 1)
--spot          apply: on Spot node pools
--claim         apply: PersistentVolumeClaim mounted at /work; one host alone may go without, on a folder that is lost with it
--restarts      apply: how often to start again after a lost host or a preemption (default 100)
--dry-run       print the commands, run none
TEXT
}

[ $# -gt 0 ] || { usage >&2 && exit 2; }
command=$1
case $command in
  -h | --help | help) usage && exit 0 ;;
  apply | status | logs | delete) shift ;;
  *) fail "no command '$command'; see $program --help" ;;
esac
jobset='' namespace='' image='' accelerator='' topology='' chips='' slices=1 spot='' claim='' restarts=100
while [ $# -gt 0 ]; do
  case $1 in
    --name=*) jobset=${1#*=} ;;
    --namespace=*) namespace=${1#*=} ;;
    --image=*) image=${1#*=} ;;
    --accelerator=*) accelerator=${1#*=} ;;
    --topology=*) topology=${1#*=} ;;
    --chips=*) chips=${1#*=} ;;
    --slices=*) slices=${1#*=} ;;
    --spot) spot=1 ;;
    --claim=*) claim=${1#*=} ;;
    --restarts=*) restarts=${1#*=} ;;
    --dry-run) dry=1 ;;
    -h | --help) usage && exit 0 ;;
    --) break ;;
    *) fail "unexpected argument '$1'; see $program --help" ;;
  esac
  shift
done
[ $# = 0 ] || shift # the --
need --name "$jobset"
name --name "$jobset" 40 # the pods' names add -slice-I-J-XXXXX and must fit in 63
kubectl=(kubectl)
[ -z "$namespace" ] || kubectl+=("--namespace=$namespace")
[ "$dry" = 1 ] || command -v kubectl >/dev/null || fail "kubectl is not on PATH; install it, or look with --dry-run"

# Words -> a YAML (JSON) list of strings.
yaml_list() {
  local word list=''
  for word in "$@"; do
    case $word in *[[:cntrl:]]*) fail "an argument of dnd has a control character in it: $(printf %q "$word")" ;; esac
    word=${word//\\/\\\\}
    word=${word//\"/\\\"}
    list="$list${list:+, }\"$word\""
  done
  printf '[%s]' "$list"
}

fill() { # YAML list of dnd's arguments: sets `text` to the manifest
  local volume=emptyDir source='{}' spot_line='' total=1 size
  for size in ${topology//x/ }; do total=$((total * size)); done
  [ -n "$chips" ] || chips=$((total < 4 ? total : 4))
  number --chips "$chips"
  [ $((total % chips)) = 0 ] || fail "--topology=$topology has $total chips: no multiple of $chips chips a host; give --chips=..."
  [ -n "$claim" ] || [ $((slices * total / chips)) = 1 ] ||
    fail "--claim=... is needed: the $((slices * total / chips)) hosts must see one folder (a PersistentVolumeClaim that many pods may mount)"
  [ -z "$claim" ] || volume=persistentVolumeClaim source="{claimName: $claim}"
  [ -z "$spot" ] || spot_line=$'\n                cloud.google.com/gke-spot: "true"'
  text=$(<"$here/gke_jobset.yaml")
  put NAME "$jobset"
  put RESTARTS "$restarts"
  put SLICES "$slices"
  put HOSTS "$((total / chips))"
  put ACCELERATOR "$accelerator"
  put TOPOLOGY "$topology"
  put SPOT "$spot_line"
  put IMAGE "$image"
  put CHIPS "$chips"
  put VOLUME "$volume"
  put SOURCE "$source"
  put ARGUMENTS "$1" # last: what the user wrote there stays as it is
}

put() { # word value: fills in one ${WORD} of the manifest
  text=${text//"\${$1}"/"$2"}
}

apply() {
  need --image "$image"
  need --accelerator "$accelerator"
  need --topology "$topology"
  [ $# -gt 0 ] || fail "apply: the arguments of dnd are missing; give them after --, such as: -- train --config=... --workdir=/work/run"
  stage "$1"
  [[ $image =~ ^[A-Za-z0-9._:/@-]+$ ]] || fail "--image=$image: not an image's name"
  [[ $accelerator =~ ^tpu[-a-z0-9]+$ ]] || fail "--accelerator=$accelerator: expected a GKE label such as tpu-v5p-slice"
  [[ $topology =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]] || fail "--topology=$topology: expected such as 4x4 or 2x2x4"
  [ -z "$claim" ] || name --claim "$claim" 63
  number --slices "$slices"
  number --restarts "$restarts"
  local arguments text
  arguments=$(yaml_list "$@" --multihost)
  fill "$arguments"
  if [ "$dry" = 1 ]; then
    printf '%s <<'\''EOF'\''\n%s\nEOF\n' "$(quote "${kubectl[@]}" apply --filename=-)" "$text"
  else
    "${kubectl[@]}" apply --filename=- <<<"$text"
  fi
}

[ "$command" = apply ] || [ $# = 0 ] || fail "$command takes no arguments after --"
case $command in
  apply) apply "$@" ;;
  status) run "${kubectl[@]}" get jobset "$jobset" --output=wide ;;
  logs)
    run "${kubectl[@]}" logs "--selector=jobset.sigs.k8s.io/jobset-name=$jobset" --follow --prefix --tail=100 --max-log-requests=1024
    ;;
  delete) run "${kubectl[@]}" delete jobset "$jobset" ;;
esac
