"""Runs whose frozen weights are in 4 or 8 bits: resumed, served, refused. Every mesh: run_mesh_test.py; on a device: run_device_test.py."""
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from bounds import CURVE_BF16, LOSS_FP32
from mesh_runs import QUICKSTART
from program import override, run

SHAPE = dict(model_type="qwen3", vocab_size=1152, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
             rms_norm_eps=1e-5, max_position_embeddings=256, initializer_range=0.05, tie_word_embeddings=False)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quant")
    (folder / "model.json").write_text(json.dumps(SHAPE))
    return folder


def train(work, name, *keys, status=0, ranks=1):
    usual = [f"--run.dir={work / name}", f"--model.config={work}/model.json", f"--model.tokenizer={QUICKSTART}/model", f"--data.train={QUICKSTART}/train.jsonl:40",
             f"--data.eval={QUICKSTART}/eval.jsonl:4", "--data.max_length=32", "--train.steps=6", "--train.micro_batch_size=2", "--optim.lr=2e-3", "--eval.every=2",
             "--train.dtype=bfloat16", "--lora.rank=4", "--lora.dropout=0.1", "--train.recompute=full", "--eval.metric=loss", "--quant.base=nf4"]
    done = run(work, "train", *override(usual, keys), ranks=ranks)
    assert done.returncode == status, done.stderr
    return done.stderr


def metrics(work, name):
    found = [json.loads(line) for line in (work / name / "metrics.jsonl").read_text().splitlines()]
    return [(line["split"], line["step"], line["loss"], line.get("grad_norm")) for line in found]


@pytest.mark.parametrize("base, keys", [("nf4", []), ("fp4", []), ("int8", []), ("nf4", ["--lora.init=loftq", "--lora.loftq_iterations=2", "--lora.dora=true"]),
                                        ("int8", ["--lora.init=pissa", "--lora.dora=true"]),
                                        ("nf4", ["--lora.rank=64", "--optim.kind=adamw8bit", "--optim.masters=false", "--train.mlp_tokens=24", "--model.embedding=host"])])
def test_a_resumed_run_has_the_bits_of_one_that_never_stopped(work, base, keys):
    of, base = [f"--quant.base={base}", *keys], f"{base}{len(keys)}"
    train(work, f"whole_{base}", *of)
    train(work, f"parts_{base}", *of, "--train.stop_after=3", status=75)
    assert "quant.base" in train(work, f"parts_{base}", *keys, "--quant.base=fp4" if "fp4" not in base else "--quant.base=nf4", status=2)
    train(work, f"parts_{base}", *of)
    assert metrics(work, f"parts_{base}") == metrics(work, f"whole_{base}")
    found, expected = (load_file(work / f"{name}_{base}/adapter/adapter_model.safetensors") for name in ("parts", "whole"))
    assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize("init", ["random", "loftq"])
def test_magnitudes_begin_as_the_norms_of_what_the_bits_stand_for(work, init):
    """Then DoRA is LoRA until they learn."""
    first = {}
    for dora in ("false", "true"):
        train(work, f"begins_{init}_{dora}", f"--lora.init={init}", f"--lora.dora={dora}", "--train.dtype=float32", "--train.steps=1", "--eval.every=1")
        first[dora] = metrics(work, f"begins_{init}_{dora}")[0][2]
    assert first["true"] == pytest.approx(first["false"], rel=LOSS_FP32)


def test_what_stays_as_it_is(work):
    """Other formats, scales, compute dtypes and layers are other runs."""
    curves = {}
    for name, keys in {"none": ["--quant.base=none"], "nf4": [], "plain": ["--quant.double=false"], "blocks": ["--quant.block_size=128"],
                       "fp4": ["--quant.base=fp4"], "wide": ["--quant.compute_dtype=float32"], "some": ["--quant.skip=down_proj,q_proj"]}.items():
        train(work, f"stays_{name}", *keys)
        curves[name] = [line[2] for line in metrics(work, f"stays_{name}")]
    assert len({tuple(curve) for curve in curves.values()}) == len(curves), curves
    for name, curve in curves.items():
        assert curve == pytest.approx(curves["none"], rel=0.02), name
    assert curves["wide"] == pytest.approx(curves["nf4"], rel=CURVE_BF16)


