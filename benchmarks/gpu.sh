#!/usr/bin/env bash
# On a machine with a GPU: proves every kernel, looks for faults and races, and times what there is to time, beside the others on the
# same card. From a checkout that is built with its tests, or in the folder that launch/bundle.sh's file was unpacked into:
#   benchmarks/gpu.sh [--list] [--only STAGE]... [--within SECONDS] [--force] [--results FOLDER] [--dry-run]
# A stage writes FOLDER/STAGE.json (benchmarks/results/gpu) when it ends; one that has passed, with the same programs on the same card, is not run
# again but with --force. --list: the stages and how they stand. --within: all ends by then, for a machine that is lent for a time;
# the next run goes on. --dry-run: tiny shapes on the CPU, which show that everything runs and
# nothing else; they are kept nowhere else than in FOLDER, if one is given. Whole steps need python3 (or TRIREME_PYTHON) with torch,
# transformers and peft for the other side. Exit status: 1 where a stage failed or was not begun, 2 where it cannot begin.
set -euo pipefail
top=$(cd "$(dirname "$0")/.." && pwd)
if [ -x "$top/bin/trireme" ]; then bin=$top/bin; else bin=${TRIREME_BUILD:-$top/build/release}; fi
python=${TRIREME_PYTHON:-python3}
usage() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$top/benchmarks/gpu.sh"; }
die() { echo "gpu: $1" >&2; exit 2; }

# Name, seconds that it may take, programs that its result depends on; what takes longest comes last.
stages="
kernels              290 device_kernels_test
attention_exact      120 attention_torch_test
attention_128        240 bench_gpu_kernels
attention_64         240 bench_gpu_kernels
attention_packed      60 bench_gpu_kernels
decode_attention      60 bench_gpu_kernels
memory               120 bench_gpu_kernels
linear_cross_entropy  60 bench_gpu_kernels
paged_state          120 bench_gpu_kernels
step_lora            420 trireme
step_lora_recompute  420 trireme
step_lora_fp8        420 trireme
step_qlora           420 trireme
step_qlora_smallest  420 trireme
step_full            420 trireme
decode               420 trireme
attention_sm80       480 bench_gpu_kernels
memcheck             540 device_kernels_test
racecheck            540 device_kernels_test
synccheck            300 device_kernels_test"

only="" force="" list="" dry="" results="" within=""
inside=""
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) usage; exit 0 ;;
    --list) list=yes ;;
    --force) force=yes ;;
    --dry-run) dry=--dry-run ;;
    --only | --results | --within | --inside)
      [ $# -gt 1 ] || { echo "gpu: $1 wants a value" >&2; exit 2; }
      case $1 in --only) only="$only $2" ;; --results) results=$2 ;; --within) within=$2 ;; --inside) inside=$2 ;; esac
      shift ;;
    *) echo "gpu: unknown argument '$1'" >&2; usage >&2; exit 2 ;;
  esac
  shift
done
[[ $within =~ ^[0-9]*$ ]] || die "--within wants seconds, not '$within'"
for name in $only; do grep -q "^$name " <<<"$stages" || die "no stage '$name'; there are $(awk 'NF {printf "%s ", $1}' <<<"$stages")"; done

quoted() { printf '"%s"' "$(tr -d '\000-\037' <<<"$1" | sed 's/[\\"]/\\&/g')"; }
row() { # WHAT SHAPE UNIT TRIREME BASELINE NAME TARGET; empty: none
  local ratio=null
  [ -z "$5" ] || ratio=$(awk -v a="$4" -v b="$5" 'BEGIN {printf "%.6g", b ? a / b : 0}')
  printf '{"what": %s, "shape": %s, "unit": "%s", "trireme": %s, "baseline": %s, "baseline_name": %s, "ratio": %s, "target": %s}\n' \
    "$(quoted "$1")" "$(quoted "$2")" "$3" "$4" "${5:-null}" "$(quoted "$6")" "$ratio" "${7:-null}" >>"$work/rows"
}

