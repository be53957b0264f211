"""Ranks of one job that were not started alike: status 2, and one sentence that says which rank differs from rank 0, in what."""
import json
import os
import re
import shutil

import pytest

from program import BINARY, SOURCE, TRACES, TRAIN, assert_all_ended, end_of, kill_all, small_run, start

HOST = re.escape(os.uname().nodename)
WAY_OUT = r"\. Start all ranks of a job with the same program, configuration and files\n"


@pytest.fixture
def work(tmp_path):
    yield tmp_path
    kill_all(tmp_path)


def together(work, *jobs):
    """One MPI job: each of `jobs` is (number of ranks, folder or None, program, words)."""
    words = ["mpirun", "-q", "--bind-to", "none", "--oversubscribe"]
    for i, (number, folder, *rest) in enumerate(jobs):
        words += [*([":"] if i else []), *(["-wdir", folder] if folder else []), "-n", number, *rest]
    return start(work, words)


def refused(job, sentence):
    done = end_of(job)
    assert done.returncode == 2 and re.fullmatch(rf"error: {sentence}{WAY_OUT}", done.stderr), done.stderr
    assert not any(trace in done.stderr for trace in TRACES)
    assert_all_ended(job.work, done)


def test_another_configuration(work):
    one = [1, None, BINARY, "train", *small_run(work)]
    two = [2, None, BINARY, "train", *small_run(work, "run", "--optim.lr=0.5", "--train.max_grad_norm=7")]
    refused(together(work, one, two), rf"rank 1 on {HOST} differs from rank 0 on {HOST}: optim\.lr is 0\.5 there, [\d.e-]+ here; train\.max_grad_norm is 7 "
                                      r"there, [\d.]+ here \(and 1 more rank differs\)")
    assert not (work / "run").exists() or not list((work / "run").iterdir())


def test_another_verb_or_help(work):
    keys = small_run(work)
    refused(together(work, [1, None, BINARY, "train", *keys], [1, None, BINARY, "train", *keys, "--dry-run"]),
            rf"rank 1 on {HOST} differs from rank 0 on {HOST}: the verb is train --dry-run there, train here")
    refused(together(work, [1, None, BINARY, "train", *keys], [1, None, BINARY, "train", "--help"]),
            rf"rank 1 on {HOST} differs from rank 0 on {HOST}: the verb is train --help there, train here")


def test_the_same_words_in_other_folders_are_other_files(work):
    for name in ("a", "b"):
        shutil.copytree(SOURCE / "configs/quickstart/model", work / name / "model")
        shutil.copy(TRAIN, work / name / "train.jsonl")
    config = json.loads((work / "b/model/config.json").read_text())
    (work / "b/model/config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    with open(work / "b/train.jsonl", "a") as file:
        file.write(TRAIN.read_text().splitlines()[0] + "\n")
    words = ["train", f"--run.dir={work / 'run'}", "--model.config=model/config.json", "--data.train=train.jsonl", "--train.steps=2",
             "--train.micro_batch_size=1"]
    file = r"of \d+ bytes, hash \w{12}"
    refused(together(work, [1, work / "a", BINARY, *words], [1, work / "b", BINARY, *words]),
            rf"rank 1 on {HOST} differs from rank 0 on {HOST}: the file of model\.config is {file} there, {file} here; train\.jsonl of data\.train is {file} "
            rf"there, {file} here")
    for name in ("model/config.json", "train.jsonl"):
        shutil.copy(work / "a" / name, work / "b" / name)
    done = end_of(together(work, [1, work / "a", BINARY, *words], [1, work / "b", BINARY, *words]))
    assert done.returncode == 0, done.stderr


def test_large_files_that_differ_in_the_middle(work):
    content = bytearray(os.urandom(20 << 20))
    for name in ("a", "b"):
        (work / name).mkdir()
        (work / name / "train.jsonl").write_bytes(content)
        content[9 << 20:(9 << 20) + 65536] = bytes(65536)
    words = ["train", f"--run.dir={work / 'run'}", f"--model.config={SOURCE / 'configs/quickstart/model/config.json'}", "--data.train=train.jsonl", "--train.steps=2"]
    file = r"of 20971520 bytes, hash \w{12}"
    refused(together(work, [1, work / "a", BINARY, *words], [1, work / "b", BINARY, *words]),
            rf"rank 1 on {HOST} differs from rank 0 on {HOST}: train\.jsonl of data\.train is {file} there, {file} here")


def test_another_build(work):
    other = work / "trireme"
    shutil.copy(BINARY, other)
    with open(other, "ab") as file:
        file.write(b"\0")
    keys = ["train", *small_run(work)]
    refused(together(work, [1, None, BINARY, *keys], [1, None, other, *keys]),
            rf"rank 1 on {HOST} differs from rank 0 on {HOST}: the version of trireme is [\d.]+ \(build \w{{12}}\) there, [\d.]+ \(build \w{{12}}\) here")