def test_evaluation_and_answers_are_of_what_was_trained(work):
    train(work, "served")
    keys = [f"--model.config={work}/model.json", "--model.dtype=bfloat16", f"--model.tokenizer={QUICKSTART}/model", f"--lora.path={work}/served/adapter"]
    data = [f"--data.eval={QUICKSTART}/eval.jsonl:4", "--data.max_length=32"]
    best = min(loss for split, _, loss, _ in metrics(work, "served") if split == "eval")
    for ranks, mesh in [(1, []), (2, ["--parallel.tensor=2"]), (2, ["--parallel.pipeline=2"])]:
        done = run(work, "eval", *keys, *data, "--quant.base=nf4", *mesh, ranks=ranks)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["loss"] == pytest.approx(best, rel=1e-3 if mesh else 1e-7)
    plain = json.loads(run(work, "eval", *keys, *data).stdout)["loss"]
    assert plain != pytest.approx(best, rel=1e-5)
    answers = [run(work, "generate", *keys, "--quant.base=nf4", "--generate.max_tokens=6", "What is", *mesh, ranks=ranks) for ranks, mesh in [(1, []), (2, ["--parallel.tensor=2"])]]
    assert answers[0].returncode == 0 and answers[0].stdout == answers[1].stdout and answers[0].stdout, answers[0].stderr


@pytest.mark.parametrize("keys, said", [
    (["--lora.rank=0", "--lora.dropout=0"], "quant.base=nf4 freezes the weights, and nothing would be trained: set lora.rank, or leave quant.base out"),
    (["--quant.block_size=96"], "quant.block_size=96: allowed are 0, 32, 64, 128, 256, 512, 1024, 2048, 4096"),
    (["--quant.block_size=16"], "quant.block_size=16: allowed are 0, 32, 64, 128, 256, 512, 1024, 2048, 4096"),
    (["--quant.skip=all-linear"], "quant.skip leaves no layer to quantize: name fewer layers, or leave quant.base=nf4 out"),
    (["--quant.base=dense"], "quant.base=dense is set, but WORK/model.json has no quantization_config: the weights are dense already; leave quant.base out"),
    (["--quant.base=int8", "--quant.threshold=-3"], "quant.threshold=-3: must be from -1 to 1e+06"),
    (["--quant.base=int8", "--quant.threshold=-0.5"], "quant.threshold=-0.5: must be 0 (no outliers) or more, or -1: 6, or what the model's folder says"),
    (["--optim.kind=sgd", "--optim.beta1=0.8"], "optim.beta1 is set, but optim.kind is sgd: set optim.kind=adamw, adamw8bit or lion, or leave optim.beta1 out"),
    (["--optim.kind=adafactor", "--optim.beta2=0.8"], "optim.beta2 is set, but optim.kind is adafactor: set optim.kind=adamw, adamw8bit or lion, or leave optim.beta2 out"),
    (["--optim.kind=lion", "--optim.epsilon=1e-6"], "optim.epsilon is set, but optim.kind is lion: set optim.kind=adamw or adamw8bit, or leave optim.epsilon out"),
    (["--optim.momentum=0.5"], "optim.momentum is set, but optim.kind is adamw: set optim.kind=sgd, or leave optim.momentum out"),
    (["--train.dtype=float32", "--optim.masters=false"], "optim.masters is set, but weights in float32 have no masters: set train.dtype=bfloat16, or leave optim.masters out"),
    (["--quant.base=nf5"], "quant.base=nf5: allowed are none, dense, nf4, fp4, int8, fp8; did you mean nf4?"),
    (["--quant.base=int8", "--quant.double=false"], "quant.double is set, but quant.base is int8: set quant.base to nf4 or fp4, or leave quant.double out"),
    (["--quant.base=none", "--quant.block_size=32"], "quant.block_size is set, but quant.base is none"),
    (["--quant.threshold=3"], "quant.threshold is set, but quant.base is nf4: set quant.base to int8, or leave quant.threshold out"),
    (["--quant.skip=dwn_proj"], "quant.skip=dwn_proj: no linear layer has this name; there are down_proj, gate_proj"),
    (["--quant.base=int8", "--train.dtype=float64"], "quant.base=int8 goes with float32 or 16 bits, but train.dtype is float64"),
    (["--lora.init=pisa"], "lora.init=pisa: allowed are random, pissa, pissa_niter_N, loftq; did you mean pissa?"),
    (["--lora.init=pissa", "--lora.rank=65"], "lora.rank=65: model.layers.0.self_attn.q_proj has 64 singular values, and lora.init=pissa takes as many as the rank: lower lora.rank, or set lora.init=random"),
    (["--lora.init=loftq", "--quant.base=none"], "lora.init=loftq makes up for what 4 bits lose, but quant.base is none: set quant.base=nf4 or fp4, or lora.init=pissa"),
    (["--lora.init=loftq", "--quant.base=int8"], "lora.init=loftq makes up for what 4 bits lose, but quant.base is int8"),
    (["--lora.loftq_iterations=2"], "lora.loftq_iterations is set, but lora.init is random: set lora.init=loftq, or leave lora.loftq_iterations out"),
    (["--lora.dora=true", "--quant.base=fp8"], "lora.dora=true is not possible with quant.base=fp8"),
    (["--model.embedding=host", "--quant.base=none", "--lora.rank=0", "--lora.dropout=0"], "model.embedding=host keeps a table that is not trained, but all weights are trained: set lora.rank, or leave model.embedding out"),
    (["--model.embedding=cpu"], "model.embedding=cpu: allowed are device, host"),
    (["--train.mlp_tokens=-1"], "train.mlp_tokens=-1: must be from 0 to"),
    (["--quant.base=fp8"], "quant.base=fp8 needs a device of compute capability 8.9 or newer")])