# Every suite of a gtest program in a process of its own, started by the words before it: a fault ends the device's context. The test
# NEEDED must have run (in a dry run it may be skipped), and every log hold what PROOF matches: no test is passed that did not run.
suites() { # PROGRAM FILTER NEEDED PROOF WORDS...
  local program=$1 filter=$2 needed=$3 proof=$4 suite log passed failed status bad=0
  shift 4
  for suite in $("$bin/$program" --gtest_list_tests --gtest_filter="$filter" | sed -n 's/^\([^ ].*\)\.$/\1/p;s/^\([^ ].*\)\.  #.*/\1/p' | sort -u); do
    log=$work/log.$(tr / _ <<<"$suite") status=0
    "$@" "$bin/$program" --gtest_filter="$suite.*${filter#"${filter%%-*}"}" >"$log" 2>&1 || status=$?
    passed=$(grep -c '^\[       OK \]' "$log" || true) failed=$(grep -c '^\[  FAILED  \] .* ms)$' "$log" || true)
    grep -qE "$proof" "$log" || status=1
    [ "$status" = 0 ] || [ "$failed" != 0 ] || failed=1
    [ $((passed + failed)) = 0 ] || row "$suite" "$program" tests "$passed" $((passed + failed)) "tests" 1
    [ "$status" = 0 ] || { bad=1; { grep -E '^\[  FAILED|Failure|========= |rror' "$log" || tail -3 "$log"; } | head -15 >&2; }
  done
  grep -qsE "^\[ ($([ -z "$dry" ] || echo ' SKIPPED|')      OK) \] $needed " "$work"/log.* ||
    { bad=1 && echo "$needed of $program did not run$(sed -n 's/.*\(no CUDA device\)/: \1/p' "$work"/log.* 2>/dev/null | head -1)" >&2; }
  return $bad
}
sanitizer() { # TOOL
  # Many tensors and large ones say nothing more about faults and take minutes under a sanitizer.
  local filter='*-*MoreTensors*:*AnyNumberOf*:*KeepsTheMean*:*AnyLength*:*TwoToThe31*'
  if [ -n "$dry" ]; then suites device_kernels_test Device.\* Device.RunsTheTests . env; return; fi
  PATH=$PATH:/usr/local/cuda/bin
  command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is missing; it comes with the CUDA toolkit" >&2; return 1; }
  # Nothing behind the buffers: memcheck knows where an allocation ends.
  TRIREME_NO_GUARDS=1 suites device_kernels_test "$filter" Device.RunsTheTests '^========= (ERROR|RACECHECK) SUMMARY: 0 ' compute-sanitizer --tool "$1" --error-exitcode 99 --target-processes all
}

