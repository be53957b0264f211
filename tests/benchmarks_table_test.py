"""benchmarks/table.py: what is kept in benchmarks/results is readable, and a target is judged on the right side."""
import json
import os
import pathlib
import subprocess
import sys

SCRIPT = pathlib.Path(os.environ["TRIREME_SOURCE"]) / "benchmarks/table.py"


def row(what, unit, trireme, baseline, ratio, target):
    return {"what": what, "shape": "x", "unit": unit, "trireme": trireme, "baseline": baseline, "baseline_name": "other",
            "ratio": ratio, "target": target}


def printed(folder=None, check=True):
    command = [sys.executable, str(SCRIPT)] + ([str(folder)] if folder else [])
    return subprocess.run(command, capture_output=True, text=True, check=check)


def write(folder, rows):
    (folder / "a.json").write_text(json.dumps({
        "benchmark": "a", "date": "2026-01-01", "commit": "abc", "hardware": {"cpu": "c", "cores": 2, "memory_gb": 8},
        "rows": rows, "notes": "n"}))


def test_targets_by_unit(tmp_path):
    write(tmp_path, [row("fast", "tokens/s", 30, 10, 3.0, 1.5), row("slow", "tokens/s", 10, 10, 1.0, 1.5),
                     row("small", "MB", 5, 10, 0.5, 0.7), row("large", "MB", 9, 10, 0.9, 0.7),
                     row("soon", "s", 1.5, None, None, 2), row("late", "s", 2.5, None, None, 2),
                     row("share", "share", 0.95, None, None, 0.9), row("near", "nats", 2.01, 2, 1.005, 1.01), row("far", "nats", 2.1, 2, 1.05, 1.01), row("only said", "s", 1, 2, 0.5, None)])
    last = {line.split(" | ")[0].strip("| "): line.split(" | ")[-1].strip("| ")
            for line in printed(tmp_path).stdout.splitlines() if " | x | " in line}
    assert last == {"fast": "reached", "slow": "missed", "small": "reached", "large": "missed", "soon": "reached",
                    "late": "missed", "share": "reached", "near": "reached", "far": "missed", "only said": ""}


def test_a_row_of_another_form_is_refused(tmp_path):
    broken = row("x", "s", 1, None, None, None)
    del broken["target"]
    write(tmp_path, [broken])
    out = printed(tmp_path, check=False)
    assert out.returncode != 0 and "a.json" in out.stderr


def test_kept_results_are_readable():
    kept = list((SCRIPT.parent / "results").glob("*.json"))
    assert kept
    text = printed().stdout
    for path in kept:
        assert f"- {json.loads(path.read_text())['benchmark']}: " in text
