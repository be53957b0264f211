"""Runs of tiny models in float64 on meshes of ranks, and their comparison with the run on one."""
import json

import pytest
import torch
from safetensors.torch import load_file

from program import SOURCE, run, override

STEPS = 20  # of twelve rows: 4 x accumulation 3 on one rank
QUICKSTART = SOURCE / "configs/quickstart"
SHAPE = dict(model_type="qwen3", vocab_size=1152, hidden_size=32, intermediate_size=44, num_hidden_layers=4, num_attention_heads=4,
             num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-5, max_position_embeddings=256, initializer_range=0.02)
# Blocks of 32 are the largest that four ranks do not cut.
IN_BLOCKS = dict(hidden_size=64, head_dim=32, intermediate_size=128, tie_word_embeddings=False)
NF4 = ["--quant.base=nf4", "--quant.block_size=32", "--lora.rank=4"]
# What a task learns and how: every value of every row of the table at least once with each way of cutting.
KINDS = {
    "full_untied_packed": (dict(tie_word_embeddings=False), ["--data.packing=true", "--data.max_length=96"], "model/model.safetensors"),
    "full_tied_biases": (dict(model_type="qwen2", tie_word_embeddings=True), ["--train.recompute=full"], "model/model.safetensors"),
    "lora_one_key_head": (dict(num_key_value_heads=1, tie_word_embeddings=False),
                          ["--lora.rank=4", "--lora.dropout=0.2", "--train.recompute=selective"], "adapter/adapter_model.safetensors"),
    # Goes on from an adapter that has learnt: of a new one B is zero, and so is the first gradient of every A.
    "lora_tied_packed": (dict(tie_word_embeddings=True), ["--lora.path={work}/learnt/adapter", "--data.packing=true", "--data.max_length=96"],
                         "adapter/adapter_model.safetensors"),
    "dora_pissa": (dict(tie_word_embeddings=False), ["--lora.rank=4", "--lora.dora=true", "--lora.init=pissa", "--lora.dropout=0.2"], "adapter/adapter_model.safetensors"),
    "qlora_packed": (IN_BLOCKS, [*NF4, "--lora.dropout=0.2", "--data.packing=true", "--data.max_length=96"], "adapter/adapter_model.safetensors"),
    "qdora": (IN_BLOCKS, [*NF4, "--lora.dropout=0.2", "--lora.dora=true", "--train.recompute=selective"], "adapter/adapter_model.safetensors"),
    "loftq": (IN_BLOCKS, [*NF4, "--lora.init=loftq", "--lora.loftq_iterations=2", "--lora.alpha=8"], "adapter/adapter_model.safetensors"),
}
# Ranks and keys of each mesh; a step always has twelve rows.
MESHES = {
    "one": (1, []),
    "dp2": (2, ["--train.micro_batch_size=6", "--train.accumulation=1"]),
    "dp4_zero3": (4, ["--train.micro_batch_size=1", "--parallel.zero=3"]),
    "dp4": (4, ["--train.micro_batch_size=1"]),
    "tp2": (2, ["--parallel.tensor=2"]),
    "tp4": (4, ["--parallel.tensor=4"]),
    "dp2_tp2_zero2": (4, ["--parallel.tensor=2", "--parallel.zero=2", "--train.micro_batch_size=2"]),
    "dp2_pp2_zero2": (4, ["--parallel.pipeline=2", "--parallel.zero=2", "--train.micro_batch_size=2", "--parallel.schedule=gpipe"]),
    "pp2": (2, ["--parallel.pipeline=2"]),
    "pp2_one": (2, ["--parallel.pipeline=2", "--train.micro_batch_size=12", "--train.accumulation=1"]),
    "pp2_gpipe": (2, ["--parallel.pipeline=2", "--parallel.schedule=gpipe"]),
    "pp2_zb_h1": (2, ["--parallel.pipeline=2", "--parallel.schedule=zb-h1"]),
    "pp2_zb_v": (2, ["--parallel.pipeline=2", "--parallel.schedule=zb-v"]),
    "pp2_interleaved": (2, ["--parallel.pipeline=2", "--parallel.schedule=interleaved", "--train.micro_batch_size=3", "--train.accumulation=4"]),
    "pp4": (4, ["--parallel.pipeline=4", "--train.micro_batch_size=2", "--train.accumulation=6"]),
    "pp2_tp2": (4, ["--parallel.pipeline=2", "--parallel.tensor=2"]),
    "pp2_tp2_zb_h1": (4, ["--parallel.pipeline=2", "--parallel.tensor=2", "--parallel.schedule=zb-h1"]),
    "dp2_pp2_zero1": (4, ["--parallel.pipeline=2", "--parallel.zero=1", "--train.micro_batch_size=2"]),
    "dp2_tp2_pp2": (8, ["--parallel.pipeline=2", "--parallel.tensor=2", "--train.micro_batch_size=2"]),
    "dp2_tp2": (4, ["--parallel.tensor=2", "--train.micro_batch_size=6", "--train.accumulation=1"]),
    "dp2_tp2_zero1": (4, ["--parallel.tensor=2", "--train.micro_batch_size=6", "--train.accumulation=1", "--parallel.zero=1"]),
    "dp2_pp2_zero3": (4, ["--parallel.pipeline=2", "--parallel.zero=3", "--train.micro_batch_size=2"]),
    "dp2_pp2_zb_v_zero3": (4, ["--parallel.pipeline=2", "--parallel.zero=3", "--train.micro_batch_size=2", "--parallel.schedule=zb-v"]),
    "dp2_tp2_pp2_zero3": (8, ["--parallel.pipeline=2", "--parallel.tensor=2", "--parallel.zero=3", "--train.micro_batch_size=3", "--train.accumulation=2",
                              "--parallel.order=data-tensor-pipeline", "--parallel.schedule=interleaved"]),
    "dp2_tp2_zero3": (4, ["--parallel.tensor=2", "--train.micro_batch_size=6", "--train.accumulation=1", "--parallel.zero=3"]),
}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mesh")
    for kind, (shape, _, _) in KINDS.items():
        (folder / f"{kind}.json").write_text(json.dumps(SHAPE | shape))
    train(folder, "lora_tied_packed", "learnt", "--lora.rank=4", "--lora.dropout=0.2", "--optim.lr=0.02", "--train.steps=2", "--schedule.warmup_steps=0",
          "--eval.every=0", begins=True)
    return folder


