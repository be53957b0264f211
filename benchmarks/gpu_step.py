"""A training step with transformers and PEFT on random tokens, for gpu.sh:
gpu_step.py CONFIG.json lora|full ROWS LENGTH STEPS none|full ACCUMULATION [--dry-run]
With the fastest attention that is there; all in bf16, adapters, gradients and AdamW's states too. Prints `name`, `tokens_per_second` (median of the steps but the first two), `peak_mb` and
`matrix_tflops`, the card's speed in a product of 8192^3, a line each."""
import os
import statistics
import sys
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # an attention that is not there is not looked for
import peft
import torch
import transformers

config_file, kind, rows, length, steps, recompute, accumulation = sys.argv[1:8]
rows, length, steps, accumulation, dry = int(rows), int(length), int(steps), int(accumulation), "--dry-run" in sys.argv
device = torch.device("cpu" if dry else "cuda")
transformers.logging.set_verbosity_error()
torch.manual_seed(0)


def wait():
    if not dry:
        torch.cuda.synchronize()


def timed(step, warm, times):
    seconds = []
    for i in range(warm + times):
        wait()
        begin = time.perf_counter()
        step()
        wait()
        if i >= warm:
            seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def measure(attention):
    config = transformers.AutoConfig.from_pretrained(config_file)
    torch.set_default_device(device)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention)
    torch.set_default_device("cpu")
    if kind == "lora":
        model = peft.get_peft_model(model, peft.LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"), autocast_adapter_dtype=False)
    if recompute == "full":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=not dry)
    batches = [torch.randint(config.vocab_size, (rows, length), device=device) for _ in range(accumulation)]

    def step():
        for ids in batches:
            (model(input_ids=ids, labels=ids, use_cache=False).loss / accumulation).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    if not dry:
        torch.cuda.reset_peak_memory_stats()
    seconds = timed(step, 2, steps - 2)
    return accumulation * rows * length / seconds, 0 if dry else torch.cuda.max_memory_allocated() / 1e6


best = None
for attention in ("sdpa", "flash_attention_2", "flash_attention_3"):
    try:
        found = measure(attention)
    except Exception as error:  # not there, or out of memory
        print(f"{attention}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}", file=sys.stderr)
        continue
    finally:
        torch.set_default_device("cpu")
        if not dry:
            torch.cuda.empty_cache()
    if best is None or found[0] > best[1]:
        best = (attention, *found)
if best is None:
    sys.exit("gpu_step.py: no attention ran")
size = 64 if dry else 8192
a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
product = timed(lambda: a @ b, 3, 11)
print(f"name transformers {transformers.__version__}{' + PEFT ' + peft.__version__ if kind == 'lora' else ''}, all bf16, {best[0]}, torch {torch.__version__}")
print(f"tokens_per_second {best[1]:.6g}\npeak_mb {best[2]:.6g}\nmatrix_tflops {2 * size ** 3 / product * 1e-12:.6g}")
