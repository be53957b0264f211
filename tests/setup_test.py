"""launch/run_local.sh turns signals into a saved run, launch/setup.sh refuses what it cannot use, the counter counts."""
import fcntl
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

SOURCE = pathlib.Path(os.environ.get("TRIREME_SOURCE", pathlib.Path(__file__).parent.parent))

# A rank that saves on SIGUSR1 as the program does: it takes a while, then leaves with status 75.
RANK = f"""#!{sys.executable}
import os, signal, sys, time
def on_stop(number, frame):
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    time.sleep(1.5)
    print("saved", flush=True)
    time.sleep(1)  # mpirun ends the others when the first has ended
    os._exit(75)
signal.signal(signal.SIGUSR1, on_stop)
words = sys.argv[1:]
print(f"threads={{os.environ.get('OMP_NUM_THREADS')}} progress={{os.environ['TRIREME_PROGRESS']}} args={{' '.join(words)}}")
print("ready", flush=True)
if words[0] == "status":
    sys.exit(int(words[1]))
if words[0] == "echo":
    print(sys.stdin.read())
    sys.exit(0)
time.sleep(30)
"""


@pytest.fixture
def binary(tmp_path):
    path = tmp_path / "rank.sh"
    path.write_text(RANK)
    path.chmod(0o755)
    return path


def start(binary, *args, **more):
    env = {key: value for key, value in os.environ.items() if key not in ("OMP_NUM_THREADS", "TRIREME_PROGRESS")}
    return subprocess.Popen([SOURCE / "launch/run_local.sh", *args], env=env | {"TRIREME_BINARY": str(binary)} | more, text=True,
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
    binary.write_text(RANK.replace("sleep(1.5)", "sleep(60)"))
    process = start(binary, "-n", "1", "train")
    wait_ready(process, 1)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=30)
    assert process.returncode not in (0, 75)
    assert "saved" not in out


@pytest.mark.parametrize("second", ["while it saves", "while it ends"])
def test_a_second_signal_does_not_hide_that_it_was_saved(binary, second):
    """mpirun ends with a status of its own then, or crashes; what rank 0 has written counts."""
    write = 'open(os.environ["TRIREME_STATUS_FILE"], "a").write("75\\n"); '
    body = {"while it saves": "time.sleep(0.5); " + write + 'print("saved", flush=True)',
            "while it ends": write + 'print("saved", flush=True); time.sleep(0.7)'}[second]
    binary.write_text(RANK.replace("time.sleep(1.5)", "signal.signal(signal.SIGTERM, signal.SIG_IGN)").replace('print("saved", flush=True)', body))
    process = start(binary, "-n", "1", "train")
    wait_ready(process, 1)
    process.send_signal(signal.SIGINT)
    if second == "while it ends":
        assert process.stdout.readline() == "saved\n"
    else:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (75, "run_local: stopping after this step; once more ends at once\n")


@pytest.mark.parametrize("status", [0, 1, 2, 3, 75])
def test_status_of_the_ranks_is_returned(binary, status):
    process = start(binary, "-n", "2", "status", str(status))
    process.communicate(timeout=30)
    assert process.returncode == status


@pytest.mark.parametrize("status", [4, 255])
def test_another_status_of_a_rank_is_a_failure(binary, status):
    process = start(binary, "-n", "2", "status", str(status))
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert f"run_local: a rank ended with status {status}, all ranks are ended\n" in err


def test_a_program_that_cannot_start_is_a_failure(binary):
    """As when a shared library is missing: the loader ends it with 127."""
    binary.write_text("#!/bin/sh\necho 'error while loading shared libraries' >&2\nexit 127\n")
    process = start(binary, "-n", "2", "train")
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert err.endswith(f"run_local: {binary} could not be started (see above); launch/setup.sh puts right what is missing\n")


