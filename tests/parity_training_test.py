"""50 steps of training against transformers and PEFT, and the same steps cut up otherwise. The bounds are in bounds.py."""
import copy
import json
import os
import shutil
import types

import bitsandbytes
import peft
import pytest
import torch
import transformers
from bitsandbytes.backends.cpu import ops as cpu_ops
from safetensors.torch import load_file, save_file

import bounds
import hf_models

STEPS, ROWS, LR = 50, 4, 1e-3


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A tiny model in a Hugging Face folder with the quickstart's tokenizer, its adapter, and the tokenised records."""
    torch.manual_seed(1)
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("parity")
    config = transformers.LlamaConfig(vocab_size=hf_models.VOCAB, hidden_size=48, intermediate_size=80, num_hidden_layers=2,
                                      num_attention_heads=3, num_key_value_heads=1, head_dim=16, tie_word_embeddings=False,
                                      bos_token_id=None, eos_token_id=2, pad_token_id=0, initializer_range=0.02)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder / "base")
    hf_models.add_tokenizer(folder / "base")
    for name, options in {"adapter": {}, "dora": {"use_dora": True}}.items():
        lora = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", **options))
        for key, value in lora.named_parameters():  # B of zeros would hide A's gradient
            if "lora_B" in key:
                torch.nn.init.normal_(value, std=0.02)
            elif "magnitude" in key:  # no norm any more
                value.data *= 1 + 0.1 * torch.randn(value.shape)
        lora.save_pretrained(folder / name)
    # bitsandbytes takes rows of whole blocks back right on a CPU.
    wide = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config.to_dict() | dict(hidden_size=64, intermediate_size=128, num_attention_heads=4)))
    wide.save_pretrained(folder / "wide")
    hf_models.add_tokenizer(folder / "wide")
    records = (hf_models.SOURCE / "configs/quickstart/train.jsonl").read_text().splitlines()[: STEPS * ROWS]
    (folder / "train.jsonl").write_text("\n".join(records) + "\n")
    (folder / "twelve.jsonl").write_text("\n".join(records[:12]) + "\n")
    tokens = hf_models.succeed("tokenize", f"--model.path={folder / 'base'}", input="\n".join(records) + "\n")
    (folder / "tokens.jsonl").write_text(tokens.stdout)
    return folder


def train(work, name, *keys, ranks=1, steps=STEPS, data="train.jsonl", base="base", lr=LR):
    """Lines of metrics and the first step's gradients."""
    run = work / name
    hf_models.succeed("train", f"--run.dir={run}", f"--model.path={work / base}", f"--data.train={work / data}",
                      "--data.shuffle=false", f"--train.steps={steps}", f"--train.gradients={run}.safetensors",
                      "--optim.weight_decay=0.01", "--schedule.kind=constant", *([f"--optim.lr={lr}"] if lr else []), *keys,
                      cache=work / "cache", ranks=ranks)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == "train"], load_file(f"{run}.safetensors")


def curve(work, name, *keys, **options):
    return [line["loss"] for line in train(work, name, f"--train.micro_batch_size={ROWS}", *keys, **options)[0]]


