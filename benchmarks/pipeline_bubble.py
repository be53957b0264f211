"""Idle time of the pipeline schedules on 4 ranks, beside theory and 1f1b (bench_pipeline_bubble: compute is a sleep). Writes
results/pipeline_bubble.json."""
import argparse
import json

import measure


def main():
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--print", action="store_true", help="do not write the result")
    arguments.add_argument("--ranks", type=int, default=4)
    arguments.add_argument("--micro-batches", type=int, default=8)
    arguments.add_argument("--repeats", type=int, default=3)
    arguments.add_argument("--milliseconds", type=int, default=200, help="of an action of a whole stage")
    options = arguments.parse_args()
    bench = measure.SOURCE / "build/release/bench_pipeline_bubble"
    out = measure.run(measure.mpirun(options.ranks, bench, options.micro_batches, options.repeats, options.milliseconds),
                      env={"OMP_NUM_THREADS": "1"})
    measured = json.loads(out["stdout"])["schedules"]
    plain = next(s for s in measured if s["name"] == "1f1b")
    rows = []
    for s in measured:
        shape = f"{options.ranks} stages, {options.micro_batches} micro-batches"
        if s["virtual_stages"] > 1:
            shape += f", {s['virtual_stages']} chunks a stage"
        rows.append(measure.row(f"{s['name']}: idle share of the stages", shape, "% idle", 100 * s["idle_share"],
                                100 * s["idle_share_in_theory"], "theory", target=1.05))
        rows.append(measure.row(f"{s['name']}: a step", shape, "s", s["seconds"], plain["seconds"], "1f1b",
                                target=1 if s["name"] in ("interleaved", "zb-h1", "zb-v") else None))
    measure.finish("pipeline_bubble", rows,
                   f"Compute is a sleep: forward, input gradient and weight gradient {options.milliseconds} ms each a stage and "
                   f"micro-batch; idle time from the runner's events; medians of {options.repeats}, the schedules taking turns", not options.print)


if __name__ == "__main__":
    main()
