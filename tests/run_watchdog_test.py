"""Ranks that wait in vain: the job ends with status 1, one sentence says whose fault it is, and each rank that lives leaves
its last operations behind."""
import os
import pathlib
import re
import shutil
import signal

import pytest

from program import (BINARY, SOURCE, TRACES, TRAIN, assert_all_ended, command, end_of, kill_all, ranks_of, small_run, start, wait_for)

RANKS = next(str(path) for path in pathlib.Path(BINARY).parent.rglob("watchdog_ranks"))
HOST = re.escape(os.uname().nodename)
END = (r"(, more than comm\.timeout_s=\d+)?(; what each rank did is in (?P<folder>\S+))?\. All ranks are ended; a training run goes on from its last "
       r"checkpoint, if it has one, when the same command is run again\n")
REDUCE = r"all_reduce #3 of group work, 32 bytes \(float32\)"


@pytest.fixture
def work(tmp_path):
    yield tmp_path
    kill_all(tmp_path)


def ended(job, sentence):
    """The job's end, checked: `sentence` is said, once, by one rank."""
    done = end_of(job)
    text = done.stderr
    assert done.returncode == 1, text
    assert len(re.findall("error: ", text)) == 1 and re.search(rf"error: ({sentence}){END}", text), text
    assert not any(trace in text for trace in TRACES), text
    assert_all_ended(job.work, done)
    return text


def flights(work, ranks):
    """The operations that each of these ranks wrote down. (mpirun wakes a stopped rank before it ends it: it may begin to write.)"""
    told = {}
    for rank in ranks:
        first, *lines = (work / f"flight/rank-{rank}.txt").read_text().splitlines()
        assert re.fullmatch(rf"rank {rank} on {HOST}, [-\d]+ [:\d]+\.\d{{6}} UTC: its last operations with other ranks, oldest first", first)
        assert all(re.fullmatch(r"[-\d]+ [:\d]+\.\d{6}  .*, (posted|(took|in flight for) \d+\.\d{3} s)", line) for line in lines) and len(lines) <= 300
        told[rank] = lines
    return told


def differing(work, what, rank=2, timeout=2, ranks=4, folder=True):
    return start(work, ["mpirun", "-q", "--bind-to", "none", "--oversubscribe", "-n", ranks, RANKS, what, rank, work / "flight" if folder else "", timeout])


@pytest.mark.parametrize("what, does", [
    ("operation", r"all_gather #3 of group work, 128 bytes \(float32\)"), ("type", r"all_reduce #3 of group work, 32 bytes \(int32\)"),
    ("reduction", r"all_reduce #3 of group work, 32 bytes \(float32, max\)"), ("barrier", r"barrier #3 of group work, 0 bytes")])
def test_a_rank_that_does_something_else_is_named_without_waiting_for_the_deadline(work, what, does):
    ended(differing(work, what, timeout=1800), rf"rank 2 on {HOST} is in {does}, where ranks 0, 1, 3 are in {REDUCE}: the ranks do not do the same operations")
    for rank, lines in flights(work, range(4)).items():
        assert re.search((does if rank == 2 else REDUCE) + ", in flight", lines[-1]), lines


def test_another_size_is_an_error_at_once(work):
    job = differing(work, "size", timeout=1800)
    text = end_of(job).stderr
    assert job.returncode == 1 and re.search(
        r"error: all_reduce #3 of group work, (32|64) bytes \(float32\): rank \d received (64|32|more) bytes from rank \d where it expected (32|64); "
        r"the ranks do not do the same operations\n", text), text
    assert_all_ended(work)


@pytest.mark.parametrize("what, tells", [
    ("sleeps", rf"rank 2 on {HOST} has not come to {REDUCE}, where rank \d waits for it; it is in no operation since barrier #2 of group work, 0 bytes "
               r"ended, \d+\.\d s before"),
    ("posts", rf"rank 2 on {HOST} has not come to {REDUCE}, where rank \d waits for it; it is in no operation since barrier #2 of group work, 0 bytes "
              r"ended, \d+\.\d s before"),
    ("root", rf"rank 2 on {HOST} is in broadcast #3 of group work, 32 bytes \(float32, from rank 2\), where ranks 0, 1, 3 are in broadcast #3 of group "
             r"work, 32 bytes \(float32, from rank 0\): the ranks do not do the same operations"),
    ("ends", rf"rank 2 on {HOST} has not come to {REDUCE}, where rank \d waits for it; it is at the end of the program"),
    ("order", rf"ranks wait for one another: (rank [013] for rank 2 in {REDUCE}(; )?|rank 2 for rank [013] in barrier #1 of group other, 0 bytes(; )?){{2}}"),
    ("message", rf"ranks wait for one another: (rank 0 for rank 2 in {REDUCE}(; )?|rank 2 for rank 0 in receive with rank 0 of group work, 32 bytes \(float32\)(; )?){{2}}"),
    ("stops", rf"rank 2 on {HOST} does not answer: it is stopped or gone \(its last word, \d+\.\d s ago: in no operation since .*\); "
              rf"rank \d has waited for \d+\.\d s in {REDUCE}")])
