"""Gradients of every parameter and 50 steps of training, full and LoRA, against transformers and PEFT in fp32."""
import copy
import json
import os
import pathlib
import shutil
import subprocess

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

SOURCE = pathlib.Path(os.environ.get("TRIREME_SOURCE", pathlib.Path(__file__).parent.parent))
BINARY = os.environ.get("TRIREME_BINARY", str(SOURCE / "build/release/trireme"))
TOKENIZER = SOURCE / "configs/quickstart/model"
STEPS, ROWS, LR = 50, 4, 1e-3


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A tiny model in a Hugging Face folder with the quickstart's tokenizer, its adapter, and the tokenised records."""
    torch.manual_seed(1)
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("parity")
    config = transformers.LlamaConfig(vocab_size=1152, hidden_size=48, intermediate_size=80, num_hidden_layers=2,
                                      num_attention_heads=3, num_key_value_heads=1, head_dim=16, tie_word_embeddings=False,
                                      bos_token_id=None, eos_token_id=2, pad_token_id=0, initializer_range=0.02)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder / "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder / "base")
    lora = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear",
                                                                   task_type="CAUSAL_LM"))
    for name, value in lora.named_parameters():  # B of zeros would hide A's gradient
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.02)
    lora.save_pretrained(folder / "adapter")
    records = (SOURCE / "configs/quickstart/train.jsonl").read_text().splitlines()[: STEPS * ROWS]
    (folder / "train.jsonl").write_text("\n".join(records) + "\n")
    tokens = subprocess.run([BINARY, "tokenize", f"--model.path={folder / 'base'}"], input="\n".join(records) + "\n",
                            capture_output=True, text=True, check=True, timeout=60)
    (folder / "tokens.jsonl").write_text(tokens.stdout)
    return folder


def trireme_run(work, kind):
    keys = [f"--lora.path={work / 'adapter'}"] if kind == "lora" else []
    run = work / f"run-{kind}"
    done = subprocess.run(
        [BINARY, "train", f"--run.dir={run}", f"--model.path={work / 'base'}", f"--data.train={work / 'train.jsonl'}",
         "--data.shuffle=false", f"--train.steps={STEPS}", f"--train.micro_batch_size={ROWS}", f"--optim.lr={LR}",
         "--optim.weight_decay=0.01", "--schedule.kind=constant", f"--train.gradients={work / kind}.safetensors", *keys],
        env=dict(os.environ, TRIREME_CACHE=str(work / "cache"), OMP_NUM_THREADS="1"), capture_output=True, text=True,
        timeout=300)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["split"] == "train"], load_file(f"{work / kind}.safetensors")


def reference_run(work, kind):
    model = transformers.LlamaForCausalLM.from_pretrained(work / "base", dtype=torch.float32)
    if kind == "lora":
        model = peft.PeftModel.from_pretrained(model, work / "adapter", is_trainable=True)
    records = [json.loads(line) for line in (work / "tokens.jsonl").read_text().splitlines()]
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [{"params": [p for _, p in named if p.dim() >= 2], "weight_decay": 0.01},
              {"params": [p for _, p in named if p.dim() < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR)
    losses, gradients = [], {}
    for step in range(STEPS):
        total, count = 0.0, 0
        for record in records[step * ROWS:(step + 1) * ROWS]:
            ids = torch.tensor([record["ids"]])
            learnt = torch.tensor(record["loss"][1:], dtype=torch.bool)
            logits = model(ids).logits[0, :-1]
            total = total + torch.nn.functional.cross_entropy(logits[learnt], ids[0, 1:][learnt], reduction="sum")
            count += int(learnt.sum())
        loss = total / count
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            gradients = {n.replace(".default.", "."): p.grad.clone() for n, p in named}
        torch.nn.utils.clip_grad_norm_([p for _, p in named], 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses, gradients


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_gradients_and_loss_curve(work, kind):
    losses, gradients = trireme_run(work, kind)
    expected_losses, expected_gradients = reference_run(work, kind)
    assert set(gradients) == set(expected_gradients)
    for name, expected in expected_gradients.items():
        scale = expected.abs().max().item()
        assert scale > 0, name
        assert (gradients[name] - expected).abs().max().item() <= 2e-5 * scale, name
    assert expected_losses[-1] < expected_losses[0]
    # fp32 rounding grows over the steps of any program (two transformers builds differ by 4e-6 after 50).
    assert losses == pytest.approx(expected_losses, rel=1e-5)
