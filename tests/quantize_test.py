"""trireme quantize writes what transformers and bitsandbytes write: the same tensors and keys, which they load with the logits of this
program, and which trains with the numbers of quant.base at load. It leaves nothing half-written."""
import json
import os
import re
import shutil
import signal
import subprocess
import time

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # bitsandbytes would compile what it runs once
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import bitsandbytes.functional as functional

import bounds
import hf_models
from program import SOURCE, command, end_of, override, run, start

IDS = [[5, 17, 300, 1100, 42, 9, 9, 250, 31, 77, 640, 3] * 4]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("quantize")
    hf_models.CASES["base"] = ("qwen2", {**hf_models.heads(4, 2, 32), "intermediate_size": 256, "tie_word_embeddings": True})
    hf_models.make("base", folder / "fp32").to(torch.bfloat16).save_pretrained(folder / "base")
    hf_models.add_tokenizer(folder / "base")
    (folder / "ids.json").write_text(json.dumps(IDS))
    return folder


def quantize(work, name, *keys, base="base", kind="nf4"):
    done = run(work, "quantize", f"--model.path={work / base}", f"--quant.base={kind}", f"--run.dir={work / name}", *keys)
    assert done.returncode == 0 and f"wrote {work / name}" in done.stderr, done.stderr
    assert not (work / f"{name}.tmp").exists()
    return work / name


def state(tensors, name):
    return json.loads(bytes(tensors[name].tolist()))


@pytest.mark.parametrize("kind, double, skip", [("nf4", True, None), ("nf4", False, "down_proj"), ("fp4", True, "q_proj")])
def test_the_folder_is_that_of_transformers(work, kind, double, skip):
    name = f"{kind}-{double}"
    out = quantize(work, name, *([] if skip is None else [f"--quant.skip={skip}"]), f"--quant.double={str(double).lower()}", kind=kind)
    options = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double, bnb_4bit_compute_dtype=torch.bfloat16,
                                              llm_int8_skip_modules=None if skip is None else ["lm_head", skip])
    transformers.AutoModelForCausalLM.from_pretrained(work / "base", quantization_config=options, dtype=torch.bfloat16).save_pretrained(work / f"{name}-theirs")
    mine, theirs = (load_file(folder / "model.safetensors") for folder in (out, work / f"{name}-theirs"))
    assert mine.keys() == theirs.keys()
    for tensor, value in theirs.items():
        assert mine[tensor].dtype == value.dtype, tensor
        if ".quant_state." in tensor:
            ours, expected = state(mine, tensor), state(theirs, tensor)
            # The mean of the scales is summed in another order, which is why nested codes are not compared to the bit.
            assert ours.pop("nested_offset", 0) == pytest.approx(expected.pop("nested_offset", 0), rel=1e-6) and ours == expected, tensor
            assert list(state(mine, tensor)) == list(state(theirs, tensor))
        elif tensor.endswith("nested_absmax"):
            torch.testing.assert_close(mine[tensor], value, rtol=1e-5, atol=0)
        elif double and tensor.endswith(".absmax"):
            assert (mine[tensor].int() - value.int()).abs().max() <= 1, tensor
        elif kind == "nf4" or value.dtype != torch.uint8:
            assert torch.equal(mine[tensor], value), tensor
        else:  # tiny negatives of FP4 have another code on its CPU
            assert mine[tensor].shape == value.shape and (mine[tensor] != value).float().mean() < 0.02, tensor
    configs = [json.loads((folder / "config.json").read_text()) for folder in (out, work / f"{name}-theirs")]
    if skip:
        assert configs[0]["quantization_config"]["llm_int8_skip_modules"] == ["lm_head"] + [f"model.layers.{i}.{part}.{skip}" for i in range(2) for part in ("self_attn", "mlp")
                                                                                        if (part == "mlp") == (skip == "down_proj")]
        configs[0]["quantization_config"]["llm_int8_skip_modules"] = ["lm_head", skip]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / file).read_bytes() == (work / "base" / file).read_bytes()
    # And they load it.
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16).train()  # else its CPU code repacks the weights of other models
    assert model.is_loaded_in_4bit and not any(l.startswith("model.layers.") for l, m in model.named_modules() if type(m) is torch.nn.Linear and skip not in (None, l.split(".")[-1]))
    with torch.no_grad():
        expected = model(torch.tensor(IDS)).logits[0].float()
    done = run(work, "eval", f"--model.path={out}", f"--eval.token_ids={work / 'ids.json'}", f"--eval.logits={work / 'logits.safetensors'}")
    assert done.returncode == 0, done.stderr
    logits = load_file(work / "logits.safetensors")["logits.0"]
    assert ((logits - expected).norm() / expected.norm()).item() <= bounds.LOGITS_BF16


