"""Model folders that bitsandbytes has quantized: read as they are on every mesh, as dense weights where asked for, and refused with one
sentence where they are damaged. Weights have the codes of both programs, which agree on NF4 (tests/quant_parity_test.py)."""
import json
import os
import shutil

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # bitsandbytes would compile what it runs once
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import bitsandbytes.functional as functional

import bounds
import hf_models
from program import SOURCE, TRACES, override, run

IDS = [[5, 17, 300, 1100, 42, 9, 9, 250, 31, 77, 640, 3] * 4]
Q = "model.layers.1.self_attn.q_proj.weight"


def is_layer(name):
    return name.endswith("_proj.weight")


def quantized(base, out, kind="nf4", double=True, block_size=64, keep=(), storage=torch.uint8):
    """The folder `base` as bitsandbytes and transformers would store it."""
    shutil.copytree(base, out)
    tensors = {}
    for name, value in load_file(base / "model.safetensors").items():
        if not is_layer(name) or name in keep:
            tensors[name] = value
            continue
        codes, state = functional.quantize_4bit(value, blocksize=block_size, compress_statistics=double, quant_type=kind, quant_storage=storage)
        tensors[name] = codes
        tensors |= {f"{name}.{part}": tensor.contiguous() for part, tensor in state.as_dict(packed=True).items()}
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    options = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double, bnb_4bit_compute_dtype="bfloat16")
    config["quantization_config"] = options.to_dict() | {"llm_int8_skip_modules": ["lm_head", *keep]}
    (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A base in bf16 that two ranks may share out without cutting blocks of 64, and what is made of it."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("quantized")
    hf_models.CASES["base"] = ("llama", {**hf_models.heads(4, 2, 32), "intermediate_size": 256, "mlp_bias": True})
    hf_models.make("base", folder / "fp32").to(torch.bfloat16).save_pretrained(folder / "base")
    hf_models.add_tokenizer(folder / "base")
    (folder / "ids.json").write_text(json.dumps(IDS))
    quantized(folder / "base", folder / "nf4")
    quantized(folder / "base", folder / "plain", double=False)
    return folder


def evaluated(work, folder, *keys, ranks=1):
    done = run(work, "eval", f"--model.path={work / folder}", f"--eval.token_ids={work / 'ids.json'}", *keys, ranks=ranks)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["loss"]


def exported(work, folder):
    out = work / f"{folder}-dense"
    done = run(work, "export", f"--model.path={work / folder}", f"--run.dir={out}")
    assert done.returncode == 0, done.stderr
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    return load_file(out / "model.safetensors")


@pytest.mark.parametrize("kind, double, block_size, keep, storage", [
    ("nf4", True, 64, (), torch.uint8), ("nf4", False, 32, (Q, "model.layers.0.mlp.down_proj.weight"), torch.uint8),
    ("fp4", True, 128, (), torch.uint8), ("fp4", False, 4096, (), torch.uint8), ("nf4", True, 256, (), torch.bfloat16)],
    ids=["nf4", "nf4-plain-some", "fp4-128", "fp4-plain-4096", "nf4-in-bf16"])
def test_the_values_are_those_of_bitsandbytes(work, kind, double, block_size, keep, storage):
    name = f"{kind}-{double}-{block_size}"
    folder = quantized(work / "base", work / name, kind, double, block_size, keep, storage)
    stored, found, base = load_file(folder / "model.safetensors"), exported(work, name), load_file(work / "base/model.safetensors")
    assert found.keys() == base.keys()
    for weight, value in found.items():
        if not is_layer(weight) or weight in keep:
            assert torch.equal(value, base[weight]), weight
            continue
        state = functional.QuantState.from_dict({part.removeprefix(f"{weight}."): tensor for part, tensor in stored.items() if part.startswith(f"{weight}.")}, "cpu")
        state.shape = torch.Size([1, base[weight].numel()])  # rows of no whole blocks are not what its CPU code is right for
        assert torch.equal(value, functional.dequantize_4bit(stored[weight], state).view_as(value)), weight
        assert not torch.equal(value, base[weight]), weight
    # The products in the form that is stored are those of the values.
    assert evaluated(work, name) == pytest.approx(evaluated(work, f"{name}-dense"), rel=bounds.LOSS_FP32)
    assert evaluated(work, name, "--quant.base=dense") == evaluated(work, f"{name}-dense") != evaluated(work, "base")


def test_a_folder_of_transformers_has_its_logits(work):
    options = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(work / "base", quantization_config=options, dtype=torch.bfloat16)
    theirs.save_pretrained(work / "theirs")
    mine, stored = (load_file(work / name / "model.safetensors") for name in ("nf4", "theirs"))
    assert all(torch.equal(mine[name], stored[name]) for name in stored) and mine.keys() == stored.keys()
    with torch.no_grad():
        expected = theirs.train()(torch.tensor(IDS)).logits[0].float()  # train(): its CPU code repacks the weights of other models
    evaluated(work, "theirs", f"--eval.logits={work / 'logits.safetensors'}")
    logits = load_file(work / "logits.safetensors")["logits.0"]
    assert ((logits - expected).norm() / expected.norm()).item() <= bounds.LOGITS_BF16


def losses(work, name, folder, *keys, ranks=1):
    usual = [f"--run.dir={work / name}", f"--model.path={work / folder}", f"--data.train={SOURCE}/configs/quickstart/train.jsonl:16", "--train.steps=3",
             "--train.micro_batch_size=2", "--train.accumulation=2", "--optim.lr=1e-2", "--lora.rank=4", "--data.max_length=64"]
    done = run(work, "train", *override(usual, keys), ranks=ranks)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (work / name / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 3
    return [(line["loss"], line["grad_norm"]) for line in lines]


@pytest.mark.parametrize("name, ranks, keys", [("one", 1, []), ("tensor", 2, ["--parallel.tensor=2"]), ("stages", 2, ["--parallel.pipeline=2"]),
                                               ("zero3", 2, ["--parallel.zero=3", "--train.recompute=full"]),
                                               ("all", 4, ["--parallel.tensor=2", "--parallel.zero=3"])])
def test_training_on_it_is_training_on_what_quant_base_makes(work, name, ranks, keys):
    """To the bit. (bitsandbytes sums scales in another order than this program, so that nested ones are not the same.)"""
    make = ("--quant.base=nf4", "--quant.double=false")
    found = losses(work, f"{name}-stored", "plain", *keys, ranks=ranks)
    assert found == losses(work, f"{name}-made", "base", *make, *keys, ranks=ranks)
    adapter = json.loads((work / f"{name}-stored/adapter/adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(work / "plain")
    if name != "one":
        return
    assert found == losses(work, "named", "plain", *make)
    planned, of_base = (run(work, "plan", f"--model.path={work / folder}", "--lora.rank=4", "--train.steps=3", f"--run.dir={work / 'planned'}", "--plan.memory_gb=1", *more) for folder, more in
                        (("plain", ()), ("base", make)))
    assert planned.returncode == 0 and planned.stderr == of_base.stderr and "it fits" in planned.stderr, planned.stderr
    # The adapter goes into the values.
    done = run(work, "export", f"--model.path={work / 'plain'}", f"--lora.path={work / 'one-stored/adapter'}", "--lora.merge=true", f"--run.dir={work / 'merged'}")
    assert done.returncode == 0, done.stderr
    assert evaluated(work, "merged") == pytest.approx(evaluated(work, "plain", f"--lora.path={work / 'one-stored/adapter'}"), rel=bounds.CURVE_BF16)


def test_every_mesh_computes_with_its_values(work):
    alone = evaluated(work, "nf4", "--model.dtype=float32")
    for keys in (["--parallel.tensor=2"], ["--parallel.pipeline=2"]):
        assert evaluated(work, "nf4", "--model.dtype=float32", *keys, ranks=2) == pytest.approx(alone, rel=bounds.LAYOUT_FP32)


def test_all_weights_train_from_the_values(work):
    found = losses(work, "dense", "nf4", "--lora.rank=0", "--quant.base=dense")
    exported(work, "nf4")
    assert found == losses(work, "dense-exported", "nf4-dense", "--lora.rank=0")
    assert "quantization_config" not in json.loads((work / "dense/model/config.json").read_text())


@pytest.mark.parametrize("keys, sentence", [
    (["--quant.base=fp4", "--lora.rank=2"], "quant.base=fp4, but the model's files hold model.layers.0.self_attn.q_proj in nf4, in blocks of 64 with scales in 8 bits: leave it out, or set "
     "quant.base=dense and quantize what that exports"),
    (["--quant.base=nf4", "--quant.block_size=128", "--lora.rank=2"], "quant.block_size=128, but the model's files hold"),
    (["--quant.base=nf4", "--quant.double=false", "--lora.rank=2"], "quant.double=false, but the model's files hold"),
    (["--quant.base=nf4", "--quant.skip=down_proj", "--lora.rank=2"], "quant.skip: the model's files hold model.layers.0.mlp.down_proj in nf4: leave it out, or set quant.base=dense"),
    ([], "FOLDER/config.json: the weights are stored in nf4, which stays as it is, and nothing would be trained: set lora.rank, or quant.base=dense to train the values that they stand for"),
], ids=["base", "block_size", "double", "skip", "no adapter"])
@pytest.mark.parametrize("verb", ["train", "plan"])
def test_what_the_folder_is_not(work, verb, keys, sentence):
    done = run(work, verb, f"--run.dir={work / 'refused'}", f"--model.path={work / 'nf4'}", f"--data.train={SOURCE}/configs/quickstart/train.jsonl:16", "--train.steps=3", *keys)
    assert done.returncode == 2 and "error: " + sentence.replace("FOLDER", str(work / "nf4")) in done.stderr, done.stderr


STATE = f"{Q}.quant_state.bitsandbytes__nf4"


def state(**changes):
    def edit(tensors):
        found = json.loads(bytes(tensors[STATE].tolist())) | changes
        put({key: value for key, value in found.items() if value is not ...})(tensors)
    return edit


def put(value):
    def edit(tensors):
        tensors[STATE] = torch.tensor(list((value if isinstance(value, str) else json.dumps(value)).encode()), dtype=torch.uint8)
    return edit


def value_of(name, value, dtype=None):
    def edit(tensors):
        tensors[name] = tensors[name].to(dtype or tensors[name].dtype).clone()
        if value is not None:
            tensors[name].view(-1)[3] = value
    return edit


def cut(name):
    return lambda tensors: tensors.update({name: tensors[name][:-1].clone()})


def gone(name):
    return lambda tensors: tensors.pop(name)


def renamed(name, other):
    return lambda tensors: tensors.update({other: tensors.pop(name)})


DAMAGES = [
    (gone(STATE), "FOLDER: 'Q.quant_state.bitsandbytes__nf4' (or fp4) is missing: without it the other tensors of Q cannot be read."),
    (gone(Q), "FOLDER: 'Q' is missing, but tensors of its quantization are there."),
    (gone(f"{Q}.absmax"), "FOLDER: 'Q.absmax' is missing: the weight beside it is quantized by bitsandbytes."),
    (gone(f"{Q}.quant_map"), "FOLDER: 'Q.quant_map' is missing: the weight beside it is quantized by bitsandbytes."),
    (gone(f"{Q}.nested_absmax"), "FOLDER: 'Q.nested_absmax' is missing: the weight beside it is quantized by bitsandbytes."),
    (gone(f"{Q}.nested_quant_map"), "FOLDER: 'Q.nested_quant_map' is missing: the weight beside it is quantized by bitsandbytes."),
    (cut(Q), "FILE: tensor 'Q' is U8 [8191, 1]; its quant_state says [128, 128] in 4 bits, 8192 bytes."),
    (cut(f"{Q}.absmax"), "FILE: tensor 'Q.absmax' is U8 [255]; U8 of 256 values is what goes with its weight."),
    (value_of(f"{Q}.absmax", None, torch.float32), "FILE: tensor 'Q.absmax' is F32 [256]; U8 of 256 values is what goes with its weight."),
    (cut(f"{Q}.quant_map"), "FILE: tensor 'Q.quant_map' is F32 [15]; F32 of 16 values is what goes with its weight."),
    (value_of(f"{Q}.quant_map", 0.5), "FILE: tensor 'Q.quant_map' does not hold the 16 numbers of nf4."),
    (value_of(f"{Q}.nested_quant_map", float("nan")), "FILE: tensor 'Q': number of the nested map 3 is NaN."),
    (lambda tensors: tensors[f"{Q}.nested_absmax"].fill_(-0.5), "FILE: tensor 'Q': nested scale 0 is negative (-0.5)."),
    (lambda tensors: tensors[f"{Q}.nested_absmax"].fill_(float("inf")), "FILE: tensor 'Q': nested scale 0 is infinite."),
    (state(quant_type="int4"), "FILE: tensor 'STATE': quant_type \"int4\" is not supported; supported are nf4, fp4."),
    (state(quant_type="fp4"), "FILE: tensor 'STATE': quant_type is \"fp4\", which its name contradicts."),
    (state(quant_type=4), "FILE: tensor 'STATE': \"quant_type\" must be a string, found 4"),
    (state(blocksize=48), "FILE: tensor 'STATE': blocksize 48 does not exist; there are 32, 64, 128, 256, 512, 1024, 2048, 4096."),
    (state(blocksize=...), "FILE: tensor 'STATE': the key \"blocksize\" is missing"),
    (state(blocksize=128), "FILE: tensor 'Q.absmax' is U8 [256]; U8 of 128 values is what goes with its weight."),
    (state(shape=[64, 256]), "model.layers.1.self_attn.q_proj is stored in nf4 as 64 x 256, but the model's is 128 x 128."),
    (state(shape=[128]), "FILE: tensor 'STATE': shape [128] is not that of a matrix."),
    (state(shape=[-128, -128]), "FILE: tensor 'STATE': shape [-128,-128] is not that of a matrix."),
    (state(shape=[1 << 62, 1 << 62]), f"FILE: tensor 'STATE': shape [{1 << 62},{1 << 62}] is not that of a matrix."),
    (state(dtype="int8"), "FILE: tensor 'STATE': dtype \"int8\" is not supported; supported are float32, bfloat16, float16."),
    (state(nested_blocksize=128), "FILE: tensor 'STATE': nested_blocksize 128 is not supported; supported is 256."),
    (state(nested_dtype="bfloat16"), "FILE: tensor 'STATE': nested_dtype \"bfloat16\" is not supported; supported is float32."),
    (state(nested_offset="0.1"), "FILE: tensor 'STATE': \"nested_offset\" must be a number, found \"0.1\""),
    (state(nested_offset=...), "FILE: tensor 'STATE': the key \"nested_offset\" is missing"),
    (state(nested_offset=1e300), "FILE: tensor 'Q': its nested offset is inf."),
    (state(nested_offset=-0.5), "FILE: tensor 'Q': its nested offset is negative (-0.5)."),
    (lambda tensors: (tensors[f"{Q}.nested_quant_map"].mul_(1e38), tensors[f"{Q}.nested_absmax"].fill_(1e38), tensors[f"{Q}.absmax"].fill_(255)), "FILE: tensor 'Q': scale 0 stands for inf (not finite)."),
    (lambda tensors: (tensors[f"{Q}.nested_absmax"].fill_(100), tensors[f"{Q}.absmax"][:3].fill_(255), tensors[f"{Q}.absmax"][3:].zero_()), "FILE: tensor 'Q': scale 3 stands for -99."),
    (put([1, 2]), "FILE: tensor 'STATE' is not a JSON object."),
    (put("{"), "FILE: tensor 'STATE': not valid JSON"),
    (put("{" + " " * 70000 + "}"), "FILE: tensor 'STATE' is U8 [70002]; U8 of 1 to 65536 values is expected, the text of a JSON object."),
    (value_of(STATE, None, torch.int16), "FILE: tensor 'STATE' is I16 "),
    (lambda tensors: tensors.update({f"{Q}.quant_state.bitsandbytes__fp4": tensors[STATE].clone()}), "FILE: tensor 'STATE' is a second state of Q beside Q.quant_state.bitsandbytes__fp4."),
    (lambda tensors: [renamed(name, name.replace("layers.1.", "layers.7."))(tensors) for name in list(tensors) if name.startswith(Q)],
     "FOLDER: model.layers.7.self_attn.q_proj is stored in nf4, but the model that config.json describes has no such layer."),
    (lambda tensors: tensors.update({f"{Q}.nested_offset": torch.zeros(1)}), "FOLDER: the tensors are not those of the model that config.json describes. Not part of the model (1): Q.nested_offset."),
    (lambda tensors: [tensors.pop(name) for name in list(tensors) if ".weight." in name],
     "FOLDER: config.json has a quantization_config, but no tensor of the files is quantized by bitsandbytes."),
    (lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith(f"{Q}.")], "FILE: tensor 'Q' is U8 [8192, 1], but no quant_state and no SCB goes with it."),
]


@pytest.mark.parametrize("edit, sentence, base", [(*damage, "none") for damage in DAMAGES] +
                         [(state(shape=[64, 256]), "FOLDER: Q is [64, 256] in nf4, but the model's is [128, 128].", "dense")], ids=range(len(DAMAGES) + 1))
def test_damaged_folders(work, tmp_path, edit, sentence, base):
    folder = tmp_path / "model"
    shutil.copytree(work / "nf4", folder)
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    done = run(tmp_path, "eval", f"--model.path={folder}", f"--eval.token_ids={work / 'ids.json'}", f"--quant.base={base}")
    sentence = sentence.replace("FOLDER", str(folder)).replace("FILE", f"{folder}/model.safetensors").replace("STATE", STATE).replace("Q", Q)
    assert done.returncode == 3 and done.stderr.count("error: ") == 1, done.stderr
    assert f"error: {sentence}" in done.stderr and not any(trace in done.stderr for trace in TRACES), done.stderr


@pytest.fixture(scope="module")
def int8(work):
    options = transformers.BitsAndBytesConfig(load_in_8bit=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(work / "base", quantization_config=options, dtype=torch.bfloat16)
    model.save_pretrained(work / "int8")
    hf_models.add_tokenizer(work / "int8")
    return model


def test_a_folder_in_8_bits(work, int8):
    stored, found = load_file(work / "int8/model.safetensors"), exported(work, "int8")
    for name, value in found.items():
        if is_layer(name):
            expected = stored[name].float() * stored[name.replace(".weight", ".SCB")][:, None] * torch.tensor(1 / 127)
            assert torch.equal(value, expected.bfloat16()), name
    with torch.no_grad():
        expected = int8(torch.tensor(IDS)).logits[0].float()
    loss = evaluated(work, "int8", f"--eval.logits={work / 'logits.safetensors'}")
    logits = load_file(work / "logits.safetensors")["logits.0"]
    assert ((logits - expected).norm() / expected.norm()).item() <= bounds.LOGITS_INT8
    assert loss != evaluated(work, "int8", "--quant.base=dense") == evaluated(work, "int8-dense")
    assert loss != evaluated(work, "int8", "--quant.base=int8", "--quant.threshold=0.5")
    assert evaluated(work, "int8", "--parallel.pipeline=2", ranks=2) == loss
    assert evaluated(work, "int8", "--parallel.tensor=2", ranks=2) == pytest.approx(loss, rel=bounds.CURVE_BF16)
    assert losses(work, "on-int8", "int8") != losses(work, "on-base", "base")
    config = json.loads((work / "int8/config.json").read_text())
    config["quantization_config"]["llm_int8_threshold"] = 0.5
    shutil.copytree(work / "int8", work / "int8-lower")
    (work / "int8-lower/config.json").write_text(json.dumps(config))
    assert evaluated(work, "int8-lower") == evaluated(work, "int8", "--quant.base=int8", "--quant.threshold=0.5")
    assert evaluated(work, "int8-lower", "--quant.base=int8", "--quant.threshold=6") == loss  # what is given wins over what is stored
    config["quantization_config"]["llm_int8_threshold"] = -1
    (work / "int8-lower/config.json").write_text(json.dumps(config))
    for folder, keys, status, sentence in (("int8-lower", [], 3, f"{work}/int8-lower/config.json: quantization_config: llm_int8_threshold -1 is negative"),
                                           ("int8", ["--model.dtype=float64"], 2, f"{work}/int8/config.json: the weights are stored in int8, which goes with float32 or 16 bits"),
                                           ("int8", ["--quant.base=nf4"], 2, "quant.base=nf4, but the model's files hold model.layers.0.self_attn.q_proj in int8: leave it out")):
        done = run(work, "eval", f"--model.path={work / folder}", f"--eval.token_ids={work / 'ids.json'}", *keys)
        assert done.returncode == status and f"error: {sentence}" in done.stderr, done.stderr


def test_sizes_that_are_no_multiples_of_8(work):
    hf_models.CASES["odd"] = ("llama", {**hf_models.heads(3, 1, 20), "hidden_size": 60, "intermediate_size": 101})
    base = work / "odd-base"
    hf_models.make("odd", work / "odd-fp32").to(torch.bfloat16).save_pretrained(base)
    hf_models.add_tokenizer(base)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, quantization_config=transformers.BitsAndBytesConfig(load_in_8bit=True), dtype=torch.bfloat16)
    model.save_pretrained(work / "odd8")
    with torch.no_grad():
        expected = model(torch.tensor(IDS)).logits[0].float()
    loss = evaluated(work, "odd8", f"--eval.logits={work / 'logits.safetensors'}")
    logits = load_file(work / "logits.safetensors")["logits.0"]
    assert ((logits - expected).norm() / expected.norm()).item() <= bounds.LOGITS_INT8
    assert evaluated(work, "odd-base", "--quant.base=int8") == pytest.approx(loss, rel=bounds.CURVE_BF16)
    # Rows of an odd number of codes of 4 bits fill no bytes.
    quantized(base, work / "odd4")
    ids = f"--eval.token_ids={work / 'ids.json'}"
    why = "model.layers.0.mlp.down_proj has 101 inputs, an odd number, whose codes of 4 bits fill no whole bytes"
    for folder, keys, status, sentence in (("odd4", [], 3, f"{why}, and the model's files hold it in nf4: set quant.base=dense for the values that its codes stand for."),
                                           ("odd-base", ["--quant.base=fp4"], 2, f"quant.base=fp4: {why}: add it to quant.skip")):
        done = run(work, "eval", f"--model.path={work / folder}", ids, *keys)
        assert done.returncode == status and f"error: {sentence}\n" in done.stderr and done.stderr.count("error: ") == 1, done.stderr
    # The ways out.
    as_base = evaluated(work, "odd-base")
    for found in (evaluated(work, "odd4", "--quant.base=dense"), evaluated(work, "odd-base", "--quant.base=fp4", "--quant.skip=down_proj")):
        assert found == pytest.approx(as_base, rel=0.05) and found != as_base


SCB, FORMAT = Q.replace(".weight", ".SCB"), f"{Q}_format"


@pytest.mark.parametrize("edit, sentence", [
    (value_of(SCB, float("nan")), "FILE: tensor 'WEIGHT': scale 3 is NaN."), (value_of(SCB, -2.0), "FILE: tensor 'WEIGHT': scale 3 is negative (-2)."),
    (cut(SCB), "FILE: tensor 'SCB' is F32 [127]; F32 of 128 values is what goes with its weight."),
    (gone(Q), "FOLDER: 'WEIGHT' is missing, but its SCB is there."),
    (value_of(Q, None, torch.float32), "FILE: tensor 'WEIGHT' is F32 [128, 128]; I8 of a matrix goes with its SCB."),
    (lambda tensors: tensors.update({FORMAT: torch.tensor(2, dtype=torch.uint8)}), "FILE: tensor 'FORMAT' is 2, a layout of old GPUs that is not supported; supported is 0, rows."),
    (lambda tensors: tensors.update({Q: tensors[Q][:, :64].clone()}), "model.layers.1.self_attn.q_proj is stored in int8 as 128 x 64, but the model's is 128 x 128."),
    (lambda tensors: [tensors.pop(name) for name in (SCB, FORMAT)], "FILE: tensor 'WEIGHT' is I8 [128, 128], but no quant_state and no SCB goes with it."),
], ids=range(8))
def test_damaged_folders_in_8_bits(work, int8, tmp_path, edit, sentence):
    folder = tmp_path / "model"
    shutil.copytree(work / "int8", folder)
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    done = run(tmp_path, "eval", f"--model.path={folder}", f"--eval.token_ids={work / 'ids.json'}")
    sentence = sentence.replace("FOLDER", str(folder)).replace("FILE", f"{folder}/model.safetensors").replace("SCB'", f"{SCB}'").replace("FORMAT", FORMAT).replace("WEIGHT", Q)
    assert done.returncode == 3 and f"error: {sentence}" in done.stderr and done.stderr.count("error: ") == 1, done.stderr


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), -1.0])
def test_a_scale_that_is_none_is_named_before_a_step_on_every_rank(work, tmp_path, value):
    folder = quantized(work / "base", tmp_path / "model", double=False)
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{Q}.absmax"][7] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    done = run(tmp_path, "train", f"--run.dir={tmp_path / 'run'}", f"--model.path={folder}", f"--data.train={SOURCE}/configs/quickstart/train.jsonl:16", "--train.steps=3", "--lora.rank=2",
               "--parallel.tensor=2", ranks=2)
    said = {"nan": "scale 7 is NaN", "-inf": "scale 7 is infinite", "-1.0": "scale 7 is negative (-1)"}[str(value)]
    assert done.returncode == 3 and f"error: {folder}/model.safetensors: tensor '{Q}': {said}." in done.stderr and done.stderr.count("error: ") == 1, done.stderr


