#!/usr/bin/env bash
# Runs trireme on several ranks of this machine:  launch/run_local.sh -n RANKS VERB [CONFIG.ini] [--key=value ...]
# SIGTERM, SIGINT (Ctrl-C) and SIGHUP let the run finish its step and save (status 75); a second one ends it at once.
set -euo pipefail
top=$(cd "$(dirname "$0")/.." && pwd)
ranks=1
if [ "${1:-}" = -n ]; then ranks=${2:?how many ranks?}; shift 2; fi
[ $# -gt 0 ] || { sed -n 2,3p "$0"; exit 2; }
case "$ranks" in ''|*[!0-9]*|0) echo "run_local: -n wants a number of ranks, found '$ranks'" >&2; exit 2 ;; esac

binary=${TRIREME_BINARY:-$top/build/release/trireme}
[ -x "$binary" ] || { echo "run_local: $binary is not there; run launch/quickstart.sh, or launch/setup.sh and cmake --build build/release" >&2; exit 2; }
cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores / ranks > 0 ? cores / ranks : 1))}
# Under mpirun isatty is wrong both ways: who starts it knows.
if [ -t 2 ]; then live=live; else live=plain; fi
export TRIREME_PROGRESS=${TRIREME_PROGRESS:-$live}
options=(-q --bind-to none -n "$ranks")
[ "$ranks" -le "$cores" ] || options+=(--oversubscribe)
[ "$(id -u)" != 0 ] || export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1

stops=0
on_signal() {
  stops=$((stops + 1))
  if [ $stops -eq 1 ]; then
    echo "run_local: stopping after this step; once more ends at once" >&2
    kill -USR1 "$job" 2>/dev/null || true
  else
    kill -KILL "$job" 2>/dev/null || true
  fi
}
# Job control gives mpirun a process group of its own: Ctrl-C then reaches this script alone.
set -m
mpirun "${options[@]}" "$binary" "$@" <&0 &
job=$!
set +m
trap on_signal TERM INT HUP
status=0
while :; do
  wait "$job" && status=0 || status=$?
  kill -0 "$job" 2>/dev/null || break
done
exit "$status"
