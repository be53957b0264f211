"""Starting the program from tests: its environment, its command line, and what it leaves behind."""
import os
import pathlib
import signal
import subprocess
import tempfile
import threading
import time

SOURCE = pathlib.Path(os.environ.get("TRIREME_SOURCE", pathlib.Path(__file__).parent.parent))
BINARY = os.environ.get("TRIREME_BINARY", str(SOURCE / "build/release/trireme"))
RUN_LOCAL = str(SOURCE / "launch/run_local.sh")
TRAIN = SOURCE / "configs/quickstart/train.jsonl"
TRACES = ("terminate called", "internal error", "Traceback", "Backtrace", "frame #", "MPI_ABORT was invoked", "Segmentation")


def environment(work, **more):
    """The cache folder is the test's own: it also marks every process of the test."""
    base = {name: value for name, value in os.environ.items() if not name.startswith(("TRIREME_", "OMPI_", "PMIX_"))}
    return base | dict(TRIREME_CACHE=str(work / "cache"), TRIREME_BINARY=BINARY, OMP_NUM_THREADS="1",
                       OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1") | more


def command(verb, *keys, ranks=1):
    launch = [] if ranks == 1 else ["mpirun", "-q", "--bind-to", "none", "--oversubscribe", "-n", str(ranks)]
    return [*launch, BINARY, verb, *map(str, keys)]


def start(work, words, env={}, **more):
    """Starts `words` (of command(), or others); end_of() waits for it."""
    with tempfile.TemporaryFile() as out:  # not a pipe: nobody reads it before the end
        job = subprocess.Popen(list(map(str, words)), cwd=SOURCE, stdout=out, stderr=subprocess.PIPE, text=True, errors="backslashreplace",
                               env=environment(work, **env), **more)
        job.out = os.dup(out.fileno())
    job.work = work
    return job


def end_of(job, since=None, timeout=120):
    """What the job said, its status, and the `seconds` from its first line with an error (or from the moment `since`) to its
    end: the launcher has returned and no process holds its stderr any more. `timeout` only tells a hang from a slow machine."""
    hangs = []
    watch = threading.Timer(timeout, lambda: (hangs.append(True), job.kill(), kill_all(job.work)))
    watch.start()
    said = []
    for line in job.stderr:
        if line.startswith("[warn] Epoll"):  # libevent in mpirun, when a rank's pipe closes at the wrong moment
            continue
        said.append(line)
        if since is None and "error: " in line:
            since = time.monotonic()
    status = job.wait()
    seconds = None if since is None else time.monotonic() - since
    watch.cancel()
    with os.fdopen(job.out, errors="backslashreplace") as out:
        out.seek(0)
        done = subprocess.CompletedProcess(job.args, status, out.read(), "".join(said))
    assert not hangs, f"still running after {timeout} s: {done.stderr}"
    done.seconds = seconds
    return done


def run(work, verb, *keys, ranks=1, timeout=120, **env):
    return end_of(start(work, command(verb, *keys, ranks=ranks), env), timeout=timeout)


def override(usual, keys):
    """`usual` without what `keys` set, and `keys`: a key may be given once."""
    names = {str(key).split("=")[0] for key in keys}
    return [*(key for key in usual if key.split("=")[0] not in names), *map(str, keys)]


def small_run(work, name="run", *keys, records=40):
    """Keys of a training run of the quickstart's model that takes a second; `keys` replace its own."""
    return ["configs/quickstart.ini", *override([
        f"--run.dir={work / name}", f"--data.train={TRAIN}:{records}", f"--data.eval={SOURCE / 'configs/quickstart/eval.jsonl'}:8",
        "--train.steps=4", "--eval.every=2"], keys)]


def processes(work):
    """Ids of the processes that this test started and that still live, ranks and launchers alike."""
    mark, alive = f"TRIREME_CACHE={work / 'cache'}".encode(), []
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            if mark in (folder / "environ").read_bytes().split(b"\0") and "\nState:\tZ" not in (folder / "status").read_text():
                alive.append(int(folder.name))
        except OSError:
            pass
    return alive


def kill_all(work):
    for pid in processes(work):
        os.kill(pid, signal.SIGKILL)


def assert_all_ended(work, done=None):
    """Every process has ended; where `done` is given, within five seconds of its error (sanitizers look for leaks then)."""
    until = time.monotonic() + 5
    while (alive := processes(work)) and time.monotonic() < until:
        time.sleep(0.05)
    kill_all(work)
    assert not alive, f"{len(alive)} processes live on"
    assert done is None or "ASAN_OPTIONS" in os.environ or done.seconds < 5, f"{done.seconds} seconds from the error to the end of all ranks"


def wait_for(condition, process=None, seconds=60):
    """Waits until condition() is true; gives up where `process` ends first."""
    until = time.monotonic() + seconds
    while not (value := condition()):
        assert process is None or process.poll() is None, "the program ended too early"
        assert time.monotonic() < until, "nothing happened"
        time.sleep(0.01)
    return value


def ranks_of(work):
    """The ranks among processes(), by rank."""
    found = {}
    for pid in processes(work):
        try:
            if os.readlink(f"/proc/{pid}/exe") == os.path.realpath(BINARY):
                variables = dict(v.split(b"=", 1) for v in pathlib.Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") if b"=" in v)
                found[int(variables.get(b"OMPI_COMM_WORLD_RANK", b"0"))] = pid
        except OSError:
            pass
    return [found[rank] for rank in sorted(found)]
