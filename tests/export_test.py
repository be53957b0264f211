"""What leaves the program is what transformers and PEFT read, and what they write comes back in: full models, adapters, merged
models, chat templates."""
import json
import shutil

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import bounds
import hf_models

RECORDS = hf_models.SOURCE / "configs/quickstart/train.jsonl"
IDS = [[5, 17, 300, 1100, 42, 9, 9, 250, 31, 77, 640, 3]]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A base of odd shape: biases, tied embeddings, grouped heads."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("export")
    hf_models.CASES["base"] = ("qwen2", {"tie_word_embeddings": True, "max_position_embeddings": 256})
    hf_models.make("base", folder / "base")
    (folder / "ids.json").write_text(json.dumps(IDS))
    return folder


def base(work):
    return transformers.AutoModelForCausalLM.from_pretrained(work / "base", dtype=torch.float32)


def theirs(model):
    with torch.no_grad():
        return model.eval()(torch.tensor(IDS)).logits[0]


def ours(work, *keys):
    out = work / "logits.safetensors"
    hf_models.succeed("eval", f"--eval.token_ids={work / 'ids.json'}", f"--eval.logits={out}", *keys)
    return load_file(out)["logits.0"]


def close(a, b):
    assert (a - b).abs().max().item() <= bounds.LOGITS_FP32


def train(work, name, *keys, status=0, lr="1e-2"):
    done = hf_models.run("train", f"--run.dir={work / name}", f"--data.train={RECORDS}:16", "--train.steps=4", f"--optim.lr={lr}",
                         "--train.micro_batch_size=4", *keys, cache=work / "cache")
    assert done.returncode == status, done.stderr
    return work / name


@pytest.fixture(scope="module")
def adapter(work):
    """Trained by the program, by names of which not every layer has one."""
    return train(work, "lora", f"--model.path={work / 'base'}", "--lora.rank=4", "--lora.alpha=6", "--lora.rslora=true",
                 "--lora.targets=q_proj,v_proj,layers.1.mlp.down_proj") / "adapter"


def test_an_adapter_loads_in_peft_with_the_same_logits(work, adapter):
    model = peft.PeftModel.from_pretrained(base(work), adapter)
    assert len(list(m for n, m in model.named_modules() if n.endswith("lora_A.default"))) == 5
    logits = ours(work, f"--model.path={work / 'base'}", f"--lora.path={adapter}")
    close(logits, theirs(model))
    assert (logits - theirs(base(work))).abs().max().item() > 0.01
    # its config alone finds the base
    config = peft.PeftConfig.from_pretrained(adapter)
    assert config.base_model_name_or_path == str(work / "base")
    close(theirs(peft.AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.float32)), logits)


def test_a_merged_model_is_pefts_merged_model(work, adapter):
    out = work / "merged"
    hf_models.succeed("export", f"--model.path={work / 'base'}", f"--lora.path={adapter}", "--lora.merge=true", f"--run.dir={out}")
    merged = peft.PeftModel.from_pretrained(base(work), adapter).merge_and_unload()
    found = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert type(found) is type(merged) and found.dtype == torch.float32
    for (name, a), (_, b) in zip(found.state_dict().items(), merged.state_dict().items(), strict=True):
        assert (a - b).abs().max().item() <= bounds.MERGED_FP32 * b.abs().max().item(), name
    close(theirs(found), theirs(merged))
    close(ours(work, f"--model.path={out}"), theirs(merged))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (work / "base" / name).read_bytes()


def test_a_checkpoint_with_adapters_is_exported_as_adapter_or_merged(work, adapter):
    keys = (f"--model.path={work / 'base'}", "--lora.rank=4", "--lora.alpha=6", "--lora.rslora=true",
            "--lora.targets=q_proj,v_proj,layers.1.mlp.down_proj", f"--run.resume={work}/lora/checkpoints/step-4")
    hf_models.succeed("export", *keys, f"--run.dir={work / 'lora-out'}")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (work / "lora-out" / name).read_bytes() == (adapter / name).read_bytes()
    hf_models.succeed("export", *keys, "--lora.merge=true", f"--run.dir={work / 'lora-merged'}")
    logits = ours(work, f"--model.path={work / 'base'}", f"--lora.path={adapter}")
    close(ours(work, f"--model.path={work / 'lora-merged'}"), logits)


@pytest.mark.parametrize("name, options", [("pissa", ["--lora.init=pissa"]), ("dora", ["--lora.dora=true"]), ("pissa-dora", ["--lora.init=pissa", "--lora.dora=true", "--lora.rslora=true"]),
                                           ("loftq", ["--lora.init=loftq", "--quant.base=nf4"])])