def in_double(model):
    """transformers computes norms and rotary angles in fp32 even in a model of float64."""
    def norm(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    def rotary(self, x, position_ids):
        size = self.config.head_dim
        frequency = 1.0 / self.config.rope_parameters["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
        angles = position_ids[..., None].double() * torch.cat([frequency, frequency])
        return angles.cos(), angles.sin()

    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = types.MethodType(norm, module)
        if type(module).__name__ == "LlamaRotaryEmbedding":
            module.forward = types.MethodType(rotary, module)
    return model


TERMS = dict(label_smoothing=0.1, z_loss=0.01)


class Lion(torch.optim.Optimizer):
    """Algorithm 2 of Chen et al. 2023."""
    def __init__(self, params, lr, betas, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                p -= group["lr"] * (torch.sign(beta1 * m + (1 - beta1) * p.grad) + group["weight_decay"] * p)
                m.copy_(beta2 * m + (1 - beta2) * p.grad)


def adamw8bit(groups):
    """Of bitsandbytes, whose CPU code finds codes by a table that misses the nearest of a fifth of second moments: here by the rule of
    its CUDA code, the nearest, but of a mean below 0 never 0."""
    def quantize(values, numbers, scales, codes, block_size):
        blocks = torch.nn.functional.pad(values.flatten(), (0, -values.numel() % block_size)).view(-1, block_size)
        scales.copy_(blocks.abs().amax(1))
        found = torch.searchsorted((numbers[1:] + numbers[:-1]) / 2, blocks / scales[:, None])
        found -= ((blocks < 0) & (numbers[found] == 0)).long()
        codes.copy_(found.flatten()[:values.numel()].view_as(codes))

    cpu_ops._quant_blockwise_fp32_direct = quantize
    return bitsandbytes.optim.AdamW8bit(groups, lr=LR)


# By optim.kind: keys, and the optimizer of the groups of parameters.
OPTIMIZERS = {
    "sgd": (["--optim.lr=0.1", "--optim.momentum=0.8"], lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.8)),
    # Of the embedding and the head, which have 4,096 elements and more.
    "adamw8bit": ([f"--optim.lr={LR}"], adamw8bit),
    "adafactor": (["--optim.lr=0.02"], lambda groups: torch.optim.Adafactor(groups, lr=0.02)),
    "lion": (["--optim.lr=2e-4", "--optim.beta1=0.9", "--optim.beta2=0.99"], lambda groups: Lion(groups, lr=2e-4, betas=(0.9, 0.99))),
}


# By the name of a run: quant.base, and whether its scales are in 8 bits. These bitsandbytes' CPU code quantizes by a table that misses the
# nearest code of one scale in 600: what it has written is read as it is.
QUANTIZED = {"nf4": ("nf4", False), "fp4": ("fp4", False), "nf4_stored": ("nf4", True), "nf4_dora": ("nf4", False)}


def quantized_model(work, kind, dtype=torch.float32):
    base, is_double = QUANTIZED.get(kind, (kind, False))
    config = transformers.BitsAndBytesConfig(load_in_8bit=True) if base == "int8" else transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=base, bnb_4bit_use_double_quant=is_double, bnb_4bit_compute_dtype=dtype)
    model = transformers.LlamaForCausalLM.from_pretrained(work / "wide", dtype=dtype, quantization_config=config, device_map="cpu")
    if is_double:
        model.save_pretrained(work / kind)
        hf_models.add_tokenizer(work / kind)
    torch.manual_seed(2)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", use_dora=kind.endswith("dora"), task_type="CAUSAL_LM"))
    for name, value in model.named_parameters():  # B of zeros would hide A's gradient
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.02)
    model.save_pretrained(work / f"{kind}_adapter")
    return model.train()


ADAPTERS = {"lora": "adapter", "dora": "dora"}
# By lora.init: keys, and with the weights of 4 bits how often they are made.
STARTS = {"pissa": (["--lora.init=pissa"], 0), "pissa_rslora_dora": (["--lora.init=pissa", "--lora.rslora=true", "--lora.dora=true"], 0),
          "loftq": (["--lora.init=loftq", "--quant.base=nf4", "--quant.double=false"], 1),
          "loftq_fp4": (["--lora.init=loftq", "--quant.base=fp4", "--quant.double=false", "--lora.loftq_iterations=3"], 3)}
