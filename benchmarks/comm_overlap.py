"""Share of the communication that computation hides on two ranks (bench_comm_overlap): gradient buckets and ZeRO-3's prefetch, with
a sleep as computation and with matrix products; and the all-reduce beside MPI's. Writes results/comm_overlap.json."""
import argparse
import json

import measure


def main():
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--print", action="store_true", help="do not write the result")
    arguments.add_argument("--ranks", type=int, default=2)
    options = arguments.parse_args()
    out = measure.run(measure.mpirun(options.ranks, measure.SOURCE / "build/release/bench_comm_overlap"), env={"OMP_NUM_THREADS": "1"})
    result = json.loads(out["stdout"])
    rows = []
    for r in result["overlap"]:
        shape = f"{options.ranks} ranks, {r['bytes'] >> 20} MiB, while computing: {r['compute']}"
        rows.append(measure.row(f"{r['what']}: hidden share", shape, "share", r["hidden_share"],
                                target=0.9 if r["compute"] == "sleep" else None))
        rows.append(measure.row(f"{r['what']}: together", shape, "ms", r["overlapped_ms"], r["sequential_ms"],
                                "computing, then communicating"))
    for r in result["all_reduce"]:
        rows.append(measure.row("all-reduce, fp32", f"{options.ranks} ranks, {r['bytes']:,} bytes", "us", r["trireme_us"],
                                r["mpi_iallreduce_us"], "MPI_Iallreduce"))
    measure.finish("comm_overlap", rows,
                   "One thread a rank; medians of 15, what is compared taking turns. A sleep leaves the cores free, matrix "
                   "products do not: there the message's own work takes time from them", not options.print)


if __name__ == "__main__":
    main()
