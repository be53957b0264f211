"""One live line on a terminal, plain lines in a log, whoever starts the ranks."""
import os
import pty
import re
import subprocess

import pytest

from program import RUN_LOCAL, SOURCE, assert_all_ended, command, environment, override, small_run

LINE = (r"step (\d+)/6  epoch \d+\.\d\d  loss \d+\.\d{4}  lr \d\.\d\de[-+]\d\d  \d+ tokens/s  \d+\.\d\d [MG]iB  left \d+:\d\d")
LIVE = "\r\x1b[K\x1b[?7l"


@pytest.fixture(autouse=True)
def terminal():
    try:
        for end in pty.openpty():
            os.close(end)
    except OSError as error:  # a root without /dev/pts
        pytest.skip(f"no terminal to be had: {error}")


def keys(work, *more):
    return small_run(work, "run", *override(["--train.steps=6", "--log.every=3"], more))


def on_a_terminal(words, work, **env):
    """What a terminal gets to see on stderr."""
    ours, theirs = pty.openpty()
    job = subprocess.Popen(words, cwd=SOURCE, env=environment(work, **env), stderr=theirs, stdout=subprocess.DEVNULL,
                           stdin=subprocess.DEVNULL)
    os.close(theirs)
    seen = b""
    try:
        while piece := os.read(ours, 65536):
            seen += piece
    except OSError:
        pass  # the last writer is gone
    os.close(ours)
    assert job.wait(60) == 0, seen
    return seen.decode().replace("\r\n", "\n")


def check_live(seen):
    """The first and the last step stay as lines; those between are shown at most ten times a second, each over the one before."""
    assert re.search(re.escape(LIVE) + LINE + re.escape("\x1b[?7h\r\x1b[K"), seen), seen
    assert re.findall("^(?:\r\x1b\\[K)?" + LINE + "$", re.sub(re.escape(LIVE) + LINE + re.escape("\x1b[?7h"), "", seen), re.M) == ["1", "6"], seen


def check_plain(seen, *steps):
    assert "\x1b" not in seen and "\r" not in seen, seen
    assert re.findall("^" + LINE + "$", seen, re.M) == [str(step) for step in steps], seen


def check_log(work):
    log = (work / "run/log.txt").read_text()
    assert "\x1b" not in log and "\r" not in log
    assert [m for m in re.findall(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d " + LINE + "$", log, re.M)] == ["1", "3", "6"], log


def test_one_process_on_a_terminal(tmp_path):
    check_live(on_a_terminal(command("train", *keys(tmp_path)), tmp_path))
    check_log(tmp_path)


def test_ranks_on_a_terminal_through_the_script(tmp_path):
    check_live(on_a_terminal([RUN_LOCAL, "-n", "2", "train", *keys(tmp_path)], tmp_path))
    check_log(tmp_path)


def test_ranks_on_a_terminal_without_the_script_are_plain(tmp_path):
    check_plain(on_a_terminal(command("train", *keys(tmp_path), ranks=2), tmp_path), 1, 3, 6)


@pytest.mark.parametrize("words", [command, lambda *w: [RUN_LOCAL, "-n", "2", *map(str, w)]], ids=["alone", "script"])
def test_in_a_log(tmp_path, words):
    done = subprocess.run(words("train", *keys(tmp_path)), cwd=SOURCE, env=environment(tmp_path), capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == 0 and done.stdout == ""
    check_plain(done.stderr, 1, 3, 6)
    check_log(tmp_path)


def test_quiet_means_quiet(tmp_path):
    assert on_a_terminal(command("train", *keys(tmp_path, "--log.level=warn")), tmp_path) == ""


def test_ctrl_c_on_a_terminal_stops_and_saves(tmp_path):
    """The terminal sends SIGINT to its whole foreground group; mpirun is in another one."""
    words = [RUN_LOCAL, "-n", "2", "train", *keys(tmp_path, "--train.steps=1000000", "--eval.every=0")]
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(SOURCE)
        os.execve(words[0], words, environment(tmp_path))
    seen = b""
    while b"step 2/" not in seen:
        seen += os.read(terminal, 65536)
    os.write(terminal, b"\x03")
    try:
        while piece := os.read(terminal, 65536):
            seen += piece
    except OSError:
        pass
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 75, seen
    assert b"run_local: stopping after this step; once more ends at once" in seen
    assert re.search(rb"stopped after step \d+ of 1000000; saved", seen), seen
    assert_all_ended(tmp_path)
