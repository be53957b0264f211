"""Full fine-tuning on several ranks of this machine: plain data parallelism beside PyTorch's DDP, ZeRO-3 beside FSDP, both over
gloo with transformers' model, the same shape, tokens, ranks and threads. Run with the Python of the test environment. The
sides take turns; CPU time is that of all ranks."""
import argparse
import json
import pathlib
import tempfile

import tokenizers

import lora_shape
import measure

MODEL = lora_shape.MODEL | {"vocab_size": 8192, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 4,
                            "num_attention_heads": 6, "num_key_value_heads": 2}
ROWS, LENGTH = 2, lora_shape.LENGTH
SHAPE = "384 wide, 4 layers, 6/2 heads, 8,192 tokens, float32"
BASELINES = {"ddp": ("PyTorch DDP, gloo", 0), "fsdp": ("PyTorch FSDP2, gloo", 3)}  # name, parallel.zero


def trireme(folder, name, ranks, zero, steps):
    run = folder / name
    out = measure.run(measure.mpirun(
        ranks, measure.BINARY, "train", f"--model.config={folder / 'config.json'}", f"--model.tokenizer={lora_shape.TOKENIZER}",
        f"--data.train={folder / 'text.txt'}", f"--data.max_length={LENGTH}", f"--data.cache={folder / 'cache'}",
        "--data.shuffle=false", "--task.kind=pretrain", "--train.dtype=float32", f"--train.steps={steps}",
        f"--train.micro_batch_size={ROWS}", "--train.threads=1", "--train.max_grad_norm=1", f"--parallel.zero={zero}",
        "--schedule.kind=constant", "--optim.lr=1e-4", f"--run.dir={run}"), progress=str(run / "metrics.jsonl"))
    return out, measure.tokens_of(measure.train_steps(run))


def main():
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--ranks", type=int, default=2)
    arguments.add_argument("--steps", type=int, default=12)
    arguments.add_argument("--warmup", type=int, default=3)
    arguments.add_argument("--kinds", default="ddp,fsdp")
    arguments.add_argument("--print", action="store_true", help="write no result file")
    options = arguments.parse_args()
    num_rows = options.ranks * ROWS * options.steps
    tables = {kind: measure.Sides() for kind in options.kinds.split(",")}
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        lora_shape.prepare(folder, num_rows)
        (folder / "config.json").write_text(json.dumps(MODEL))
        ids = tokenizers.Tokenizer.from_file(str(lora_shape.TOKENIZER / "tokenizer.json")).encode((folder / "text.txt").read_text()).ids
        (folder / "ids.json").write_text(json.dumps([ids[i * LENGTH:(i + 1) * LENGTH] for i in range(num_rows)]))
        for i in range(options.rounds):
            for kind, table in tables.items():
                out, tokens = trireme(folder, f"run-{kind}-{i}", options.ranks, BASELINES[kind][1], options.steps)
                progress = folder / f"progress-{kind}-{i}"
                other = measure.run(measure.mpirun(options.ranks, *measure.python(
                    "parallel_baseline.py", kind, folder / "config.json", folder / "ids.json", options.steps, ROWS, progress,
                    folder / f"meeting-{kind}-{i}")), progress=str(progress), env={"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"})
                for side, result, of_steps in (("trireme", out, tokens),
                                               ("baseline", other, [options.ranks * ROWS * LENGTH] * options.steps)):
                    speed, cpu = measure.rates(result["lines"], of_steps, options.warmup)
                    table.add("training speed", side, speed)
                    table.add("CPU time", side, cpu)
                    table.add("peak memory", side, result["peak_bytes"])
    rows = []
    for kind, table in tables.items():
        name, zero = BASELINES[kind]
        mine = f"{options.ranks} ranks of 1 thread, {'ZeRO-3' if zero else 'plain copies'}"
        shape = f"{SHAPE}, {ROWS} x {LENGTH} a rank"
        rows += [dict(table.row("training speed", shape, "tokens/s", name, 1), what=f"training speed, {mine}"),
                 dict(table.row("CPU time", shape, "s/1000 tokens", name), what=f"CPU time, {mine}"),
                 dict(table.row("peak memory", shape, "MB", name, scale=1e-6), what=f"peak memory of all ranks, {mine}")]
    measure.finish("parallel_speed", rows,
                   f"Full fine-tuning with AdamW and clipping on both sides; {options.rounds} rounds in which the sides take turns, "
                   f"{options.steps} steps each, the first {options.warmup} not counted; memory is VmHWM", not options.print)


if __name__ == "__main__":
    main()
