"""A signal while the run starts is not lost. A run that goes on keeps its number of threads, and with it every bit."""
import json
import os
import re
import signal
import subprocess
import time

import pytest

from program import BINARY, SOURCE, environment

DIFFER = "from here on the last bits differ from those of a run that was never stopped: "


def train(work, name, *keys, **env):
    base = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    return subprocess.run([BINARY, "train", "configs/quickstart.ini", f"--run.dir={work / name}", "--train.steps=4",
                           "--train.micro_batch_size=1", "--eval.every=0", *keys], cwd=SOURCE, text=True, capture_output=True,
                          timeout=120, env=base | {"TRIREME_CACHE": str(work / "cache")} | env)


def norms(work, name):
    lines = [json.loads(line) for line in (work / name / "metrics.jsonl").read_text().splitlines()]
    return [line["grad_norm"] for line in lines if line["split"] == "train"]


def test_threads_are_kept(tmp_path):
    whole = train(tmp_path, "whole", "--train.threads=1")
    assert whole.returncode == 0 and "ready after 0:0" in whole.stderr and "1 rank of 1 thread" in whole.stderr
    assert train(tmp_path, "cut", "--train.threads=1", "--train.stop_after=1").returncode == 75
    again = train(tmp_path, "cut", "--train.stop_after=1")  # all the cores of this machine, if nobody says how many
    assert again.returncode == 75 and "1 rank of 1 thread" in again.stderr and DIFFER not in again.stderr
    other = train(tmp_path, "cut", OMP_NUM_THREADS="2")
    assert other.returncode == 0 and "1 rank of 2 threads" in other.stderr
    assert DIFFER + "threads of a rank 1 then, 2 now\n" in other.stderr
    assert norms(tmp_path, "cut")[:2] == norms(tmp_path, "whole")[:2]


@pytest.mark.parametrize("delay", [0.15, 0.4, 0.8])
def test_a_signal_while_the_run_starts_is_not_lost(tmp_path, delay):
    command = [SOURCE / "launch/run_local.sh", "-n", "2", "train", "configs/quickstart.ini", f"--run.dir={tmp_path / 'run'}",
               "--train.steps=100000", "--schedule.kind=constant", "--train.micro_batch_size=1", "--eval.every=0"]
    env = os.environ | {"TRIREME_BINARY": BINARY, "TRIREME_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=SOURCE, env=env, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    time.sleep(delay)
    process.send_signal(signal.SIGTERM)
    try:
        _, err = process.communicate(timeout=60)  # tells a lost signal from a slow machine
    finally:
        process.kill()
    assert process.returncode in (75, -signal.SIGTERM), err  # the latter: the script itself had not begun
    if (tmp_path / "run/checkpoints/latest").exists():
        assert "; saved. Run the same command again to go on\n" in err


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core")
def test_doctor_knows_cores_that_mpirun_has_bound():
    env = os.environ | {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    env.pop("OMP_NUM_THREADS", None)
    for binding, threads in (("core", 1), ("none", len(os.sched_getaffinity(0)) // 2)):
        done = subprocess.run(["mpirun", "-q", "--bind-to", binding, "-n", "2", BINARY, "doctor"], env=env, text=True,
                              capture_output=True, timeout=60)
        assert done.returncode == 0, done.stderr
        cores = 2 if binding == "core" else len(os.sched_getaffinity(0))
        assert f"\ncores         {cores} for 2 ranks of {threads} thread{'s' * (threads != 1)}\nmemory" in done.stdout  # nothing to change
        assert done.stdout.count("\nhost ") == 1
        assert "\nCUDA          not in this build" in done.stdout or re.search(
            r"\nCUDA          runtime 13\.\d+, (no driver|driver for up to \d+\.\d+), \d+ devices?(; training runs on the CPU)?\n", done.stdout)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core")
def test_mpi_is_told_to_give_cores_away_where_threads_are_more(tmp_path):
    """Open MPI sees no more ranks than slots here, and would not do it by itself; doctor asks the MPI that runs."""
    cores = len(os.sched_getaffinity(0))
    done = subprocess.run(["mpirun", "-q", "--bind-to", "none", "-n", "2", BINARY, "doctor"], text=True, capture_output=True, timeout=60,
                          env=environment(tmp_path, OMP_NUM_THREADS=str(cores)))
    assert done.returncode == 0, done.stderr
    assert (f"\ncores         {cores} for 2 ranks of {cores} threads; a rank that waits gives its core away\n  change: more threads than cores: "
            "set OMP_NUM_THREADS, or start fewer ranks\n") in done.stdout, done.stdout
