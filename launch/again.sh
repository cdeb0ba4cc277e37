#!/usr/bin/env bash
# Starts a command again when it ends with status 3: a process of its run was lost, or its disk or network failed for a while.
# launch/README.md says where it is of use.
set -euo pipefail
program=launch/again.sh
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=common.sh
. "$here/common.sh"

usage() {
  cat <<'TEXT'
usage: launch/again.sh [--times=N] [--wait=SECONDS] [--dry-run] -- COMMAND...

Runs COMMAND, and again while it ends with status 3, on each machine of a run. Any other status is the end, 2 (bad input) above all.
SIGTERM and Ctrl-C reach COMMAND as SIGTERM, at which it saves; it is not started again then.

--times   how often at most (default 20)
--wait    seconds before the first new start (default 10); twice as long before each that follows, 300 at most
--dry-run print the command, run none
TEXT
}

times=20 pause=10
while [ $# -gt 0 ]; do
  case $1 in
    --times=*) times=${1#*=} ;;
    --wait=*) pause=${1#*=} ;;
    --dry-run) dry=1 ;;
    -h | --help) usage && exit 0 ;;
    --) break ;;
    *) fail "unexpected argument '$1'; see $program --help" ;;
  esac
  shift
done
[ $# -gt 1 ] || fail "the command is missing; give it after --, such as: -- dnd train --config=... --workdir=..."
shift # the --
number --times "$times"
number --wait "$pause"
if [ "$dry" = 1 ]; then
  run "$@"
  exit 0
fi

child='' stopped=0
forward() { # a shell's background command ignores Ctrl-C, hence SIGTERM for both
  stopped=1
  [ -z "$child" ] || kill -TERM "$child" 2>/dev/null || true
}
trap forward TERM INT

for ((start = 0; ; start++)); do
  "$@" &
  child=$!
  while :; do # a signal ends the wait before the command ends
    status=0
    wait "$child" || status=$?
    kill -0 "$child" 2>/dev/null || break
  done
  child=''
  [ "$status" = 3 ] && [ "$stopped" = 0 ] || exit "$status"
  if [ "$start" = "$times" ]; then
    echo "$program: ended with status 3 after $times new starts" >&2
    exit "$status"
  fi
  echo "$program: ended with status 3; start $((start + 1)) of $times in $pause s" >&2
  sleep "$pause" &
  wait $! || true
  [ "$stopped" = 0 ] || exit "$status"
  pause=$((pause * 2 < 300 ? pause * 2 : 300))
done
