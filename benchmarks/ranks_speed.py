"""Several ranks on this machine: the time from the start of mpirun to the end of the first step, speed on two and four ranks
beside one, and the bytes of gradients that a step reduces."""
import argparse
import pathlib
import tempfile

import lora_shape
import measure

QUICKSTART = "quickstart model, 16 rows a step"


def quickstart(folder, name, ranks, rows, steps, threads=0):
    run = folder / name
    out = measure.run(measure.mpirun(
        ranks, measure.BINARY, "train", "configs/quickstart.ini", f"--run.dir={run}", f"--train.steps={steps}",
        f"--train.micro_batch_size={rows // ranks}", f"--train.threads={threads}", "--eval.every=0",
        f"--data.cache={folder / 'cache'}"), progress=str(run / "metrics.jsonl"))
    return out, measure.train_steps(run)


def main():
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--print", action="store_true", help="write no result file")
    options = arguments.parse_args()
    table, reduced = measure.Sides(), {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        lora_shape.prepare(folder, 100)
        layouts = ((1, 1), (2, 1), (4, 1), (1, 2))  # ranks, threads of each
        cases = {QUICKSTART: (60, 10, lambda name, ranks, threads, steps: quickstart(folder, name, ranks, 16, steps, threads)),
                 lora_shape.SHAPE + ", bf16": (8, 2, lambda name, ranks, threads, steps: lora_shape.trireme(
                     folder, name, "bfloat16", steps, ranks, threads))}
        quickstart(folder, "caches", 1, 16, 1)
        for i in range(options.rounds):
            for ranks in (4, 8):
                out, steps = quickstart(folder, f"start-{ranks}-{i}", ranks, 16, 1)
                table.add(f"{ranks} ranks: start to first step done", "trireme", out["lines"][0][0])
                table.add(f"{ranks} ranks: the same, CPU time of all", "trireme", out["lines"][0][1])
            for shape, (steps, warmup, train) in cases.items():
                if i >= 3:
                    break
                for ranks, threads in layouts:
                    out, lines = train(f"{len(shape)}-{ranks}-{threads}-{i}", ranks, threads, steps)
                    speed, _ = measure.rates(out["lines"], measure.tokens_of(lines), warmup)
                    table.add(shape, f"{ranks}x{threads}", speed)
                    if ranks == 2:
                        reduced[shape] = lines[-1]["bytes_reduced"]
    rows = [table.row(f"{ranks} ranks: start to first step done", f"{QUICKSTART}, tokens cached", "s", target=target)
            for ranks, target in ((4, 2), (8, 4))]
    rows += [table.row(f"{ranks} ranks: the same, CPU time of all", f"{QUICKSTART}, tokens cached", "s") for ranks in (4, 8)]
    for shape in cases:
        for side, what, target in (("2x1", "2 ranks of 1 thread", 1.6), ("4x1", "4 ranks of 1 thread", None),
                                   ("1x2", "1 rank of 2 threads", None)):
            rows.append(dict(table.row(shape, shape, "tokens/s", "1 rank of 1 thread", target, (side, "1x1")), what=what))
        rows.append(measure.row("gradients reduced a step", f"{shape}, 2 ranks", "bytes", reduced[shape]))
    measure.finish("ranks_speed", rows,
                   f"start: median of {options.rounds}; speeds: {min(3, options.rounds)} rounds in which the layouts take turns",
                   not options.print)


if __name__ == "__main__":
    main()
