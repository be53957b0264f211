"""A run that was stopped and resumed is the run that was never stopped, bit for bit; layouts give the same losses."""
import json
import os
import pathlib
import subprocess

import pytest

SOURCE = pathlib.Path(os.environ.get("TRIREME_SOURCE", pathlib.Path(__file__).parent.parent))
BINARY = os.environ.get("TRIREME_BINARY", str(SOURCE / "build/release/trireme"))


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("resume")


def train(work, name, *keys, ranks=1):
    launch = [] if ranks == 1 else ["mpirun", "-q", "--bind-to", "none", "--oversubscribe", "-n", str(ranks)]
    env = dict(os.environ, OMP_NUM_THREADS="1", TRIREME_CACHE=str(work / "cache"), OMPI_ALLOW_RUN_AS_ROOT="1",
               OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
    command = [BINARY, "train", "configs/quickstart.ini", f"--run.dir={work / name}", "--train.steps=8", "--eval.every=4",
               *keys]
    return subprocess.run(launch + command, cwd=SOURCE, env=env, capture_output=True, text=True, timeout=120)


def metrics(work, name):
    lines = [json.loads(line) for line in (work / name / "metrics.jsonl").read_text().splitlines()]
    return [(x["step"], x["split"], x["loss"], x.get("grad_norm"), x.get("learning_rate")) for x in lines]


LORA = ("--lora.rank=4", "--lora.dropout=0.1")


@pytest.mark.parametrize("keys", [(), LORA], ids=["full", "lora"])
def test_two_resumes_equal_an_uninterrupted_run(work, keys):
    kind = "lora" if keys else "full"
    assert train(work, f"whole-{kind}", *keys).returncode == 0
    for _ in range(2):
        assert train(work, f"cut-{kind}", "--train.stop_after=3", *keys).returncode == 75
    assert train(work, f"cut-{kind}", *keys).returncode == 0
    assert metrics(work, f"cut-{kind}") == metrics(work, f"whole-{kind}")
    product = "adapter/adapter_model.safetensors" if keys else "model/model.safetensors"
    assert (work / f"cut-{kind}" / product).read_bytes() == (work / f"whole-{kind}" / product).read_bytes()


def test_a_finished_run_says_so(work):
    assert train(work, "finished").returncode == 0
    again = train(work, "finished")
    assert again.returncode == 0
    assert "is finished (step 8)" in again.stderr


def test_a_broken_newest_checkpoint_is_named_and_the_one_before_used(work):
    keys = ("--checkpoint.every=2", "--checkpoint.keep=0", "--train.stop_after=6")
    assert train(work, "broken", *keys).returncode == 75
    shard = next((work / "broken/checkpoints/step-6").glob("shard-*.h5"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    again = train(work, "broken", "--checkpoint.every=2", "--checkpoint.keep=0")
    assert again.returncode == 0
    assert "step-6" in again.stderr and "step 4 of 8" in again.stderr
    train(work, "unbroken", "--checkpoint.every=2")
    assert metrics(work, "broken") == metrics(work, "unbroken")


def test_another_learning_rate_is_refused_by_name(work):
    assert train(work, "other", "--train.stop_after=2").returncode == 75
    again = train(work, "other", "--optim.lr=0.5")
    assert again.returncode == 2
    assert "optim.lr: 0.002 then, 0.5 now" in again.stderr


def test_layouts_give_the_same_losses(work):
    rows = {1: "--train.accumulation=4", 2: "--train.accumulation=2", 4: "--train.accumulation=1"}
    losses = {}
    for ranks, key in rows.items():
        assert train(work, f"ranks-{ranks}", key, ranks=ranks).returncode == 0
        losses[ranks] = [m[2] for m in metrics(work, f"ranks-{ranks}") if m[1] == "train"]
    for ranks in (2, 4):
        assert losses[ranks] == pytest.approx(losses[1], rel=1e-6)


def test_resumed_on_fewer_ranks_keeps_rows_and_losses(work):
    assert train(work, "four", ranks=4).returncode == 0
    assert train(work, "four-two", "--train.stop_after=4", ranks=4).returncode == 75
    again = train(work, "four-two", ranks=2)
    assert again.returncode == 0
    assert "keeps its 16 rows" in again.stderr
    a, b = ([m[2] for m in metrics(work, run) if m[1] == "train"] for run in ("four", "four-two"))
    assert b == pytest.approx(a, rel=1e-6)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputation_changes_no_bit(work, mode):
    if not (work / "plain/metrics.jsonl").exists():
        assert train(work, "plain", *LORA).returncode == 0
    assert train(work, mode, f"--train.recompute={mode}", *LORA).returncode == 0
    assert metrics(work, mode) == metrics(work, "plain")