def outcome(work, name, folder, *keys, trained=()):
    train = run(work, "train", f"--run.dir={work / name}", f"--model.path={work / folder}", f"--data.train={SOURCE}/configs/quickstart/train.jsonl:16", "--train.steps=3",
                "--train.micro_batch_size=4", "--optim.lr=1e-2", "--lora.rank=4", "--data.max_length=64", *keys, *trained)
    assert train.returncode == 0, train.stderr
    lines = [json.loads(line) for line in (work / name / "metrics.jsonl").read_text().splitlines()]
    adapter = f"--lora.path={work / name}/adapter"
    loss = run(work, "eval", f"--model.path={work / folder}", f"--eval.token_ids={work / 'ids.json'}", adapter, *keys).stdout
    said = run(work, "generate", f"--model.path={work / folder}", "--generate.max_tokens=8", "What is Trireme?", adapter, *keys)
    assert said.returncode == 0, said.stderr
    return [(line["loss"], line["grad_norm"]) for line in lines], loss, said.stdout


@pytest.mark.parametrize("kind, keys", [("nf4", []), ("fp4", ["--quant.block_size=32", "--quant.double=false", "--quant.skip=o_proj,gate_proj"]), ("int8", ["--quant.skip=k_proj"])],
                         ids=["nf4", "fp4", "int8"])
def test_its_numbers_are_those_of_quantizing_at_load(work, kind, keys):
    name = f"round-{kind}"
    quantize(work, name, *keys, kind=kind)
    assert outcome(work, f"{name}-stored", name) == outcome(work, f"{name}-made", "base", f"--quant.base={kind}", *keys)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_magnitudes_are_of_the_stored_values(work, kind):
    quantize(work, f"dora-{kind}", kind=kind)
    dora = {"trained": ["--lora.dora=true"]}
    assert outcome(work, f"dora-{kind}-stored", f"dora-{kind}", **dora) == outcome(work, f"dora-{kind}-made", "base", f"--quant.base={kind}", **dora)
    done = run(work, "train", f"--run.dir={work / 'refused'}", f"--model.path={work}/dora-{kind}", f"--data.train={SOURCE}/configs/quickstart/train.jsonl:16", "--train.steps=1", "--lora.rank=4",
               "--lora.init=pissa")
    assert done.returncode == 2 and f"are stored in {kind}, which stays as it is: set lora.init=random, or quant.base=dense with lora.init=pissa" in done.stderr, done.stderr


def test_rows_that_bitsandbytes_reads_wrongly_are_said(work):
    """Its CPU code takes the blocks of each row from the row's beginning."""
    done = run(work, "quantize", f"--model.path={work / 'base'}", "--quant.base=nf4", "--quant.block_size=256", f"--run.dir={work / 'cut-rows'}")
    said = ("warning: 12 layers, such as model.layers.0.mlp.gate_proj with rows of 128, have rows that blocks of 256 do not divide: bitsandbytes' CPU code reads such weights wrongly, its CUDA code "
            "and trireme do not; quant.block_size=128 divides all, and quant.skip leaves layers as they are\n")
    assert done.returncode == 0 and said in done.stderr, done.stderr
    for keys in (["--quant.base=nf4"], ["--quant.base=nf4", "--quant.block_size=128"], ["--quant.base=int8"]):
        shutil.rmtree(work / "whole-rows", ignore_errors=True)
        done = run(work, "quantize", f"--model.path={work / 'base'}", *keys, f"--run.dir={work / 'whole-rows'}")
        assert done.returncode == 0 and "warning" not in done.stderr, done.stderr


FORMS = {"nf4": [], "fp4": ["--quant.block_size=32", "--quant.double=false", "--quant.skip=o_proj"], "int8": ["--quant.skip=q_proj"]}


