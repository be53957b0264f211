#!/usr/bin/env bash
# From a fresh clone to a model that answers: sets up, builds, trains on 4 ranks, evaluates, exports, asks.
# Takes no arguments. The run goes into runs/quickstart, or runs/quickstart-2 and so on where that is there.
set -euo pipefail
cd "$(dirname "$0")/.."
usage() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' launch/quickstart.sh; }
case "${1:-}" in -h | --help) usage; exit 0 ;; esac
[ $# -eq 0 ] || { echo "quickstart: unknown argument '$1'" >&2; usage >&2; exit 2; }
stage() { printf '\n== %s\n' "$*"; }

stage "setting up (packages, libtorch; the first time takes some minutes)"
launch/setup.sh
stage "building"
cmake --build build/release -j "$(cat build/release/.jobs)" --target trireme

run=runs/quickstart
for n in $(seq 2 1000); do
  [ -e "$run" ] || break
  run=runs/quickstart-$n
done
stage "training a small Llama from random weights on 4 ranks, into $run"
launch/run_local.sh -n 4 train configs/quickstart.ini --run.dir="$run"

trireme=build/release/trireme
stage "evaluating on questions in words that it has not seen"
$trireme eval --model.path="$run/model" --data.eval=configs/quickstart/eval.jsonl --data.max_length=256

stage "asking the exported model, $run/model"
for question in "Could you say what Trireme is?" "Explain data parallelism." "How can I resume a run that stopped?"; do
  printf 'Q: %s\nA: ' "$question"
  $trireme generate --model.path="$run/model" --generate.chat=true "$question" 2>"$run/generate.log" ||
    { cat "$run/generate.log" >&2; exit 1; }
done
