"""The best model: found, counted across resumes, never compared with another measure, kept, restored; one branch a run folder."""
import json
import shutil

import pytest

from program import SOURCE, TRAIN, run

# The rate is so high that the evaluation loss rises and falls: the best is neither the first nor the last.
KEYS = ("configs/quickstart.ini", f"--data.train={TRAIN}:40", "--data.max_length=64", "--train.micro_batch_size=2", "--train.steps=10",
        "--schedule.kind=constant", "--schedule.warmup_steps=0", "--schedule.min_lr=0", "--optim.lr=0.02", "--eval.every=1",
        "--checkpoint.keep=0")
EVAL = SOURCE / "configs/quickstart/eval.jsonl"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("best")


def train(work, name, *keys, status=0, ranks=1):
    chosen = {key.split("=")[0] for key in keys}
    usual = (*KEYS, f"--data.eval={EVAL}:8", f"--run.dir={work / name}")
    done = run(work, "train", *(key for key in usual if key.split("=")[0] not in chosen), *keys, ranks=ranks)
    assert done.returncode == status, done.stderr
    return done.stderr


def lines(work, name):
    return [json.loads(line) for line in (work / name / "metrics.jsonl").read_text().splitlines()]


def metrics(work, name):
    return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second", "memory_bytes")} for line in lines(work, name)]


def series(work, name, metric="loss"):
    return {line["step"]: line[metric] for line in lines(work, name) if line["split"] == "eval"}


def finished(work, name):
    return json.loads((work / name / "finished.json").read_text())


def product(work, name):
    return next((work / name).glob("*/*model.safetensors")).read_bytes()


def checkpoints(work, name):
    return {path.name for path in (work / name / "checkpoints").glob("step-*")}


def lowest(values):
    return min(values, key=values.get)


def stop_of(losses, patience):
    """The step where a run ends early, and the best step then."""
    best, waited = None, 0
    for step, loss in losses.items():
        best, waited = (step, 0) if best is None or loss < losses[best] else (best, waited + 1)
        if waited == patience:
            return step, best
    return None, best


def damage(shard):
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)


@pytest.fixture(scope="module")
def whole(work):
    """Never stopped, every step saved. Other tests copy it to save their time."""
    train(work, "whole", "--checkpoint.every=1")
    losses = series(work, "whole")
    assert 1 < lowest(losses) < 8 and stop_of(losses, 4) == (5, 1), losses
    return losses


def test_the_best_is_exported(work, whole):
    best = lowest(whole)
    assert finished(work, "whole") == {"step": 10, "stopped_early": False, "metric": "loss", "best": whole[best], "best_step": best}
    assert (work / "whole/checkpoints/best").read_text() == f"step-{best}\n"
    train(work, "short", f"--train.steps={best}")
    assert product(work, "short") == product(work, "whole")
    train(work, "last", "--eval.restore_best=false")
    assert product(work, "last") != product(work, "whole")


def test_two_ranks_decide_together(work):
    """Each evaluates a half; they stop at the same step, and export the best."""
    keys = ("--train.micro_batch_size=1", "--checkpoint.every=1")
    said = train(work, "two", "--eval.patience=4", *keys, ranks=2)
    losses, done = series(work, "two"), finished(work, "two")
    assert stop_of(losses, 4) == (5, 1) == (done["step"], done["best_step"]) and done["stopped_early"], losses
    assert said.count("restored the best model, of step 1\n") == 1
    train(work, "two-short", "--train.steps=1", *keys, ranks=2)
    assert product(work, "two") == product(work, "two-short")


@pytest.mark.parametrize("every, evaluated, every_save, saved", [("3", {3, 5}, "0", {3, 5}), ("0.3", {2, 4, 5}, "0.5", {3, 5}), ("0.01", {1, 2, 3, 4, 5}, "4", {4, 5})])
def test_steps_and_fractions_of_the_run(work, every, evaluated, every_save, saved):
    """Evaluation and saving at whole steps, at rounded fractions of five steps, and after the last one."""
    name = f"every-{every}"
    train(work, name, "--train.steps=5", f"--eval.every={every}", f"--checkpoint.every={every_save}")
    losses = series(work, name)
    assert set(losses) == evaluated
    best = {step for step in losses if losses[step] == min(loss for s, loss in losses.items() if s <= step)}
    assert checkpoints(work, name) == {f"step-{step}" for step in saved | best}