# Both sides of whole steps: tokens a second and peak memory, of steps after the first three.
step() { # NAME CONFIG ROWS LENGTH lora|full RECOMPUTE GFLOP_A_TOKEN TARGET TARGET_RATIO ACCUMULATION [BASE [MOST_MB [KEY=VALUE...]]]
  local name=$1 config=$top/benchmarks/$2 rows=$3 length=$4 kind=$5 recompute=$6 accumulation=${10} base=${11:-none} most=${12:-} steps=10 keys=() what run=$work/run shape key
  [ -z "$dry" ] || [ "$base" != fp8 ] || base=none # the CPU has no such products
  what=$([ "$kind" = lora ] && echo "LoRA rank 16" || echo "full fine-tuning")$([ "$base" = none ] || echo ", base in $base")
  [ -z "$dry" ] || { name=tiny config=$top/benchmarks/gpu_tiny.json rows=2 length=64 steps=5; }
  shape="$name, $rows x $length$([ "$accumulation" = 1 ] || echo ", $accumulation times a step"), bf16$([ $# -gt 12 ] || echo " with gradients, master and moments in fp32"), recomputation $recompute"
  for key in "${@:13}"; do keys+=("--$key") shape="$shape, $key"; done
  for _ in $(seq $((steps * accumulation * rows * length / 20000 + 2))); do cat "$top/configs/quickstart/train.jsonl"; done >"$work/text.txt"
  [ "$kind" != lora ] || keys+=(--lora.rank=16 --lora.alpha=16)
  [ "$base" = none ] || keys+=(--quant.base="$base")
  "$bin/trireme" train --model.config="$config" --model.tokenizer="$top/configs/quickstart/model" --task.kind=pretrain --data.train="$work/text.txt" \
    --data.max_length="$length" --data.cache="$work/cache" --train.dtype=bfloat16 --train.micro_batch_size="$rows" --train.accumulation="$accumulation" --train.recompute="$recompute" \
    --train.steps=$((steps + 100)) --checkpoint.async=false --schedule.kind=constant --optim.lr=1e-4 --log.every=1 --run.device=$([ -n "$dry" ] && echo cpu || echo cuda) --run.dir="$run" ${keys+"${keys[@]}"} >"$work/log.trireme" 2>&1 &
  local job=$!
  until [ "$(grep -c '"split":"train"' "$run/metrics.jsonl" 2>/dev/null)" -ge $steps ] 2>/dev/null; do
    kill -0 $job 2>/dev/null || break
    sleep 0.3
  done
  kill -KILL $job 2>/dev/null || true # before it writes a model that nobody wants
  wait $job 2>/dev/null || true
  [ "$(grep -c '"split":"train"' "$run/metrics.jsonl" 2>/dev/null)" -ge $steps ] 2>/dev/null || { tail -3 "$work/log.trireme" >&2; return 1; }
  field() { sed -n "/\"split\":\"train\"/s/.*\"$1\":\([0-9.e+]*\).*/\1/p" "$run/metrics.jsonl" | sed -n "4,${steps}p" | sort -g | awk '{v[NR] = $1} END {print v[int((NR + 1) / 2)]}'; }
  local speed memory other reached sheet
  speed=$(field tokens_per_second) memory=$(awk -v b="$(field memory_bytes)" 'BEGIN {printf "%.0f", b / 1e6}')
  row "training step, $what" "$shape" tokens/s "$speed" "" "" "$8"
  row "peak memory of the step, $what" "$shape" MB "$memory" "" "" "$most"
  rm -rf --one-file-system "$run"
  other=$("$python" "$top/benchmarks/gpu_step.py" "$config" "$kind" "$rows" "$length" $((steps < 8 ? steps : 8)) "$recompute" "$accumulation" $dry 2>"$work/log.python") ||
    { tail -3 "$work/log.python" >&2; return 1; }
  of() { sed -n "s/^$1 //p" <<<"$other"; }
  row "training step, $what" "$shape" tokens/s "$speed" "$(of tokens_per_second)" "$(of name)" "$9"
  row "peak memory of the step, $what" "$shape" MB "$memory" "$(of peak_mb)" "$(of name)" ""
  reached=$(awk -v s="$speed" -v g="$7" 'BEGIN {printf "%.4g", s * g / 1000}')
  row "share of the card's matrix products, $what" "$shape" TFLOP/s "$reached" "$(of matrix_tflops)" "torch, 8192^3 of random bf16" ""
  case $GPU_CARD in # dense bf16, of the data sheets
    *"H200 NVL"* | *"H100 NVL"*) sheet=835 ;;
    *"H100 PCIe"*) sheet=756 ;;
    *H100* | *H200*) sheet=989 ;;
    *A100*) sheet=312 ;;
    *) return 0 ;;
  esac
  row "share of the card's matrix peak, $what" "$shape" TFLOP/s "$reached" "$sheet" "data sheet" ""
}

# Both sides of an answer: the likeliest tokens, one after another.
decode() { # NAME CONFIG TOKENS
  local name=$1 config=$top/benchmarks/$2 tokens=$3 found
  [ -z "$dry" ] || { name=tiny config=$top/benchmarks/gpu_tiny.json tokens=40; }
  found=$("$python" "$top/benchmarks/gpu_decode.py" "$bin/trireme" "$config" "$top/configs/quickstart/model" "Why do ranks row?" "$tokens" $dry 2>"$work/log.python") ||
    { tail -3 "$work/log.python" >&2; return 1; }
  of() { sed -n "s/^$1 //p" <<<"$found"; }
  row "decoding, one answer" "$name, $tokens tokens after $(of prompt), bf16" tokens/s "$(of trireme_tokens_per_second)" "$(of tokens_per_second)" "$(of name)" ""
}

