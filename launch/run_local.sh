#!/usr/bin/env bash
# Runs trireme on several ranks of this machine:  launch/run_local.sh -n RANKS VERB [CONFIG.ini] [--key=value ...]
# SIGTERM, SIGINT (Ctrl-C), SIGHUP and SIGUSR1 let a training run finish its step and save (status 75); a second one ends it at
# once (status 1, or 75 where it had saved), as the first one does with every other verb (status 1).
set -euo pipefail
top=$(cd "$(dirname "$0")/.." && pwd)
usage() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; }
case "${1:-}" in -h | --help) usage; exit 0 ;; esac
ranks=1
if [ "${1:-}" = -n ]; then ranks=${2:?how many ranks?}; shift 2; fi
[ $# -gt 0 ] || { usage; exit 2; }
case "$ranks" in ''|*[!0-9]*|0) echo "run_local: -n wants a number of ranks, found '$ranks'" >&2; exit 2 ;; esac

binary=${TRIREME_BINARY:-$top/build/release/trireme}
[ -x "$binary" ] || { echo "run_local: $binary is not there; run launch/quickstart.sh, or launch/setup.sh and cmake --build build/release" >&2; exit 2; }
# Under mpirun isatty is wrong both ways: who starts it knows.
if [ -t 2 ]; then live=live; else live=plain; fi
export TRIREME_PROGRESS=${TRIREME_PROGRESS:-$live}
# More ranks than mpirun counts cores are not refused: the program sees to it that waiting ranks give their cores away.
options=(-q --bind-to none --oversubscribe -n "$ranks")
[ "$(id -u)" != 0 ] || export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1

saves="" job="" stops=0 started=$(mktemp)
export TRIREME_STATUS_FILE=$started # rank 0 writes 75 when all ranks have saved and end
for word; do [ "$word" != train ] || saves=yes; done
trap 'rm -f "$started"' EXIT
saved() { grep -qx 75 "$started"; }
on_signal() {
  stops=$((stops + 1))
  [ -n "$job" ] || exit 75 # nothing has begun
  [ $stops -gt 2 ] || ! saved || return 0 # they are ending; mpirun may crash when it is told now
  case $stops$saves in
    1yes)
      echo "run_local: stopping after this step; once more ends at once" >&2
      # Until it has begun, mpirun passes no signal on: it is told until it ends.
      while ! saved && kill -USR1 "$job"; do sleep 1; done </dev/null >/dev/null 2>&1 & ;;
    1 | 2yes) kill -TERM "$job" 2>/dev/null || true ;;
    *) kill -KILL "$job" 2>/dev/null || true ;;
  esac
}
trap on_signal TERM INT HUP
# Job control gives mpirun a process group of its own: Ctrl-C then reaches this script alone. SIGUSR1 is ignored until
# mpirun and the ranks have handlers for it: it would end them.
trap '' USR1
set -m
mpirun "${options[@]}" sh -c 'trap "" USR1; echo started >>"$0"; exec "$@"' "$started" "$binary" "$@" <&0 &
job=$!
set +m
trap on_signal USR1
# A signal ends `wait` before mpirun has ended; 127 then says that its status was given already.
status="" seen=-1
while [ $seen -ne $stops ]; do
  seen=$stops
  answer=0; wait "$job" || answer=$?
  [ $answer -eq 127 ] && [ -n "$status" ] || status=$answer
done
! saved || status=75
if [ "$status" -ne 0 ] && [ "$stops" -eq 0 ] && [ ! -s "$started" ]; then
  echo "run_local: mpirun could not start a rank (status $status); this is what it says:" >&2
  mpirun "${options[@]:1}" true >&2 || true
fi
case $status in
  0 | 1 | 2 | 3 | 75) exit "$status" ;;
  126 | 127) echo "run_local: $binary could not be started (see above); launch/setup.sh puts right what is missing" >&2 ;;
  # 128 + signal: a rank that nobody asked to end is gone; what mpirun says about it is long and no help.
  *) how="ended with status $status"
    if [ "$status" -gt 128 ] && name=$(kill -l "$status" 2>/dev/null); then how="was killed (SIG$name)"; fi
    echo "run_local: a rank $how, all ranks are ended${saves:+; run the same command again to go on from the last checkpoint}" >&2 ;;
esac
exit 1