def keys_of(work, kind, name, *keys, begins=False):
    usual = [f"--run.dir={work / name}", f"--model.config={work / kind}.json", f"--model.tokenizer={QUICKSTART}/model", "--model.dtype=float64",
             f"--data.train={QUICKSTART}/train.jsonl:90", f"--train.steps={STEPS}", "--train.micro_batch_size=4", "--train.accumulation=3",
             "--optim.lr=1e-3", "--optim.weight_decay=0.01", "--schedule.warmup_steps=3", "--train.max_grad_norm=0.5",
             f"--data.eval={QUICKSTART}/eval.jsonl:9", f"--eval.every={STEPS // 2}", "--eval.micro_batch_size=1", "--eval.restore_best=false",
             "--checkpoint.every=50"]
    of_kind = [key.format(work=work) for key in KINDS[kind][1] if not (begins and key.startswith("--lora.path"))]
    return override(override(usual, of_kind), keys)


def train(work, kind, name, *keys, ranks=1, status=0, begins=False):
    done = run(work, "train", *keys_of(work, kind, name, *keys, begins=begins), ranks=ranks)
    assert done.returncode == status, done.stderr
    return done.stderr


def losses(work, name):
    """Loss and gradient norm of every step; loss and accuracy of every evaluation."""
    lines = [json.loads(line) for line in (work / name / "metrics.jsonl").read_text().splitlines()]
    steps, evaluations = ([line for line in lines if line["split"] == split] for split in ("train", "eval"))
    assert [line["step"] for line in steps] == list(range(1, len(steps) + 1))
    assert [line["step"] for line in evaluations] == [STEPS // 2, STEPS][:len(evaluations)]
    of = lambda lines, *keys: [line[key] for line in lines for key in keys]  # noqa: E731
    return of(steps, "loss"), of(steps, "grad_norm"), of(evaluations, "loss", "token_accuracy", "tokens")


def assert_same_run(work, kind, name, whole):
    found, expected = losses(work, name), losses(work, whole)
    assert [len(values) for values in found] == [STEPS, STEPS, 6]
    for got, wanted in zip(found, expected):
        assert got == pytest.approx(wanted, rel=1e-12)
    found, expected = (load_file(work / run / KINDS[kind][2]) for run in (name, whole))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert value.dtype == torch.float64 and torch.allclose(found[key], value, rtol=0, atol=1e-10), key


@pytest.fixture(scope="module")
def whole(work):
    """The run on one rank, by kind."""
    for kind in KINDS:
        train(work, kind, f"one_{kind}", f"--train.gradients={work}/one_{kind}.safetensors")
    return {kind: f"one_{kind}" for kind in KINDS}
