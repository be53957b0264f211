"""A loss or gradient that is not finite stops the run, names where it appeared first, and nothing is saved."""
import shutil

import pytest
from safetensors.torch import load_file, save_file

import hf_models

OUT = "Lower optim.lr"  # gradients are clipped already, and in float32


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nonfinite")
    hf_models.make("llama", folder / "whole")
    return folder


def nan_in_a_weight(weights):
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    weights["model.norm.weight"][0] = float("inf")


def product_too_large(weights):
    for name in ("gate_proj", "up_proj"):
        weights[f"model.layers.0.mlp.{name}.weight"] *= 1e21


def gradient_too_large(weights):  # the logits are not, but the difference of two rows of the head is
    weights["model.norm.weight"] *= 1e-20
    weights["lm_head.weight"] = weights["lm_head.weight"].sign() * 3e38


CASES = {
    "loss": (nan_in_a_weight, "model.layers.1.mlp.up_proj.weight: 1 of 3840 values are not finite",
             "These weights are damaged: take them from their source, or from an earlier checkpoint"),
    "layer": (product_too_large, "model.layers.0.mlp.down_proj: {} of {} values are not finite", OUT),
    "gradient": (gradient_too_large, "the gradient of model.norm.weight: {} of 48 values are not finite", OUT),
}


@pytest.mark.parametrize("ranks, zero", [(1, 0), (2, 0), (2, 3)])
@pytest.mark.parametrize("name", list(CASES))
def test_the_first_place_is_named(work, name, ranks, zero):
    change, where, way_out = CASES[name]
    folder, run = work / f"{name}-{ranks}-{zero}", work / f"run-{name}-{ranks}-{zero}"
    shutil.copytree(work / "whole", folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    done = hf_models.run("train", f"--run.dir={run}", f"--model.path={folder}", "--train.steps=3", "--train.micro_batch_size=2", f"--parallel.zero={zero}",
                         f"--data.train={hf_models.SOURCE}/configs/quickstart/train.jsonl:8", ranks=ranks, cache=work / "cache")
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
    pattern = ("error: step 1: the loss or its gradient is not finite; it appeared first in " + where +
               ". Nothing was updated, and checkpoints are as they were. " + way_out)
    pieces = pattern.split("{}")
    assert len(errors) == 1
    if len(pieces) == 1:
        assert errors[0] == pattern
    else:
        assert errors[0].startswith(pieces[0]) and errors[0].endswith(pieces[-1])
    assert not list((run / "checkpoints").glob("step-*"))
    assert (run / "metrics.jsonl").read_text() == ""