@pytest.fixture(scope="module")
def adapters(work):
    """Of some layers, trained beside each base."""
    def train(base, *keys):
        done = run(work, "train", f"--run.dir={work}/of-{base}", f"--model.path={work}/fp32", f"--quant.base={base}", f"--data.train={SOURCE}/configs/quickstart/train.jsonl:16", "--train.steps=4",
                   "--train.micro_batch_size=4", "--optim.lr=1e-2", "--lora.rank=4", "--lora.alpha=32", "--lora.targets=q_proj,down_proj", "--data.max_length=64", *keys)
        assert done.returncode == 0, done.stderr
        return work / f"of-{base}/adapter"
    return {base: train(base, *keys) for base, keys in FORMS.items()}


def values(work, name, *keys):
    """What weights stand for, in fp32."""
    out = work / f"{name}-values"
    if not out.exists():
        done = run(work, "export", *keys, f"--run.dir={out}")
        assert done.returncode == 0, done.stderr
    return load_file(out / "model.safetensors")


@pytest.mark.parametrize("kind, keys", FORMS.items(), ids=FORMS)
def test_an_adapter_goes_back_into_fewer_bits(work, adapters, kind, keys):
    """Into those of the base: what bitsandbytes makes of the sum. What that loses is said, and of other layers nothing is."""
    form, out = [f"--quant.base={kind}", *keys], work / f"again-{kind}"
    merge = [f"--lora.path={adapters[kind]}", "--lora.merge=true", "--lora.requantize=true"]
    done = run(work, "export", f"--model.path={work}/fp32", *merge, *form, f"--run.dir={out}")
    assert done.returncode == 0 and f"wrote {out}" in done.stderr, done.stderr
    plain = quantize(work, f"plain-{kind}", *keys, base="fp32", kind=kind)
    assert json.loads((out / "config.json").read_text()) == json.loads((plain / "config.json").read_text())
    before, after, adapter = (load_file(path) for path in (plain / "model.safetensors", out / "model.safetensors", adapters[kind] / "adapter_model.safetensors"))
    base, again = values(work, f"plain-{kind}", f"--model.path={plain}"), values(work, f"again-{kind}", f"--model.path={out}")
    assert before.keys() == after.keys()
    left, errors = {}, {}
    for name, tensor in before.items():
        layer = name.split(".weight")[0].removesuffix(".SCB")
        a = adapter.get(f"base_model.model.{layer}.lora_A.weight")
        if a is None:
            assert torch.equal(tensor, after[name]), name
            continue
        if not name.endswith(".weight"):
            continue
        update = 8 * adapter[f"base_model.model.{layer}.lora_B.weight"].double() @ a.double()
        merged = base[name].double() + update
        if kind == "int8" and "q_proj" in name:  # which stays as it is
            assert (after[name] - merged).abs().max() <= bounds.MERGED_FP32 * merged.abs().max()
            continue
        found = again[name].double()
        left[layer] = ((found - base[name]) * update).sum() / (update * update).sum()
        errors[layer] = (found - merged).norm() / update.norm()
        if kind == "int8":
            half = merged.half().double()  # which bitsandbytes' codes are of
            expected = torch.round(half * 127 / half.abs().amax(1, keepdim=True)).to(torch.int8)
            assert (tensor != expected).any() and (after[name] != expected).float().mean() < 1e-3, name
        else:  # where a scale is between two numbers, or a value between two codes
            codes, _ = functional.quantize_4bit(merged.float(), blocksize=32 if keys else 64, quant_type=kind)
            assert not torch.equal(tensor, after[name]) and (after[name] != codes).float().mean() < (1e-3 if kind == "nf4" else 0.02), name
    said = re.search(r"merged and quantized again: logits differ from those of base and adapter by (\S+) of their norm, those of merged weights in float32 by (\S+)\n", done.stderr)
    assert 0 <= float(said[2]) < (0.05 if kind == "int8" else 1e-4) < 0.5, said  # int8 quantizes inputs on one side alone
    losses = re.search(r"of the adapter's updates (\S+) is left, the mean of (\d+) layers, least in (\S+) \((\S+)\); rounding changes weights by (\S+) of their norm beside, most in (\S+) \((\S+)\)\n", done.stderr)
    assert int(losses[2]) == len(left) == (2 if kind == "int8" else 4)
    least, most = min(left, key=left.get), max(errors, key=errors.get)
    assert (losses[3], losses[6]) == (least, most)
    for found, expected in ((losses[1], sum(left.values()) / len(left)), (losses[4], left[least]), (losses[5], sum(errors.values()) / len(errors)), (losses[7], errors[most])):
        assert float(found) == pytest.approx(float(expected), rel=1e-3), losses
    # It is loaded by transformers, and the logits are what is said of them.
    logits = {}
    for name, more in (("again", [f"--model.path={out}"]), ("trained", [f"--model.path={work}/fp32", f"--lora.path={adapters[kind]}", *form])):
        done = run(work, "eval", *more, f"--eval.token_ids={work / 'ids.json'}", f"--eval.logits={work / 'logits.safetensors'}")
        assert done.returncode == 0, done.stderr
        logits[name] = load_file(work / "logits.safetensors")["logits.0"]
    assert ((logits["again"] - logits["trained"]).norm() / logits["trained"].norm()).item() == pytest.approx(float(said[1]), rel=0.8)  # of other tokens
    if kind != "int8":  # which transformers computes in fp16
        with torch.no_grad():
            expected = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).train()(torch.tensor(IDS)).logits[0]
        assert ((logits["again"] - expected).norm() / expected.norm()).item() <= bounds.LOGITS_BF16
    # A folder that holds the codes, and a run's checkpoint, give the same.
    assert run(work, "export", f"--model.path={plain}", *merge, f"--run.dir={out}-stored").returncode == 0
    resumed = [f"{work}/of-{kind}/config.ini", f"--run.resume={work}/of-{kind}/checkpoints/step-4", *merge[1:], *keys]
    assert run(work, "export", *resumed, f"--run.dir={out}-resumed").returncode == 0
    for folder in ("stored", "resumed"):
        for file in ("model.safetensors", "config.json"):
            assert (work / f"again-{kind}-{folder}" / file).read_bytes() == (out / file).read_bytes(), (folder, file)


