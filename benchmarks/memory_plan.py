"""The most memory that a rank's tensors hold in a training step, beside what `trireme plan` says of it, for the ways of sharing a
model out over two ranks; and the resident memory of the process above what it had before there was a model."""
import argparse
import json
import pathlib
import tempfile

import measure

SHAPE = "46 M parameters (hidden 512, 12 layers, vocabulary 8,192), 4 rows of 256 tokens, fp32"
CONFIG = dict(model_type="llama", vocab_size=8192, hidden_size=512, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=8,
              num_key_value_heads=4, head_dim=64, rms_norm_eps=1e-5, max_position_embeddings=1024, tie_word_embeddings=False)
EVALUATION = ["--train.recompute=full", "--eval.micro_batch_size=48", "--eval.every=2", "--data.eval_fraction=0.5"]
CASES = {
    "1 rank": (1, []),
    "data 2": (2, []),
    "ZeRO-1": (2, ["--parallel.zero=1"]),
    "ZeRO-1, optimizer by way of host memory": (2, ["--parallel.zero=1", "--optim.offload=true"]),
    "ZeRO-2": (2, ["--parallel.zero=2"]),
    "ZeRO-3": (2, ["--parallel.zero=3"]),
    "tensor 2": (2, ["--parallel.tensor=2"]),
    "tensor 2, selective recomputation": (2, ["--parallel.tensor=2", "--train.recompute=selective"]),
    "tensor 2, full recomputation": (2, ["--parallel.tensor=2", "--train.recompute=full"]),
    "pipeline 2, 1f1b of 4 micro-batches": (2, ["--parallel.pipeline=2", "--train.accumulation=4"]),
    "pipeline 2, zb-h1 of 4 micro-batches": (2, ["--parallel.pipeline=2", "--train.accumulation=4", "--parallel.schedule=zb-h1"]),
    "evaluation of 48 rows": (1, EVALUATION),
    "tensor 2, evaluation of 48 rows": (2, ["--parallel.tensor=2", *EVALUATION]),
    "pipeline 2, evaluation of 48 rows": (2, ["--parallel.pipeline=2", "--train.accumulation=2", *EVALUATION]),
    "ZeRO-3, LoRA, 2 micro-batches": (2, ["--parallel.zero=3", "--lora.rank=8", "--train.accumulation=2"]),
}


def main():
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--only", help="cases whose name has this in it")
    arguments.add_argument("--print", action="store_true", help="write no result file")
    options = arguments.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        (folder / "config.json").write_text(json.dumps(CONFIG))
        (folder / "text.txt").write_text((measure.SOURCE / "README.md").read_text() * 4)
        for number, (name, (ranks, keys)) in enumerate(CASES.items()):
            if options.only and options.only not in name:
                continue
            out = measure.run(measure.mpirun(
                ranks, pathlib.Path(measure.BINARY).parent / "bench_memory_plan", f"--run.dir={folder / str(number)}", f"--model.config={folder}/config.json",
                f"--model.tokenizer={measure.SOURCE}/configs/quickstart/model", "--task.kind=pretrain", f"--data.train={folder}/text.txt",
                f"--data.cache={folder}/cache", "--data.max_length=256", "--train.micro_batch_size=4", "--train.steps=10", "--train.stop_after=2",
                "--checkpoint.async=false", "--train.threads=1", "--log.level=error", *keys))
            said = [json.loads(line) for line in out["stdout"].splitlines()]
            worst = max(said, key=lambda rank: rank["tensor_bytes"] / rank["planned_bytes"])
            print(name, worst, flush=True)
            rows.append(measure.row(f"{name}: tensors at the peak", SHAPE, "MB", worst["tensor_bytes"] / 1e6, worst["planned_bytes"] / 1e6, "plan", target=1.05))
            rows.append(measure.row(f"{name}: resident above the process", SHAPE, "MB", worst["resident_bytes"] / 1e6))
    measure.finish("memory_plan", rows, "the rank of the largest ratio; two steps; bytes of tensors counted in the allocator, without what "
                   "MPI and the matrix library take for themselves, which the resident memory has", not options.print)


if __name__ == "__main__":
    main()