@pytest.mark.parametrize("kind, keys", [
    ("fp32", ()), ("bf16", ("--train.dtype=bfloat16", "--train.accumulation=3", "--data.packing=true", "--lora.rank=4", "--lora.dropout=0.2"))])
def test_patience_counts_across_a_resume(work, kind, keys):
    """With bf16: 40 records are 18 packed rows and a step takes 6 of them, so that the run crosses epochs, too."""
    patience = "--eval.patience=4" if kind == "fp32" else "--eval.patience=10"
    said = train(work, f"at-once-{kind}", patience, *keys)
    for _ in range(2):
        train(work, f"cut-{kind}", patience, "--train.stop_after=2", *keys, status=75)
    cut = train(work, f"cut-{kind}", patience, *keys)
    assert metrics(work, f"cut-{kind}") == metrics(work, f"at-once-{kind}")
    assert finished(work, f"cut-{kind}") == finished(work, f"at-once-{kind}")
    assert product(work, f"cut-{kind}") == product(work, f"at-once-{kind}")
    if kind == "fp32":
        losses = series(work, "cut-fp32")
        assert stop_of(losses, 4) == (5, 1) and finished(work, "cut-fp32")["stopped_early"]
        for text in (said, cut):
            assert f"stopping early: no better loss in 4 evaluations; the best was {losses[1]:.6g} at step 1\n" in text
            assert "restored the best model, of step 1\n" in text
        again = train(work, "cut-fp32", patience)
        assert again.endswith(f"{work}/cut-fp32 is finished (step 5, stopped early); set another run.dir to train again\n")


def test_patience_that_a_resumed_run_asks_for_counts_what_was(work, whole):
    train(work, "later", "--train.stop_after=4", status=75)
    train(work, "later", "--eval.patience=4")
    assert finished(work, "later")["step"] == 5


@pytest.mark.parametrize("kind, keys, why", [
    ("metric", ("--eval.metric=token_accuracy",), "eval.metric is token_accuracy now, it was loss"),
    ("data", (f"--data.eval={EVAL}:5",), "the evaluation data are others now")])
def test_another_measure_begins_anew(work, whole, kind, keys, why):
    train(work, kind, "--train.stop_after=3", status=75)
    said = train(work, kind, "--eval.patience=9", *keys)
    assert f"warning: {why}: the best so far, of step 1, does not count any more\n" in said
    metric = "token_accuracy" if kind == "metric" else "loss"
    values = {step: -v if kind == "metric" else v for step, v in series(work, kind, metric).items() if step > 3}
    best = lowest(values)
    done = finished(work, kind)
    assert (done["metric"], done["best_step"], done["best"]) == (metric, best, series(work, kind, metric)[best])


def test_a_branch_is_left_at_the_resume(work, whole):
    """Later steps are set aside, the best of the branch is kept, and the same command goes on where it was."""
    shutil.copytree(work / "whole", work / "branch")
    folder = work / "branch/checkpoints"
    keys = (f"--run.resume={folder / 'step-3'}", "--train.stop_after=2", "--checkpoint.every=1", "--checkpoint.keep=1", "--train.steps=11")
    said = train(work, "branch", *keys, status=75)
    assert f"going on from {folder}/step-3, step 3 of 11\n" in said
    assert (f"warning: {folder}/step-6 is later than step 3, where this run goes on: set aside as step-6.abandoned\n") in said
    assert checkpoints(work, "branch") == {"step-1", "step-5", *(f"step-{n}.abandoned" for n in range(6, 11))}
    said = train(work, "branch", *keys, status=75)  # step-3 is gone: it was older than the newest
    assert f"going on from {folder}/step-5, step 5 of 11\n" in said
    train(work, "branch", "--checkpoint.every=1", "--checkpoint.keep=1", "--train.steps=11")
    train(work, "never-left", "--train.steps=11")
    assert metrics(work, "branch") == metrics(work, "never-left")
    assert product(work, "branch") == product(work, "never-left")
    best = finished(work, "never-left")["best_step"]
    assert checkpoints(work, "branch") == {f"step-{best}", "step-11"}