@pytest.mark.parametrize("option", ["-h", "--help"])
@pytest.mark.parametrize("script", sorted(path.name for path in (SOURCE / "launch").glob("*.sh")))
def test_help_is_the_comment_at_the_head_and_does_nothing(script, option):
    done = subprocess.run([f"./{script}", option], cwd=SOURCE / "launch", text=True, capture_output=True, timeout=20)
    head = (SOURCE / "launch" / script).read_text().split("\nset ")[0].splitlines()[1:]
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [line.removeprefix("#").removeprefix(" ") for line in head]


@pytest.mark.parametrize("script", ["quickstart", "setup"])
def test_unknown_arguments_are_refused(script):
    done = subprocess.run([SOURCE / f"launch/{script}.sh", "--fast"], text=True, capture_output=True, timeout=20)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"{script}: unknown argument '--fast'\n")


def test_ranks_are_told_threads_progress_and_arguments(binary):
    process = start(binary, "-n", "2", "echo", "a b")
    out, _ = process.communicate("typed\n", timeout=30)
    assert out.count("threads=None progress=plain args=echo a b") == 2  # the program itself divides the cores
    assert out.count("typed") == 1  # stdin goes to rank 0


def test_more_ranks_than_cores_are_started(binary):
    process = start(binary, "-n", str(len(os.sched_getaffinity(0)) + 1), "status", "0",
                    OMP_NUM_THREADS="64")  # not the number of cores
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert out.count("ready") == len(os.sched_getaffinity(0)) + 1


