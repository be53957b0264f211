"""train.gradients: the first step's gradients, reduced over all rows, before clipping, in fp32, under the names of the product."""
import json
import math

import pytest
import torch
from safetensors.torch import load_file

import bounds
from program import run, small_run


CLIP = "--train.max_grad_norm=0.01"


def gradients(work, name, *keys, ranks=1):
    file = work / f"{name}.safetensors"
    done = run(work, "train", *small_run(work, name, f"--train.gradients={file}", "--train.stop_after=1", CLIP, *keys),
               ranks=ranks)
    assert done.returncode == 75, done.stderr
    line = json.loads((work / name / "metrics.jsonl").read_text().splitlines()[0])
    return load_file(file), line["grad_norm"]


@pytest.mark.parametrize("keys, product", [([], "model/model.safetensors"), (["--lora.rank=2", "--lora.targets=q_proj,down_proj"], "adapter/adapter_model.safetensors"),
                                           (["--train.dtype=bfloat16"], "model/model.safetensors")], ids=["full", "lora", "bfloat16"])
def test_names_dtype_and_norm(tmp_path, keys, product):
    found, norm = gradients(tmp_path, "run", *keys)
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    squares = sum(tensor.double().square().sum().item() for tensor in found.values())
    assert math.sqrt(squares) == pytest.approx(norm, rel=bounds.GRADIENT_NORM_FP32) and norm > 0.02  # clipping would have made it 0.01
    assert run(tmp_path, "train", *small_run(tmp_path, "run", CLIP, *keys)).returncode == 0
    trained = load_file(tmp_path / "run" / product)
    assert {name: tensor.shape for name, tensor in found.items()} == {name: tensor.shape for name, tensor in trained.items()}


def test_two_ranks_reduce_to_what_one_rank_has(tmp_path):
    one, _ = gradients(tmp_path, "one", "--train.accumulation=2")
    two, _ = gradients(tmp_path, "two", ranks=2)
    largest = max(tensor.abs().max() for tensor in one.values())
    relative, absolute = bounds.REDUCED_GRADIENT_FP32
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=relative, atol=absolute * largest)  # the order of fp32 sums


def test_a_run_that_goes_on_has_no_first_step(tmp_path):
    gradients(tmp_path, "run")
    again = run(tmp_path, "train", *small_run(tmp_path, "run", CLIP, f"--train.gradients={tmp_path / 'again'}"))
    assert again.returncode == 2 and not (tmp_path / "again").exists()
    assert again.stderr.endswith("error: train.gradients is set, but the run goes on from step 1; the first step's gradients need another run.dir\n")