def test_what_cannot_be_is_refused_in_a_sentence(work, keys, said):
    assert said.replace("WORK", str(work)) in train(work, "refused", *keys, status=2)
    assert not (work / "refused").exists()


def test_a_table_that_is_the_output_layer_too_stays_on_the_device(work):
    (work / "tied.json").write_text(json.dumps(SHAPE | dict(tie_word_embeddings=True)))
    said = train(work, "refused", "--model.embedding=host", f"--model.config={work}/tied.json", status=2)
    assert "model.embedding=host saves nothing with " in said and "tied.json, whose output layer is the same table" in said, said


def test_a_cut_through_a_block_is_refused_before_anything_is_read(work):
    said = train(work, "refused", "--quant.block_size=64", "--parallel.tensor=4", "--train.accumulation=1", ranks=4, status=2)
    assert "quant.block_size=64: a rank's columns 0 to 31 of model.layers.0.self_attn.o_proj (64 x 128) would cut a block of scales: take 32; or set another parallel.tensor" in said, said
    done = run(work, "plan", f"--model.config={work}/model.json", "--lora.rank=4", "--quant.base=nf4", "--parallel.tensor=4", "--plan.ranks=4", "--data.max_length=32")
    assert done.returncode == 2 and "take 32; or set another parallel.tensor" in done.stderr, done.stderr


@pytest.mark.parametrize("keys, cuts_in_four", [(["--quant.base=none"], True), (["--quant.base=nf4", "--quant.block_size=32"], True), (["--quant.base=nf4"], False),
                                                (["--quant.base=fp8", "--quant.skip=up_proj,gate_proj,down_proj"], True), (["--quant.base=fp8"], False)])
