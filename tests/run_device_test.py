"""Runs on a device are the runs on the CPU. The device is a double of one (device_double.cpp) within the whole program: its
memory is closed to the host, its kernels are the emulated ones, and it counts who waits for it."""
import json
import os
import pathlib
import re
import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file

from bounds import CURVE_BF16, CURVE_FP16, CURVE_FP32
from program import BINARY, SOURCE, end_of, environment, override, run, start

DOUBLE = str(pathlib.Path(BINARY).with_name("trireme_double"))
QUICKSTART = SOURCE / "configs/quickstart"
SHAPE = dict(model_type="qwen3", vocab_size=1152, hidden_size=128, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
             head_dim=64, rms_norm_eps=1e-5, max_position_embeddings=256, initializer_range=0.05, tie_word_embeddings=False)
STEPS = 3
SMALLEST = ["--train.dtype=bfloat16", "--lora.rank=32", "--lora.dropout=0.2", "--quant.base=nf4", "--train.recompute=full", "--train.mlp_tokens=24", "--model.embedding=host",
            "--optim.kind=adamw8bit", "--optim.masters=false"]
WORKSPACE = 32 << 20  # of matrix products


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("device")
    for name, more in {"model": {}, "tied": dict(tie_word_embeddings=True, head_dim=16, num_attention_heads=3, num_key_value_heads=3, model_type="qwen2")}.items():
        (folder / f"{name}.json").write_text(json.dumps(SHAPE | more))
    return folder


def device(work, verb, *keys, status=0, **env):
    """The program with the double, which is its CUDA."""
    done = end_of(start(work, [DOUBLE, verb, *keys], env), timeout=300)
    assert done.returncode == status, done.stderr
    return done


def cpu(work, verb, *keys):
    done = run(work, verb, *keys, "--run.device=cpu")
    assert done.returncode == 0, done.stderr
    return done


def keys_of(work, name, *keys, model="model"):
    return override([f"--run.dir={work / name}", f"--model.config={work / model}.json", f"--model.tokenizer={QUICKSTART}/model", f"--data.train={QUICKSTART}/train.jsonl:40",
                     f"--data.eval={QUICKSTART}/eval.jsonl:4", "--data.max_length=32", f"--train.steps={STEPS}", "--train.micro_batch_size=2", "--train.accumulation=2",
                     "--optim.lr=2e-3", "--optim.weight_decay=0.01", "--train.max_grad_norm=0.5", "--eval.every=2", "--checkpoint.every=100"], keys)


