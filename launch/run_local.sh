#!/usr/bin/env bash
# Runs trireme on several ranks of this machine:  launch/run_local.sh -n RANKS VERB [CONFIG.ini] [--key=value ...]
# SIGTERM, SIGINT (Ctrl-C), SIGHUP and SIGUSR1 let the run finish its step and save (status 75); a second one ends it at once.
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

job="" stops=0
on_signal() {
  stops=$((stops + 1))
  [ -n "$job" ] || exit 75 # nothing has begun
  case $stops in
    1) echo "run_local: stopping after this step; once more ends at once" >&2; kill -USR1 "$job" 2>/dev/null || true ;;
    2) kill -TERM "$job" 2>/dev/null || true ;;
    *) kill -KILL "$job" 2>/dev/null || true ;;
  esac
}
trap on_signal TERM INT HUP USR1
# Job control gives mpirun a process group of its own: Ctrl-C then reaches this script alone.
set -m
mpirun "${options[@]}" "$binary" "$@" <&0 &
job=$!
set +m
# A signal ends `wait` before mpirun has ended; 127 says that its status was given already.
status=0 seen=-1
while [ $seen -ne $stops ]; do
  seen=$stops
  answer=0; wait "$job" || answer=$?
  [ $answer -eq 127 ] || status=$answer
done
exit "$status"