def test_adapters_that_begin_with_the_weights_or_have_magnitudes_go_out_for_the_weights(work, name, options):
    """Whole runs and checkpoints, as adapters and merged, are one model; PEFT reads it, and has the logits."""
    keys = (f"--model.path={work / 'base'}", "--lora.rank=4", *options)
    run = train(work, name, *keys)
    stored = (run / "config.ini", f"--run.resume={run}/checkpoints/step-4")
    hf_models.succeed("export", *stored, f"--run.dir={work / name}-out")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (work / f"{name}-out" / file).read_bytes() == (run / "adapter" / file).read_bytes()
    hf_models.succeed("export", *stored, "--lora.merge=true", f"--run.dir={work / name}-merged")
    logits = ours(work, f"--model.path={work / name}-merged")
    if "quant" in options[-1]:  # merged into what the 4 bits stand for; the adapter is for the weights without their loss
        logits = ours(work, f"--model.path={work / 'base'}", f"--lora.path={run / 'adapter'}")
    close(ours(work, f"--model.path={work / 'base'}", f"--lora.path={run / 'adapter'}"), logits)
    if "quant" in options[-1]:
        done = hf_models.run("export", keys[0], *options[:1], "--lora.rank=4", stored[1], f"--run.dir={work / name}-none")
        assert done.returncode == 2 and "quant.base is none: name the run's config.ini" in done.stderr
    model = peft.PeftModel.from_pretrained(base(work), run / "adapter")
    assert model.peft_config["default"].r == (8 if "init" in options[0] else 4) and model.peft_config["default"].use_dora == ("dora" in name)
    close(theirs(model), logits)
    assert (logits - theirs(base(work))).abs().max().item() > 0.01
    hf_models.succeed("export", f"--model.path={work / 'base'}", f"--lora.path={run / 'adapter'}", "--lora.merge=true", f"--run.dir={work / name}-again")
    close(ours(work, f"--model.path={work / name}-again"), logits)


def test_pissa_by_iterations_begins_as_pefts(work):
    """Weights whose singular values halve: of 16 iterations nothing is left to see of which vectors they began with."""
    model = base(work)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("_proj.weight"):
                u, s, v = torch.linalg.svd(value, full_matrices=False)
                value.copy_(u * (3 * 0.5 ** torch.arange(len(s)).clamp(max=12)) @ v)
    model.save_pretrained(work / "steep")
    hf_models.add_tokenizer(work / "steep")
    adapter = train(work, "niter", f"--model.path={work / 'steep'}", "--lora.rank=4", "--lora.alpha=8", "--lora.init=pissa_niter_16", lr="1e-12") / "adapter"
    found = load_file(adapter / "adapter_model.safetensors")  # what was learnt, which is nothing, and behind it what it began with
    expected = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights="pissa_niter_16")).state_dict()
    for key, value in found.items():
        theirs_4 = expected[key.replace(".weight", ".default.weight")]
        ours_4 = value[:4].T if "lora_A" in key else value[:, :4]
        theirs_4 = theirs_4.T if "lora_A" in key else theirs_4
        assert torch.linalg.svdvals(torch.linalg.qr(ours_4.double())[0].T @ torch.linalg.qr(theirs_4.double())[0]).min() > 1 - 1e-9, key  # the cosine of the largest angle
        assert torch.allclose(ours_4.norm(dim=0), theirs_4.norm(dim=0), rtol=1e-5), key


def test_a_checkpoint_of_a_run_that_began_with_an_adapter_is_exported(work, adapter):
    run = train(work, "lora_again", f"--model.path={work / 'base'}", f"--lora.path={adapter}")
    out = work / "of_checkpoint"
    hf_models.succeed("export", f"--model.path={work / 'base'}", f"--lora.path={adapter}", f"--run.resume={run / 'checkpoints/step-4'}", f"--run.dir={out}")
    assert (out / "adapter_model.safetensors").read_bytes() == (run / "adapter/adapter_model.safetensors").read_bytes() != (adapter / "adapter_model.safetensors").read_bytes()


def peft_adapter(work, name, **options):
    torch.manual_seed(3)
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "o_proj", "up_proj"], **options}
    model = peft.get_peft_model(base(work), peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **options))
    model.save_pretrained(work / name)
    return model


@pytest.mark.parametrize("name, options", [("plain", {}), ("rslora", {"use_rslora": True}), ("dora", {"use_dora": True}),
                                           ("all-linear", {"target_modules": "all-linear", "lora_dropout": 0.3}),
                                           ("pattern", {"target_modules": r".*layers\.1\.self_attn\.(q|k)_proj"})])
def test_an_adapter_of_peft_comes_in(work, name, options):
    model = peft_adapter(work, f"peft-{name}", **options)
    close(ours(work, f"--model.path={work / 'base'}", f"--lora.path={work}/peft-{name}"), theirs(model))
    # and is trained on: the run's adapter has the same modules
    again = train(work, f"peft-{name}-run", f"--model.path={work / 'base'}", f"--lora.path={work}/peft-{name}") / "adapter"
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (work / f"peft-{name}", again))
    assert set(before) == set(after)
    assert all(not torch.equal(before[key], after[key]) for key in before)
    assert peft.PeftConfig.from_pretrained(again).use_rslora == bool(options.get("use_rslora"))


