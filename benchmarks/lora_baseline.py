"""LoRA steps with transformers + PEFT in a plain loop: lora_baseline.py MODEL IDS.json STEPS ROWS RANK DTYPE PROGRESS
MODEL is a config.json, whose weights are random, or with DTYPE nf4 a folder, quantized by bitsandbytes with nested scales, whose products
are in bfloat16. IDS.json is an array of arrays of ids, one a row. Writes a line to PROGRESS after every step; prints its losses as JSON."""
import json
import sys

import peft
import torch
import transformers

source, ids_file, steps, rows, rank, dtype, progress = sys.argv[1:]
steps, rows, rank = int(steps), int(rows), int(rank)
transformers.logging.set_verbosity_error()
if dtype == "nf4":
    quantized = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, quantization_config=quantized, device_map="cpu")
else:
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(source), dtype=getattr(torch, dtype))
model = peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear",
                                                   task_type="CAUSAL_LM"))
model.train()
trained = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=1e-4)
ids = json.load(open(ids_file))
losses = []
for step in range(steps):
    batch = torch.tensor([ids[(step * rows + i) % len(ids)] for i in range(rows)])
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
    with open(progress, "a") as file:
        file.write(f"{step}\n")
print(json.dumps(losses))