def test_mpirun_that_cannot_start_a_rank_is_heard(binary, tmp_path):
    """-q, which keeps it from commenting on the status of the ranks, silences its own errors as well."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/mpirun").write_text('#!/bin/sh\n[ "$1" = -q ] || echo "no slots: $*"\nexit 1\n')
    (tmp_path / "bin/mpirun").chmod(0o755)
    os.environ["PATH"], path = f"{tmp_path / 'bin'}:{os.environ['PATH']}", os.environ["PATH"]
    try:
        process = start(binary, "-n", "2", "train")
    finally:
        os.environ["PATH"] = path
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert err == ("run_local: mpirun could not start a rank (status 1); this is what it says:\n"
                   "no slots: --bind-to none --oversubscribe -n 2 true\n")


@pytest.mark.parametrize("delay", [0.1, 0.4])
def test_a_signal_while_it_starts_is_not_lost(binary, delay):
    """The program has its handlers only after its libraries are loaded."""
    binary.write_text(RANK.replace("\nsignal.signal(", "\ntime.sleep(1)\nsignal.signal(").replace("sleep(1.5)", "sleep(0)"))
    process = start(binary, "-n", "2", "train")
    time.sleep(delay)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=30)
    # -15: nothing had begun. mpirun ends the others when the first of these ranks, which do not agree, has left with 75.
    assert process.returncode in (75, -15) and ("saved" in out) <= (process.returncode == 75), err


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


class Machine:
    """A copy of launch/ with stand-ins for the programs of the system before it on the PATH."""

    def __init__(self, folder):
        self.folder, self.log = folder, folder / "calls"
        shutil.copytree(SOURCE / "launch", folder / "clone/launch")
        (folder / "bin").mkdir()
        self.program("dpkg-query", "echo 'install ok installed'")
        self.program("df", "printf 'head\\nx 1 1 99999999 1 x\\n'")
        self.program("nvcc", "echo release 13.0")
        self.program("cmake", "mkdir -p build/release; touch build/release/build.ninja")
        self.program("python3", 'case "$1" in -c) echo 3.11; exit ;; esac; mkdir -p "$3/bin"; cp "$0.pip" "$3/bin/python"')
        self.program("python3.pip", 'd=$(dirname "$0")/..; echo "${@: -1}" >>' + str(self.log) +
                     '; [ -z "$PIP_FAILS" ] || exit 1; cd "$d"; mkdir -p lib/python3.11/site-packages/torch'
                     '; case "$*" in *-cuda*) mkdir -p lib/python3.11/site-packages/nvidia/cu13/bin; cd "$_"; '
                     'printf "#!/bin/sh\necho release 13.0\n" >nvcc; chmod +x nvcc ;; esac')

    def program(self, name, body):
        (self.folder / "bin" / name).write_text("#!/bin/bash\n" + body + "\n")
        (self.folder / "bin" / name).chmod(0o755)

    def setup(self, *args, script="setup", **env):
        base = {key: value for key, value in os.environ.items() if not key.startswith(("TRIREME_", "XDG_"))}
        base["HOME"] = str(self.folder / "home")
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        return subprocess.run([self.folder / f"clone/launch/{script}.sh", *args], text=True, capture_output=True, timeout=60,
                              env=base | {"TRIREME_DEPS": str(self.folder / "deps"), "PATH": path, "PIP_FAILS": ""} | env)

    def installed(self):
        return self.log.read_text().split() if self.log.exists() else []


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def test_an_interrupted_install_repairs_itself(machine):
    failed = machine.setup(PIP_FAILS="1")
    assert failed.returncode == 1
    assert "pip could not install launch/requirements.txt" in failed.stderr
    again = machine.setup()
    assert again.returncode == 0, again.stderr
    assert "was interrupted; starting it again" in again.stderr
    assert machine.installed() == ["launch/requirements.txt"] * 2
    third = machine.setup()
    assert (third.returncode, third.stderr) == (0, "")
    assert machine.installed() == ["launch/requirements.txt"] * 2


def test_the_compiler_and_the_test_packages_come_when_they_are_wanted(machine):
    machine.program("nvcc", "echo release 11.8")
    if os.path.exists("/usr/local/cuda/bin/nvcc"):
        pytest.skip("this machine has a CUDA compiler of its own")
    result = machine.setup("--tests")
    assert result.returncode == 0, result.stderr
    assert machine.installed() == [f"launch/requirements{kind}.txt" for kind in ("", "-cuda", "-test")]


def test_a_build_with_tests_keeps_them(machine):
    assert machine.setup("--tests").returncode == 0
    assert machine.setup().stderr == ""
    assert machine.installed() == ["launch/requirements.txt", "launch/requirements-test.txt"]


def test_a_build_for_another_torch_is_made_anew(machine):
    assert machine.setup().returncode == 0
    remembered = machine.folder / "clone/build/release/.ninja_deps"
    remembered.touch()
    assert machine.setup("--tests").returncode == 0
    assert remembered.exists()
    assert machine.setup(TRIREME_DEPS=str(machine.folder / "elsewhere")).returncode == 0
    assert not remembered.exists()


def test_a_full_disk_is_found_first(machine):
    machine.program("df", "printf 'head\\nx 1 1 2097152 1 x\\n'")
    result = machine.setup()
    assert result.returncode == 1
    assert f"{machine.folder / 'deps'} has 2 GB free, 6 GB are needed; set TRIREME_DEPS" in result.stderr
    assert machine.installed() == []


@pytest.mark.parametrize("args, free, built, words", [
    ([], 1199, 0, "1199 MB free, the build needs 1200 MB"), ([], 1200, 0, ""), (["--tests"], 4199, 0, "4199 MB free, the build and its tests need 4200 MB"),
    (["--tests"], 3500, 800, "")])
def test_a_disk_that_cannot_hold_the_build_is_found_before_anything_is_installed(machine, args, free, built, words):
    machine.program("df", f'[ "$2" = . ] && mb={free} || mb=20000; printf "head\\nx 1 1 $((mb * 1024)) 1 x\\n"')
    (machine.folder / "clone/build").mkdir()
    machine.program("stat", "echo one disk for all")
    machine.program("du", f"printf '{built}\\tbuild\\n'")
    result = machine.setup(*args)
    assert (result.returncode == 0, machine.installed() != []) == (words == "", words == ""), result.stderr
    if words:
        assert result.stderr == f"setup: {machine.folder}/clone has {words}; make room there or clone to a larger disk\n"


def test_the_disk_of_temporary_files_is_looked_at_too(machine):
    machine.program("df", f'[ "$2" = {machine.folder / "tmp"} ] && gb=2 || gb=20\n'
                          'printf "head\\nx 1 1 $((gb * 1048576)) 1 x\\n"')
    (machine.folder / "tmp").mkdir()
    result = machine.setup(TMPDIR=str(machine.folder / "tmp"))
    assert result.returncode == 1
    assert f"{machine.folder / 'tmp'} has 2 GB free, 3 GB are needed; set TMPDIR to a folder on a larger disk" in result.stderr


def test_all_cores_build_whatever_openmp_is_told(machine):
    (machine.folder / "bin/nproc").symlink_to("/usr/bin/nproc")
    machine.program("awk", '[ -n "$2" ] || cat >/dev/null; echo 9000')  # of memory and disk
    assert machine.setup(OMP_NUM_THREADS="1").returncode == 0
    assert (machine.folder / "clone/build/release/.jobs").read_text() == f"{len(os.sched_getaffinity(0))}\n"
    assert machine.setup(OMP_NUM_THREADS="64").returncode == 0
    assert (machine.folder / "clone/build/release/.jobs").read_text() == f"{len(os.sched_getaffinity(0))}\n"


@pytest.mark.parametrize("cores, memory_gb, jobs", [(8, 9, 4), (2, 9, 2), (8, 1, 1)])
def test_memory_limits_the_jobs(machine, cores, memory_gb, jobs):
    machine.program("nproc", f"echo {cores}")
    machine.program("awk", f'case "$1" in *MemAvail*1048576*) echo {memory_gb} ;; *) cat >/dev/null; echo 9000 ;; esac')
    assert machine.setup().returncode == 0
    assert (machine.folder / "clone/build/release/.jobs").read_text() == f"{jobs}\n"


@pytest.mark.parametrize("package", ["", "ninja-build"])
def test_too_little_memory_is_found_before_anything_is_installed(machine, package):
    machine.program("dpkg-query", f'[ "${{@: -1}}" = "{package}" ] || echo "install ok installed"')
    machine.program("apt-get", f"echo apt-get >>{machine.log}")
    machine.program("awk", 'case "$1" in *MemAvail*) echo 1500 ;; *) cat >/dev/null; echo 9000 ;; esac')
    result = machine.setup()
    assert (result.returncode, result.stderr) == (
        1, "setup: 1500 MB of memory are free, compiling needs 2,000 MB; end other programs or add swap\n")
    assert machine.installed() == []


def test_an_unknown_python_is_refused(machine):
    machine.program("python3", "echo 3.9")
    result = machine.setup()
    assert result.returncode == 1
    assert "the pinned wheels are for Python 3.10 3.11 3.12 3.13 3.14, this is 3.9" in result.stderr


def test_without_root_the_command_for_the_administrator_is_printed(machine):
    machine.program("dpkg-query", '[ "${@: -1}" = ninja-build ] || echo "install ok installed"')
    machine.program("id", "echo 1000")
    machine.program("sudo", "exit 1")
    result = machine.setup()
    assert result.returncode == 1
    assert "apt-get update && apt-get install -y --no-install-recommends ninja-build" in result.stderr


def test_sudo_keeps_the_proxy(machine):
    machine.program("dpkg-query", '[ "${@: -1}" = ninja-build ] || echo "install ok installed"')
    machine.program("id", "echo 1000")
    machine.program("sudo", f'printf "%s\\n" "$*" >>{machine.folder}/sudo')
    machine.setup()
    calls = (machine.folder / "sudo").read_text().splitlines()
    assert [call for call in calls if "apt-get" in call] == [
        "--preserve-env=http_proxy,https_proxy,no_proxy apt-get update -qq",
        "--preserve-env=http_proxy,https_proxy,no_proxy DEBIAN_FRONTEND=noninteractive apt-get install -y "
        "--no-install-recommends ninja-build"]


def test_another_processor_is_said_and_left_to_cmake(machine):
    machine.program("uname", "echo aarch64")
    result = machine.setup(TRIREME_TORCH=str(machine.folder))
    assert "this is not Debian or Ubuntu on x86-64; packages are left to you" in result.stderr
    assert "is not a torch package folder" in result.stderr


def test_another_processor_has_no_wheels(machine):
    machine.program("uname", "echo aarch64")
    machine.program("cmake", "echo CMake Error: this is missing; exit 1")
    result = machine.setup("--tests")
    assert (result.returncode, result.stderr.splitlines()[1:]) == (1, [
        "setup: the pinned wheels are for x86-64; here TRIREME_TORCH has to name the folder of a torch 2.11 package",
        "configuring build/release", "CMake Error: this is missing", "setup: CMake could not configure; what is missing is named above"])
    assert machine.installed() == []


def test_a_torch_that_is_there_is_used(machine):
    torch = machine.folder / "torch"
    (torch / "include/ATen").mkdir(parents=True)
    (torch / "version.py").write_text("__version__ = '2.11.0+cpu'\n")
    machine.program("cmake", 'mkdir -p build/release; touch build/release/build.ninja; echo "$@" >build/arguments')
    for _ in range(2):
        result = machine.setup("--tests", TRIREME_TORCH=str(torch), TRIREME_PYTHON="/their/python")
        assert result.returncode == 0, result.stderr
    assert result.stderr == "" and machine.installed() == []
    assert (machine.folder / "clone/build/arguments").read_text() == (
        f"--preset release -DTRIREME_TORCH={torch} -DTRIREME_PYTHON=/their/python -DTRIREME_TESTS=ON -DTRIREME_CUDA=ON "
        f"-DCMAKE_CUDA_COMPILER={machine.folder}/bin/nvcc\n")


def test_remove_undoes_it_and_waits_for_nobody(machine):
    assert machine.setup().returncode == 0
    lock = next((machine.folder / "deps").glob("env-*.lock"))
    with open(lock) as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        refused = machine.setup("--remove")
        assert refused.returncode == 1
        assert "another setup is installing into" in refused.stderr
    assert (machine.folder / "clone/build").exists()
    tokens = machine.folder / "home/.cache/trireme/tokens"
    tokens.mkdir(parents=True)
    assert machine.setup("--remove").returncode == 0
    assert not tokens.exists()
    assert not (machine.folder / "deps").exists()
    assert not (machine.folder / "clone/build").exists()


def test_what_tests_leave_is_removed_at_the_end_or_by_the_next_run(machine):
    """ctest is the stand-in: its first run is killed with the script."""
    scratch = machine.folder / "tmp"
    scratch.mkdir()
    machine.program("ctest", f'ls "$TMPDIR" >>{machine.folder}/found; touch "$TMPDIR/left"; [ -e {machine.folder}/once ] || '
                             f'{{ touch {machine.folder}/once; kill -KILL $PPID; }}')
    status = [machine.setup(script="test", TMPDIR=str(scratch)).returncode for _ in range(2)]
    assert status == [-signal.SIGKILL, 0]
    assert (machine.folder / "found").read_text() == "" and os.listdir(scratch) == []


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


def test_counter_loses_no_case_of_a_file_that_two_programs_wrote(tmp_path):
    status, lines = count(tmp_path, {"x": CASES.format("") + "tes>\n", "y": CASES.format("")})
    assert (status, lines[-1]) == (1, "1 passed, 1 failed, 1 skipped")


def test_counter_refuses_no_tests(tmp_path):
    status, lines = count(tmp_path, {})
    assert (status, lines[-1]) == (1, "0 passed, 0 failed, 0 skipped")
