"""Full fine-tuning over ranks with transformers and PyTorch's DDP or FSDP (fully_shard of each layer and the rest) over gloo,
started by mpirun: parallel_baseline.py ddp|fsdp MODEL_CONFIG IDS.json STEPS ROWS PROGRESS RENDEZVOUS_FILE
IDS.json is an array of arrays of ids, one a row; ROWS of every rank. Rank 0 writes a line to PROGRESS after every step and
prints its losses as JSON."""
import json
import os
import sys

import torch
import transformers
from torch.distributed.fsdp import fully_shard

kind, config_file, ids_file, steps, rows, progress, meeting = sys.argv[1:]
steps, rows = int(steps), int(rows)
rank, size = int(os.environ["OMPI_COMM_WORLD_RANK"]), int(os.environ["OMPI_COMM_WORLD_SIZE"])
torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
transformers.logging.set_verbosity_error()
torch.manual_seed(1)
model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(config_file), dtype=torch.float32)
model.train()
if kind == "ddp":
    model = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
else:
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
ids = json.load(open(ids_file))
losses = []
for step in range(steps):
    first = (step * size + rank) * rows
    batch = torch.tensor([ids[(first + i) % len(ids)] for i in range(rows)])
    loss = model(input_ids=batch, labels=batch, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
    if rank == 0:
        with open(progress, "a") as file:
            file.write(f"{step}\n")
if rank == 0:
    print(json.dumps(losses))
torch.distributed.destroy_process_group()