@pytest.mark.parametrize("folder, edit, sentence", [
    ("nf4", {"load_in_4bit": False, "load_in_8bit": True}, "says load_in_8bit=true, but the files hold model.layers.0.mlp.down_proj in nf4 with scales in 8 bits"),
    ("nf4", {"bnb_4bit_quant_type": "fp4"}, "says bnb_4bit_quant_type=\"fp4\", but the files hold model.layers.0.mlp.down_proj in nf4 with scales in 8 bits"),
    ("nf4", {"bnb_4bit_use_double_quant": False}, "says bnb_4bit_use_double_quant=false, but the files hold model.layers.0.mlp.down_proj in nf4 with scales in 8 bits"),
    ("plain", {"bnb_4bit_use_double_quant": True}, "says bnb_4bit_use_double_quant=true, but the files hold model.layers.0.mlp.down_proj in nf4 with scales in 32 bits"),
    ("int8", {"load_in_4bit": True, "load_in_8bit": False}, "says load_in_8bit=false, but the files hold model.layers.0.mlp.down_proj in int8")])
def test_a_config_that_is_not_of_the_files(work, int8, tmp_path, folder, edit, sentence):
    shutil.copytree(work / folder, tmp_path / "model")
    path = tmp_path / "model/config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= edit
    path.write_text(json.dumps(config))
    done = run(tmp_path, "eval", f"--model.path={tmp_path / 'model'}", f"--eval.token_ids={work / 'ids.json'}")
    assert done.returncode == 3 and done.stderr == f"error: {path}: quantization_config {sentence}: take the config.json that was written with the files\n", done.stderr


