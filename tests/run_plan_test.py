"""`trireme plan` for ranks that are not started: no data, no tokenizer, no weights."""
import json
import re

import pytest

from program import override, run

# Llama 3.1 70B, by its config.json alone.
LLAMA_70B = dict(model_type="llama", vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
                 num_key_value_heads=8, head_dim=128, rms_norm_eps=1e-5, max_position_embeddings=8192, tie_word_embeddings=False, dtype="bfloat16")


@pytest.fixture
def plan(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B))

    def say(*keys, status=0):
        done = run(tmp_path, "plan", f"--model.config={tmp_path}/config.json", *override(["--train.dtype=bfloat16", "--data.max_length=8192"], keys))
        assert done.returncode == status, done.stderr
        return done.stderr

    return say


def test_a_large_model_on_many_ranks(plan):
    keys = ["--plan.ranks=64", "--parallel.tensor=4", "--parallel.pipeline=8", "--parallel.schedule=interleaved", "--parallel.virtual_stages=5",
            "--parallel.zero=1", "--train.accumulation=64", "--checkpoint.async=false"]
    said = plan(*keys, "--plan.memory_gb=80").splitlines()
    assert said[0] == "plan: 70.55 B parameters, 70.55 B trained; steps of 128 rows (about 1048576 tokens)"
    assert [line.split(":")[1] for line in said[2:10]] == [f" stage {stage} of the pipeline" for stage in range(8)]
    assert said[10].startswith("plan: data 2 x tensor 4 x pipeline 8; stage 0: a rank exchanges in a step gradients 8.95 GiB, weights 4.47 GiB, ")
    assert said[11].startswith("plan: the pipeline idles 2.1 % of the time (interleaved, 8 stages, 64 micro-batches)")  # 7 / (5 * 64 + 7)
    needed, words = re.fullmatch(r"plan: a rank needs ([\d.]+) GiB of its device and has 74.51 GiB: it does not fit; it would with (.*)", said[12]).groups()
    fitting = dict(re.findall(r"(\S+) \(([\d.]+) GiB\)", words))
    assert float(needed) > 74.51 > max(map(float, fitting.values())) and set(fitting) == {"train.recompute=selective", "train.recompute=full", "train.mlp_tokens=1024"}
    for change, gib in fitting.items():  # what is promised holds
        said = plan(*keys, "--plan.memory_gb=80", f"--{change}")
        assert f"needs {gib} GiB of its device and has 74.51 GiB: it fits\n" in said
        longest = int(re.search(r"plan: rows of up to (\d+) tokens fit into 74.51 GiB", said)[1])
        assert 8192 == longest and "the model's max_position_embeddings" in said
    assert 64 < int(re.search(r"plan: rows of up to (\d+) tokens fit into 74.51 GiB", plan(*keys, "--plan.memory_gb=80"))[1]) < 8192


def test_a_mesh_that_does_not_fit_is_refused_with_those_that_do(plan):
    # 64 heads and 8 key heads, 80 layers: 5 tensor ranks are none, of 320 ranks 3 stages are none.
    said = plan("--plan.ranks=40", "--parallel.tensor=3", status=2)
    assert ("error: parallel.tensor=3 x parallel.pipeline=1 is 3 or a multiple of it, but there are 40 ranks: take one of "
            "these meshes: data 10 x tensor 4 x pipeline 1, data 20 x tensor 2 x pipeline 1, ") in said and "tensor 5" not in said
    assert "cannot be shared out evenly over 5 ranks; sizes that can: 1, 2, 4, 8, 16, 32, 64\n" in plan("--plan.ranks=40", "--parallel.tensor=5", status=2)
    assert "the model has only 80 layers" in plan("--plan.ranks=96", "--parallel.pipeline=96", status=2)


def test_a_run_needs_what_a_plan_does_without(tmp_path, plan):
    plan()
    assert plan("--plan.ranks=2", "--data.train=elsewhere.jsonl", "--train.steps=5").count("plan: ") > 2
    done = run(tmp_path, "train", f"--model.config={tmp_path}/config.json", "--dry-run")
    assert done.returncode == 2 and "data.train is not set" in done.stderr and "the length of the run is not set" in done.stderr


def test_a_device_that_is_not_here(plan):
    assert re.search(r"needs [\d.]+ GiB of its device; there is none here: set plan.memory_gb ", plan("--plan.ranks=1", "--run.device=cuda"))
    said = plan("--plan.ranks=1", "--run.device=cpu", "--plan.memory_gb=80")
    assert "GiB and has 74.51 GiB: " in said and "device" not in said


def test_products_of_float8_are_planned_where_there_is_no_device(plan):
    keys = ["--plan.ranks=8", "--parallel.tensor=8", "--lora.rank=16"]
    assert "and the CPU computes this: leave quant.base out, or run where there is one; plans for one have run.device=cuda or plan.memory_gb set\n" in plan(
        *keys, "--run.device=cpu", "--quant.base=fp8", status=2)
    activations = [float(re.search(r"activations at most ([\d.]+) GiB", plan(*keys, "--run.device=cuda", *more)).group(1)) for more in ([], ["--quant.base=fp8"])]
    assert activations[1] - activations[0] == pytest.approx(8192 * 8192 / 2**30, abs=0.011)  # the codes of the inputs of a layer
    found = plan(*keys, "--plan.memory_gb=80", "--quant.base=fp8")
    assert "plan: 70.55 B parameters, " in found and "GiB of its device and has 74.51 GiB: " in found
    assert "quant.skip=o_prj: no linear layer has this name; there are down_proj, " in plan(*keys, "--plan.memory_gb=80", "--quant.base=fp8", "--quant.skip=o_prj", status=2)


def test_what_a_device_does_not_compute_or_a_plan_does_not_know(tmp_path, plan):
    assert "error: optim.momentum is set, but optim.kind is lion: " in plan("--plan.ranks=1", "--optim.kind=lion", "--optim.momentum=0.5", status=2)
    assert "error: optim.offload=true and optim.paged=true are two places for the same state: " in plan("--plan.ranks=1", "--optim.offload=true", "--optim.paged=true", status=2)
    assert "error: optim.offload=true is not possible with optim.kind=adafactor, " in plan("--plan.ranks=1", "--optim.offload=true", "--optim.kind=adafactor", status=2)
    assert "error: optim.masters=false is not possible with train.dtype=float16, " in plan("--plan.ranks=1", "--train.dtype=float16", "--optim.masters=false", status=2)
    assert "train.dtype=float64 is computed by the CPU alone" in plan("--plan.ranks=1", "--run.device=cuda", "--train.dtype=float64", status=2)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B | dict(head_dim=80, max_position_embeddings=4096)))
    said = plan("--plan.ranks=1", "--plan.memory_gb=80")
    assert "plan: rows of 4096 tokens, the model's max_position_embeddings; data.max_length=8192 is more\n" in said
    assert "whole matrices of attention's scores, which are not in this plan: whether it fits is not known\n" in said