@pytest.mark.parametrize("keys, sentence", [
    ([], "lora.requantize=true, but quant.base is none and WORK/fp32 is not quantized: set quant.base to nf4, fp4 or int8, as the adapter was trained beside, or leave lora.requantize out"),
    (["--quant.base=nf4", "--lora.merge=false"], "lora.requantize=true needs lora.merge=true"),
    (["--quant.base=nf4", "--model.dtype=float64"], "lora.requantize=true is not possible with float64, of which bitsandbytes has no codes: set model.dtype=float32")])
def test_what_does_not_go_back(work, adapters, keys, sentence):
    usual = [f"--model.path={work}/fp32", f"--lora.path={adapters['nf4']}", "--lora.merge=true", "--lora.requantize=true", f"--run.dir={work}/never"]
    done = run(work, "export", *override(usual, keys))
    assert done.returncode == 2 and f"error: {sentence.replace('WORK', str(work))}" in done.stderr, done.stderr
    assert not (work / "never").exists() and not (work / "never.tmp").exists()


def test_an_adapter_names_its_base(work, adapters):
    done = run(work, "export", f"--lora.path={adapters['nf4']}", "--lora.merge=true", "--quant.base=nf4", f"--run.dir={work}/never")
    assert done.returncode == 2 and done.stderr == (f"error: neither model.path nor model.config is set: lora.path={adapters['nf4']} is an adapter for {work}/fp32; set model.path to it\n"), done.stderr


@pytest.mark.parametrize("adapter, keys, then, now, way_out", [
    ("nf4", [], "nf4, blocks of 64, scales in 8 bits", "weights that are not quantized", "set quant.base=nf4, or quant.base=none"),
    ("int8", ["--quant.base=nf4"], "int8, without q_proj", "one in nf4, blocks of 64, scales in 8 bits", "set quant.base=int8 quant.skip=q_proj, or quant.base=none"),
    ("fp4", ["--quant.base=fp4"], "fp4, blocks of 32, scales in 32 bits, without o_proj", "one in fp4, blocks of 64, scales in 8 bits",
     "set quant.base=fp4 quant.block_size=32 quant.double=false quant.skip=o_proj, or quant.base=none")])