@pytest.mark.parametrize("folder, part", [("nf4", "down_proj.weight.absmax"), ("int8", "down_proj.SCB")])
def test_a_config_that_says_nothing_of_the_files(work, int8, tmp_path, folder, part):
    shutil.copytree(work / folder, tmp_path / "model")
    path = tmp_path / "model/config.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "quantization_config"}))
    done = run(tmp_path, "eval", f"--model.path={tmp_path / 'model'}", f"--eval.token_ids={work / 'ids.json'}")
    assert done.returncode == 3 and done.stderr == (f"error: {path}: has no quantization_config, but {tmp_path}/model/model.safetensors holds 'model.layers.0.mlp.{part}', a part of a weight that bitsandbytes "
                                                    "has quantized: take the config.json that was written with the files\n"), done.stderr


def test_a_run_does_not_go_on_with_another_base(work, int8):
    losses(work, "went", "nf4")
    keys = [f"--run.dir={work / 'went'}", f"--data.train={SOURCE}/configs/quickstart/train.jsonl:16", "--train.steps=4", "--train.micro_batch_size=2", "--train.accumulation=2", "--optim.lr=1e-2",
            "--lora.rank=4", "--data.max_length=64"]
    for folder, lines in (("plain", ["  config.json quantization_config bnb_4bit_use_double_quant: true then, false now"]),
                          ("base", ['  config.json quantization_config: {"']),
                          ("int8", ["  config.json quantization_config load_in_4bit: true then, false now", "  config.json quantization_config load_in_8bit: false then, true now"])):
        done = run(work, "train", f"--model.path={work / folder}", *keys)
        assert done.returncode == 2 and "cannot go on from" in done.stderr, done.stderr
        said = [line for line in done.stderr.splitlines() if line.startswith("  ")]
        assert all(any(found.startswith(line) for found in said) for line in lines) and all(len(line) < 200 for line in said if "weights" not in line), done.stderr


