"""LoRA on GSM8K's real lengths (TRIREME_TEST_DATA), beside TRL's SFTTrainer as it comes: real tokens a second, peak memory,
and the time from the start of the program to the end of its first step. Run with the Python of the test environment."""
import argparse
import json
import os
import pathlib
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers

import measure

ROWS, RANK, WARMUP = 4, 16, 3
SHAPE = "576 wide, 6 layers, 9/3 heads, 50,257 tokens, rank 16 all linear, 4 samples a step"
SPEED, MEMORY, CPU = "LoRA on GSM8K, real tokens", "peak memory on GSM8K", "CPU time on GSM8K"
FIRST, COLD, FIRST_CPU = "GSM8K: start to first step done", "the same, nothing cached", "the same, CPU time"


def make_model(folder):
    """A Hugging Face folder with random bf16 weights and GPT-2's tokenizer, for both sides."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(pathlib.Path(measure.DATA) / "tokenizers/gpt2")
    config = transformers.LlamaConfig(
        vocab_size=50257, hidden_size=576, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=9,
        num_key_value_heads=3, head_dim=64, tie_word_embeddings=True, bos_token_id=50256, eos_token_id=50256)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)


def main():
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rounds", type=int, default=2)
    arguments.add_argument("--steps", type=int, default=12, help="of the baseline; Trireme makes three times as many")
    measure.threads_argument(arguments)
    arguments.add_argument("--print", action="store_true", help="write no result file")
    options = arguments.parse_args()
    records = pathlib.Path(measure.DATA) / "gsm8k/train.jsonl"
    table = measure.Sides()
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        make_model(folder / "model")
        for i in range(options.rounds + 1):  # the first round fills the caches of both
            steps, mine = (options.steps, 3 * options.steps) if i else (1, 1)
            run, progress = folder / f"run-{i}", folder / f"progress-{i}"
            out = measure.run(measure.mpirun(
                1, measure.BINARY, "train", f"--model.path={folder / 'model'}", f"--data.train={records}",
                "--data.prompt_field=question", "--data.completion_field=answer", f"--data.cache={folder / 'cache'}",
                "--train.dtype=bfloat16", f"--train.micro_batch_size={ROWS}", f"--train.steps={mine}",
                f"--lora.rank={RANK}", "--optim.lr=2e-4", f"--train.threads={options.threads}",
                f"--run.dir={run}"), progress=str(run / "metrics.jsonl"))
            other = measure.run(measure.python("gsm8k_baseline.py", folder / "model", records, steps, ROWS, RANK, progress),
                                progress=str(progress), env={"HF_HOME": str(folder / "hub"), "HF_HUB_OFFLINE": "1"}
                                | measure.threads_env(options.threads))
            for side, result, tokens in (("trireme", out, measure.tokens_of(measure.train_steps(run))),
                                         ("baseline", other, json.loads(other["stdout"].splitlines()[-1]))):
                table.add(FIRST if i else COLD, side, result["lines"][0][0])
                if i == 0:
                    continue
                table.add(FIRST_CPU, side, result["lines"][0][1])
                speed, cpu = measure.rates(result["lines"], tokens, WARMUP)
                table.add(SPEED, side, speed)
                table.add(CPU, side, cpu)
                table.add(MEMORY, side, result["peak_bytes"])
    name = "TRL SFTTrainer as it comes, bf16"
    shape = f"{SHAPE}; {measure.threads_text(options.threads)}"
    rows = [table.row(SPEED, shape, "tokens/s", name, 5), table.row(CPU, shape, "s/1000 tokens", name),
            table.row(MEMORY, shape, "MB", name, scale=1e-6), table.row(FIRST, shape, "s", target=2, sides=("trireme", None)),
            table.row(FIRST, shape, "s", name), table.row(FIRST_CPU, shape, "s", name),
            table.row(COLD, shape, "s", name)]
    measure.finish("gsm8k_speed" + (f"_{options.threads}_thread" if options.threads else ""), rows,
                   f"{options.rounds} rounds in which the sides take turns, after one that fills the caches; bf16; "
                   f"{options.steps} steps of the baseline, {3 * options.steps} of Trireme, the first {WARMUP} not counted; "
                   "tokens are those of the samples, padding not counted; memory is VmHWM", not options.print)


if __name__ == "__main__":
    main()
