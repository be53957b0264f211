"""A run that is told to stop finishes its step, saves, exits 75, and goes on to the same bits; what saves nothing ends."""
import json
import os
import shutil
import signal
import subprocess
import time

import pytest

from program import RUN_LOCAL, SOURCE, TRACES, TRAIN, assert_all_ended, command, end_of, override, ranks_of, run, start, wait_for

STEPS = 400


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Holds a model of one narrow layer with dropout in its adapters: steps of a few milliseconds."""
    folder = tmp_path_factory.mktemp("signals")
    shutil.copytree(SOURCE / "configs/quickstart/model", folder / "model")
    config = json.loads((folder / "model/config.json").read_text())
    small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=16)
    (folder / "model/config.json").write_text(json.dumps(config | small))
    return folder


def keys(work, name, *more):
    return override((f"--run.dir={work / name}", f"--model.config={work / 'model/config.json'}", f"--data.train={TRAIN}:30",
             f"--data.eval={SOURCE / 'configs/quickstart/eval.jsonl'}:4", "--eval.every=100", "--lora.rank=2", "--lora.dropout=0.2",
             f"--train.steps={STEPS}", "--train.micro_batch_size=2", "--optim.lr=1e-2", "--log.every=100"), more)


def metrics(work, name):
    lines = [json.loads(line) for line in (work / name / "metrics.jsonl").read_text().splitlines()]
    return [(x["step"], x["split"], x["loss"], x.get("grad_norm"), x.get("learning_rate")) for x in lines]


def steps_done(work, name):
    file = work / name / "metrics.jsonl"
    return file.read_text().count('"split":"train"') if file.exists() else 0


def product(work, name):
    return (work / name / "adapter/adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def never_stopped(work):
    assert run(work, "train", *keys(work, "whole"), ranks=2).returncode == 0
    return metrics(work, "whole"), product(work, "whole")


def by_mpirun(work, name, *more):
    return start(work, command("train", *keys(work, name, *more), ranks=2))


def by_script(work, name, *more):
    return start(work, [RUN_LOCAL, "-n", "2", "train", *keys(work, name, *more)])


WAYS = {"USR1 to mpirun": (by_mpirun, lambda job, work: job.send_signal(signal.SIGUSR1)),
        "TERM to the script": (by_script, lambda job, work: job.send_signal(signal.SIGTERM)),
        "INT to the script": (by_script, lambda job, work: job.send_signal(signal.SIGINT)),
        "TERM to one rank": (by_mpirun, lambda job, work: os.kill(ranks_of(work)[1], signal.SIGTERM))}


@pytest.mark.parametrize("way", WAYS)
def test_told_to_stop_twice_and_resumed_it_is_the_run_that_was_never_stopped(work, never_stopped, way):
    begin, stop = WAYS[way]
    name = way.replace(" ", "-")
    for _ in range(2):
        before = steps_done(work, name)
        job = begin(work, name)
        wait_for(lambda: before + 20 < steps_done(work, name) or job.poll() is not None, seconds=60)
        stop(job, work)
        ended = end_of(job)
        text = ended.stderr
        assert ended.returncode == 75, text
        done = steps_done(work, name)
        assert 0 < done < STEPS
        assert f"\nstopped after step {done} of {STEPS}; saved. Run the same command again to go on\n" in text, text
        assert (work / name / "checkpoints/latest").read_text() == f"step-{done}\n"
        assert not any(trace in text for trace in TRACES), text
        assert_all_ended(work)
    ended = end_of(begin(work, name))
    text = ended.stderr
    assert ended.returncode == 0, text
    assert f"going on from {work / name}/checkpoints/step-{done}, step {done} of {STEPS}" in text
    assert (metrics(work, name), product(work, name)) == never_stopped


def test_told_to_stop_while_a_checkpoint_is_written(work, never_stopped):
    name, folder = "writing", work / "writing/checkpoints"
    job = by_mpirun(work, name, "--checkpoint.every=1")
    wait_for(lambda: steps_done(work, name) > 10 and list(folder.glob("step-*[0-9].tmp")), job)
    job.send_signal(signal.SIGUSR1)
    ended = end_of(job)
    assert ended.returncode == 75, ended.stderr
    done = steps_done(work, name)
    assert (folder / "latest").read_text() == f"step-{done}\n" and list(folder.glob("*.tmp")) == []
    assert run(work, "train", *keys(work, name), ranks=2).returncode == 0
    assert (metrics(work, name), product(work, name)) == never_stopped


def test_told_again_it_ends_at_once_and_keeps_what_it_had(work):
    """The second signal comes while the ranks cannot finish their step: one of them is stopped."""
    name = "at-once"
    job = by_script(work, name, "--checkpoint.every=10", "--train.steps=1000000", "--schedule.kind=constant", "--eval.every=0")
    wait_for(lambda: (work / name / "checkpoints/latest").exists(), job)
    os.kill(ranks_of(work)[1], signal.SIGSTOP)
    job.send_signal(signal.SIGTERM)
    said = [job.stderr.readline()]
    while not said[-1].startswith("run_local: stopping"):
        said.append(job.stderr.readline())
    told = time.monotonic()
    job.send_signal(signal.SIGTERM)
    ended = end_of(job, told)
    # mpirun wakes a stopped rank before it ends it: there may be time to save after all.
    assert ended.returncode == (75 if "saved" in ended.stderr else 1), ended.stderr
    assert_all_ended(work, ended)
    again = run(work, "train", *keys(work, name, "--checkpoint.every=10", "--train.steps=1000000", "--schedule.kind=constant",
                                     "--eval.every=0", "--train.stop_after=1"), ranks=2)
    assert again.returncode == 75, again.stderr
    assert "going on from" in again.stderr


@pytest.mark.parametrize("delay", [0.1, 0.7])
def test_told_again_while_it_saves_and_ends_its_status_says_what_it_did(work, delay):
    job = by_script(work, f"again-{delay}", "--train.steps=1000000", "--schedule.kind=constant", "--eval.every=0")
    wait_for(lambda: steps_done(work, f"again-{delay}") > 20, job)
    job.send_signal(signal.SIGINT)
    time.sleep(delay)
    job.send_signal(signal.SIGINT)
    ended = end_of(job)
    assert ended.returncode == (75 if "saved" in ended.stderr else 1), ended.stderr
    assert not any(trace in ended.stderr for trace in TRACES), ended.stderr
    assert_all_ended(work)


def test_keep_never_deletes_the_best(work):
    """At this learning rate the first evaluation is the best; keep=1 deletes all others but the last, also after a resume."""
    more = ("--lora.rank=0", "--lora.dropout=0", "--optim.lr=2", "--schedule.kind=constant", "--checkpoint.keep=1", "--eval.every=2", "--train.steps=12")
    for stop in (5, 4):
        assert run(work, "train", *keys(work, "best", *more, f"--train.stop_after={stop}")).returncode == 75
    kept = lambda: sorted(path.name for path in (work / "best/checkpoints").glob("step-*"))
    assert kept() == ["step-2", "step-9"] and (work / "best/checkpoints/best").read_text() == "step-2\n"
    done = run(work, "train", *keys(work, "best", *more))
    assert done.returncode == 0 and "restored the best model, of step 2" in done.stderr
    assert kept() == ["step-12", "step-2"]
    losses = {m[0]: m[2] for m in metrics(work, "best") if m[1] == "eval"}
    assert min(losses, key=losses.get) == 2


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_verb_that_has_nothing_to_save_ends_at_once(work, sent):
    """Rank 0 reads lines from us, rank 1 waits for it."""
    job = start(work, [RUN_LOCAL, "-n", "2", "tokenize", f"--model.path={work}/model"], stdin=subprocess.PIPE)
    wait_for(lambda: len(ranks_of(work)) == 2, job)
    told = time.monotonic()
    job.send_signal(sent)
    ended = end_of(job, told)
    job.stdin.close()
    assert ended.returncode == 1 and "run_local" not in ended.stderr, ended.stderr
    assert_all_ended(work, ended)
