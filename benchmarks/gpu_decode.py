"""Tokens a second of one answer, here and with transformers, for gpu.sh:
gpu_decode.py TRIREME CONFIG.json TOKENIZER_FOLDER TEXT NUM_TOKENS [--dry-run]
Random weights in bf16 and the likeliest token of each step, behind a prompt of a few. Both sides answer four times in one process; the
first answer, which prepares and compiles, does not count. Prints `trireme_tokens_per_second`, `tokens_per_second` (the fastest cache of
transformers: the static one, with which it compiles on a GPU, and the one that grows), `name` and `prompt`, a line each. Before: small models
must give the same answers with a recorded step as without, those that have a kernel of attention and others."""
import json
import statistics
import pathlib
import subprocess
import sys
import tempfile
import time

import torch
import transformers

program, config_file, tokenizer, text, num_tokens = sys.argv[1:6]
num_tokens, dry, times = int(num_tokens), "--dry-run" in sys.argv, 4
device = torch.device("cpu" if dry else "cuda")
transformers.logging.set_verbosity_error()
torch.manual_seed(0)


def ours():
    keys = [f"--model.config={config_file}", f"--model.tokenizer={tokenizer}", "--model.dtype=bfloat16", f"--generate.max_tokens={num_tokens}", "--generate.format=json",
            f"--run.device={device.type}"]
    process = subprocess.Popen([program, "generate", *keys, *[text] * times], text=True, stdout=subprocess.PIPE)
    ends, answers = [], []
    for line in process.stdout:
        ends.append(time.perf_counter())
        answers.append(json.loads(line)["tokens"])
    if process.wait() != 0 or len(answers) != times:
        raise SystemExit("trireme generate failed")
    return statistics.median(tokens / (end - begin) for tokens, begin, end in zip(answers[1:], ends, ends[1:]))


def check_graphs():
    tiny = json.loads((pathlib.Path(__file__).parent / "gpu_tiny.json").read_text())
    with tempfile.TemporaryDirectory() as folder:
        for head_dim, dtype in ((64, "bfloat16"), (32, "float32")):
            (pathlib.Path(folder) / "config.json").write_text(json.dumps(tiny | {"head_dim": head_dim, "initializer_range": 0.2}))
            keys = [f"--model.config={folder}/config.json", f"--model.tokenizer={tokenizer}", f"--model.dtype={dtype}", "--generate.max_tokens=40", "--generate.format=json",
                    f"--run.device={device.type}"]
            plain, recorded = (subprocess.run([program, "generate", *keys, f"--generate.graphs={graphs}", text, text + text], text=True, check=True, stdout=subprocess.PIPE).stdout
                               for graphs in ("false", "true"))
            if plain != recorded:
                raise SystemExit(f"a recorded step gives another answer, head_dim {head_dim} in {dtype}:\n{recorded}without:\n{plain}")


def theirs(model, prompt, **cache):
    rates = []
    for _ in range(times):
        begin = time.perf_counter()
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False, pad_token_id=0, **cache)
        out.tolist()
        rates.append((out.shape[1] - prompt.shape[1]) / (time.perf_counter() - begin))
    return statistics.median(rates[1:])


check_graphs()
print(f"trireme_tokens_per_second {ours():.6g}", flush=True)
config = transformers.AutoConfig.from_pretrained(config_file)
torch.set_default_device(device)
model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
prompt = torch.tensor([transformers.PreTrainedTokenizerFast(tokenizer_file=f"{tokenizer}/tokenizer.json")(text)["input_ids"]])
best = max((theirs(model, prompt, **cache), name) for name, cache in {"static cache": {"cache_implementation": "static"}, "growing cache": {}}.items())
print(f"tokens_per_second {best[0]:.6g}\nname transformers {transformers.__version__}, {best[1]}, torch {torch.__version__}\nprompt {prompt.shape[1]}")
