"""A run that was stopped and resumed is the run that was never stopped, bit for bit; layouts give the same losses."""
import json
import shutil

import pytest

import bounds
from program import TRAIN, override, run


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("resume")


def train(work, name, *keys, ranks=1):
    return run(work, "train", "configs/quickstart.ini",
               *override((f"--run.dir={work / name}", "--train.steps=8", "--eval.every=4"), keys), ranks=ranks)


def metrics(work, name):
    lines = [json.loads(line) for line in (work / name / "metrics.jsonl").read_text().splitlines()]
    return [(x["step"], x["split"], x["loss"], x.get("grad_norm"), x.get("learning_rate"), x["epoch"]) for x in lines]


def evaluations(work, name):
    lines = [json.loads(line) for line in (work / name / "metrics.jsonl").read_text().splitlines()]
    return [{name: x[name] for name in ("loss", "perplexity", "token_accuracy", "tokens")} for x in lines if x["split"] == "eval"]


def losses(work, name):
    return [m[2] for m in metrics(work, name) if m[1] == "train"]


LORA = ("--lora.rank=4", "--lora.dropout=0.1")
# 20 records are 10 rows of 64 tokens: 3 epochs are 8 steps of 4 rows, the 3rd lies in two epochs, the 8th ends in a fourth.
PACKED = (f"--data.train={TRAIN}:20", "--data.packing=true", "--data.max_length=64", "--train.steps=0", "--train.epochs=3",
          "--eval.every=0", *LORA)


@pytest.mark.parametrize("kind, keys", [("full", ()), ("lora", LORA), ("packed", PACKED)])
def test_two_resumes_equal_an_uninterrupted_run(work, kind, keys):
    assert train(work, f"whole-{kind}", *keys).returncode == 0
    for _ in range(2):
        assert train(work, f"cut-{kind}", "--train.stop_after=3", *keys).returncode == 75
    assert train(work, f"cut-{kind}", *keys).returncode == 0
    assert metrics(work, f"cut-{kind}") == metrics(work, f"whole-{kind}")
    product = "adapter/adapter_model.safetensors" if keys else "model/model.safetensors"
    assert (work / f"cut-{kind}" / product).read_bytes() == (work / f"whole-{kind}" / product).read_bytes()
    if kind == "packed":
        assert [m[5] for m in metrics(work, "cut-packed") if m[1] == "train"] == [4 * step / 10 for step in range(8)]


def test_a_finished_run_says_so(work):
    if not (work / "whole-full").exists():
        assert train(work, "whole-full").returncode == 0
    again = train(work, "whole-full")
    assert again.returncode == 0
    assert again.stderr.endswith(f"{work}/whole-full is finished (step 8); raise train.steps to go on, or set another run.dir\n")


def test_a_finished_run_goes_on_with_more_steps(work):
    assert train(work, "short", "--train.steps=5", "--schedule.kind=constant").returncode == 0
    assert train(work, "short", "--schedule.kind=constant").returncode == 0
    assert train(work, "long", "--schedule.kind=constant").returncode == 0
    assert losses(work, "short") == losses(work, "long")
    fewer = train(work, "short", "--train.steps=6", "--schedule.kind=constant")
    assert fewer.returncode == 0
    assert "is finished (step 8); raise train.steps to go on" in fewer.stderr


def test_a_stopped_run_gets_no_shorter(work):
    assert train(work, "shorter", "--train.stop_after=1").returncode == 75
    fewer = train(work, "shorter", "--train.steps=6")
    assert fewer.returncode == 2
    assert fewer.stderr.endswith(f"error: cannot go on from {work}/shorter/checkpoints/step-1: its run has 8 steps, this one 6; train.steps and "
                                 "train.epochs may only grow\n"), fewer.stderr