STARTED = dict(r=4, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")


def started(model, kind):
    keys, iterations = STARTS[kind]
    if not iterations:
        return peft.get_peft_model(model, peft.LoraConfig(init_lora_weights="pissa", use_rslora="rslora" in kind, use_dora="dora" in kind, **STARTED))
    # Li et al. 2023, algorithm 1, as PEFT, whose code asks for CUDA and for nf4.
    model = peft.get_peft_model(model, peft.LoraConfig(**STARTED))
    form = "fp4" if "fp4" in kind else "nf4"
    for module in model.modules():
        if not hasattr(module, "lora_A"):
            continue
        weight = rest = module.base_layer.weight.data
        for _ in range(iterations):
            codes, state = bitsandbytes.functional.quantize_4bit(rest.contiguous().view(1, -1), blocksize=64, quant_type=form)
            base = bitsandbytes.functional.dequantize_4bit(codes, state).view(weight.shape)
            u, s, v = torch.linalg.svd(weight - base, full_matrices=False)
            b, a = u[:, :4] * s[:4].sqrt(), s[:4].sqrt()[:, None] * v[:4]
            rest = weight - b @ a
        module.unquantized = weight - b @ a
        module.base_layer.weight.data, module.lora_A.default.weight.data, module.lora_B.default.weight.data = base, a.contiguous(), b.contiguous()
    return model


def reference_run(work, kind, dtype, steps, model=None):
    smoothing, z_loss = TERMS.values() if kind == "terms" else (0, 0)
    model = model or transformers.LlamaForCausalLM.from_pretrained(work / "base", dtype=dtype)
    if dtype == torch.float64:
        in_double(model)
    if kind in ("lora", "dora"):
        model = peft.PeftModel.from_pretrained(model, work / ADAPTERS[kind], is_trainable=True).to(dtype)
    elif kind in STARTS:
        model = started(model, kind)
    records = [json.loads(line) for line in (work / "tokens.jsonl").read_text().splitlines()]
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [{"params": [p for _, p in named if p.dim() >= 2], "weight_decay": 0.01},
              {"params": [p for _, p in named if p.dim() < 2], "weight_decay": 0.0}]
    optimizer = OPTIMIZERS[kind][1](groups) if kind in OPTIMIZERS else torch.optim.AdamW(groups, lr=LR)
    losses, gradients = [], {}
    for step in range(steps):
        total, count = 0.0, 0
        for record in records[step * ROWS:(step + 1) * ROWS]:
            ids = torch.tensor([record["ids"]])
            learnt = torch.tensor(record["loss"][1:], dtype=torch.bool)
            logits = model(ids).logits[0, :-1].to(torch.promote_types(dtype, torch.float32))
            total = total + torch.nn.functional.cross_entropy(logits[learnt], ids[0, 1:][learnt], reduction="sum", label_smoothing=smoothing)
            total = total + z_loss * logits[learnt].logsumexp(1).square().sum()
            count += int(learnt.sum())
        loss = total / count
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            gradients = {n.replace(".default.", ".").replace("vector.weight", "vector"): p.grad.clone() for n, p in named}
        torch.nn.utils.clip_grad_norm_([p for _, p in named], 1.0)
        optimizer.step()
        losses.append(loss.item())
    if kind in STARTS:
        for module in model.modules():  # an adapter is for weights that are in no 4 bits
            if hasattr(module, "unquantized"):
                module.base_layer.weight.data = module.unquantized
        with torch.no_grad():
            gradients = model.eval()(torch.tensor([records[0]["ids"]])).logits[0]
    return losses, gradients


@pytest.mark.parametrize("kind, dtype", [("full", "float32"), ("lora", "float32"), ("full", "float64"), ("lora", "float64"), ("dora", "float32"), ("dora", "float64"),
                                         ("terms", "float64"), *((kind, "float32" if kind == "adamw8bit" else "float64") for kind in OPTIMIZERS)])
def test_gradients_and_loss_curve(work, kind, dtype):
    keys = {"full": [], **{adapter: [f"--lora.path={work / folder}"] for adapter, folder in ADAPTERS.items()}, "terms": [f"--train.{key}={value}" for key, value in TERMS.items()],
            **{rule: [f"--optim.kind={rule}", *of_rule] for rule, (of_rule, _) in OPTIMIZERS.items()}}[kind]
    steps = STEPS if kind in ("full", "lora", "dora") else 10
    lr = [] if kind in OPTIMIZERS else [f"--optim.lr={LR}"]
    lines, gradients = train(work, f"{kind}-{dtype}", f"--train.micro_batch_size={ROWS}", f"--train.dtype={dtype}", *keys, *lr, steps=steps, lr=None)
    losses = [line["loss"] for line in lines]
    expected_losses, expected_gradients = reference_run(work, kind, getattr(torch, dtype), steps)
    in_first, in_curve, in_gradient = {"float32": (bounds.LOSS_FP32, bounds.CURVE_FP32, bounds.GRADIENT_FP32),
                                       "float64": (bounds.LOSS_FP64, bounds.CURVE_FP64, bounds.GRADIENT_FP64)}[dtype]
    assert set(gradients) == set(expected_gradients)
    for name, expected in expected_gradients.items():
        scale = expected.abs().max().item()
        assert scale > 0, name
        assert (gradients[name] - expected).abs().max().item() <= in_gradient * scale, name
    assert expected_losses[-1] < expected_losses[0]
    assert losses[0] == pytest.approx(expected_losses[0], rel=in_first)
    assert losses == pytest.approx(expected_losses, rel=in_curve)


@pytest.mark.parametrize("kind", QUANTIZED)
def test_loss_curve_and_gradients_over_a_quantized_base(work, kind):
    """QLoRA of PEFT and bitsandbytes, in fp32: the values of the codes are the same, and so is all that follows."""
    model = quantized_model(work, kind)
    stored = (work / kind).exists()
    lines, gradients = train(work, f"qlora-{kind}", f"--train.micro_batch_size={ROWS}", "--train.dtype=float32", f"--lora.path={work}/{kind}_adapter",
                             *([] if stored else [f"--quant.base={QUANTIZED[kind][0]}", "--quant.double=false"]), base=kind if stored else "wide")
    expected_losses, expected_gradients = reference_run(work, kind, torch.float32, STEPS, model)
    assert set(gradients) == set(expected_gradients)
    for name, expected in expected_gradients.items():
        assert (gradients[name] - expected).abs().max().item() <= bounds.GRADIENT_FP32 * expected.abs().max().item(), name
    losses = [line["loss"] for line in lines]
    assert expected_losses[-1] < expected_losses[0]
    assert losses == pytest.approx(expected_losses, rel=bounds.CURVE_FP32)
    if not stored:
        _, plain = train(work, f"plain-{kind}", f"--train.micro_batch_size={ROWS}", "--train.dtype=float32", f"--lora.path={work}/{kind}_adapter", steps=1, base="wide")
        assert all((plain[name] - expected).abs().max().item() > 100 * bounds.GRADIENT_FP32 * expected.abs().max().item() for name, expected in expected_gradients.items())


@pytest.mark.parametrize("base", ["nf4", "fp4"])
def test_16_bit_curves_over_a_quantized_base_stay_near(work, base):
    """As QLoRA is run, with products in bfloat16: what is rounded is the same, but for the order of sums."""
    expected, _ = reference_run(work, base, torch.bfloat16, STEPS, quantized_model(work, base, torch.bfloat16))
    found = curve(work, f"{base}-16", "--train.dtype=bfloat16", f"--lora.path={work}/{base}_adapter", f"--quant.base={base}", "--quant.double=false", base="wide")
    assert found == pytest.approx(expected, rel=bounds.LAYOUT_BF16)


def test_loss_curve_over_int8(work):
    """In fp32, where less hides what it is about, and with bitsandbytes' layers in eval(): in train() its CPU code does not quantize inputs.
    tests/quant_parity_test.py has a layer, with outliers."""
    model = quantized_model(work, "int8")
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear8bitLt):
            module.eval()
    expected, _ = reference_run(work, "int8", torch.float32, STEPS, model)
    keys = ["--train.dtype=float32", f"--lora.path={work}/int8_adapter"]
    assert curve(work, "int8", *keys, "--quant.base=int8", base="wide") == pytest.approx(expected, rel=bounds.CURVE_INT8)
    assert curve(work, "int8-not", *keys, base="wide") != pytest.approx(expected, rel=bounds.CURVE_INT8)