@pytest.mark.parametrize("key, value", [("rank_pattern", {"q_proj": 8}), ("alpha_pattern", {"q_proj": 12}), ("use_qalora", True),
                                        ("bias", "lora_only"), ("modules_to_save", ["lm_head"])])
def test_what_an_adapter_cannot_have_is_refused_by_name(work, key, value):
    peft_adapter(work, f"peft-{key}", **{key: value})
    done = hf_models.run("eval", f"--model.path={work / 'base'}", f"--lora.path={work}/peft-{key}",
                         f"--eval.token_ids={work / 'ids.json'}")
    assert done.returncode == 3
    assert done.stderr == (f"error: {work}/peft-{key}/adapter_config.json: '{key}' is {json.dumps(value, separators=(',', ':'))}, which is "
                           "not supported. Retrain the adapter without it, or merge it into its base model with PEFT "
                           "(merge_and_unload).\n")


def test_a_checkpoint_is_exported_in_the_dtype_of_its_training(work):
    run = train(work, "full-bf16", f"--model.path={work / 'base'}", "--train.dtype=bfloat16")
    hf_models.succeed("export", f"--model.path={work / 'base'}", f"--run.resume={run}/checkpoints/step-4", f"--run.dir={work / 'bf16'}")
    assert (work / "bf16/model.safetensors").read_bytes() == (run / "model/model.safetensors").read_bytes()


def test_a_full_model_and_its_checkpoint_come_out_and_in_again(work):
    run = train(work, "full", f"--model.path={work / 'base'}")
    found = transformers.AutoModelForCausalLM.from_pretrained(run / "model")
    assert (theirs(found) - theirs(base(work))).abs().max().item() > 0.01
    close(ours(work, f"--model.path={run / 'model'}"), theirs(found))
    hf_models.succeed("export", f"--model.path={work / 'base'}", f"--run.resume={run}/checkpoints/step-4", f"--run.dir={work / 'again'}")
    for file in sorted(p.name for p in (run / "model").iterdir()):
        assert (work / "again" / file).read_bytes() == (run / "model" / file).read_bytes()
    hf_models.succeed("export", f"--model.path={run / 'model'}", f"--run.dir={work / 'copy'}", "--model.dtype=bfloat16")
    copy = transformers.AutoModelForCausalLM.from_pretrained(work / "copy")
    for (name, a), (_, b) in zip(copy.state_dict().items(), found.state_dict().items(), strict=True):
        assert a.dtype == torch.bfloat16 and torch.equal(a, b.bfloat16()), name


def test_random_weights_from_a_config_alone_load_in_transformers(work):
    (work / "alone").mkdir()
    shutil.copy(work / "base/config.json", work / "alone/config.json")
    run = train(work, "random", f"--model.config={work}/alone/config.json", f"--model.tokenizer={work / 'base'}")
    found = transformers.AutoModelForCausalLM.from_pretrained(run / "model")
    close(ours(work, f"--model.path={run / 'model'}"), theirs(found))


@pytest.mark.parametrize("template", ["chatml", "alpaca"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_template_of_training_goes_along(work, template, lora):
    """Into a folder whose tokenizer names another template and no end token, and whose model ends by another token."""
    source = work / f"untold-{template}-{lora}"
    shutil.copytree(work / "base", source)
    config = json.loads((source / "tokenizer_config.json").read_text())
    del config["eos_token"]
    config["chat_template"] = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    for name in ("config.json", "generation_config.json"):
        (source / name).write_text(json.dumps({**json.loads((source / name).read_text()), "eos_token_id": 0}))
    run = train(work, f"told-{template}-{lora}", f"--model.path={source}", f"--data.chat_template={template}",
                *(["--lora.rank=2"] if lora else []))
    product = run / ("adapter" if lora else "model")
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Why?"}]
    record = json.dumps({"messages": messages}) + "\n"
    asked = hf_models.succeed("tokenize", f"--model.path={source}", f"--data.chat_template={template}",
                              "--tokenize.generation_prompt=true", input=record)
    text = json.loads(asked.stdout)["text"]
    assert ("<|im_start|>" in text) == (template == "chatml")
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(product)
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == text
    assert tokenizer.eos_token == "<|endoftext|>"
    again = hf_models.succeed("tokenize", f"--model.path={product}", "--tokenize.generation_prompt=true", input=record)
    assert json.loads(again.stdout)["text"] == text
    if not lora:
        generation = json.loads((product / "generation_config.json").read_text())
        assert generation["eos_token_id"] == ([0, hf_models.END] if template == "chatml" else 0)