def test_a_rank_that_does_not_come_is_named_at_the_deadline(work, what, tells):
    ended(differing(work, what), tells)
    told = flights(work, [0, 1, 3] if what == "stops" else range(4))
    assert re.search(REDUCE.replace("3", "4" if what == "root" else "3", 1) + ", in flight", told[0][-1]), told[0]


@pytest.mark.parametrize("rank, sentence", [
    (2, rf"rank 2 of 4 has not come to the start of the program 3 s after rank 0 on {HOST}: stopped or gone\. All ranks are ended"),
    (0, rf"rank [123] on {HOST} has waited 6 s for rank 0 to say that all ranks have come to the start of the program: rank 0 is stopped or gone\. All ranks are ended")])
def test_a_rank_that_is_stopped_before_the_job_has_begun(work, rank, sentence):
    done = end_of(differing(work, "starts", rank=rank))
    assert done.returncode == 9 and re.search(f"^{sentence}\n", done.stderr), done.stderr
    assert_all_ended(work)


def test_a_message_that_nobody_waits_for_is_not_late(work):
    done = end_of(differing(work, "computes", timeout=1))
    assert (done.returncode, done.stderr) == (0, "")


def test_where_rank_0_is_stopped_the_next_one_speaks_and_without_a_folder_nothing_is_written(work):
    text = ended(differing(work, "stops", rank=0, folder=False),
                 rf"rank 0 on {HOST} does not answer: it is stopped or gone.*; rank [123] has waited for \d+\.\d s in {REDUCE}")
    assert "[rank 1] error: rank 0 " in text and "[rank 1] warning: the last operations of this rank:\n" in text and not (work / "flight").exists()


def test_a_rank_that_is_stopped_while_the_run_trains(work):
    folder = work / "run"
    job = start(work, command("train", *small_run(work, "run", "--comm.timeout_s=2", "--train.steps=100000", "--schedule.kind=constant", "--eval.every=0",
                                                  "--train.accumulation=1"), ranks=4))
    wait_for(lambda: (folder / "metrics.jsonl").exists() and len((folder / "metrics.jsonl").read_text().splitlines()) > 3, job)
    os.kill(ranks_of(work)[3], signal.SIGSTOP)
    operation = r"[\w ]+ #\d+ of group \w+, \d+ bytes( \(\w+(, max)?\))?"
    text = ended(job, rf"rank 3 on {HOST} does not answer: it is stopped or gone \(its last word, \d+\.\d s ago: in (no operation since )?{operation}"
                      rf"( ended, \d+\.\d s before)?\); rank \d has waited for \d+\.\d s in {operation}")
    assert f"what each rank did is in {folder}/flight." in text
    told = flights(folder, range(3))
    assert all(len(lines) > 20 and "in flight" in "".join(lines) for lines in told.values())
    assert text.split("error: ")[1].splitlines()[0] in (folder / "log.txt").read_text()


@pytest.mark.parametrize("verb", ["train", "eval"])
def test_a_rank_that_is_stopped_while_the_run_starts(work, verb):
    """It is stopped while rank 0 tokenises, which alone the others have to wait for however long it takes."""
    (work / "long.jsonl").write_text(TRAIN.read_text() * 100)
    if verb == "train":
        words = command("train", *small_run(work, "run", "--comm.timeout_s=2", f"--data.train={work / 'long.jsonl'}"), ranks=2)
    else:
        model = SOURCE / "configs/quickstart/model"
        words = command("eval", f"--model.config={model / 'config.json'}", f"--model.tokenizer={model}", "--comm.timeout_s=2",
                        f"--data.eval={work / 'long.jsonl'}", ranks=2)
    shutil.rmtree(work / "cache", ignore_errors=True)
    job = start(work, words)
    wait_for(lambda: (work / "cache").exists(), job)
    os.kill(ranks_of(work)[1], signal.SIGSTOP)
    ended(job, rf"rank 1 on {HOST} does not answer: it is stopped or gone.*; rank 0 has waited for \d+\.\d s in .*")


def test_a_rank_that_fails_while_its_peers_wait_for_it_says_why(work):
    done = end_of(differing(work, "fails", timeout=1800))
    assert (done.returncode, done.stderr) == (3, "[rank 2] error: FILE is damaged\n")
    assert_all_ended(work)