def lines(work, name, split="train"):
    found = [json.loads(line) for line in (work / name / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["split"] == split]


def curve(work, name):
    steps = lines(work, name)
    assert [line["step"] for line in steps] == list(range(1, len(steps) + 1))
    return [line[key] for line in steps for key in ("loss", "grad_norm")] + [line["loss"] for line in lines(work, name, "eval")]


def product(work, name):
    folder = work / name
    return load_file(next(path for path in (folder / "model/model.safetensors", folder / "adapter/adapter_model.safetensors") if path.exists()))


KINDS = {
    "float32": (CURVE_FP32, []),
    "float32 selective accumulation 3": (CURVE_FP32, ["--train.recompute=selective", "--train.accumulation=3", "--train.micro_batch_size=1"]),
    "float32 tied, biases, no kernel for the heads": (CURVE_FP32, ["model=tied"]),
    "bfloat16 packed": (CURVE_BF16, ["--train.dtype=bfloat16", "--data.packing=true"]),
    "bfloat16 lora dropout": (CURVE_BF16, ["--train.dtype=bfloat16", "--lora.rank=4", "--lora.dropout=0.2", "--train.recompute=full"]),
    "bfloat16 activations on the host": (CURVE_BF16, ["--train.dtype=bfloat16", "--train.recompute=full", "--train.offload_activations=true"]),
    "bfloat16 optimizer on the host": (CURVE_BF16, ["--train.dtype=bfloat16", "--optim.offload=true"]),
    "bfloat16 without masters": (CURVE_BF16, ["--train.dtype=bfloat16", "--optim.masters=false"]),
    "float32 sgd": (CURVE_FP32, ["--optim.kind=sgd", "--optim.lr=0.1"]),
    "bfloat16 lion": (CURVE_BF16, ["--train.dtype=bfloat16", "--optim.kind=lion", "--optim.lr=2e-4"]),
    "bfloat16 moments in 8 bits": (CURVE_BF16, ["--train.dtype=bfloat16", "--optim.kind=adamw8bit"]),
    "bfloat16 paged moments in 8 bits": (CURVE_BF16, ["--train.dtype=bfloat16", "--optim.kind=adamw8bit", "--optim.masters=false", "--optim.paged=true"]),
    "float32 adafactor": (CURVE_FP32, ["--optim.kind=adafactor", "--optim.lr=0.02"]),
    "bfloat16 adafactor paged": (CURVE_BF16, ["--train.dtype=bfloat16", "--optim.kind=adafactor", "--optim.lr=0.02", "--optim.paged=true"]),
    "float32 dora pissa dropout": (CURVE_FP32, ["--lora.rank=4", "--lora.dora=true", "--lora.init=pissa", "--lora.dropout=0.2"]),
    "bfloat16 dora nf4 loftq": (CURVE_BF16, ["--train.dtype=bfloat16", "--lora.rank=4", "--lora.dora=true", "--lora.init=loftq", "--quant.base=nf4", "--train.recompute=full"]),
    "float16": (CURVE_FP16, ["--train.dtype=float16"]),
    "bfloat16 nf4": (CURVE_BF16, ["--train.dtype=bfloat16", "--lora.rank=4", "--lora.dropout=0.2", "--quant.base=nf4", "--train.recompute=full"]),
    "float32 fp4 plain scales": (CURVE_FP32, ["--lora.rank=4", "--quant.base=fp4", "--quant.double=false"]),
    "bfloat16 nf4 smallest": (CURVE_BF16, SMALLEST),
    "bfloat16 lora sgd without masters": (CURVE_BF16, ["--train.dtype=bfloat16", "--lora.rank=4", "--optim.kind=sgd", "--optim.lr=0.1", "--optim.masters=false", "--train.mlp_tokens=24"]),
    "bfloat16 lora lion without masters": (CURVE_BF16, ["--train.dtype=bfloat16", "--lora.rank=4", "--optim.kind=lion", "--optim.lr=2e-4", "--optim.masters=false", "--train.mlp_tokens=24",
                                                        "--train.recompute=selective"]),
    "bfloat16 int8": (CURVE_BF16, ["--train.dtype=bfloat16", "--lora.rank=4", "--quant.base=int8"]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_on_a_device_is_the_run_on_the_cpu(work, kind):
    bound, keys = KINDS[kind]
    model = dict(model=next((key.split("=")[1] for key in keys if key.startswith("model=")), "model"))
    keys = [key for key in keys if key.startswith("--")]
    name = kind.replace(" ", "_").replace(",", "")
    cpu(work, "train", *keys_of(work, f"{name}_cpu", *keys, **model))
    counts = work / f"{name}.json"
    done = device(work, "train", *keys_of(work, name, *keys, **model), TRIREME_DOUBLE_COUNTS=counts)
    assert curve(work, name) == pytest.approx(curve(work, f"{name}_cpu"), rel=bound)
    assert json.loads(counts.read_text())["kernels"] > 100
    assert ("has no kernel" in done.stderr) == (model["model"] == "tied" or "dtype" not in " ".join(keys)), done.stderr
    found, expected = product(work, name), product(work, f"{name}_cpu")
    assert found.keys() == expected.keys()
    for key, value in expected.items():  # Adam's first steps are nearly lr * sign(gradient): where that is almost zero they turn round
        assert (found[key].float() - value.float()).norm() <= 40 * bound * value.float().norm() + 1e-3, key


@pytest.mark.parametrize("keys", [["--train.dtype=bfloat16"], SMALLEST, ["--train.dtype=bfloat16", "--optim.paged=true"], ["--train.dtype=bfloat16", "--optim.kind=adafactor", "--optim.lr=0.02"],
                                  ["--train.dtype=bfloat16", "--lora.rank=4", "--lora.dropout=0.1", "--train.recompute=full", "--train.offload_activations=true"]])
def test_the_host_waits_in_no_step_but_for_the_numbers_of_the_one_before(work, keys):
    found = {}
    for steps in (2, 4):
        counts = work / "counts.json"
        device(work, "train", *keys_of(work, f"waits{steps}", *keys, f"--train.steps={steps}", "--eval.every=0", "--data.eval=", "--run.resume=never", f"--run.dir={work}/waits{steps}{len(keys)}{keys[1:2]}"),
               TRIREME_DOUBLE_COUNTS=counts)
        found[steps] = json.loads(counts.read_text())
    assert found[4]["blocking"] == found[2]["blocking"]
    assert found[4]["events"] - found[2]["events"] == 2


def test_a_resumed_run_has_the_bits_of_one_that_never_stopped(work):
    keys = ["--train.dtype=bfloat16", "--lora.rank=4", "--lora.dropout=0.2"]
    device(work, "train", *keys_of(work, "whole", *keys))
    device(work, "train", *keys_of(work, "parts", *keys, "--train.stop_after=2"), status=75)
    done = device(work, "train", *keys_of(work, "parts", *keys))
    assert "last bits differ" not in done.stderr
    assert curve(work, "parts") == curve(work, "whole")
    for key, value in product(work, "whole").items():
        assert torch.equal(product(work, "parts")[key], value), key


def test_state_that_does_not_fit_waits_in_host_memory(work):
    """Not all of activations, moments and masters fits at once: pages of these leave when memory is asked for, and are back before the
    update's kernels touch them."""
    keys = ["--train.dtype=bfloat16", "--train.micro_batch_size=8", "--train.accumulation=1"]
    counts = {name: work / f"paged_{name}.json" for name in ("roomy", "paged", "scarce")}
    device(work, "train", *keys_of(work, "roomy", *keys), TRIREME_DOUBLE_COUNTS=counts["roomy"])
    done = device(work, "train", *keys_of(work, "paged", *keys, "--optim.paged=true"), TRIREME_DOUBLE_COUNTS=counts["paged"])
    sizes = dict(re.findall(r"(optimizer|activations at most) ([0-9.]+) MiB", done.stderr))
    found = {name: json.loads(path.read_text()) for name, path in counts.items() if path.exists()}
    state = float(sizes["optimizer"]) * 2**20
    assert found["roomy"]["peak_bytes"] - found["paged"]["peak_bytes"] == pytest.approx(state, rel=0.1)
    assert found["paged"]["pages_left"] == found["paged"]["page_faults"] == 0 and found["paged"]["pages_prefetched"] >= state // 4096
    limit = found["roomy"]["peak_bytes"] - int(float(sizes["activations at most"]) * 2**20 * 0.4)
    keys += ["--checkpoint.async=false"]
    said = str(1 << 30)
    done = device(work, "train", *keys_of(work, "refused", *keys), status=1, TRIREME_DOUBLE_BYTES=str(limit), TRIREME_DOUBLE_SAYS_FREE=said)
    assert re.search(r"is out of memory .* set .*optim.paged=true", done.stderr), done.stderr
    scarce = dict(TRIREME_DOUBLE_COUNTS=counts["scarce"], TRIREME_DOUBLE_BYTES=str(limit), TRIREME_DOUBLE_SAYS_FREE=said)
    device(work, "train", *keys_of(work, "scarce_paged", *keys, "--optim.paged=true", "--train.stop_after=2"), status=75, **scarce)
    device(work, "train", *keys_of(work, "scarce_paged", *keys, "--optim.paged=true"), **scarce)
    found["scarce"] = json.loads(counts["scarce"].read_text())
    assert found["scarce"]["pages_left"] > 0 == found["scarce"]["page_faults"]
    for name in ("paged", "scarce_paged"):
        assert curve(work, name) == curve(work, "roomy")
        for key, value in product(work, "roomy").items():
            assert torch.equal(product(work, name)[key], value), key
    for key in ("blocking", "events"):
        assert found["paged"][key] == found["roomy"][key]
    # What the plan leaves to host memory: all but two windows, which are more than this model.
    done = device(work, "train", *keys_of(work, "planned_paged", *keys, "--optim.paged=true"), status=2, TRIREME_DOUBLE_BYTES=str(1 << 20))
    assert re.search(r"needs about .* of its device's memory .*optim.offload=true in place of optim.paged=true, ", done.stderr), done.stderr


def test_a_run_goes_on_on_another_device_and_says_that_bits_differ(work):
    keys = ["--train.dtype=float32"]
    cpu(work, "train", *keys_of(work, "moved_cpu", *keys))
    device(work, "train", *keys_of(work, "moved", *keys, "--train.stop_after=1"), status=75)
    done = run(work, "train", *keys_of(work, "moved", *keys, "--train.stop_after=1"), "--run.device=cpu")
    assert done.returncode == 75 and "last bits differ" in done.stderr, done.stderr
    device(work, "train", *keys_of(work, "moved", *keys))
    assert curve(work, "moved") == pytest.approx(curve(work, "moved_cpu"), rel=CURVE_FP32)


def test_a_loss_that_is_not_finite_ends_the_run_one_step_later_and_changes_nothing(work):
    """The step after it is under way by then: it may not update anything either."""
    keys = ["--train.dtype=bfloat16", "--optim.lr=1e6", "--optim.weight_decay=1e6", "--schedule.kind=constant", "--train.max_grad_norm=0",
            "--eval.every=0", "--data.eval="]
    done = device(work, "train", *keys_of(work, "nonfinite", *keys, "--train.steps=9"), status=1)
    step = int(re.search(r"step (\d+): the loss or its gradient is not finite", done.stderr)[1])
    assert [line["step"] for line in lines(work, "nonfinite")] == list(range(1, step))
    assert step > 1 and not list(work.glob("nonfinite/checkpoints/step-*"))


def test_answers_and_evaluations_are_those_of_the_cpu(work):
    cpu(work, "train", *keys_of(work, "served", "--train.dtype=float32"))
    keys = [f"--model.path={work}/served/model", f"--data.eval={QUICKSTART}/eval.jsonl:6"]
    found, expected = (json.loads(done.stdout) for done in (device(work, "eval", *keys), cpu(work, "eval", *keys)))
    assert found == pytest.approx(expected, rel=CURVE_FP32)
    rounded = json.loads(device(work, "eval", *keys, "--train.tf32=true").stdout)
    assert rounded["loss"] != pytest.approx(found["loss"], rel=1e-7) and rounded["loss"] == pytest.approx(found["loss"], rel=2e-3)
    # The first token is the prompt's, the next a step that prepares; later ones are what was recorded, launched again. The second prompt
    # is answered in the memory of the first, and with what it has recorded.
    counts = work / "answers.json"
    keys = [f"--model.path={work}/served/model", "--generate.max_tokens=12", "--generate.format=json", "What is", "Why do ranks row?"]
    done = device(work, "generate", *keys, TRIREME_DOUBLE_COUNTS=counts)
    assert done.stdout == cpu(work, "generate", *keys).stdout and "has no kernel" in done.stderr
    found = json.loads(counts.read_text())
    steps = sum(min(11, answer["tokens"] + (answer["finish_reason"] == "stop")) for answer in map(json.loads, done.stdout.splitlines()))  # one ahead of what is read
    assert (found["graphs"], found["replays"]) == (1, steps - 1) and steps > 4
    keys += ["--model.dtype=bfloat16"]
    for more in ([], ["--generate.temperature=1"]):
        done = device(work, "generate", *keys, *more, TRIREME_DOUBLE_COUNTS=counts)
        assert "has no kernel" not in done.stderr and json.loads(counts.read_text())["graphs"] == 1
        assert done.stdout == device(work, "generate", *keys, *more, "--generate.graphs=false", TRIREME_DOUBLE_COUNTS=counts).stdout
        assert json.loads(counts.read_text())["graphs"] == 0
    weights, cache = os.path.getsize(work / "served/model/model.safetensors"), 256 * 2 * 2 * 64 * 4  # rows, layers, of keys and values
    done = device(work, "generate", keys[0], "Why?", status=2, TRIREME_DOUBLE_BYTES=str(weights + cache // 2))
    assert "generate.max_tokens=128: the KV cache of an answer takes 0.25 MiB, and " in done.stderr, done.stderr
    done = device(work, "generate", keys[0], "Why " * 70, status=1, TRIREME_DOUBLE_BYTES=str(weights + cache * 5 // 4))
    assert re.search(r"is out of memory .*the KV cache of a prompt of \d+ tokens and its answer 0.50 MiB.* Lower generate.max_tokens, shorten the prompt", done.stderr), done.stderr


@pytest.mark.parametrize("base", ["", "nf4", "int8"])
def test_the_plan_holds_what_tensors_take(work, base):
    counts = work / "peak.json"
    keys = ["--train.dtype=bfloat16", "--train.micro_batch_size=8", "--train.steps=1", *(["--lora.rank=4", f"--quant.base={base}"] if base else [])]
    done = device(work, "train", *keys_of(work, f"planned{base}", *keys), TRIREME_DOUBLE_COUNTS=counts)
    number, unit = re.search(r"plan: memory of a rank's device: weights .*, workspace of products 32.00 MiB: ([0-9.]+) ([KMG]iB); in host memory: ", done.stderr).groups()
    planned, peak = float(number) * {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}[unit], json.loads(counts.read_text())["peak_bytes"]
    assert 0.7 * (planned - WORKSPACE) <= peak - WORKSPACE <= planned - WORKSPACE
    assert lines(work, f"planned{base}")[-1]["memory_bytes"] <= peak
    device(work, "train", *keys_of(work, f"fits{base}", *keys), TRIREME_DOUBLE_BYTES=str(int(planned) + 10000))  # rounded as it is said


@pytest.mark.parametrize("shape", [{}, dict(hidden_size=64, intermediate_size=512)], ids=["wide", "long MLP"])
@pytest.mark.parametrize("keys", [[], ["--lora.dropout=0.1"], ["--lora.dropout=0.1", "--train.recompute=selective"]], ids=["plain", "dropout", "dropout selective"])
def test_the_plan_holds_what_dora_takes(work, shape, keys):
    """More closely than that: nearly all here is activations. Of some hundred small tensors each takes whole pieces of memory."""
    (work / "dora.json").write_text(json.dumps(SHAPE | shape))
    (work / "text.txt").write_text((QUICKSTART / "train.jsonl").read_text()[:20000])  # rows that are all as long as they may be
    counts = work / "peak.json"
    done = device(work, "train", *keys_of(work, f"dora{len(shape)}{len(keys)}", "--train.dtype=bfloat16", "--train.micro_batch_size=16", "--train.accumulation=1", "--train.steps=1", "--eval.every=0",
                                          "--data.eval=", f"--data.train={work}/text.txt", "--task.kind=pretrain", "--lora.rank=2", "--lora.dora=true", *keys, model="dora"), TRIREME_DOUBLE_COUNTS=counts)
    number, unit = re.search(r"plan: memory of a rank's device: weights .*, workspace of products 32.00 MiB: ([0-9.]+) ([KMG]iB); in host memory: ", done.stderr).groups()
    planned, peak = float(number) * {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}[unit], json.loads(counts.read_text())["peak_bytes"]
    assert 0.88 * (planned - WORKSPACE) <= peak - WORKSPACE <= planned - WORKSPACE + 2**14, done.stderr


def test_what_leaves_the_device_is_not_on_it(work):
    """Of eight blocks all inputs but those of two, beside what they are there."""
    (work / "deep.json").write_text(json.dumps(SHAPE | dict(num_hidden_layers=8)))
    keys = ["--train.dtype=bfloat16", "--lora.rank=2", "--train.recompute=full", "--train.micro_batch_size=4", "--train.accumulation=1", "--train.steps=1", "--eval.every=0",
            "--data.eval=", "--data.packing=true"]
    peaks, planned = {}, {}
    for offload in ("false", "true"):
        counts = work / "peak.json"
        done = device(work, "train", *keys_of(work, f"away_{offload}", *keys, f"--train.offload_activations={offload}", model="deep"), TRIREME_DOUBLE_COUNTS=counts)
        peaks[offload] = json.loads(counts.read_text())["peak_bytes"]
        planned[offload] = float(re.search(r"activations at most ([0-9.]+) MiB", done.stderr)[1]) * 2**20
    row = 4 * 32 * 128 * 2
    assert peaks["false"] - peaks["true"] >= 5 * row, peaks
    assert planned["false"] - planned["true"] == pytest.approx(6 * row, rel=0.05)


def test_an_embedding_in_host_memory_is_not_on_the_device(work):
    peaks, planned, curves, table = {}, {}, {}, 1152 * 128 * 2
    keys = ["--train.dtype=bfloat16", "--lora.rank=2", "--eval.every=0", "--data.eval="]
    for place in ("device", "host"):
        counts = work / "peak.json"
        done = device(work, "train", *keys_of(work, f"table_{place}", *keys, f"--model.embedding={place}"), TRIREME_DOUBLE_COUNTS=counts)
        peaks[place] = json.loads(counts.read_text())["peak_bytes"]
        planned[place] = [float(re.search(pattern, done.stderr)[1]) * 2**20 for pattern in (r"device: weights ([0-9.]+) MiB", r"in host memory: .*program 300.00 MiB: ([0-9.]+) MiB")]
        curves[place] = curve(work, f"table_{place}")
    assert curves["device"] == curves["host"]
    assert peaks["device"] - peaks["host"] == pytest.approx(table, rel=0.02)
    assert planned["device"][0] - planned["host"][0] == pytest.approx(table, rel=0.05) == planned["host"][1] - planned["device"][1]
    cpu(work, "train", *keys_of(work, "table_cpu", *keys, "--model.embedding=host"))
    assert curves["host"] == pytest.approx(curve(work, "table_cpu"), rel=CURVE_BF16)
    of_adapter = [f"--model.config={work}/model.json", "--model.dtype=bfloat16", f"--model.tokenizer={QUICKSTART}/model", f"--lora.path={work}/table_host/adapter"]
    for verb, more in (("eval", [f"--data.eval={QUICKSTART}/eval.jsonl:4", "--data.max_length=32"]), ("generate", ["--generate.max_tokens=6", "What is"])):
        assert cpu(work, verb, *of_adapter[:3], *more, "--model.embedding=host").stdout == cpu(work, verb, *of_adapter[:3], *more).stdout != ""
        assert device(work, verb, *of_adapter, *more, "--model.embedding=host").stdout == device(work, verb, *of_adapter, *more).stdout != ""


@pytest.mark.parametrize("ranks, mesh", [(2, ["--parallel.zero=3", "--train.accumulation=1"]), (2, ["--parallel.pipeline=2"]), (2, ["--parallel.tensor=2", "--optim.kind=adamw"])])
def test_the_smallest_footprint_is_the_same_run_on_every_mesh(work, ranks, mesh):
    (work / "quads.json").write_text(json.dumps(SHAPE | dict(num_attention_heads=4, num_key_value_heads=2, intermediate_size=128)))
    name = "smallest_" + "_".join(key.split("=")[0].split(".")[1] for key in mesh)
    device(work, "train", *keys_of(work, f"one_{name}", *override(SMALLEST, [key for key in mesh if key.startswith("--optim")]), model="quads"))
    done = over_ranks(work, ranks, "train", *keys_of(work, name, *override(SMALLEST, mesh), model="quads"))
    assert done.returncode == 0, done.stderr
    assert curve(work, name) == pytest.approx(curve(work, f"one_{name}"), rel=CURVE_BF16)


def test_memory_that_does_not_suffice_is_said_before_the_first_step_or_with_names(work):
    done = device(work, "train", *keys_of(work, "small"), status=2, TRIREME_DOUBLE_BYTES=str(1 << 20))
    assert re.search(r"needs about .* of its device's memory .*which has 1.00 MiB free: lower train.micro_batch_size", done.stderr), done.stderr
    scarce = dict(TRIREME_DOUBLE_SAYS_FREE=str(1 << 30), TRIREME_DOUBLE_BYTES=str(int(2.5 * 2**20)))
    done = device(work, "train", *keys_of(work, "scarce", "--train.dtype=bfloat16", "--lora.rank=2"), status=1, **scarce)
    names = r"activations \(as planned\) 0.58 MiB, model.embed_tokens.weight 0.28 MiB, lm_head.weight 0.28 MiB, .* Lower train.micro_batch_size .*train.recompute=full"
    assert re.search(r"is out of memory \(the double is out of memory: asked for 33554432 bytes\), with 1.* MiB of tensors at most; the largest: " + names, done.stderr), done.stderr
    cpu(work, "train", *keys_of(work, "to_serve", "--train.steps=1"))
    keys = [f"--model.path={work}/to_serve/model"]
    for verb, more, advice in (("eval", [f"--data.eval={QUICKSTART}/eval.jsonl:6"], "Lower eval.micro_batch_size"), ("generate", ["What is"], "Lower generate.max_tokens")):
        done = device(work, verb, *keys, *more, status=1, **scarce)
        assert re.search(r"out of memory .*; the largest: model.embed_tokens.weight 0.56 MiB, .*\. " + advice, done.stderr), done.stderr


def test_a_gradient_that_is_not_finite_is_found_in_its_own_step(work):
    """The loss is finite, and so is all of the step after it: one token's row of the head meets a norm's weight in the first alone."""
    rows = [letters * 4 for letters in ("a b", "c d", "a b", "e z", "a b", "c d", "a b", "c d", "a b", "c d", "a b", "c d")]
    (work / "few.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    said = subprocess.run([BINARY, "tokenize", f"--model.path={QUICKSTART}/model", "--tokenize.special=false"], input="".join(json.dumps(row) + "\n" for row in rows),
                          text=True, capture_output=True, env=environment(work)).stdout
    ids = [json.loads(line)["ids"] for line in said.splitlines()]
    token = next(token for token in ids[3][1:] if not any(token in others for others in ids[:3] + ids[4:]))
    cpu(work, "train", *keys_of(work, "source", "--train.steps=1", "--train.dtype=float32"))
    weights = load_file(work / "source/model/model.safetensors")
    weights["model.embed_tokens.weight"][:, 3] = -5  # so that every state has about -11 there, behind its norm
    weights["model.norm.weight"][3] = 1.77e-38
    weights["lm_head.weight"][token, 3] = 3e38       # logit -60
    save_file(weights, work / "source/model/model.safetensors", metadata={"format": "pt"})
    done = device(work, "train", *override(keys_of(work, "gradient", "--train.dtype=float32"), [f"--model.path={work}/source/model", "--model.config=", "--model.tokenizer=",
                  f"--data.train={work}/few.jsonl", "--task.kind=pretrain", "--data.shuffle=false", "--eval.every=0", "--data.eval="]), status=1)
    assert "step 1: the loss or its gradient is not finite; it appeared first in the gradient of model.norm.weight: 1 of 128 values" in done.stderr, done.stderr


@pytest.mark.parametrize("keys, ranks", [(["--train.dtype=bfloat16"], 2), (["--train.dtype=float32", "--parallel.zero=3"], 2), (["--train.dtype=float32", "--lora.rank=4", "--parallel.tensor=2"], 2),
                                         (["--train.dtype=float32", "--parallel.pipeline=2"], 2), (["--train.dtype=bfloat16", "--parallel.pipeline=2", "--parallel.zero=1"], 4)])
def test_ranks_with_a_device_each_are_one(work, keys, ranks):
    copies = ranks // (2 if "--parallel.tensor=2" in keys or "--parallel.pipeline=2" in keys else 1)
    model = "pairs"
    (work / "pairs.json").write_text(json.dumps(SHAPE | dict(num_attention_heads=4, num_key_value_heads=2)))
    name = "_".join(key.split("=")[0].split(".")[1] + key.split("=")[1] for key in keys)
    cpu(work, "train", *keys_of(work, f"one_{name}", *(key for key in keys if "parallel" not in key), model=model))
    done = end_of(start(work, ["mpirun", "-q", "--bind-to", "none", "--oversubscribe", "-n", str(ranks), DOUBLE, "train",
                               *keys_of(work, name, *keys, f"--train.accumulation={2 // copies}", model=model)], dict(TRIREME_DOUBLE_DEVICES="ABCD")), timeout=300)
    assert done.returncode == 0, done.stderr
    assert curve(work, name) == pytest.approx(curve(work, f"one_{name}"), rel=CURVE_BF16 if "--train.dtype=bfloat16" in keys else CURVE_FP32)


ATTENTION_GAP = "attention has no kernel for head_dim 16 in float32 (but for 64, 96, 128 and 256 in bfloat16 and float16): whole matrices of scores are computed instead"


def test_what_the_kernels_leave_to_others_is_said_by_every_verb(work):
    keys = [f"--model.config={work}/tied.json", f"--model.tokenizer={QUICKSTART}/model"]
    lora = ["--lora.rank=4", "--lora.dropout=0.1", "--data.max_length=32"]
    rows = work / "ids.json"
    rows.write_text("[[1, 2, 3]]")
    assert device(work, "eval", *keys, f"--eval.token_ids={rows}").stderr.count(ATTENTION_GAP) == 1
    assert device(work, "generate", *keys, "--generate.max_tokens=1", "a").stderr.count(ATTENTION_GAP) == 1
    dropped = "LoRA with dropout writes dropped copies of its inputs"
    words = ", not for float32, rank 4, features 0 to 128 (model.layers.0.self_attn.q_proj and 13 more)"
    for more in ["--run.device=cuda"], ["--plan.memory_gb=80"], []:  # here the double is seen
        said = device(work, "plan", *keys, *lora, *more).stderr
        assert said.count(ATTENTION_GAP) == 1 and said.count(dropped) == 1 and words in said, said
    assert "LoRA" not in device(work, "plan", *keys, "--lora.rank=4", "--data.max_length=32").stderr
    for words in ["plan", *keys, *lora, "--run.device=cpu", "--plan.memory_gb=80"], ["eval", *keys, f"--eval.token_ids={rows}", "--run.device=cpu"]:
        assert "kernel" not in device(work, *words).stderr
    said = device(work, "train", *keys_of(work, "gaps", *lora, "--train.steps=1", model="tied")).stderr
    assert said.count(dropped) == 1 and said.index(dropped) < said.index("step 1"), said


def test_a_cut_that_leaves_layers_to_other_code_than_one_rank_takes_is_said(work):
    (work / "uneven.json").write_text(json.dumps(SHAPE | dict(intermediate_size=88, num_key_value_heads=2)))
    keys = [f"--model.config={work}/uneven.json", "--train.dtype=bfloat16", "--data.max_length=32", "--lora.rank=4", "--lora.dropout=0.1", "--run.device=cuda"]
    assert "kernel" not in device(work, "plan", *keys).stderr
    said = device(work, "plan", *keys, "--plan.ranks=2", "--parallel.tensor=2").stderr
    assert ("not for bfloat16, rank 4, features 0 to 44 (model.layers.0.mlp.down_proj and 1 more); parallel.tensor=2 cuts it so, and one rank would take the kernels, "
            "whose last bits are others: take a number that leaves eights, or lora.dropout=0") in said, said


@pytest.mark.parametrize("verb", ["plan", "eval", "generate"])
def test_rows_wider_than_the_kernels_hold_are_refused_by_every_verb(work, verb):
    (work / "wide.json").write_text(json.dumps(SHAPE | dict(hidden_size=16392)))
    rows = work / "ids.json"
    rows.write_text("[[1, 2, 3]]")
    keys = {"plan": ["--data.max_length=32"], "eval": [f"--eval.token_ids={rows}"], "generate": ["a"]}[verb]
    done = device(work, verb, f"--model.config={work}/wide.json", f"--model.tokenizer={QUICKSTART}/model", *keys, status=2)
    assert "hidden_size 16392 is more than the 16384 values of a row that the kernels of RMSNorm hold: set run.device=cpu" in done.stderr, done.stderr


def test_ranks_that_see_a_device_each_take_it(work):
    """As srun --gpus-per-task=1 shows them. One that is not theirs alone is refused."""
    def ranks(name, devices):
        return end_of(start(work, ["mpirun", "-q", "--bind-to", "none", "--oversubscribe", "-n", "2", DOUBLE, "train",
                                   *keys_of(work, name, "--train.steps=1", "--eval.every=0", "--data.eval=")], dict(TRIREME_DOUBLE_DEVICES=devices)))
    done = ranks("each", "A B")
    assert done.returncode == 0, done.stderr
    assert len(lines(work, "each")) == 1
    for devices, said in {"A A": "this host has 2 ranks but sees 1 device", "AB A": "ranks 0 and 1 of this host see different devices and would both take one of them"}.items():
        done = ranks("both", devices)
        assert done.returncode == 2 and said in done.stderr, done.stderr


@pytest.mark.parametrize("ranks, mesh", [(2, ["--parallel.pipeline=2"]), (2, ["--parallel.tensor=2"]), (4, ["--parallel.tensor=2", "--parallel.pipeline=2"])])
def test_ranks_with_a_device_each_answer_as_one(work, ranks, mesh):
    (work / "quads.json").write_text(json.dumps(SHAPE | dict(num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3)))
    keys = [f"--model.config={work}/quads.json", f"--model.tokenizer={QUICKSTART}/model", "--generate.max_tokens=8", "--generate.format=json", "What is", "Why"]
    done = end_of(start(work, ["mpirun", "-q", "--bind-to", "none", "--oversubscribe", "-n", str(ranks), DOUBLE, "generate", *keys, *mesh], dict(TRIREME_DOUBLE_DEVICES="ABCD")), timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == cpu(work, "generate", *keys).stdout


def test_what_cannot_be_computed_there_is_refused_in_a_sentence(work):
    done = device(work, "train", *keys_of(work, "double", "--train.dtype=float64"), status=2)
    assert "train.dtype=float64 is computed by the CPU alone: set run.device=cpu" in done.stderr
    done = end_of(start(work, ["mpirun", "-q", "--bind-to", "none", "--oversubscribe", "-n", "2", DOUBLE, "train", *keys_of(work, "ranks")]))
    assert done.returncode == 2 and "this host has 2 ranks but sees 1 device" in done.stderr, done.stderr
    assert not (work / "ranks").exists()


@pytest.mark.skipif(os.path.exists("/dev/nvidiactl"), reason="there is a device")
def test_a_device_that_is_asked_for_and_not_there(work):
    done = run(work, "train", *keys_of(work, "none"), "--run.device=cuda")
    assert done.returncode == 2 and "run.device=cuda" in done.stderr and "set run.device=cpu" in done.stderr, done.stderr



@pytest.mark.parametrize("base, graphs", [("nf4", 1), ("int8", 0)])
def test_answers_of_a_quantized_base_are_recorded_where_the_host_need_not_look(work, base, graphs):
    (work / "quads.json").write_text(json.dumps(SHAPE | dict(num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3)))
    counts = work / "quantized.counts"
    keys = [f"--model.config={work}/quads.json", "--model.dtype=bfloat16", f"--model.tokenizer={QUICKSTART}/model", f"--quant.base={base}", "--generate.max_tokens=8", "What is", "Why"]
    answers = [device(work, "generate", *keys, *more, TRIREME_DOUBLE_COUNTS=counts).stdout for more in (["--generate.graphs=false"], [])]
    assert json.loads(counts.read_text())["graphs"] == graphs
    assert answers[0] == answers[1] and answers[0].strip()

FLOAT8 = ["--train.dtype=bfloat16", "--lora.rank=4", "--quant.base=fp8"]
CURVE_FLOAT8 = 0.02  # factors of products have three digits behind the point, gradients two: 6 and 12 % of each, of which a sum keeps little


def over_ranks(work, ranks, verb, *keys):
    return end_of(start(work, ["mpirun", "-q", "--bind-to", "none", "--oversubscribe", "-n", str(ranks), DOUBLE, verb, *keys], dict(TRIREME_DOUBLE_DEVICES="ABCD")), timeout=300)


@pytest.fixture(scope="module")
def float8(work):
    """A run with products of float8: the folder's name."""
    (work / "float8.json").write_text(json.dumps(SHAPE | dict(num_attention_heads=4, num_key_value_heads=2)))
    counts = work / "float8.counts"
    done = device(work, "train", *keys_of(work, "float8", *FLOAT8, model="float8"), TRIREME_DOUBLE_COUNTS=counts)
    number, unit = re.search(r"plan: memory of a rank's device: weights .*, workspace of products 32.00 MiB: ([0-9.]+) ([KMG]iB); in host memory: ", done.stderr).groups()
    assert json.loads(counts.read_text())["peak_bytes"] <= float(number) * {"MiB": 2**20}[unit]
    return "float8"


def test_a_frozen_base_in_float8_trains_adapters_as_one_in_16_bits(work, float8):
    cpu(work, "train", *keys_of(work, "not_float8", *FLOAT8[:2], model="float8"))
    found, expected = curve(work, float8), curve(work, "not_float8")
    assert found == pytest.approx(expected, rel=CURVE_FLOAT8)
    assert found != pytest.approx(expected, rel=1e-4)
    for key, value in product(work, "not_float8").items():
        assert (product(work, float8)[key].float() - value.float()).norm() <= 40 * CURVE_FLOAT8 * value.float().norm() + 1e-3, key
    device(work, "train", *keys_of(work, "in_16_bits", *FLOAT8[:2], model="float8"))
    device(work, "train", *keys_of(work, "some_skipped", *FLOAT8, "--quant.skip=down_proj", model="float8"))
    assert curve(work, "some_skipped") not in (curve(work, "in_16_bits"), found)


def test_a_frozen_base_in_float8_is_resumed_to_the_bit(work, float8):
    device(work, "train", *keys_of(work, "float8_parts", *FLOAT8, "--train.stop_after=2", model="float8"), status=75)
    done = device(work, "train", *keys_of(work, "float8_parts", *FLOAT8[:2], model="float8"), status=2)
    assert "\n  quant.base: fp8 then, none now\n" in done.stderr, done.stderr
    done = device(work, "train", *keys_of(work, "float8_parts", *FLOAT8, "--quant.skip=q_proj", model="float8"), status=2)
    assert "\n  quant.skip: nothing then, q_proj now\n" in done.stderr, done.stderr
    device(work, "train", *keys_of(work, "float8_parts", *FLOAT8, model="float8"))
    assert curve(work, "float8_parts") == curve(work, float8)


@pytest.mark.parametrize("ranks, mesh", [(2, ["--parallel.zero=3", "--train.accumulation=1"]), (2, ["--parallel.pipeline=2"]), (2, ["--parallel.tensor=2"]),
                                         (4, ["--parallel.tensor=2", "--parallel.zero=3", "--train.accumulation=1"])])
def test_a_frozen_base_in_float8_is_the_same_on_every_mesh(work, float8, ranks, mesh):
    """But where ranks cut the rows of a product: each scales its own."""
    name = "float8_" + "_".join(key.split("=")[0].split(".")[1] for key in mesh)
    done = over_ranks(work, ranks, "train", *keys_of(work, name, *FLOAT8, *mesh, model="float8"))
    assert done.returncode == 0, done.stderr
    assert curve(work, name) == pytest.approx(curve(work, float8), rel=CURVE_FLOAT8 if "--parallel.tensor=2" in mesh else CURVE_BF16)


def test_a_frozen_base_in_float8_is_evaluated_and_answers(work, float8):
    keys = [f"--model.config={work}/float8.json", "--model.dtype=bfloat16", f"--model.tokenizer={QUICKSTART}/model", f"--lora.path={work}/{float8}/adapter"]
    data = [f"--data.eval={QUICKSTART}/eval.jsonl:4", "--data.max_length=32"]
    found, plain = (json.loads(device(work, "eval", *keys, *data, *more).stdout)["loss"] for more in (["--quant.base=fp8"], []))
    assert found == pytest.approx(lines(work, float8, "eval")[-1]["loss"], rel=CURVE_BF16) and found != plain
    answers = [device(work, "generate", *keys, "--quant.base=fp8", "--generate.max_tokens=6", "What is", *more).stdout for more in ([], ["--generate.graphs=false"])]
    assert answers[0] == answers[1]


def test_a_frozen_base_in_float8_that_cannot_be_is_refused(work, float8):
    for keys, env, said in (
            (FLOAT8, dict(TRIREME_DOUBLE_CAPABILITY="80"), "quant.base=fp8 needs a device of compute capability 8.9 or newer, but device 0 has 8.0: leave quant.base out"),
            (FLOAT8 + ["--run.device=cpu"], {}, "quant.base=fp8 needs a device of compute capability 8.9 or newer, and the CPU computes this"),
            (FLOAT8[1:] + ["--train.dtype=float32"], {}, "quant.base=fp8 goes with 16 bits, but train.dtype is float32: set train.dtype=bfloat16"),
            (FLOAT8[::2], {}, "quant.base=fp8 freezes the weights, and nothing would be trained: set lora.rank, or leave quant.base out"),
            (FLOAT8[:2] + ["--quant.skip=q_proj"], {}, "quant.skip is set, but quant.base is none"),
            (FLOAT8 + ["--quant.skip=q_prj"], {}, "quant.skip=q_prj: no linear layer has this name; there are down_proj, gate_proj"),
            (FLOAT8[:2] + ["--quant.base=fp9"], {}, "quant.base=fp9: allowed are none, ")):
        done = device(work, "train", *keys_of(work, "refused", *keys, model="float8"), status=2, **env)
        assert said in done.stderr, done.stderr
    (work / "odd.json").write_text(json.dumps(SHAPE | dict(intermediate_size=88)))
    done = device(work, "train", *keys_of(work, "refused", *FLOAT8, model="odd"), status=2)
    assert ("quant.base=fp8: model.layers.0.mlp.gate_proj has 88 outputs and 128 inputs, and products of float8 take multiples of 16: add it to quant.skip" in done.stderr), done.stderr
