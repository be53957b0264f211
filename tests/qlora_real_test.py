"""QLoRA from end to end, as the README does it: four ranks (2 copies x 2 tensor ranks), killed and resumed; adapter and merged model in
transformers, PEFT and bitsandbytes have the loss that `trireme eval` says. On GSM8K where TRIREME_TEST_DATA has it, else on the quickstart's
questions and answers."""
import json
import os
import pathlib

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # bitsandbytes would compile what it runs once
import peft
import pytest
import torch
import transformers

import bounds
from program import SOURCE, TRAIN, command, end_of, kill_all, run, start, wait_for

GSM8K = pathlib.Path(os.environ.get("TRIREME_TEST_DATA", SOURCE.parent / "shared/data")) / "gsm8k/train.jsonl"
SHAPE = dict(architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=1152, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=32, rms_norm_eps=1e-5, max_position_embeddings=1024, initializer_range=0.05, tie_word_embeddings=True, eos_token_id=2)
FIELDS = ["--data.prompt_field=question", "--data.completion_field=answer", "--data.separator=\n", "--data.max_length=1024"]
STEPS = 24


def succeed(work, verb, *keys, **options):
    done = run(work, verb, *keys, **options)
    assert done.returncode == 0, done.stderr
    return done


def records():
    if GSM8K.exists():
        return [json.loads(line) for line in GSM8K.read_text().splitlines()[:80]]
    of_chats = [[message["content"] for message in json.loads(line)["messages"][-2:]] for line in TRAIN.read_text().splitlines()[:80]]
    return [{"question": question, "answer": answer} for question, answer in of_chats]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A base in bfloat16 that has learnt a little, and the records: 64 to train on, 16 to evaluate."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("real")
    lines = [json.dumps(record) + "\n" for record in records()]
    (folder / "train.jsonl").write_text("".join(lines[:64]))
    (folder / "test.jsonl").write_text("".join(lines[64:]))
    (folder / "config.json").write_text(json.dumps(SHAPE))
    succeed(folder, "train", *FIELDS, f"--model.config={folder}/config.json", f"--model.tokenizer={SOURCE}/configs/quickstart/model", f"--data.train={folder}/train.jsonl",
            "--task.kind=pretrain", "--train.steps=20", "--train.micro_batch_size=4", "--optim.lr=3e-3", "--model.dtype=bfloat16", f"--run.dir={folder}/pretrained")
    return folder


def train(work, name):
    return command("train", "configs/gsm8k.ini", f"--model.path={work}/pretrained/model", f"--data.train={work}/train.jsonl", f"--data.eval={work}/test.jsonl", "--data.eval_fraction=0",
                   "--data.max_length=1024", "--quant.base=nf4", "--parallel.tensor=2", "--lora.rank=8", "--lora.dropout=0.1", "--train.dtype=bfloat16", "--train.recompute=full",
                   "--train.micro_batch_size=1", "--train.epochs=0", f"--train.steps={STEPS}", "--optim.lr=2e-3", "--checkpoint.every=4", "--eval.every=8", f"--run.dir={work / name}", ranks=4)


def metrics(work, name):
    lines = [json.loads(line) for line in (work / name / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("seconds", "tokens_per_second", "memory_bytes")} for line in lines]


@pytest.fixture(scope="module")
def adapter(work):
    """Of the run that was killed, all its processes at once, and resumed."""
    job = start(work, train(work, "run"))
    latest = work / "run/checkpoints/latest"
    wait_for(lambda: latest.exists() and latest.read_text() != "step-4\n", job)
    kill_all(work)
    end_of(job)
    assert not (work / "run/adapter").exists()
    done = end_of(start(work, train(work, "run")))
    assert done.returncode == 0 and f"going on from {work}/run/checkpoints/step-" in done.stderr, done.stderr
    return work / "run/adapter"


def test_the_killed_run_has_the_bits_of_one_that_never_stopped(work, adapter):
    done = end_of(start(work, train(work, "whole")))
    assert done.returncode == 0, done.stderr
    assert metrics(work, "run") == metrics(work, "whole")
    assert adapter.joinpath("adapter_model.safetensors").read_bytes() == (work / "whole/adapter/adapter_model.safetensors").read_bytes()
    losses = [line["loss"] for line in metrics(work, "run") if line["split"] == "eval"]
    assert len(losses) == 3 and losses[-1] < losses[0]


def evaluated(work, folder, *keys):
    done = succeed(work, "eval", *FIELDS, f"--model.path={folder}", f"--data.eval={work}/test.jsonl", "--model.dtype=float32", *keys)
    return json.loads(done.stdout)["loss"]


def loss_of(work, model):
    """Of the answers in test.jsonl, one record at a time; the tokens are those that `trireme tokenize` says are learnt."""
    with (work / "test.jsonl").open() as lines:
        told = end_of(start(work, command("tokenize", *FIELDS[:3], f"--model.path={work}/pretrained/model"), stdin=lines))
    total, count = 0.0, 0
    for line in map(json.loads, told.stdout.splitlines()):
        ids, learnt = torch.tensor(line["ids"]), torch.tensor(line["loss"], dtype=torch.bool)
        with torch.no_grad():
            logits = model(ids[None]).logits[0, :-1].double()
        total += torch.nn.functional.cross_entropy(logits[learnt[1:]], ids[1:][learnt[1:]], reduction="sum").item()
        count += learnt[1:].sum().item()
    assert count > 100
    return total / count


def in_four_bits(folder, adapter, **options):
    """Of transformers, bitsandbytes and PEFT, to be evaluated; but the layers are in train(): in eval() bitsandbytes' CPU code repacks weights."""
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu", **options)
    model = peft.PeftModel.from_pretrained(base, adapter).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.eval()
    return model


def test_transformers_and_peft_have_its_loss_over_four_bits(work, adapter):
    base = work / "pretrained/model"
    expected = evaluated(work, base, "--quant.base=nf4", f"--lora.path={adapter}")
    assert evaluated(work, base, "--quant.base=nf4") - expected > 0.05  # the adapter has learnt
    # bitsandbytes quantizes at load, by CPU code that gives one scale in 600 the next code: 6e-7 of the loss.
    options = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32)
    found = loss_of(work, in_four_bits(base, adapter, quantization_config=options))
    assert found == pytest.approx(expected, rel=bounds.CURVE_FP32)
    # The codes of `trireme quantize`; in float32, for bitsandbytes rounds the values to the dtype of the folder.
    succeed(work, "quantize", f"--model.path={base}", "--quant.base=nf4", "--model.dtype=float32", f"--run.dir={work}/nf4")
    found = loss_of(work, in_four_bits(work / "nf4", adapter))
    assert found == pytest.approx(expected, rel=bounds.LOSS_FP32)


def test_the_merged_model_has_its_loss(work, adapter):
    """In float32, which rounds nothing away, and as it goes out."""
    base = work / "pretrained/model"
    expected = evaluated(work, base, "--quant.base=nf4", f"--lora.path={adapter}")
    for dtype, bound in (("float32", bounds.LOSS_FP32), ("bfloat16", bounds.CURVE_BF16)):
        merged = work / f"merged_{dtype}"
        done = succeed(work, "export", f"--model.path={base}", f"--lora.path={adapter}", "--lora.merge=true", "--quant.base=nf4", f"--model.dtype={dtype}", f"--run.dir={merged}")
        assert "merged with what the quantized base stands for" in done.stderr
        found = loss_of(work, transformers.AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32))
        assert found == pytest.approx(evaluated(work, merged), rel=bounds.LOSS_FP32)
        assert found == pytest.approx(expected, rel=bound)
