"""Share of the communication that computation hides on two ranks (bench_comm_overlap): gradient buckets and ZeRO-3's prefetch, with
a sleep as computation and with matrix products; and the all-reduce beside MPI's. Writes results/comm_overlap.json. With --rows
what tensor parallelism hides of its messages: results/row_overlap.json."""
import argparse
import json

import measure


def finish_rows(results, options):
    rows = []
    for r in results:
        link = f"a link of {r['rate'] / 1e9:.0f} GB/s that is a timer" if r["rate"] else "MPI in one host"
        shape = f"{options.ranks} ranks, {r['phase']}, {'LoRA' if r['lora'] else 'full'}, {link}"
        for way, name in [("gathers", "rows gathered while multiplied"), ("pieces", "and sums in 2 pieces")]:
            rows.append(measure.row(name, shape, "ms", r[f"{way}_ms"], r["waits_ms"], "waiting for all rows"))
            rows.append(measure.row(f"{name}: share of the messages' time saved", shape, "share", r[f"{way}_saved"]))
        rows.append(measure.row("the messages alone", shape, "ms", r["messages_ms"], r["compute_ms"], "the model without messages"))
    measure.finish("row_overlap", rows,
                   "Two blocks of 512 hidden features, 512 tokens, fp32, one thread a rank; medians of 45, shares of 45 differences "
                   "between neighbours. Differences below 1 ms are noise, which is all that MPI's messages take. While waiting for all rows full training fills waits "
                   "of backward with weight gradients, LoRA has none. Used between hosts and over NCCL, not over MPI in one host",
                   not options.print)


def main():
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--print", action="store_true", help="do not write the result")
    arguments.add_argument("--ranks", type=int, default=2)
    arguments.add_argument("--rows", action="store_true", help="tensor parallelism alone")
    options = arguments.parse_args()
    command = measure.mpirun(options.ranks, measure.SOURCE / "build/release/bench_comm_overlap", *(["rows"] if options.rows else []))
    result = json.loads(measure.run(command, env={"OMP_NUM_THREADS": "1"})["stdout"])
    if options.rows:
        return finish_rows(result["rows"], options)
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
