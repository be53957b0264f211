"""Logits of every family against transformers in fp32."""
import json
import os
import subprocess

import pytest
import safetensors.torch
import torch

import hf_models


@pytest.mark.parametrize("name", list(hf_models.CASES))
def test_logits(name, tmp_path):
    model = hf_models.make(name, tmp_path / "model")
    generator = torch.Generator().manual_seed(7)
    rows = [torch.randint(0, hf_models.VOCAB, (n,), generator=generator).tolist() for n in (1, 7, 40)]
    (tmp_path / "ids.json").write_text(json.dumps(rows))
    done = subprocess.run([os.environ["TRIREME_BINARY"], "eval", f"--model.path={tmp_path / 'model'}",
                           f"--eval.token_ids={tmp_path / 'ids.json'}", f"--eval.logits={tmp_path / 'out.safetensors'}",
                           f"--run.dir={tmp_path / 'run'}"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    ours = safetensors.torch.load_file(tmp_path / "out.safetensors")
    for i, row in enumerate(rows):
        with torch.no_grad():
            theirs = model(torch.tensor([row])).logits[0]
        assert ours[f"logits.{i}"].shape == theirs.shape
        assert (ours[f"logits.{i}"] - theirs).abs().max().item() <= 1e-5