def test_an_adapter_is_not_merged_into_another_base(work, adapters, adapter, keys, then, now, way_out):
    sentence = f"was trained beside a base in {then}, and would be merged into {now}: {way_out} to merge into these weights all the same"
    run_of = ["export", f"{work}/of-{adapter}/config.ini", f"--run.resume={work}/of-{adapter}/checkpoints/step-4", "--quant.base=none", "--quant.block_size=64", "--quant.double=true", "--quant.skip="]
    for command, named in ((["export", f"--model.path={work}/fp32", f"--lora.path={adapters[adapter]}", *keys], f"lora.path={adapters[adapter]}"),
                           (override(run_of, keys) if keys else None, f"run.resume={work}/of-{adapter}/checkpoints/step-4")):
        if command is None:
            continue
        done = run(work, *command, "--lora.merge=true", f"--run.dir={work}/never")
        assert done.returncode == 2 and done.stderr == f"error: {named} {sentence}\n", done.stderr
        assert not (work / "never").exists()


def test_an_adapter_is_merged_into_the_base_that_is_named(work, adapters):
    """Its own, or weights that are not quantized."""
    for adapter, keys in (("nf4", ["--quant.base=none"]), ("nf4", ["--quant.base=nf4"]), ("int8", ["--quant.base=int8", "--quant.skip=q_proj"])):
        shutil.rmtree(work / "told", ignore_errors=True)
        done = run(work, "export", f"--model.path={work}/fp32", f"--lora.path={adapters[adapter]}", "--lora.merge=true", *keys, f"--run.dir={work}/told")
        assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    # The run's own keys beside its adapter: what the adapter says of itself is not said twice.
    run_of = [f"{work}/of-int8/config.ini", f"--lora.path={adapters['int8']}", "--lora.merge=true"]
    done = run(work, "export", *run_of, f"--run.dir={work}/told-run")
    assert done.returncode == 0 and (work / "told-run/model.safetensors").read_bytes() == (work / "told/model.safetensors").read_bytes(), done.stderr
    # What is stored knows itself which layers are left out.
    quantize(work, "stored-int8", "--quant.skip=q_proj", base="fp32", kind="int8")
    merge = [f"--model.path={work}/stored-int8", "--lora.merge=true", "--model.dtype=float32"]
    done = run(work, "export", *merge, f"--lora.path={adapters['int8']}", f"--run.dir={work}/told-stored")
    assert done.returncode == 0 and "(rounding explains 0.05" in done.stderr, done.stderr
    done = run(work, "export", *merge, f"--lora.path={adapters['nf4']}", f"--run.dir={work}/never")
    assert done.returncode == 2 and "would be merged into one in int8: set model.path to that base, or quant.base=dense to merge into these weights all the same" in done.stderr, done.stderr
    done = run(work, "export", *merge, f"--lora.path={adapters['nf4']}", "--quant.base=dense", f"--run.dir={work}/told-dense")
    assert done.returncode == 0, done.stderr


def test_peft_reads_an_adapter_that_names_its_base(work, adapters):
    model = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(work / "fp32"), adapters["nf4"])
    assert model.peft_config["default"].r == 4


def test_8_bits_are_those_of_transformers(work):
    out = quantize(work, "int8", kind="int8")
    model = transformers.AutoModelForCausalLM.from_pretrained(work / "base", quantization_config=transformers.BitsAndBytesConfig(load_in_8bit=True), dtype=torch.bfloat16)
    model.save_pretrained(work / "int8-theirs")
    mine, theirs = (load_file(folder / "model.safetensors") for folder in (out, work / "int8-theirs"))
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        assert mine[name].dtype == value.dtype and mine[name].shape == value.shape, name
        if value.dtype == torch.int8:  # its are of fp16, in which the smallest weights are rounded
            assert (mine[name].int() - value.int()).abs().max() <= 1 and (mine[name] != value).float().mean() < 1e-3, name
        else:
            assert torch.equal(mine[name], value), name
    configs = [json.loads((folder / "config.json").read_text())["quantization_config"] for folder in (out, work / "int8-theirs")]
    assert configs[0] == configs[1]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    with torch.no_grad():
        found, expected = (m(torch.tensor(IDS)).logits[0].float() for m in (loaded, model))
    assert ((found - expected).norm() / expected.norm()).item() <= bounds.LOGITS_INT8


