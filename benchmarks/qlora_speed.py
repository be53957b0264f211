"""QLoRA training (NF4, double quantization, bfloat16): tokens a second and peak memory, beside transformers + PEFT + bitsandbytes on the
same weights and tokens, and beside Trireme's own LoRA in bfloat16; and what a model of 1.1B parameters takes in memory with each. Run
with the Python of the test environment. The sides take turns; CPU time is that of all threads."""
import argparse
import json
import pathlib
import tempfile

import tokenizers
import torch
import transformers

import measure
from lora_shape import TOKENIZER

MODEL = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 8192, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 6,
         "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
         "hidden_act": "silu", "tie_word_embeddings": False, "initializer_range": 0.02, "eos_token_id": 2}
BILLION = MODEL | {"vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32}
ROWS, LENGTH, RANK = 2, 512, 16
SHAPE = "1,024 wide, 6 layers, 16/4 heads, 8,192 tokens, rank 16 all linear, 2 x 512"
BILLION_SHAPE = "1.1B: 2,048 wide, 22 layers, 32/4 heads, 32,000 tokens, rank 16 all linear, 1 x 128, full recomputation, adapters of both without masters and with moments in 8 bits, no copy for a checkpoint"


def trireme(folder, name, base, steps, options, model, length, rows, *keys):
    run = folder / name
    out = measure.run(measure.mpirun(
        1, measure.BINARY, "train", *model, f"--model.tokenizer={TOKENIZER}", f"--data.train={folder / 'text.txt'}", f"--data.max_length={length}",
        f"--data.cache={folder / 'cache'}", "--data.shuffle=false", "--task.kind=pretrain", "--train.dtype=bfloat16", f"--train.steps={steps}", f"--train.micro_batch_size={rows}",
        f"--lora.rank={RANK}", f"--train.threads={options.threads}", f"--quant.base={base}", "--schedule.kind=constant", "--optim.lr=1e-4", f"--run.dir={run}", *keys),
        progress=str(run / "metrics.jsonl"))
    return out, measure.train_steps(run)


def main():
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--steps", type=int, default=8)
    arguments.add_argument("--warmup", type=int, default=3)
    measure.threads_argument(arguments)
    arguments.add_argument("--print", action="store_true", help="write no result file")
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        records = (measure.SOURCE / "configs/quickstart/train.jsonl").read_text().splitlines()
        text = "\n".join(m["content"] for r in records for m in json.loads(r)["messages"])
        (folder / "text.txt").write_text("\n".join([text] * (2 + options.steps * ROWS * LENGTH // (len(text) // 4))))
        ids = tokenizers.Tokenizer.from_file(str(TOKENIZER / "tokenizer.json")).encode((folder / "text.txt").read_text()).ids
        (folder / "ids.json").write_text(json.dumps([ids[i * LENGTH:(i + 1) * LENGTH] for i in range(ROWS * options.steps)]))
        for name, config in (("model", MODEL), ("billion", BILLION)):
            (folder / f"{name}.json").write_text(json.dumps(config))
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder / "model.json"), dtype=torch.bfloat16).save_pretrained(folder / "model")
        theirs, ours, billion = measure.Sides(), measure.Sides(), measure.Sides()
        for i in range(options.rounds):
            progress = folder / f"progress-{i}"
            model = [f"--model.path={folder / 'model'}"]
            out, steps = trireme(folder, f"nf4-{i}", "nf4", options.steps, options, model, LENGTH, ROWS)
            other = measure.run(measure.python("lora_baseline.py", folder / "model", folder / "ids.json", options.steps, ROWS, RANK, "nf4", progress), progress=str(progress),
                                env=measure.threads_env(options.threads))
            plain, plain_steps = trireme(folder, f"none-{i}", "none", options.steps, options, model, LENGTH, ROWS)
            for table, side, result, tokens in ((theirs, "trireme", out, measure.tokens_of(steps)), (theirs, "baseline", other, [ROWS * LENGTH] * options.steps),
                                                (ours, "trireme", out, measure.tokens_of(steps)), (ours, "baseline", plain, measure.tokens_of(plain_steps))):
                speed, cpu = measure.rates(result["lines"], tokens, options.warmup)
                table.add("speed", side, speed)
                table.add("CPU time", side, cpu)
                table.add("peak memory", side, result["peak_bytes"])
        small = ["--train.recompute=full", "--checkpoint.async=false", "--optim.kind=adamw8bit", "--optim.masters=false"]
        empty = trireme(folder, "empty", "none", 1, options, [f"--model.config={measure.SOURCE / 'configs/quickstart/model/config.json'}"], 128, 1)[0]["peak_bytes"]
        for side, base in (("trireme", "nf4"), ("baseline", "none")):
            peak = trireme(folder, f"billion-{base}", base, 2, options, [f"--model.config={folder / 'billion.json'}"], 128, 1, *small)[0]["peak_bytes"]
            billion.add("memory", side, peak - empty)
    shape = f"{SHAPE}; {measure.threads_text(options.threads)}"
    rows = []
    for table, name, target in ((theirs, "transformers + PEFT + bitsandbytes", 1.5), (ours, "Trireme's LoRA in bfloat16", 0.95)):
        rows += [table.row("speed", shape, "tokens/s", name, target) | {"what": "QLoRA training speed"},
                 table.row("CPU time", shape, "s/1000 tokens", name) | {"what": "CPU time of QLoRA training"},
                 table.row("peak memory", shape, "MB", name, scale=1e-6) | {"what": "peak memory of QLoRA training"}]
    rows.append(billion.row("memory", BILLION_SHAPE, "MB", "Trireme's LoRA in bfloat16", 0.4, scale=1e-6) | {"what": "memory above a run of the quickstart's model"})
    measure.finish("qlora_speed" + (f"_{options.threads}_thread" if options.threads else ""), rows,
                   f"{options.rounds} rounds in which the sides take turns, {options.steps} steps each, the first {options.warmup} not counted; memory is VmHWM", not options.print)


if __name__ == "__main__":
    main()
