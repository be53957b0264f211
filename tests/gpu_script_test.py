"""benchmarks/gpu.sh without a GPU: every stage runs on tiny shapes (--dry-run), keeps what it is told to keep and nothing else, and what
fails is seen."""
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
from program import BINARY, SOURCE

SCRIPT = SOURCE / "benchmarks/gpu.sh"
KEPT = SOURCE / "benchmarks/results/gpu"
KEYS = {"what", "shape", "unit", "trireme", "baseline", "baseline_name", "ratio", "target"}


def gpu(*arguments, **env):
    env = {"TRIREME_BUILD": str(pathlib.Path(BINARY).parent), "TRIREME_PYTHON": sys.executable} | env
    return subprocess.run([str(SCRIPT), *map(str, arguments)], text=True, capture_output=True, timeout=200, env=os.environ | env)


def rows_of(folder, stage):
    result = json.loads((folder / f"{stage}.json").read_text())
    assert result["status"] == "passed" and result["notes"].startswith("A TRIAL ON THE CPU, NO RESULT. ")
    assert all(set(row) == KEYS for row in result["rows"])
    return result["rows"]


def before():
    return {path: path.read_bytes() for path in KEPT.glob("*")}


def test_every_benchmark_of_kernels_runs(tmp_path):
    kept = before()
    stages = ["kernels", "attention_exact", "attention_64", "attention_packed", "decode_attention", "memory", "linear_cross_entropy", "paged_state", "attention_sm80", "memcheck"]
    words = [word for stage in stages for word in ("--only", stage)] + ["--dry-run", "--results", tmp_path]
    done = gpu(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [[stage, "passed,"] for stage in stages]
    attention = rows_of(tmp_path, "attention_64")
    assert {row["what"] for row in attention} == {f"attention, head dim 64, {mask}, {way}" for mask in ("causal", "full")
                                                  for way in ("forward", "backward", "backward, deterministic")}
    assert {row["what"] for row in rows_of(tmp_path, "attention_sm80")} == {f"attention of sm_80, head dim {dim}, {mask}, {way}" for dim in (128, 64)
                                                                            for mask in ("causal", "full") for way in ("forward", "backward", "backward, deterministic")}
    assert all(row["trireme"] > 0 and (row["baseline"] is None or row["ratio"] == pytest.approx(row["trireme"] / row["baseline"])) for row in attention)
    judged = {row["what"]: row["target"] for row in rows_of(tmp_path, "memory") if row["target"]}
    for what in ("RMSNorm", "SwiGLU", "rotary"):
        assert (judged[f"{what}, forward"], judged[f"{what}, backward"]) == (0.85, 0.8)
    assert judged["NF4, dequantize"] == judged["NF4 with scales in 8 bits, dequantize"] == 0.85
    assert judged["AdamW, bf16 without master"] == judged["AdamW in 8 bits, bf16 without master"] == 0.85
    assert judged["AdamW, bf16 with master"] == judged["cast, fp32 to bf16"] == judged["cross-entropy, loss alone"] == 0.85
    decoding = rows_of(tmp_path, "decode_attention")
    assert [row["baseline_name"] for row in decoding] == ["copy of the card", "torch's attention"] * 3 and all(row["ratio"] > 0 for row in decoding)
    assert [row["target"] for row in rows_of(tmp_path, "linear_cross_entropy")] == [18.5, None, 13.0, None]
    again = gpu(*words)
    assert [line.split(maxsplit=1)[1] for line in again.stdout.splitlines()] == ["passed before"] * len(stages)
    assert "memory                 passed, " in gpu("--only", "memory", "--force", "--dry-run", "--results", tmp_path).stdout
    table = subprocess.run([sys.executable, SOURCE / "benchmarks/table.py", tmp_path], text=True, capture_output=True)
    assert "copy of the card" in table.stdout, table.stderr
    assert before() == kept


def test_a_whole_step_runs_on_both_sides(tmp_path):
    kept = before()
    done = gpu("--only", "step_lora_recompute", "--dry-run", "--results", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = rows_of(tmp_path, "step_lora_recompute")
    assert [row["unit"] for row in rows] == ["tokens/s", "MB", "tokens/s", "MB", "TFLOP/s"]
    assert rows[0]["trireme"] == rows[2]["trireme"] > 0 and rows[1]["trireme"] > 0 and rows[2]["baseline"] > 0
    assert "PEFT" in rows[2]["baseline_name"] and "all bf16" in rows[2]["baseline_name"]
    assert "2 x 64, bf16 with gradients, master and moments in fp32" in rows[0]["shape"]
    assert (rows[0]["target"], rows[2]["target"]) == (11500, 2)
    assert before() == kept


def test_an_answer_is_decoded_on_both_sides(tmp_path):
    done = gpu("--only", "decode", "--dry-run", "--results", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    row, = rows_of(tmp_path, "decode")
    assert row["unit"] == "tokens/s" and row["trireme"] > 0 and row["baseline"] > 0 and "cache" in row["baseline_name"]
    assert re.match(r"tiny, 40 tokens after \d+, bf16$", row["shape"])


def program(folder, name, text):
    (folder / name).write_text("#!/bin/sh\n" + text)
    (folder / name).chmod(0o755)


def test_a_test_that_is_skipped_or_not_watched_has_not_passed(tmp_path):
    program(tmp_path, "trireme", "exit 0\n")
    program(tmp_path, "nvidia-smi", "echo A card\n")
    # A driver that is too old: no device is seen.
    program(tmp_path, "device_kernels_test", """case "$*" in *list*) printf 'Device.\\n  RunsTheTests\\n'; exit ;; esac
echo 'device_kernels.cpp:1: Skipped'; echo 'no CUDA device: so'; echo '[  SKIPPED ] Device.RunsTheTests (0 ms)'\n""")
    results = tmp_path / "results"

    def fails(stage, *words):
        done = gpu("--only", stage, "--results", results, *words, TRIREME_BUILD=str(tmp_path), GPU_SAID=str(tmp_path / "said"), PATH=f"{tmp_path}:{os.environ['PATH']}")
        assert done.returncode == 1 and f"{stage} ".ljust(22) + " failed, " in done.stdout, done.stdout + done.stderr
        assert json.loads((results / f"{stage}.json").read_text())["status"] == "failed"
        return done.stdout

    assert "Device.RunsTheTests of device_kernels_test did not run: no CUDA device" in fails("kernels")
    # A tool that sees nothing of what it starts.
    program(tmp_path, "device_kernels_test", """case "$*" in *list*) printf 'Device.\\n  RunsTheTests\\n'; exit ;; esac
echo "$@" >>"$GPU_SAID"; echo '[       OK ] Device.RunsTheTests (0 ms)'\n""")
    program(tmp_path, "compute-sanitizer", 'while [ "${1#--}" != "$1" ]; do shift; [ -x "$1" ] || shift; done; "$@"\n')
    assert "[       OK ] Device.RunsTheTests" in fails("memcheck")
    program(tmp_path, "compute-sanitizer", 'while [ "${1#--}" != "$1" ]; do shift; [ -x "$1" ] || shift; done; "$@"; echo "========= ERROR SUMMARY: 0 errors"\n')
    done = gpu("--only", "memcheck", "--results", results, TRIREME_BUILD=str(tmp_path), GPU_SAID=str(tmp_path / "said"), PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == 0 and "memcheck               passed, " in done.stdout, done.stdout + done.stderr
    gpu("--only", "kernels", "--dry-run", TRIREME_BUILD=str(tmp_path), GPU_SAID=str(tmp_path / "said"))
    filters = (tmp_path / "said").read_text().split()
    assert filters[0] == filters[1] and filters[0].startswith("--gtest_filter=Device.*-*MoreTensors*:") and filters[2:] == ["--gtest_filter=Device.*"]
    program(tmp_path, "bench_gpu_kernels", """echo '{"what": "one"}'; echo broken >&2; exit 1\n""")
    fails("memory")
    assert json.loads((results / "memory.json").read_text())["rows"] == [{"what": "one"}]  # what was known before


def test_what_fails_is_told_and_is_run_again(tmp_path):
    program(tmp_path, "trireme", "exit 0\n")
    program(tmp_path, "device_kernels_test", """case "$*" in *list*) printf 'Device.\\n  RunsTheTests\\n  Breaks\\n'; exit ;; esac
echo '[       OK ] Device.RunsTheTests (0 ms)'; echo 'x.cpp:1: Failure'; echo '[  FAILED  ] Device.Breaks (0 ms)'; exit 1\n""")
    words = ["--only", "kernels", "--dry-run", "--results", tmp_path / "results"]
    done = gpu(*words, TRIREME_BUILD=str(tmp_path))
    assert done.returncode == 1
    assert "kernels                failed, " in done.stdout and "x.cpp:1: Failure" in done.stdout
    result = json.loads((tmp_path / "results/kernels.json").read_text())
    assert result["status"] == "failed"
    assert [(row["what"], row["trireme"], row["baseline"]) for row in result["rows"]] == [("Device", 1, 2)]
    assert gpu("--list", *words[2:], TRIREME_BUILD=str(tmp_path)).stdout.splitlines()[0].split() == ["kernels", "failed"]
    program(tmp_path, "device_kernels_test", "kill -SEGV $$\n")
    assert gpu("--list", *words[2:], TRIREME_BUILD=str(tmp_path)).stdout.splitlines()[0] == "kernels                failed, and something has changed since"
    kept = tmp_path / "results/kernels.json"
    kept.write_text(kept.read_text().replace('"status": "failed"', '"status": "passed"'))
    assert gpu("--list", *words[2:], TRIREME_BUILD=str(tmp_path)).stdout.splitlines()[0] == "kernels                done, something has changed since"
    program(tmp_path, "timeout", "exit 124\n")  # as if the time were over
    done = gpu(*words, TRIREME_BUILD=str(tmp_path), PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == 1
    assert "kernels                over its limit of 290 s, " in done.stdout
    done = gpu(*words, "--within", 100, TRIREME_BUILD=str(tmp_path), PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert "kernels                over its limit of 85 s, " in done.stdout or "over its limit of 84 s, " in done.stdout
    done = gpu(*words, "--within", 40, TRIREME_BUILD=str(tmp_path))
    assert (done.returncode, done.stdout) == (1, "kernels                not begun, the time is over\n")


def test_what_a_stage_lacks_is_told_before_it_begins(tmp_path):
    program(tmp_path, "trireme", "touch $0.ran\n")
    program(tmp_path, "python", "echo peft\n")
    words = ["--only", "kernels", "--only", "memory", "--only", "step_lora", "--dry-run", "--results", tmp_path / "results"]
    done = gpu(*words, TRIREME_BUILD=str(tmp_path), TRIREME_PYTHON=f"{tmp_path}/python")
    end = "build with the tests (launch/setup.sh --tests), and pack a bundle from such a build"
    assert done.stdout.splitlines() == [
        f"kernels                not begun, {tmp_path}/device_kernels_test is not there; {end}", f"memory                 not begun, {tmp_path}/bench_gpu_kernels is not there; {end}",
        f"step_lora              not begun, {tmp_path}/python lacks peft; set TRIREME_PYTHON to a Python that has torch, transformers, peft"], done.stdout + done.stderr
    assert done.returncode == 1 and not list((tmp_path / "results").iterdir())
    done = gpu("--only", "decode", "--dry-run", TRIREME_BUILD=str(tmp_path), TRIREME_PYTHON="no-python")
    assert done.stdout == "decode                 not begun, no-python lacks torch, transformers; set TRIREME_PYTHON to a Python that has torch, transformers\n"
    done = gpu("--only", "decode", "--dry-run", "--results", tmp_path / "trireme/results", TRIREME_BUILD=str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"gpu: no file can be written in {tmp_path}/trireme/results; name another folder with --results\n"
    assert not (tmp_path / "trireme.ran").exists()


def test_says_what_is_wrong(tmp_path):
    assert gpu("--only", "speed", "--dry-run").stderr.startswith("gpu: no stage 'speed'; there are kernels ")
    assert gpu("--within", "soon").stderr == "gpu: --within wants seconds, not 'soon'\n"
    assert gpu("--fast").stderr.startswith("gpu: unknown argument '--fast'\n")
    assert gpu("--dry-run", TRIREME_BUILD=str(tmp_path)).stderr.startswith(f"gpu: {tmp_path}/trireme is not there; build it with its tests")
    program(tmp_path, "nvidia-smi", "exit 9\n")
    done = gpu("--only", "kernels", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert (done.returncode, done.stderr) == (2, "gpu: nvidia-smi shows no GPU here; --dry-run shows on the CPU that everything runs\n")