def test_8_bits_of_fp32_are_those_of_transformers(work):
    """Which takes weights in float16, and so this program does, in a folder and at load; it says where they do not fit."""
    out = quantize(work, "int8-of-fp32", base="fp32", kind="int8")
    transformers.AutoModelForCausalLM.from_pretrained(work / "fp32", quantization_config=transformers.BitsAndBytesConfig(load_in_8bit=True), dtype=torch.float32).save_pretrained(work / "int8-of-fp32-theirs")
    mine, theirs = (load_file(folder / "model.safetensors") for folder in (out, work / "int8-of-fp32-theirs"))
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        if value.dtype == torch.int8:  # at ties theirs go the other way
            assert (mine[name] != value).float().mean() < 1e-3 and (mine[name].int() - value.int()).abs().max() <= 1, name
        else:
            assert torch.equal(mine[name], value), name
    folder = shutil.copytree(work / "fp32", work / "beyond")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    tensors[f"{name}.weight"][3, 5] = -70000
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for verb, keys in (("quantize", [f"--run.dir={work / 'beyond8'}"]), ("eval", [f"--eval.token_ids={work / 'ids.json'}"])):
        done = run(work, verb, f"--model.path={folder}", "--quant.base=int8", *keys)
        assert done.returncode == 2 and f"error: quant.base=int8: {name}.weight has values of up to 70000, but LLM.int8() takes weights in float16, of 65504 at most: add it to quant.skip" in done.stderr, done.stderr


def test_weights_in_other_dtypes_and_shards(work):
    """Codes are of what the weights are in the dtype of the product."""
    as_bf16, of_bf16 = (load_file(quantize(work, name, *keys, base=base) / "model.safetensors")
                        for name, base, keys in (("converted", "fp32", ["--model.dtype=bfloat16"]), ("plainly", "base", [])))
    assert as_bf16.keys() == of_bf16.keys() and all(torch.equal(as_bf16[name], of_bf16[name]) for name in as_bf16)
    fp32 = load_file(quantize(work, "float", base="fp32") / "model.safetensors")
    assert state(fp32, next(name for name in fp32 if ".quant_state." in name))["dtype"] == "float32" and fp32["model.norm.weight"].dtype == torch.float32
    assert json.loads((work / "float/config.json").read_text())["quantization_config"]["bnb_4bit_compute_dtype"] == "float32"


def wide(folder, layers):
    """A model that takes a while to write."""
    config = json.loads((SOURCE / "configs/quickstart/model/config.json").read_text())
    config |= dict(model_type="llama", hidden_size=1024, intermediate_size=4096, num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=8, head_dim=128,
                   vocab_size=1152, tie_word_embeddings=True, torch_dtype="bfloat16")
    config.pop("layer_types", None)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    sizes = {"input_layernorm": (1024,), "post_attention_layernorm": (1024,), **{f"self_attn.{x}_proj": (1024, 1024) for x in "qkvo"},
             "mlp.gate_proj": (4096, 1024), "mlp.up_proj": (4096, 1024), "mlp.down_proj": (1024, 4096)}
    tensors = {f"model.layers.{i}.{name}.weight": torch.ones(size, dtype=torch.bfloat16) for i in range(layers) for name, size in sizes.items()}
    save_file(tensors | {"model.norm.weight": torch.ones(1024, dtype=torch.bfloat16), "model.embed_tokens.weight": torch.ones((1152, 1024), dtype=torch.bfloat16)},
              folder / "model.safetensors", {"format": "pt"})
    hf_models.add_tokenizer(folder)
    return folder


