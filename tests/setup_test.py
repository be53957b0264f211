"""launch/run_local.sh turns signals into a saved run, launch/setup.sh refuses what it cannot use, the counter counts."""
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

SOURCE = pathlib.Path(os.environ.get("TRIREME_SOURCE", pathlib.Path(__file__).parent.parent))

# A rank that saves on SIGUSR1 as the program does: it takes a while, then leaves with status 75.
RANK = """#!/usr/bin/env bash
echo "threads=$OMP_NUM_THREADS progress=$TRIREME_PROGRESS args=$*"
trap 'sleep 1.5; echo saved; exit 75' USR1
echo ready
case "$1" in status) exit "$2" ;; echo) cat; exit 0 ;; esac
for i in $(seq 300); do sleep 0.1; done
"""


@pytest.fixture
def binary(tmp_path):
    path = tmp_path / "rank.sh"
    path.write_text(RANK)
    path.chmod(0o755)
    return path


def start(binary, *args):
    env = {key: value for key, value in os.environ.items() if key not in ("OMP_NUM_THREADS", "TRIREME_PROGRESS")}
    return subprocess.Popen([SOURCE / "launch/run_local.sh", *args], env=env | {"TRIREME_BINARY": str(binary)}, text=True,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


def wait_ready(process, ranks):
    seen = ""
    while seen.count("ready") < ranks:
        line = process.stdout.readline()
        assert line, seen + process.stderr.read()
        seen += line
    return seen


@pytest.mark.parametrize("signal_sent", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_saves_and_returns_75(binary, signal_sent):
    process = start(binary, "-n", "2", "train")
    wait_ready(process, 2)
    process.send_signal(signal_sent)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 75
    assert out.count("saved") == 2
    assert "stopping after this step" in err


def test_a_second_signal_ends_at_once(binary):
    binary.write_text(RANK.replace("sleep 1.5; echo saved; exit 75", "sleep 60; echo saved; exit 75"))
    process = start(binary, "-n", "1", "train")
    wait_ready(process, 1)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=30)
    assert process.returncode not in (0, 75)
    assert "saved" not in out


@pytest.mark.parametrize("status", [0, 1, 2, 3, 75])
def test_status_of_the_ranks_is_returned(binary, status):
    process = start(binary, "-n", "2", "status", str(status))
    process.communicate(timeout=30)
    assert process.returncode == status


def test_ranks_are_told_threads_progress_and_arguments(binary):
    process = start(binary, "-n", "2", "echo", "a b")
    out, _ = process.communicate("typed\n", timeout=30)
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert out.count(f"threads={threads} progress=plain args=echo a b") == 2
    assert out.count("typed") == 1  # stdin goes to rank 0


@pytest.mark.parametrize("args, words", [(["-n", "x", "train"], "-n wants a number of ranks, found 'x'"),
                                         (["-n", "0", "train"], "-n wants a number of ranks, found '0'")])
def test_wrong_ranks_are_refused(binary, args, words):
    process = start(binary, *args)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 2
    assert words in err


def setup(tmp_path, **env):
    return subprocess.run([SOURCE / "launch/setup.sh"], text=True, capture_output=True, timeout=60,
                          env=os.environ | {"TRIREME_DEPS": str(tmp_path)} | env)


def test_setup_refuses_a_folder_that_is_no_torch(tmp_path):
    result = setup(tmp_path, TRIREME_TORCH=str(tmp_path))
    assert result.returncode == 1
    assert f"TRIREME_TORCH={tmp_path} is not a torch package folder" in result.stderr


def test_setup_refuses_another_version_of_torch(tmp_path):
    (tmp_path / "include/ATen").mkdir(parents=True)
    (tmp_path / "version.py").write_text("__version__ = '2.4.1+cpu'\n")
    result = setup(tmp_path, TRIREME_TORCH=str(tmp_path))
    assert result.returncode == 1
    assert f"TRIREME_TORCH={tmp_path} is torch '2.4.1'" in result.stderr


def count(tmp_path, xml, failed_entries=""):
    results, ctest = tmp_path / "results", tmp_path / "ctest"
    results.mkdir()
    ctest.mkdir()
    for name, text in xml.items():
        (results / f"{name}.xml").write_text(text)
    if failed_entries:
        (ctest / "LastTestsFailed.log").write_text(failed_entries)
    result = subprocess.run([sys.executable, SOURCE / "launch/count_results.py", results, ctest], text=True,
                            capture_output=True, timeout=60)
    return result.returncode, result.stdout.splitlines()


CASES = """<testsuites><testsuite><testcase classname="a" name="b"/>
<testcase classname="a" name="c"><skipped message="no data folder"/></testcase>{}</testsuite></testsuites>"""


def test_counter_counts_cases(tmp_path):
    status, lines = count(tmp_path, {"x": CASES.format("")})
    assert (status, lines[-1]) == (0, "1 passed, 0 failed, 1 skipped")
    assert "skipped: x: a.c no data folder" in lines


def test_counter_counts_a_failed_case_once(tmp_path):
    failing = '<testcase classname="a" name="d"><failure message="no"/></testcase>'
    status, lines = count(tmp_path, {"x": CASES.format(failing)}, "1:x\n")
    assert (status, lines[-1]) == (1, "1 passed, 1 failed, 1 skipped")


def test_counter_counts_a_crash_and_refuses_nothing(tmp_path):
    status, lines = count(tmp_path, {"x": "<testsuites><testsuite>"}, "1:x\n")
    assert (status, lines[-1]) == (1, "0 passed, 1 failed, 0 skipped")


def test_counter_refuses_no_tests(tmp_path):
    status, lines = count(tmp_path, {})
    assert (status, lines[-1]) == (1, "0 passed, 0 failed, 0 skipped")
