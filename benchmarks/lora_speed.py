"""LoRA training, tokens a second and peak memory, beside transformers + PEFT on the same shape and the same tokens.
Run with the Python of the test environment. The sides take turns; CPU time is that of all threads."""
import argparse
import json
import pathlib
import tempfile

import tokenizers

import measure
from lora_shape import LENGTH, RANK, ROWS, SHAPE, TOKENIZER, prepare, trireme


def main():
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--steps", type=int, default=10)
    arguments.add_argument("--warmup", type=int, default=3)
    arguments.add_argument("--dtypes", default="bfloat16,float32")
    measure.threads_argument(arguments)
    arguments.add_argument("--print", action="store_true", help="write no result file")
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        prepare(folder, ROWS * options.steps)
        ids = tokenizers.Tokenizer.from_file(str(TOKENIZER / "tokenizer.json")).encode((folder / "text.txt").read_text()).ids
        (folder / "ids.json").write_text(json.dumps([ids[i * LENGTH:(i + 1) * LENGTH] for i in range(ROWS * options.steps)]))
        sides = {dtype: measure.Sides() for dtype in options.dtypes.split(",")}
        for i in range(options.rounds):
            for dtype, table in sides.items():
                out, steps = trireme(folder, f"run-{dtype}-{i}", dtype, options.steps, threads=options.threads)
                progress = folder / f"progress-{dtype}-{i}"
                other = measure.run(measure.python("lora_baseline.py", folder / "config.json", folder / "ids.json",
                                                   options.steps, ROWS, RANK, dtype, progress),
                                    progress=str(progress), env=measure.threads_env(options.threads))
                for side, result, tokens in (("trireme", out, measure.tokens_of(steps)),
                                             ("baseline", other, [ROWS * LENGTH] * options.steps)):
                    speed, cpu = measure.rates(result["lines"], tokens, options.warmup)
                    table.add("LoRA training speed", side, speed)
                    table.add("CPU time of LoRA training", side, cpu)
                    table.add("peak memory of LoRA training", side, result["peak_bytes"])
    best = {side: max(sides, key=lambda dtype: sides[dtype].median("LoRA training speed", side))
            for side in ("trireme", "baseline")}
    rows = []
    both = measure.Sides()  # each in its best dtype
    for what in ("LoRA training speed", "peak memory of LoRA training", "CPU time of LoRA training"):
        for side in best:
            for value in sides[best[side]].values[what][side]:
                both.add(what, side, value)
    shape = f"{SHAPE}; {measure.threads_text(options.threads)}"
    tables = [(both, shape, f"transformers + PEFT, {best['baseline']}", (1.5, 0.7))]
    tables += [(table, f"{shape}, both in {dtype}", "transformers + PEFT", (None, None))
               for dtype, table in sides.items() if len(sides) > 1]
    for table, shape, name, targets in tables:
        rows += [table.row("LoRA training speed", shape, "tokens/s", name, targets[0]),
                 table.row("peak memory of LoRA training", shape, "MB", name, targets[1], scale=1e-6),
                 table.row("CPU time of LoRA training", shape, "s/1000 tokens", name)]
    measure.finish("lora_speed" + (f"_{options.threads}_thread" if options.threads else ""), rows,
                   f"{f'each in the better of {options.dtypes}' if len(sides) > 1 else f'both in {options.dtypes}'} "
                   f"(Trireme {best['trireme']}), {options.rounds} rounds in which the "
                   f"sides take turns, {options.steps} steps each, the first {options.warmup} not counted; memory is VmHWM",
                   not options.print)


if __name__ == "__main__":
    main()