def test_a_killed_writer_leaves_nothing_that_looks_whole_and_runs_again(tmp_path):
    model = wide(tmp_path / "model", 4)
    keys = command("quantize", f"--model.path={model}", "--quant.base=nf4", f"--run.dir={tmp_path / 'out'}/")
    job = start(tmp_path, keys)
    while not list(tmp_path.glob("out.tmp/*.tmp")) and job.poll() is None:
        time.sleep(0.001)
    job.send_signal(signal.SIGKILL)
    end_of(job)
    assert not (tmp_path / "out").exists() and (tmp_path / "out.tmp").is_dir()
    (tmp_path / "out.tmp/model-00001-of-00002.safetensors.tmp").write_text("of another writer")
    assert run(tmp_path, *keys[1:]).returncode == 0
    assert run(tmp_path, "quantize", f"--model.path={model}", "--quant.base=nf4", f"--run.dir={tmp_path / 'never-killed'}").returncode == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(path.name for path in (tmp_path / "never-killed").iterdir())
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "never-killed/model.safetensors").read_bytes()


@pytest.mark.parametrize("keys, status, sentence", [
    ([], 2, "quant.base=none is no form that is written: set it to nf4, fp4 or int8"),
    (["--quant.base=fp8"], 2, "quant.base=fp8 is no form that is written: set it to nf4, fp4 or int8"),
    (["--quant.base=nf4", "--run.dir=WORK/base"], 2, "run.dir=WORK/base is the folder of the model itself; name a new folder"),
    (["--quant.base=nf4", "--run.dir=WORK/fp32"], 2, "run.dir=WORK/fp32 is not empty; name a new folder"),
    (["--quant.base=nf4", "--run.dir=WORK/ids.json"], 2, "run.dir=WORK/ids.json is a file; name a new folder"),
    (["--quant.base=nf4", "--run.dir="], 2, "run.dir is not set: the folder to write"),
    (["--quant.base=nf4", "--quant.block_size=48"], 2, "quant.block_size=48: allowed are 0, 32, 64, 128, 256, 512, 1024, 2048, 4096"),
    (["--quant.base=nf4", "--quant.skip=nose_proj"], 2, "quant.skip=nose_proj: no linear layer has this name; there are down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj, or all-linear"),
    (["--quant.base=nf4", "--quant.skip=all-linear"], 2, "quant.skip leaves no layer to quantize: name fewer layers, or leave quant.base=nf4 out"),
    (["--quant.base=nf4", "--model.dtype=float64"], 2, "bitsandbytes quantizes float32, bfloat16 and float16, but the weights are float64: set model.dtype=float32"),
    (["--quant.base=nf4", "--lora.rank=2"], 2, "lora.rank is read by train, export, plan, not by quantize: leave it out (a configuration file may hold it)"),
    (["--quant.base=nf4", "--model.path=WORK/none"], 3, "model.path=WORK/none does not exist: name a Hugging Face model folder, or a hub name (org/name) that is in its cache"),
    (["--quant.base=nf4", "--model.path=WORK/done"], 2, "the weights of WORK/done are in nf4 already: quantize the model's original weights, or what trireme export makes of these"),
    (["--quant.base=nf4", "--model.path="], 2, "model.path is not set: the folder with the weights to quantize"),
    (["--quant.base=nf4", "--model.path=", f"--model.config={SOURCE}/configs/quickstart/model/config.json"], 2,
     "model.config is read by train, eval, generate, prepare, tokenize, export, plan, not by quantize: leave it out"),
])
def test_what_is_refused(work, keys, status, sentence):
    if not (work / "done").exists():
        quantize(work, "done")
    keys = [key.replace("WORK", str(work)) for key in keys]
    usual = [f"--model.path={work / 'base'}", f"--run.dir={work / 'never'}"]
    done = run(work, "quantize", *(key for key in usual if key.split("=")[0] not in {k.split("=")[0] for k in keys}), *keys)
    assert done.returncode == status and f"error: {sentence.replace('WORK', str(work))}" in done.stderr and done.stderr.count("error: ") == 1, done.stderr
    assert not (work / "never").exists() and not (work / "never.tmp").exists()


@pytest.mark.parametrize("keys, ranks, sentence", [
    (["--parallel.tensor=2"], 2, "a rank's columns 0 to 63 of model.layers.0.self_attn.o_proj (128 x 128) would cut a block of 256 values, whose scale is one in the model's files: set another "
     "parallel.tensor, or quant.base=dense for the values that the codes stand for"),
    *((["--lora.init=loftq", *base], 1, "lora.init=loftq begins with the weights, but those of WORK/coarse are stored in nf4 already: set lora.init=random, or quant.base=dense with lora.init=pissa")
      for base in ([], ["--quant.base=nf4"], ["--quant.base=dense"]))], ids=["cut", "loftq", "loftq on nf4", "loftq on dense"])