def test_a_run_that_goes_on_in_another_folder(work, whole):
    """It takes the best and the metrics along, and the same command goes on there."""
    folder, begin = work / "elsewhere", work / "whole/checkpoints/step-7"
    keys = (f"--run.resume={begin}/", "--train.stop_after=2", "--checkpoint.keep=1")
    assert f"going on from {begin}/, step 7 of 10\n" in train(work, "elsewhere", *keys, status=75)
    assert checkpoints(work, "elsewhere") == {f"step-{lowest(whole)}", "step-9"}
    assert f"going on from {folder}/checkpoints/step-9, step 9 of 10\n" in train(work, "elsewhere", *keys)
    assert metrics(work, "elsewhere") == metrics(work, "whole")
    assert product(work, "elsewhere") == product(work, "whole")
    before = checkpoints(work, "elsewhere")
    refused = train(work, "elsewhere", f"--run.resume={work}/whole/checkpoints/step-4", "--train.steps=12", status=2)
    assert refused.endswith(f"error: the run folder {folder} holds another run, at step 10, and run.resume={work}/whole/checkpoints/step-4 is not "
                            "of it; set another run.dir\n")
    refused = train(work, "third", f"--run.resume={folder}", status=2)
    assert refused.endswith(f"error: run.resume={folder} is a run folder, not a checkpoint: name {folder}/checkpoints/step-N, or set "
                            f"run.dir={folder} to go on with that run\n")
    assert checkpoints(work, "elsewhere") == before


def test_a_best_that_is_lost(work, whole):
    best = lowest(whole)
    ignore = shutil.ignore_patterns("finished.json", *(f"step-{n}" for n in range(best + 2, 11)))
    shutil.copytree(work / "whole", work / "lost", ignore=ignore)
    folder = work / f"lost/checkpoints/step-{best}"
    shutil.copytree(work / "lost", work / "broken")
    shutil.rmtree(folder)
    said = train(work, "lost")
    assert (f"warning: the best model so far, of step {best}, is lost and does not count any more: {folder} is not a checkpoint: it has no "
            "manifest.json.\n") in said
    assert finished(work, "lost")["best_step"] == lowest({step: loss for step, loss in whole.items() if step > best + 1})

    shard = work / f"broken/checkpoints/step-{best}/shard-00000.h5"
    damage(shard)
    said = train(work, "broken", status=3)
    assert said.endswith(f"error: the best model, of step {best}, cannot be restored: {shard} is damaged: its hash differs from the manifest's. "
                         "Set eval.restore_best=false to take the last one.\n")
    assert not (work / "broken/finished.json").exists()
    train(work, "broken", "--eval.restore_best=false")
    train(work, "last", "--eval.restore_best=false")
    assert product(work, "broken") == product(work, "last")


def test_a_finished_run_needs_no_data(work, whole):
    said = train(work, "whole", f"--data.train={work}/gone.jsonl")
    assert said == f"{work}/whole is finished (step 10); raise train.steps to go on, or set another run.dir\n"


def test_the_plan_counts_the_copy_for_a_checkpoint(work):
    def plan(*keys):
        done = run(work, "plan", *KEYS, f"--run.dir={work / 'planned'}", *keys)
        assert done.returncode == 0, done.stderr
        return done.stderr

    assert "weights 6.85 MiB, gradients 6.85 MiB, optimizer 13.70 MiB" in plan()
    assert ", copy for a checkpoint 20.55 MiB, " in plan()
    assert "copy for a checkpoint" not in plan("--checkpoint.async=false")
