#!/usr/bin/env bash
# The part of launch/tpu_vm.sh that runs on a TPU worker; it arrives with the code.
# Beside the code: dnd.sh is the command, dnd.pid its process and when that began, dnd.log what it prints. A TPU serves one process at a time.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# When a process began: another one may have its number, after a restart of the machine above all.
begun() { # PID
  printf '%s-%s' "$(cat /proc/sys/kernel/random/boot_id)" "$(sed 's/.*) //' "/proc/$1/stat" | cut -d ' ' -f 20)"
}

running() { # sets pid
  local since=''
  pid=''
  [ -f dnd.pid ] || return 1
  read -r pid since <dnd.pid || true
  kill -0 "$pid" 2>/dev/null && [ "$(begun "$pid" 2>/dev/null)" = "$since" ]
}

start() {
  nohup bash dnd.sh >>dnd.log 2>&1 </dev/null &
  echo "$! $(begun $!)" >dnd.pid
  echo "$(hostname): started $(tail -n 1 dnd.sh)"
}

stop() {
  if running; then
    kill -TERM "$pid" || true # it may end just now
    while running; do sleep 1; done
    echo "$(hostname): $(tail -n 1 dnd.log)"
  fi
  rm -f dnd.pid
}

case ${1:-} in
  install) # the runtime images bring Python 3.10; uv brings one that we support. requirements.txt: the versions tested together
    python3 -m pip install --user --quiet uv
    python3 -m uv venv --quiet --allow-existing --python 3.12 .venv
    python3 -m uv pip install --quiet --python .venv/bin/python --constraint requirements.txt --editable '.[tpu,demo,trackers]'
    .venv/bin/dnd --help >/dev/null
    echo "$(hostname): installed"
    ;;
  run)
    shift
    if running; then
      echo "$(hostname): already running: use stop or resume" >&2
      exit 1
    fi
    printf 'exec .venv/bin/dnd%s\n' "$(printf ' %q' "$@" --multihost)" >dnd.sh
    start
    ;;
  stop) stop ;;
  resume)
    [ -f dnd.sh ] || { echo "$(hostname): nothing was run here yet: use run" >&2 && exit 1; }
    stop
    start
    ;;
  logs)
    tail -n 100 -F dnd.log | sed -u "s/^/[$(hostname)] /"
    ;;
  *)
    echo "usage: launch/on_worker.sh install | run STAGE ... | stop | resume | logs; launch/tpu_vm.sh calls it on the workers" >&2
    exit 2
    ;;
esac