def test_what_is_stored_stays_and_what_is_advised_can_be_done(work, keys, ranks, sentence):
    if not (work / "coarse").exists():
        quantize(work, "coarse", "--quant.block_size=256")
    usual = [f"--model.path={work / 'coarse'}", f"--data.train={SOURCE}/configs/quickstart/train.jsonl:8", "--data.max_length=32", "--train.steps=1", "--lora.rank=4", "--lora.targets=down_proj"]
    done = run(work, "train", *usual, *keys, f"--run.dir={work}/never", ranks=ranks)
    assert done.returncode == 2 and f"error: {sentence.replace('WORK', str(work))}\n" in done.stderr, done.stderr
    done = run(work, "train", *usual, *override(keys, ["--quant.base=dense", *(["--lora.init=pissa"] if ranks == 1 else [])]), f"--run.dir={work}/dense{len(keys)}{ranks}{keys[-1][-3:]}", ranks=ranks)
    assert done.returncode == 0, done.stderr


def test_two_writers_of_one_folder_do_not_mix(work):
    """One writes it, the other is refused: before it has begun, or when it sees what the first has written."""
    jobs = [start(work, command("quantize", f"--model.path={work / 'base'}", f"--quant.base={kind}", f"--run.dir={work / 'both'}")) for kind in ("nf4", "int8")]
    done = [end_of(job) for job in jobs]
    assert sorted(job.returncode for job in done) == [0, 2], [job.stderr for job in done]
    refused, kind = next((job.stderr, kind) for job, kind in zip(done, ("int8", "nf4")) if job.returncode == 2)
    assert "is in use by" in refused or "is not empty; name a new folder" in refused, refused
    config = json.loads((work / "both/config.json").read_text())["quantization_config"]
    stored = {str(value.dtype) for name, value in load_file(work / "both/model.safetensors").items() if name.endswith("up_proj.weight")}
    assert (config["load_in_4bit"], stored) == ((True, {"torch.uint8"}) if kind == "nf4" else (False, {"torch.int8"}))
    assert not (work / "both.tmp").exists() and not (work / "both/run.lock").exists()


def test_what_is_in_the_way_stays(work):
    (work / "mine.tmp").mkdir()
    (work / "mine.tmp/kept").write_text("mine")
    (work / "nowhere").symlink_to(work / "gone")
    (work / "file").write_text("")
    for name, said, status in (("mine", "mine.tmp is in the way, and no unfinished folder of trireme: move it, or name another run.dir", 2),
                               ("nowhere", "nowhere is a link to nothing; name a new folder", 2), ("file/x", "cannot be written (", 1)):
        done = run(work, "quantize", f"--model.path={work / 'base'}", "--quant.base=nf4", f"--run.dir={work / name}")
        assert done.returncode == status and said in done.stderr, done.stderr
        assert not (work / f"{name}.tmp/model.safetensors").exists()
    assert (work / "mine.tmp/kept").read_text() == "mine" and not (work / "mine").exists()


def test_a_folder_that_is_there_and_empty(work):
    (work / "linked").mkdir()
    (work / "link").symlink_to(work / "linked")
    done = run(work, "quantize", f"--model.path={work / 'base'}", "--quant.base=nf4", f"--run.dir={work / 'link'}")
    assert done.returncode == 0 and (work / "link").is_symlink() and (work / "linked/config.json").exists(), done.stderr


def test_a_disk_is_no_new_folder(work):
    (work / "disk").mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", work / "disk"], capture_output=True).returncode != 0:
        pytest.skip("only root may mount a small disk")
    try:
        done = run(work, "quantize", f"--model.path={work / 'base'}", "--quant.base=nf4", f"--run.dir={work / 'disk'}")
        assert done.returncode == 2 and f"error: run.dir={work / 'disk'} is where a disk is mounted; name a new folder in it" in done.stderr, done.stderr
    finally:
        subprocess.run(["umount", "-l", work / "disk"], capture_output=True)
