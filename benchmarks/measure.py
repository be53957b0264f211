"""What the benchmark drivers share: where things are, one watched process, and the form of a result file."""
import datetime
import json
import os
import pathlib
import statistics
import subprocess
import sys
import threading
import time

SOURCE = pathlib.Path(__file__).resolve().parent.parent
BINARY = os.environ.get("TRIREME_BINARY", str(SOURCE / "build/release/trireme"))
DATA = os.environ.get("TRIREME_TEST_DATA")
RESULTS = SOURCE / "benchmarks/results"
MPI_ENV = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
TICKS = os.sysconf("SC_CLK_TCK")


def python(script, *arguments):
    """Command of a baseline script, with the Python that runs this (it needs the packages of requirements-test.txt)."""
    return [sys.executable, str(SOURCE / "benchmarks" / script), *map(str, arguments)]


def mpirun(ranks, *command):
    return ["mpirun", "-q", "--bind-to", "none", "--oversubscribe", "-n", str(ranks), *map(str, command)]


class Watch:
    """A process and all it starts, looked at from outside: peak memory, and the time and CPU time at every line that
    `progress` (a file that need not exist yet) gets."""

    def __init__(self, pid, progress):
        self.pid, self.progress = pid, progress
        self.start, self.peaks, self.lines = time.monotonic(), {}, []
        self.running = True
        self.thread = threading.Thread(target=self.loop)
        self.thread.start()

    def processes(self, pid):
        try:
            children = open(f"/proc/{pid}/task/{pid}/children").read().split()
        except OSError:
            return []
        return [pid] + [p for child in children for p in self.processes(int(child))]

    def look(self):
        cpu = 0
        for pid in self.processes(self.pid):
            try:
                fields = open(f"/proc/{pid}/stat").read().rsplit(")", 1)
                status = open(f"/proc/{pid}/status").read()
            except OSError:
                continue
            cpu += sum(map(int, fields[1].split()[11:13]))
            if not fields[0].endswith(("(mpirun", "(orted")) and "VmHWM" in status:
                self.peaks[pid] = int(status.split("VmHWM:")[1].split()[0]) * 1024
        return cpu / TICKS

    def loop(self):
        size, looked = 0, 0
        while self.running:
            now = time.monotonic() - self.start
            grown = self.progress and os.path.exists(self.progress) and os.path.getsize(self.progress) > size
            if grown or now > looked + 0.05:
                cpu, looked = self.look(), now
            if grown:
                text = open(self.progress, "rb").read()
                size = len(text)
                self.lines += [(now, cpu)] * (text.count(b"\n") - len(self.lines))
            time.sleep(0.005)


def run(command, env=None, progress=None, timeout=900):
    """Runs to the end. Returns stdout, seconds, peak_bytes (VmHWM summed over the processes but mpirun) and lines: for
    every line of `progress` the seconds since the start and the CPU seconds used until then."""
    process = subprocess.Popen(command, env=dict(os.environ, **MPI_ENV, **(env or {})), cwd=SOURCE, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    watch = Watch(process.pid, progress)
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    finally:
        watch.running = False
        watch.thread.join()
        process.kill()
    if process.returncode:
        sys.exit(f"{' '.join(command)}\nended with {process.returncode}\n{stderr[-4000:]}")
    return {"stdout": stdout, "seconds": time.monotonic() - watch.start, "peak_bytes": sum(watch.peaks.values()),
            "lines": watch.lines}


def rates(lines, tokens, warmup):
    """(tokens a second, CPU seconds a thousand tokens) of the steps after `warmup` ones; `tokens` of every step."""
    (first, first_cpu), (last, last_cpu) = lines[warmup - 1], lines[len(tokens) - 1]
    count = sum(tokens[warmup:])
    return count / (last - first), (last_cpu - first_cpu) / count * 1000


def train_steps(folder):
    lines = [json.loads(line) for line in (pathlib.Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == "train"]


def tokens_of(steps):
    return [round(step["tokens_per_second"] * step["seconds"]) for step in steps]


class Sides:
    """Numbers of both sides, round by round: medians, and as ratio the median of the rounds' own ratios, which other
    work on the machine hardly changes because the two of a round run one after the other."""

    def __init__(self):
        self.values = {}

    def add(self, what, side, value):
        self.values.setdefault(what, {}).setdefault(side, []).append(value)

    def median(self, what, side):
        return statistics.median(self.values[what][side])

    def row(self, what, shape, unit, baseline_name=None, target=None, sides=("trireme", "baseline"), scale=1):
        mine, theirs = self.values[what][sides[0]], self.values[what].get(sides[1])
        number = lambda values: float(f"{statistics.median(values) * scale:.4g}")
        return {"what": what, "shape": shape, "unit": unit, "trireme": number(mine),
                "baseline": number(theirs) if theirs else None, "baseline_name": baseline_name,
                "ratio": float(f"{statistics.median(a / b for a, b in zip(mine, theirs)):.4g}") if theirs else None,
                "target": target}


def row(what, shape, unit, trireme, baseline=None, baseline_name=None, ratio=None, target=None):
    """`ratio` is trireme / baseline where nothing else is given."""
    number = lambda x: None if x is None else float(f"{x:.4g}")
    return {"what": what, "shape": shape, "unit": unit, "trireme": number(trireme), "baseline": number(baseline),
            "baseline_name": baseline_name,
            "ratio": number(ratio if ratio is not None else trireme / baseline if baseline else None), "target": target}


def hardware():
    cpu = next((line.split(":", 1)[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "")
    memory = int(next(line for line in open("/proc/meminfo") if line.startswith("MemTotal")).split()[1])
    return {"cpu": cpu, "cores": len(os.sched_getaffinity(0)), "memory_gb": round(memory / 1e6, 1)}


def threads_argument(arguments):
    arguments.add_argument("--threads", type=int, default=0, help="of each side; 0: one a core. One thread and its CPU time "
                           "tell most where other work disturbs")


def threads_env(threads):
    """What gives a baseline its number of threads; nothing where it takes its own."""
    return {"OMP_NUM_THREADS": str(threads)} if threads else {}


def threads_text(threads):
    return "all cores" if threads == 0 else f"{threads} thread{'s' if threads > 1 else ''} each"


def finish(benchmark, rows, notes, write):
    """Prints the rows and, where asked to, keeps them in results/."""
    for line in rows:
        print(json.dumps(line))
    if not write:
        return
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=SOURCE, capture_output=True, text=True).stdout
    load = f"{os.getloadavg()[0]:.1f}"
    result = {"benchmark": benchmark, "date": datetime.date.today().isoformat(), "commit": commit.strip(),
              "hardware": hardware(), "rows": rows,
              "notes": f"{notes}. A shared virtual machine; load average at the end {load}."}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{benchmark}.json").write_text(json.dumps(result, indent=1) + "\n")
