"""What a run says before its first step that it will need, against what it took."""
import json
import re

import pytest

from program import SOURCE, TRAIN, run

UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@pytest.mark.parametrize("keys, shape", [
    # The head and its gradients: nearly all of the model.
    (["--train.dtype=bfloat16", "--checkpoint.async=false", "--train.micro_batch_size=8"],
     {"vocab_size": 50000, "hidden_size": 512, "tie_word_embeddings": True}),
    (["--train.dtype=bfloat16", "--optim.masters=false", "--checkpoint.async=false", "--train.micro_batch_size=8"],
     {"vocab_size": 50000, "hidden_size": 512, "tie_word_embeddings": True}),
    (["--optim.kind=adafactor", "--checkpoint.async=false", "--train.micro_batch_size=8"], {"vocab_size": 50000, "hidden_size": 512, "tie_word_embeddings": True}),
    # Activations.
    (["--train.recompute=selective", "--train.micro_batch_size=24"], {"hidden_size": 256, "num_hidden_layers": 6}),
    (["--lora.rank=4", "--train.micro_batch_size=24"], {"hidden_size": 256, "num_hidden_layers": 6}),
    (["--lora.rank=4", "--lora.dora=true", "--train.micro_batch_size=24"], {"hidden_size": 256, "num_hidden_layers": 6}),
    (["--lora.rank=4", "--lora.dora=true", "--lora.dropout=0.1", "--train.micro_batch_size=24"], {"hidden_size": 256, "num_hidden_layers": 6}),
    (["--lora.rank=4", "--train.mlp_tokens=512", "--train.micro_batch_size=24"], {"hidden_size": 256, "num_hidden_layers": 6}),
    (["--train.mlp_tokens=512", "--train.recompute=full", "--train.micro_batch_size=24"], {"hidden_size": 256, "num_hidden_layers": 6}),
    (["--train.recompute=full", "--train.micro_batch_size=2", "--data.eval_fraction=0.9", "--eval.every=1", "--eval.micro_batch_size=96"], {"hidden_size": 256, "num_hidden_layers": 2}),
], ids=["wide vocabulary", "without masters", "adafactor", "selective", "lora", "dora", "dora with dropout", "pieces", "pieces of a trained MLP", "evaluation"])
def test_memory_is_at_most_what_the_plan_says_and_at_least_half(tmp_path, keys, shape):
    config = json.loads((SOURCE / "configs/quickstart/model/config.json").read_text())
    heads = shape["hidden_size"] // 64
    config |= {"intermediate_size": 2 * shape["hidden_size"], "num_attention_heads": heads, "num_key_value_heads": heads, "head_dim": 64, **shape}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "text.txt").write_text(TRAIN.read_text())
    done = run(tmp_path, "train", f"--run.dir={tmp_path / 'run'}", f"--model.config={tmp_path / 'config.json'}", "--task.kind=pretrain",
               f"--model.tokenizer={SOURCE / 'configs/quickstart/model'}", f"--data.train={tmp_path / 'text.txt'}", "--data.max_length=256",
               "--train.steps=2", "--schedule.warmup_steps=0", "--checkpoint.every=1", *keys)
    assert done.returncode == 0, done.stderr
    number, unit = re.search(r"plan: memory of a rank: .*: ([0-9.]+) ([KMG]iB)\n", done.stderr).groups()
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    planned, taken = float(number) * UNITS[unit], max(line.get("memory_bytes", 0) for line in lines)
    assert planned / 2 <= taken <= planned, done.stderr
