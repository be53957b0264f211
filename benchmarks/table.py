"""Prints the results in benchmarks/results (or the folder named) as one Markdown table, and where each was measured."""
import json
import pathlib
import sys

LESS_IS_BETTER = {"s", "ms", "us", "MB", "bytes", "s/1000 tokens", "% idle", "nats", "perplexity"}
KEYS = {"what", "shape", "unit", "trireme", "baseline", "baseline_name", "ratio", "target"}


def reached(row):
    """Of a target: what has one is the ratio where there is a baseline, else the number itself. None without a target."""
    if row["target"] is None:
        return None
    value = row["ratio"] if row["baseline"] is not None else row["trireme"]
    return value <= row["target"] if row["unit"] in LESS_IS_BETTER else value >= row["target"]


def number(value):
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(folder):
    lines = ["| what | shape | Trireme | baseline | ratio | target | |", "|---|---|---:|---|---:|---:|---|"]
    places = []
    for path in sorted(pathlib.Path(folder).glob("*.json")):
        result = json.loads(path.read_text())
        for row in result["rows"]:
            if set(row) != KEYS:
                sys.exit(f"{path}: a row has the keys {sorted(row)}, expected {sorted(KEYS)}")
            least = "" if row["target"] is None else ("≤ " if row["unit"] in LESS_IS_BETTER else "≥ ") + number(row["target"])
            baseline = "" if row["baseline"] is None else f"{number(row['baseline'])} ({row['baseline_name']})"
            lines.append(f"| {row['what']} | {row['shape']} | {number(row['trireme'])} {row['unit']} | {baseline} | "
                         f"{number(row['ratio'])} | {least} | { {None: '', True: 'reached', False: 'missed'}[reached(row)]} |")
        hardware = result["hardware"]
        places.append(f"- {result['benchmark']}: {result['date']}, commit {result['commit']}, {hardware['cpu']}, "
                      f"{hardware['cores']} cores, {hardware['memory_gb']} GB. {result['notes']}")
    return "\n".join(lines + [""] + places)


if __name__ == "__main__":
    print(table(sys.argv[1] if len(sys.argv) > 1 else pathlib.Path(__file__).resolve().parent / "results"))
