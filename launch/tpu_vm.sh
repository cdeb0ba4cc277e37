#!/usr/bin/env bash
# Cloud TPU VMs from one terminal: create, ship the code, run on all workers, tail the logs, resume, delete.
# launch/tpu_vm.sh --help lists the commands; launch/README.md walks through them.
set -euo pipefail
program=launch/tpu_vm.sh
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=common.sh
. "$here/common.sh"

usage() {
  cat <<'TEXT'
usage: launch/tpu_vm.sh COMMAND --name=NAME --zone=ZONE [options] [-- STAGE --config=... --workdir=...]

create    request the TPU (a queued resource) and wait until it is there: --type=v5p-32 [--slices=2] [--spot | --reserved]
ship      copy this folder to every worker and install it there
run       start `dnd STAGE ... --multihost` on every worker, in the background; the arguments follow after --
logs      follow the log of worker 0 (--worker=all for all of them)
stop      SIGTERM to every worker; returns when all have saved and ended
resume    stop what runs and start the same command again, from the newest checkpoint
status    the state of the request: WAITING_FOR_RESOURCES, ACTIVE, SUSPENDED (preempted), ...
delete    give the TPU back

--name      of the request and of its node(s)
--zone      such as us-east5-a; --project when it is not gcloud's default
--type      create: accelerator type: v4-*, v5litepod-*, v5p-*, v6e-*, or another with --runtime
--runtime   create: runtime version (default: by type)
--slices    create: slices joined over DCN (default 1)
--worker    logs: 0, 1, ... or all (default 0)
--dry-run   print the commands, run none
TEXT
}

there='bash dnd_jax/launch/on_worker.sh' # in the home folder of a worker, once `ship` has been there

on_workers() { # worker command: over ssh, on that worker (or all) of every slice at once
  run gcloud compute tpus queued-resources ssh "$resource" "${place[@]}" --node=all "--worker=$1" --batch-size=all "--command=$2"
}

default_runtime() {
  case $1 in
    v4-*) echo tpu-ubuntu2204-base ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) fail "--type=$1: no default runtime is known for it; give --runtime=... (gcloud compute tpus tpu-vm versions list)" ;;
  esac
}

state() {
  run gcloud compute tpus queued-resources describe "$resource" "${place[@]}" '--format=value(state.state)'
}

create() {
  need --type "$type"
  [ -n "$runtime" ] || runtime=$(default_runtime "$type")
  local nodes=("--node-id=$resource")
  [ "$slices" = 1 ] || nodes=("--node-count=$slices" "--node-prefix=$resource")
  run gcloud compute tpus queued-resources create "$resource" "${place[@]}" "--accelerator-type=$type" \
    "--runtime-version=$runtime" "${nodes[@]}" ${tier:+"$tier"}
  if [ "$dry" = 1 ]; then
    echo '# the next command is repeated every 30 s until it prints ACTIVE'
    state
    return
  fi
  local now
  while now=$(state) && [ "$now" != ACTIVE ]; do
    case $now in
      FAILED | SUSPENDING | SUSPENDED | DELETING) echo "$program: $resource is $now; delete it and create it again" >&2 && exit 1 ;;
    esac
    echo "$resource: $now"
    sleep 30
  done
  [ "$now" = ACTIVE ] || exit 1 # gcloud has said why
  echo "$resource: ACTIVE"
}

ship() {
  local archive="${TMPDIR:-/tmp}/$resource.dnd_jax.tar.gz"
  run tar -czf "$archive" -C "$(dirname "$here")" --exclude=./.git --exclude=./.venv --exclude=./runs --exclude=__pycache__ .
  run gcloud compute tpus queued-resources scp "$archive" "$resource:/tmp/dnd_jax.tar.gz" "${place[@]}" --node=all --worker=all --batch-size=all
  on_workers all "rm -rf dnd_jax/dnd_jax dnd_jax/configs && mkdir -p dnd_jax && tar -xzf /tmp/dnd_jax.tar.gz -C dnd_jax && $there install"
  run rm "$archive"
}

[ $# -gt 0 ] || { usage >&2 && exit 2; }
command=$1
case $command in
  -h | --help | help) usage && exit 0 ;;
  create | ship | run | logs | stop | resume | status | delete) shift ;;
  *) fail "no command '$command'; see $program --help" ;;
esac
resource='' zone='' project='' type='' runtime='' slices=1 tier='' worker=0
while [ $# -gt 0 ]; do
  case $1 in
    --name=*) resource=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --runtime=*) runtime=${1#*=} ;;
    --slices=*) slices=${1#*=} ;;
    --worker=*) worker=${1#*=} ;;
    --spot | --reserved)
      [ -z "$tier" ] || fail "$tier and $1: one of them"
      tier=$1
      ;;
    --dry-run) dry=1 ;;
    -h | --help) usage && exit 0 ;;
    --) break ;;
    *) fail "unexpected argument '$1'; see $program --help" ;;
  esac
  shift
done
[ $# = 0 ] || shift # the --
if [ "$command" = run ]; then
  [ $# -gt 0 ] || fail "run: the arguments of dnd are missing; give them after --, such as: -- train --config=... --workdir=..."
  stage "$1"
else
  [ $# = 0 ] || fail "$command takes no arguments after --"
fi
need --name "$resource"
need --zone "$zone"
name --name "$resource" 39
number --slices "$slices"
[[ $worker =~ ^(all|0|[1-9][0-9]*)$ ]] || fail "--worker=$worker: expected a number or all"
place=("--zone=$zone")
[ -z "$project" ] || place+=("--project=$project")
[ "$dry" = 1 ] || command -v gcloud >/dev/null || fail "gcloud is not on PATH; install the Google Cloud CLI, or look with --dry-run"

case $command in
  create) create ;;
  ship) ship ;;
  run) on_workers all "$there run $(quote "$@")" ;;
  logs) on_workers "$worker" "$there logs" ;;
  stop | resume) on_workers all "$there $command" ;;
  status) state ;;
  delete) run gcloud compute tpus queued-resources delete "$resource" "${place[@]}" --force ;;
esac