run_stage() {
  case $1 in
    kernels) suites device_kernels_test "$([ -n "$dry" ] && echo Device.\* || echo \*)" Device.RunsTheTests . env ;;
    attention_exact) suites attention_torch_test '*-*InTheEmulation' AttentionBesideTorch.IsAsExactOnADevice . env ;;
    memcheck | racecheck | synccheck) sanitizer "$1" ;;
    step_lora) step "Llama 3 8B" gpu_llama_8b.json 2 2048 lora none 32.1 14000 2 1 ;;
    step_lora_recompute) step "Llama 3 8B" gpu_llama_8b.json 2 2048 lora full 46.6 11500 2 1 ;;
    step_lora_fp8) step "Llama 3 8B" gpu_llama_8b.json 2 2048 lora none 32.1 "" "" 1 fp8 ;;
    # At most 8.0 GiB, and 6.5 GiB with the keys that save memory.
    step_qlora) step "Llama 3 8B" gpu_llama_8b.json 2 2048 lora full 46.6 "" "" 1 nf4 8590 ;;
    step_qlora_smallest) step "Llama 3 8B" gpu_llama_8b.json 2 2048 lora full 46.6 "" "" 1 nf4 6979 \
      model.embedding=host train.mlp_tokens=1024 optim.kind=adamw8bit optim.masters=false ;;
    # Sixteen bytes a weight leave room for rows one by one.
    step_full) step "Qwen2.5 7B" gpu_qwen2_7b.json 1 1024 full none 43.3 14000 "" 8 ;;
    decode) decode "Llama 3 8B" gpu_llama_8b.json 512 ;;
    *) "$bin/bench_gpu_kernels" "$1" $dry "$top/benchmarks/gpu_gsm8k_lengths.txt" >>"$work/rows" 2>"$work/log.bench" || { tail -3 "$work/log.bench" >&2; return 1; } ;;
  esac
}
if [ -n "$inside" ]; then # a stage in a process of its own, which can be ended
  work=$GPU_WORK
  run_stage "$inside"
  exit
fi

keeps=yes
if [ -n "$dry" ] && [ -z "$results" ]; then keeps=""; fi
results=${results:-$top/benchmarks/results/gpu}
field_of() { nvidia-smi --query-gpu="$1" --format=csv,noheader 2>/dev/null | head -1; }
card=$(field_of name || true)
[ -n "$card$dry$list" ] || die "nvidia-smi shows no GPU here; --dry-run shows on the CPU that everything runs"
[ -x "$bin/trireme" ] || die "$bin/trireme is not there; build it with its tests (launch/setup.sh --tests), or unpack launch/bundle.sh's file"
if [ -n "$keeps" ] && [ -z "$list" ]; then # else hours would be found lost at their end
  mkdir -p "$results" 2>/dev/null && [ -w "$results" ] || die "no file can be written in $results; name another folder with --results"
fi
if [ -z "${TRIREME_TORCH:-}" ]; then # where the programs find libtorch (in a bundle) and cuBLASLt
  TRIREME_TORCH=$(ldd "$bin/trireme" 2>/dev/null | sed -n 's|.* => \(/.*\)/lib/libtorch_cpu.so .*|\1|p' || true)
  [ -n "$TRIREME_TORCH" ] || TRIREME_TORCH=$("$python" -c 'import importlib.util; print(importlib.util.find_spec("torch").submodule_search_locations[0])' 2>/dev/null || true)
fi
program_of() { if [ -e "$top/programs/$1" ]; then echo "$top/programs/$1"; else echo "$bin/$1"; fi; } # in a bundle bin/ has launchers
key_of() { { echo "$card $dry"; cat "$top/benchmarks"/gpu* "$(program_of "$1")"; } 2>/dev/null | sha256sum | cut -c1-16; }
state_of() { # NAME PROGRAM
  [ -e "$results/$1.json" ] || { echo "not done"; return; }
  local status
  status=$(sed -n 's/^ "status": "\(.*\)",$/\1/p' "$results/$1.json")
  if grep -q "\"key\": \"$(key_of "$2")\"" "$results/$1.json"; then echo "$status"
  elif [ "$status" = passed ]; then echo "done, something has changed since"
  else echo "$status, and something has changed since"; fi
}
lacks() { # NAME PROGRAM: says what the stage cannot begin without, if anything
  local modules="" missing
  [ -x "$bin/$2" ] || { echo "$bin/$2 is not there; build with the tests (launch/setup.sh --tests), and pack a bundle from such a build"; return; }
  case $1 in step_*) modules="torch transformers peft" ;; decode) modules="torch transformers" ;; esac
  [ -n "$modules" ] || return 0
  missing=$("$python" -c 'import importlib.util, sys; print(*(name for name in sys.argv[1:] if not importlib.util.find_spec(name)), sep=", ")' $modules 2>/dev/null) ||
    missing=${modules// /, }
  [ -z "$missing" ] || echo "$python lacks $missing; set TRIREME_PYTHON to a Python that has ${modules// /, }"
}