def test_the_meshes_that_are_suggested_cut_no_block(work, keys, cuts_in_four):
    """A quarter of 128 columns is half a block of 64, one of 96 no multiple of 16."""
    (work / "narrow.json").write_text(json.dumps(SHAPE | dict(intermediate_size=96 if "fp8" in keys[0] else 128, num_key_value_heads=4)))
    done = run(work, "plan", f"--model.config={work}/narrow.json", "--lora.rank=4", *keys, "--train.dtype=bfloat16", "--plan.memory_gb=80", "--parallel.tensor=3", "--plan.ranks=4", "--data.max_length=32")
    assert done.returncode == 2 and "take one of these meshes: " in done.stderr and "data 2 x tensor 2 x pipeline 1" in done.stderr, done.stderr
    assert ("data 1 x tensor 4 x pipeline 1" in done.stderr) == cuts_in_four, done.stderr


def test_the_plan_counts_the_bits(work):
    def weights(base, *keys):
        done = run(work, "plan", f"--model.config={work}/model.json", "--lora.rank=4", f"--quant.base={base}", "--data.max_length=32", "--train.dtype=bfloat16", *keys)
        assert done.returncode == 0, done.stderr
        return float(done.stderr.split("weights ")[1].split(" MiB")[0])

    bits = {base: weights(base) for base in ("none", "nf4", "int8")}
    linears = 2 * (64 * 128 * 2 + 64 * 64 * 2 + 3 * 64 * 128)
    assert (bits["none"] - bits["int8"]) * 2**20 == pytest.approx(linears, abs=2 * 0.01 * 2**20)
    assert (bits["none"] - bits["nf4"]) * 2**20 == pytest.approx(linears * (2 - 4.127 / 8) - 14 * 1024, abs=2 * 0.01 * 2**20)  # each layer's map of scales; as it is said


def test_an_adapter_is_merged_into_what_the_codes_stand_for(work):
    """Against the sum by hand, of the values that evaluation computes with: those of a run that exports the base alone."""
    done = run(work, "train", f"--run.dir={work}/pretrained", f"--model.config={work}/model.json", f"--model.tokenizer={QUICKSTART}/model", f"--data.train={QUICKSTART}/train.jsonl:8",
               "--data.max_length=32", "--train.steps=1", "--train.dtype=float32")
    assert done.returncode == 0, done.stderr
    model = f"--model.path={work}/pretrained/model"
    for dtype, bound in (("float32", 0), ("bfloat16", 2**-8)):
        name = f"merge_{dtype}"
        train(work, name, model, "--model.config=", "--model.tokenizer=", f"--train.dtype={dtype}", f"--model.dtype={dtype}", "--optim.lr=2e-2")
        merged, alone, kept = (work / f"{name}_{what}" for what in ("merged", "alone", "kept"))
        keys = [f"--model.dtype={dtype}", "--quant.base=nf4"]
        done = run(work, "export", model, f"--lora.path={work}/{name}/adapter", "--lora.merge=true", *keys, f"--run.dir={merged}")
        assert done.returncode == 0 and "merged with what the quantized base stands for: logits differ" in done.stderr, done.stderr
        assert run(work, "export", model, *keys, f"--run.dir={alone}").returncode == 0
        assert run(work, "export", f"{work}/{name}/config.ini", f"--run.resume={work}/{name}/checkpoints/step-6", "--lora.merge=true", f"--run.dir={kept}").returncode == 0
        found, values, adapter, again = (load_file(path) for path in (merged / "model.safetensors", alone / "model.safetensors", work / name / "adapter/adapter_model.safetensors",
                                                                      kept / "model.safetensors"))
        original = load_file(work / "pretrained/model/model.safetensors")
        assert all(torch.equal(again[key], value) for key, value in found.items())
        for key, value in found.items():
            path = f"base_model.model.{key.removesuffix('.weight')}"
            if f"{path}.lora_A.weight" not in adapter:
                assert torch.equal(value.float(), original[key].to(value.dtype).float()), key
                continue
            update = adapter[f"{path}.lora_B.weight"].float() @ adapter[f"{path}.lora_A.weight"].float()
            room = (2 * bound + 1e-6) * (values[key].float().abs() + update.abs())
            assert ((value.float() - values[key].float() - update).abs() <= room).all(), key
            assert ((value.float() - original[key] - update).abs() > room).float().mean() > 0.5, key  # nothing was added to the weights as they are stored


