"""One rank that fails alone while a run starts: its sentence is said once, all ranks end with its status."""
import json
import os
import re
import shutil

import pytest

from program import BINARY, SOURCE, TRACES, TRAIN, assert_all_ended, end_of, start

MPIRUN = ("mpirun", "-q", "--bind-to", "none", "--oversubscribe")


@pytest.fixture
def folders(tmp_path):
    """The working folders of rank 0 and rank 1; only the first has what a relative path names."""
    for rank in (0, 1):
        (tmp_path / f"rank-{rank}").mkdir()
    (tmp_path / "rank-0/some.ini").write_text("[train]\nsteps = 2\n")
    return [tmp_path / f"rank-{rank}" for rank in (0, 1)]


def train(work, folders, *keys, second=()):
    """Each rank in a folder of its own; `second` stands before the program of rank 1."""
    words = [BINARY, "train", f"--data.train={TRAIN}:20", *keys]
    zero, one = (["-n", "1", "-wdir", folder] for folder in folders)
    return end_of(start(work, [*MPIRUN, *zero, *words, ":", *one, *second, *words]), timeout=40)


def check(work, done, status, sentence):
    text = done.stdout + done.stderr
    assert text.count("error: ") == 1 and re.search(rf"^error: {sentence}\n", text, re.M), text
    assert done.returncode == status, text
    assert not any(trace in text for trace in TRACES), text
    assert "step 1/" not in text
    assert_all_ended(work, done)


def test_a_run_folder_that_is_not_that_of_rank_0(tmp_path, folders):
    done = train(tmp_path, folders, f"--model.config={SOURCE}/configs/quickstart/model/config.json", "--train.steps=2", "--run.dir=run")
    check(tmp_path, done, 2, r"rank 1 on \S+ differs from rank 0 on \S+: run\.dir is \S+/rank-1/run there, \S+/rank-0/run here\. Start all ranks .*")


def test_a_configuration_that_is_not_there(tmp_path, folders):
    done = train(tmp_path, folders, f"--model.config={SOURCE}/configs/quickstart/model/config.json", "some.ini", f"--run.dir={tmp_path}/run")
    check(tmp_path, done, 2, r"\[rank 1\] the configuration some\.ini: .*No such file or directory")


# The weights of this model take 113 MiB, its gradients as much again, the program itself 60 to 100.
@pytest.mark.skipif("ASAN_OPTIONS" in os.environ, reason="sanitizers need more memory than the limit")
@pytest.mark.parametrize("megabytes", [150, 240], ids=["weights", "gradients"])
def test_memory_that_is_not_there(tmp_path, folders, megabytes):
    """The plan asks how much memory the host has free; this limit is the rank's own."""
    shutil.copytree(SOURCE / "configs/quickstart/model", tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(config | {"vocab_size": 146000}))
    done = train(tmp_path, folders, f"--model.config={tmp_path}/model/config.json", "--train.steps=2", f"--run.dir={tmp_path}/run",
                 second=("sh", "-c", f'ulimit -d {megabytes * 1024}; exec "$@"', "sh"))
    check(tmp_path, done, 1, r"\[rank 1\] out of memory: lower train\.micro_batch_size, eval\.micro_batch_size, generate\.max_tokens or data\.max_length, set train\.recompute=full, or start "
          "fewer ranks")