commit=$(cat "$top/COMMIT" 2>/dev/null || git -C "$top" describe --always --dirty 2>/dev/null || echo unknown)
work=$(mktemp -d "${TMPDIR:-/tmp}/gpu.XXXXXX")
trap 'rm -rf --one-file-system "$work"' EXIT
export GPU_WORK=$work GPU_CARD=$card TRIREME_TORCH
failed=0
while read -r name limit program; do
  [ -n "$name" ] || continue
  case " $only " in "  " | *" $name "*) ;; *) continue ;; esac
  state=$(state_of "$name" "$program")
  if [ -n "$list" ]; then printf '%-22s %s\n' "$name" "$state"; continue; fi
  if [ "$state" = passed ] && [ -z "$force" ]; then printf '%-22s passed before\n' "$name"; continue; fi
  why=$(lacks "$name" "$program")
  if [ -n "$why" ]; then failed=1 && printf '%-22s not begun, %s\n' "$name" "$why"; continue; fi
  if [ -n "$within" ] && [ "$limit" -gt $((within - SECONDS - 15)) ]; then limit=$((within - SECONDS - 15)); fi # it is killed 10 s after
  if [ "$limit" -lt 30 ]; then failed=1 && printf '%-22s not begun, the time is over\n' "$name"; continue; fi
  rm -rf --one-file-system "$work"/*
  : >"$work/rows"
  : >"$work/clocks"
  before=$(field_of clocks.sm,clocks.mem,temperature.gpu,power.draw || true) begin=$SECONDS status=0
  watch=""
  # Of nothing there is nothing to watch, and a shell that is ended before it has become the watcher would remove $work.
  if [ -n "$card" ]; then nvidia-smi --query-gpu=utilization.gpu,clocks.sm --format=csv,noheader,nounits --loop=1 >"$work/clocks" 2>/dev/null & watch=$!; fi
  timeout --kill-after=10 "$limit" "$0" --inside "$name" $dry >/dev/null 2>"$work/said" || status=$?
  [ -z "$watch" ] || { kill "$watch" && wait "$watch"; } 2>/dev/null || true
  busy=$(awk -F', *' '$1 > 50 {print $2}' "$work/clocks" | sort -n | awk '{v[NR] = $1} END {if (NR) printf "%d to %d MHz, median %d", v[1], v[NR], v[int((NR + 1) / 2)]}')
  case $status in 0) state=passed ;; 124 | 137) state="over its limit of $limit s" ;; *) state=failed ;; esac
  [ "$state" = passed ] || failed=1
  printf '%-22s %s, %d s, %d rows%s\n' "$name" "$state" $((SECONDS - begin)) "$(wc -l <"$work/rows")" "$([ "$state" = passed ] || sed 's/^/\n    /' "$work/said" | head -20)"
  [ -n "$keeps" ] || continue
  {
    printf '{\n "benchmark": "gpu/%s",\n "date": "%s",\n "commit": "%s",\n "key": "%s",\n "status": "%s",\n' "$name" "$(date -u +%F)" "$commit" "$(key_of "$program")" "$state"
    printf ' "hardware": {"cpu": %s, "cores": %d, "memory_gb": %d, "gpu": %s, "driver": %s, "clocks_before": %s, "clocks_busy": %s, "clocks_after": %s, "clocks_max": %s},\n' \
      "$(quoted "$(sed -n 's/^model name\t*: //p' /proc/cpuinfo | head -1)")" "$(nproc)" "$(awk '/MemTotal/ {print int($2 / 1e6)}' /proc/meminfo)" "$(quoted "${card:-none}")" \
      "$(quoted "$(field_of driver_version || true)")" "$(quoted "$before")" "$(quoted "$busy")" "$(quoted "$(field_of clocks.sm,clocks.mem,temperature.gpu,power.draw || true)")" "$(quoted "$(field_of clocks.max.sm,clocks.max.mem || true)")"
    printf ' "rows": [\n%s\n ],\n "notes": %s\n}\n' "$(sed '/^$/d; $!s/$/,/' "$work/rows")" \
      "$(quoted "$([ -z "$dry" ] || echo "A TRIAL ON THE CPU, NO RESULT. ")${card:-no GPU}; clocks: SM, memory, temperature, power; busy: SM, each second; $((SECONDS - begin)) s$([ "$state" = passed ] || printf '; %s' "$(head -3 "$work/said")")")"
  } >"$work/json"
  mv "$work/json" "$results/$name.json"
done <<<"$stages"
exit $failed