def test_merging_that_loses_the_model_is_refused(work):
    """In float16 a weight of 1e5 is infinite."""
    train(work, "lost", "--train.dtype=float16", "--model.dtype=float16", "--train.steps=1", "--data.eval=", "--eval.every=0")
    path = work / "lost/adapter/adapter_model.safetensors"
    tensors = load_file(path)
    a = next(key for key in tensors if key.endswith("down_proj.lora_A.weight"))
    tensors[a][:] = 300
    tensors[a.replace("lora_A", "lora_B")][:] = 300  # their product is not in float16, though what goes through them may be
    save_file(tensors, path, metadata={"format": "pt"})
    done = run(work, "export", f"--model.config={work}/model.json", "--model.dtype=float16", f"--model.tokenizer={QUICKSTART}/model", f"--lora.path={work}/lost/adapter", "--lora.merge=true",
               "--quant.base=nf4", f"--run.dir={work}/lost_merged")
    assert done.returncode == 3 and "the merged weights are not the model that was trained" in done.stderr, done.stderr
    assert not (work / "lost_merged").exists()


def test_what_fewer_bits_would_hide_is_found(work):
    done = run(work, "train", f"--run.dir={work}/sound", f"--model.config={work}/model.json", f"--model.tokenizer={QUICKSTART}/model", f"--data.train={QUICKSTART}/train.jsonl:8",
               "--data.max_length=32", "--train.steps=1")
    assert done.returncode == 0, done.stderr
    path = work / "sound/model/model.safetensors"
    tensors = load_file(path)
    for bad in (float("nan"), float("inf")):
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = bad
        save_file(tensors, path, metadata={"format": "pt"})
        for base in ("nf4", "int8"):
            keys = [f"--model.path={work}/sound/model", f"--quant.base={base}"]
            for verb, more in (("quantize", [f"--run.dir={work}/damaged"]), ("export", [f"--run.dir={work}/damaged"]), ("eval", [f"--data.eval={QUICKSTART}/eval.jsonl:2"])):
                done = run(work, verb, *keys, *more)
                assert done.returncode == 3 and "model.layers.1.mlp.up_proj.weight: 1 of 8192 values are not finite" in done.stderr, done.stderr
                assert not (work / "damaged").exists() and not (work / "damaged.tmp").exists()
        for init, keys in (("pissa", []), ("pissa_niter_2", []), ("pissa_niter_2", ["--quant.base=nf4"]), ("loftq", ["--quant.base=nf4"])):
            done = run(work, "train", f"--model.path={work}/sound/model", f"--data.train={QUICKSTART}/train.jsonl:8", "--data.max_length=32", "--train.steps=1", "--lora.rank=4",
                       f"--lora.init={init}", f"--run.dir={work}/begun_{bad}_{init}{len(keys)}", *keys)
            said = f"model.layers.1.mlp.up_proj.weight: 1 of 8192 values are not finite, and lora.init={init} begins with them: the model's weights are damaged"
            assert done.returncode == 3 and said in done.stderr, done.stderr


def test_a_run_that_computed_in_another_dtype_is_merged(work):
    train(work, "wider", "--train.dtype=float32", "--quant.compute_dtype=bfloat16", "--train.steps=2")
    done = run(work, "export", f"{work}/wider/config.ini", f"--run.resume={work}/wider/checkpoints/step-2", "--lora.merge=true", f"--run.dir={work}/wider_merged")
    assert done.returncode == 0 and "(rounding explains 0.05)" in done.stderr, done.stderr