def damage(work, name, step):
    shard = next((work / name / f"checkpoints/step-{step}").glob("shard-*.h5"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    return f"{shard} is damaged: its hash differs from the manifest's."


def test_a_broken_newest_checkpoint_is_named_and_the_one_before_used(work):
    keys = ("--checkpoint.every=2", "--checkpoint.keep=0")
    assert train(work, "broken", *keys, "--train.stop_after=6").returncode == 75
    shutil.copytree(work / "broken", work / "all-broken")
    why = damage(work, "broken", 6)
    again = train(work, "broken", *keys)
    assert again.returncode == 0
    folder = work / "broken/checkpoints"
    assert f"warning: checkpoint {folder}/step-6 is broken and passed over: {why}\n" in again.stderr
    assert f"going on from {folder}/step-4, step 4 of 8\n" in again.stderr
    assert train(work, "unbroken", *keys).returncode == 0
    assert metrics(work, "broken") == metrics(work, "unbroken")

    folder = work / "all-broken/checkpoints"
    why = {step: damage(work, "all-broken", step) for step in (2, 4, 6)}
    refused = train(work, "all-broken", *keys, ranks=2)
    assert refused.returncode == 3
    assert refused.stderr.endswith(f"error: {folder}: every checkpoint is broken; the newest: {why[6]} Restore one, or start afresh in another "
                                   "run.dir.\n"), refused.stderr
    assert len(list(folder.glob("step-*"))) == 3


def test_a_checkpoint_that_is_named(work):
    """Later checkpoints are of another branch from then on: they are set aside, and not taken for the newest."""
    keys = ("--checkpoint.every=2", "--checkpoint.keep=0", "--eval.every=0")
    assert train(work, "named", *keys, "--train.stop_after=6").returncode == 75
    again = train(work, "named", *keys, f"--run.resume={work / 'named/checkpoints/step-2'}", "--train.stop_after=2")
    assert again.returncode == 75, again.stderr
    assert f"going on from {work}/named/checkpoints/step-2, step 2 of 8" in again.stderr
    assert (work / "named/checkpoints/latest").read_text() == "step-4\n"
    assert train(work, "named", *keys).returncode == 0
    assert train(work, "not-named", *keys).returncode == 0
    assert metrics(work, "named") == metrics(work, "not-named")


def test_never_refuses_a_run_folder_that_was_used(work):
    assert train(work, "used", "--train.stop_after=1").returncode == 75
    again = train(work, "used", "--run.resume=never")
    assert again.returncode == 2
    assert again.stderr.endswith(f"error: the run folder {work}/used holds a run and run.resume is never; set another run.dir\n")


def test_layouts_give_the_same_losses(work):
    rows = {1: "--train.accumulation=4", 2: "--train.accumulation=2", 4: "--train.accumulation=1"}
    for ranks, key in rows.items():
        assert train(work, f"ranks-{ranks}", key, ranks=ranks).returncode == 0
    for ranks in (2, 4):
        assert losses(work, f"ranks-{ranks}") == pytest.approx(losses(work, "ranks-1"), rel=bounds.RESUMED_ELSEWHERE)
        assert evaluations(work, f"ranks-{ranks}") == [pytest.approx(line, rel=bounds.RESUMED_ELSEWHERE) for line in evaluations(work, "ranks-1")]
    # What the verb says of the product is what the run said of its best step.
    best = min(evaluations(work, "ranks-1"), key=lambda line: line["loss"])
    again = run(work, "eval", "configs/quickstart.ini", "--model.config=", f"--model.path={work / 'ranks-1/model'}")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout) == pytest.approx(best, rel=bounds.RESUMED_ELSEWHERE)


def test_resumed_on_fewer_ranks_keeps_rows_and_losses(work):
    """4 rows a step on 4 ranks, then on 2: the same packed rows and dropout masks, in mid-epoch and over its end."""
    keys = (*PACKED, "--train.micro_batch_size=1")
    assert train(work, "four", *keys, ranks=4).returncode == 0
    assert train(work, "four-two", *keys, "--train.stop_after=4", ranks=4).returncode == 75
    again = train(work, "four-two", *keys, ranks=2)
    assert again.returncode == 0
    assert "going on with train.accumulation=2, so that a step keeps its 4 rows\n" in again.stderr
    assert losses(work, "four-two") == pytest.approx(losses(work, "four"), rel=bounds.RESUMED_ELSEWHERE)
    assert [m[5] for m in metrics(work, "four-two")] == [m[5] for m in metrics(work, "four")]


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputation_changes_no_bit(work, mode):
    if not (work / "whole-lora/metrics.jsonl").exists():
        assert train(work, "whole-lora", *LORA).returncode == 0
    assert train(work, mode, f"--train.recompute={mode}", *LORA).returncode == 0
    assert metrics(work, mode) == metrics(work, "whole-lora")


def test_evaluation_drops_nothing(work):
    """What a run with dropout says of its adapter is what the verb says of the merged model, which has no dropout."""
    assert train(work, "dropped", "--lora.rank=4", "--lora.dropout=0.5", "--lora.alpha=64", "--optim.lr=0.02").returncode == 0
    merged = run(work, "export", work / "dropped/config.ini", f"--run.resume={work}/dropped/checkpoints/step-8", f"--run.dir={work / 'merged'}",
                 "--lora.merge=true")
    assert merged.returncode == 0, merged.stderr
    again = run(work, "eval", "configs/quickstart.ini", "--model.config=", f"--model.path={work / 'merged'}")
    assert json.loads(again.stdout)["loss"] == pytest.approx(evaluations(work, "dropped")[-1]["loss"], rel=bounds.LOSS_FP32)