@pytest.mark.parametrize("kind", STARTS)
def test_adapters_that_begin_with_the_weights(work, kind):
    """The loss curve of PEFT's PiSSA and of LoftQ; and the adapter is one for the folder's weights, where PEFT's needs its own base."""
    keys, _ = STARTS[kind]
    found = curve(work, kind, "--lora.rank=4", *keys, steps=10)
    expected, logits = reference_run(work, kind, torch.float32, 10)
    assert found == pytest.approx(expected, rel=bounds.CURVE_FP32)
    plain = curve(work, f"{kind}-plain", "--lora.rank=4", *[key for key in keys if "init" not in key and "iterations" not in key], steps=10)
    assert plain != pytest.approx(expected, rel=10 * bounds.CURVE_FP32)
    model = transformers.LlamaForCausalLM.from_pretrained(work / "base", dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(model, work / kind / "adapter")
    assert adapted.peft_config["default"].r == 8 and adapted.peft_config["default"].init_lora_weights is True
    ours = adapted.eval()(torch.tensor([json.loads((work / "tokens.jsonl").open().readline())["ids"]])).logits[0]
    assert (ours - logits).abs().max().item() < bounds.LOGITS_FP32


@pytest.fixture(scope="module")
def in_fp32(work):
    return curve(work, "fp32")


@pytest.mark.parametrize("dtype, bound", [("bfloat16", bounds.CURVE_BF16), ("float16", bounds.CURVE_FP16)])
def test_16_bit_curves_stay_near(work, in_fp32, dtype, bound):
    steps = 20 if dtype == "float16" else STEPS  # it is slow on CPUs
    losses = curve(work, dtype, f"--train.dtype={dtype}", steps=steps)
    assert losses != in_fp32[:steps]
    assert losses == pytest.approx(in_fp32[:steps], rel=bound)


# Twelve records, all of them in every step.
@pytest.fixture(scope="module")
def alone(work):
    return train(work, "alone", "--train.micro_batch_size=12", steps=10, data="twelve.jsonl")


def same(found, expected):
    lines, gradients = found
    for key, bound in (("loss", bounds.LAYOUT_LOSS), ("grad_norm", bounds.LAYOUT_GRAD_NORM)):
        assert [line[key] for line in lines] == pytest.approx([line[key] for line in expected[0]], rel=bound)
    assert [line["tokens"] for line in lines] == [line["tokens"] for line in expected[0]]
    for name, gradient in expected[1].items():
        difference = (gradients[name] - gradient).abs().max().item()
        assert difference <= bounds.GRADIENT_FP32 * gradient.abs().max().item(), name


@pytest.mark.parametrize("ranks, rows, accumulation", [(1, 4, 3), (2, 6, 1), (2, 2, 3), (4, 1, 3)])
def test_accumulation_and_ranks_change_only_the_order_of_sums(work, alone, ranks, rows, accumulation):
    same(train(work, f"cut-{ranks}-{rows}", f"--train.micro_batch_size={rows}", f"--train.accumulation={accumulation}",
               ranks=ranks, steps=10, data="twelve.jsonl"), alone)


@pytest.mark.parametrize("ranks", [1, 2])
def test_packing_changes_only_the_order_of_sums(work, alone, ranks):
    # 12 records in 4 rows: what no packing gives in 12.
    found = train(work, f"packed-{ranks}", "--data.packing=true", "--data.max_length=96", f"--train.micro_batch_size={4 // ranks}",
                  ranks=ranks, steps=10, data="twelve.jsonl")
    same(found, alone)


def rescaled(work, name, changes):
    """The name of the base with some weights multiplied, as float16 numbers."""
    weights = load_file(work / "base/model.safetensors")
    for key, factor in changes.items():
        weights[key] = weights[key] * factor
    shutil.copytree(work / "base", work / name)
    save_file({key: value.half().float() for key, value in weights.items()}, work / name / "model.safetensors", {"format": "pt"})
    return name


FLOAT16 = {"small": {"lm_head.weight": 1e-4},  # gradients of 1e-9 to 1e-6: float16 alone has nothing between 0 and 6e-8
           "large": {"model.embed_tokens.weight": 3e-3, "lm_head.weight": 1.0}}   # of 1e3: the first scale overflows


@pytest.mark.parametrize("size", list(FLOAT16))
def test_float16_neither_loses_nor_overflows_gradients(work, size):
    options = {"base": rescaled(work, f"{size}-gradients", FLOAT16[size]), "steps": 1, "data": "twelve.jsonl"}
    _, exact = train(work, f"{size}-fp32", "--train.micro_batch_size=12", **options)
    lines, gradients = train(work, f"{size}-fp16", "--train.micro_batch_size=12", "--train.dtype=float16", **options)
    assert (lines[0]["loss_scale"] < 1024) == (size == "large")
    assert ("step 1: a gradient overflowed float16; computing it again with loss scale 512" in
            (work / f"{size}-fp16/log.txt").read_text()) == (size == "large")
    for name, expected in exact.items():
        assert (gradients[name] - expected).norm() <= bounds.GRADIENT_FP16 * expected.norm(), name


def test_stored_float16_trains_in_bfloat16_unless_float16_is_asked_for(work):
    transformers.LlamaForCausalLM.from_pretrained(work / "base", dtype=torch.float16).save_pretrained(work / "half")
    hf_models.add_tokenizer(work / "half")
    lines, _ = train(work, "auto", base="half", steps=1)
    assert "loss_scale" not in lines[0]
    assert load_file(work / "auto/model/model.safetensors")["lm_head.weight"].dtype == torch.bfloat16
    lines, _ = train(work, "asked", "--model.dtype=float16", base="half", steps=1)
    assert lines[0]["loss_scale"] == 1024
    assert json.loads((work / "asked/model/config.json").read_text())["dtype"] == "float16"


def test_float16_resumes_with_its_loss_scale(work):
    base = rescaled(work, "resumed-base", FLOAT16["large"])
    keys = ("--train.micro_batch_size=4", "--train.dtype=float16")
    whole, _ = train(work, "whole", *keys, base=base, lr=1e-5, steps=6)
    assert whole[-1]["loss_scale"] < 1024
    cut = ("train", f"--run.dir={work / 'cut'}", f"--model.path={work / base}", f"--data.train={work / 'train.jsonl'}",
           "--data.shuffle=false", "--train.steps=6", "--optim.lr=1e-5", "--optim.weight_decay=0.01", "--schedule.kind=constant", *keys)
    assert hf_models.run(*cut, "--train.stop_after=3", cache=work / "cache").returncode == 75
    hf_models.succeed(*cut, cache=work / "cache")
    repeats = [[line[20:] for line in (work / run / "log.txt").read_text().splitlines() if "computing it again" in line]
               for run in ("whole", "cut")]
    assert repeats[0] == repeats[1]  # it went on with the scale that was found before
    overflowed = max(int(line.split("step ")[1].split(":")[0]) for line in repeats[0])
    state = json.loads((work / "cut/checkpoints/step-6/manifest.json").read_text())["state"]
    assert state["clean_steps"] == 6 - overflowed + 1
    lines = [json.loads(line) for line in (work / "cut/metrics.jsonl").read_text().splitlines()]
    for key in ("loss", "grad_norm", "loss_scale"):
        assert [line[key] for line in lines] == [line[key] for line in whole]
    assert (work / "cut/model/model.safetensors").read_bytes() == (work / "whole/model/model.safetensors").read_bytes()