@pytest.mark.parametrize("config, sentence", [
    ({"load_in_4bit": True, "load_in_8bit": True}, "load_in_4bit=true beside load_in_8bit=true"),
    ({"quant_method": "gptq", "bits": 4}, "quant_method \"gptq\""), ({"load_in_4bit": False}, "load_in_4bit=false"),
    ({"load_in_4bit": True, "bnb_4bit_quant_type": "af4"}, "bnb_4bit_quant_type \"af4\"")])
def test_other_quantizations(work, tmp_path, config, sentence):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads((work / "base/config.json").read_text()) | {"quantization_config": config}))
    done = run(tmp_path, "plan", f"--model.config={path}", "--train.steps=1")
    assert done.returncode == 3 and f"error: {path}: quantization_config: {sentence} is not supported; supported is bitsandbytes in 4 or 8 bits. Take the model's original weights" in done.stderr, done.stderr


def test_random_weights_are_in_no_file(work, tmp_path):
    done = run(tmp_path, "plan", f"--model.config={work / 'nf4/config.json'}", "--train.steps=1", "--lora.rank=2")
    assert done.returncode == 3 and "config.json: has a quantization_config, but model.config starts from random weights" in done.stderr and "set quant.base=nf4" in done.stderr, done.stderr


@pytest.mark.parametrize("key, held", [("block_size=64", "in blocks of 128 with scales in 32 bits"), ("double=true", "in blocks of 128 with scales in 32 bits")])
@pytest.mark.parametrize("base", ["none", "nf4"])
def test_what_is_asked_for_is_not_overruled(work, key, held, base):
    """Also where it is what a folder without quantization is given unasked."""
    if not (work / "wide").exists():
        quantized(work / "base", work / "wide", double=False, block_size=128)
    evaluated(work, "wide", f"--quant.base={base}")
    evaluated(work, "wide", "--quant.block_size=128", "--quant.double=false", "--quant.base=nf4")
    done = run(work, "eval", f"--model.path={work / 'wide'}", f"--eval.token_ids={work / 'ids.json'}", f"--quant.{key}", f"--quant.base={base}")
    assert done.returncode == 2 and f"error: quant.{key}, but the model's files hold model.layers.0.self_attn.q_proj in nf4, {held}: leave it out" in done.stderr, done.stderr
