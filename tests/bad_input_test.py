"""Bad input: one clear sentence, the right status, no stack trace."""
import json
import os
import pathlib
import shutil
import struct
import subprocess

import pytest
import torch
from safetensors.torch import save_file

SOURCE = pathlib.Path(os.environ.get("TRIREME_SOURCE", pathlib.Path(__file__).parent.parent))
BINARY = os.environ.get("TRIREME_BINARY", str(SOURCE / "build/release/trireme"))
TRAIN = SOURCE / "configs/quickstart/train.jsonl"


def refused(work, status, words, *keys, ranks=1, verb="train"):
    launch = [] if ranks == 1 else ["mpirun", "-q", "--bind-to", "none", "--oversubscribe", "-n", str(ranks)]
    run = subprocess.run(launch + [BINARY, verb, *map(str, keys)], cwd=SOURCE, capture_output=True, text=True, timeout=60,
                         env=dict(os.environ, TRIREME_CACHE=str(work / "cache"), OMP_NUM_THREADS="1", OMPI_ALLOW_RUN_AS_ROOT="1",
                                  OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1"))
    text = run.stdout + run.stderr
    assert words in text, text
    assert run.returncode == status, text
    assert "terminate called" not in text and "internal error" not in text and "Traceback" not in text, text
    assert text.count(words) == 1, text


@pytest.fixture
def model(tmp_path):
    """A folder with the quickstart's config and tokenizer and one tensor too few to be a model."""
    folder = tmp_path / "model"
    shutil.copytree(SOURCE / "configs/quickstart/model", folder)
    save_file({"model.norm.weight": torch.ones(192)}, folder / "model.safetensors")
    return folder


def keys(work, *more, data=TRAIN):
    return ("configs/quickstart.ini", f"--run.dir={work / 'run'}", f"--data.train={data}", "--train.steps=2", *more)


def with_model(work, model):
    ini = work / "bare.ini"
    ini.write_text("[train]\nsteps = 2\n")
    return (ini, f"--run.dir={work / 'run'}", f"--data.train={TRAIN}", f"--model.path={model}")


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("content, words", [
    ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n' * 6 + '{"messages": [\n', "data.jsonl:7"),
    ('{"colour": "red"}\n', "colour"),
    ("", "data.jsonl"),
    ('{"text": "\udcff"}\n', "invalid UTF-8"),
    ('{"text": "' + "x" * 11_000_000 + '"}\n', "data.jsonl:1"),
], ids=["line 7", "no field", "empty", "utf8", "10 MB line"])
def test_data_files(tmp_path, content, words, ranks):
    (tmp_path / "data.jsonl").write_bytes(content.encode("utf-8", "surrogateescape"))
    refused(tmp_path, 3, words, *keys(tmp_path, data=tmp_path / "data.jsonl"), ranks=ranks)


def test_missing_model_folder(tmp_path):
    refused(tmp_path, 3, "not/there", *with_model(tmp_path, "/not/there/at/all"))


def test_missing_tensors(tmp_path, model):
    refused(tmp_path, 3, "model.embed_tokens.weight", *with_model(tmp_path, model))


def test_truncated_safetensors(tmp_path, model):
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    refused(tmp_path, 3, "model.safetensors", *with_model(tmp_path, model))


def test_header_longer_than_the_file(tmp_path, model):
    (model / "model.safetensors").write_bytes(struct.pack("<Q", 1000) + b"{}")
    refused(tmp_path, 3, "model.safetensors", *with_model(tmp_path, model))


@pytest.mark.parametrize("change, words", [
    ({"model_type": "gpt_neox"}, 'model_type "gpt_neox" is not supported; supported are llama'),
    ({"num_key_value_heads": 4}, "num_attention_heads 6 is no multiple of num_key_value_heads 4"),
    ({"vocab_size": 100}, "ids, but the embedding of the model"),
    ({"hidden_size": -1}, '"hidden_size" is -1'),
], ids=["family", "heads", "vocabulary", "size"])
def test_config_json(tmp_path, model, change, words):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | change))
    refused(tmp_path, 3, words, *with_model(tmp_path, model))


def test_unknown_tokenizer_component(tmp_path, model):
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Rot13"}
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused(tmp_path, 3, 'the normalizer "Rot13" is not supported', *with_model(tmp_path, model))


def test_template_that_raises(tmp_path):
    (tmp_path / "t.jinja").write_text("{{ raise_exception('no such role') }}")
    refused(tmp_path, 3, "no such role", *keys(tmp_path, f"--data.chat_template={tmp_path / 't.jinja'}"))


@pytest.mark.parametrize("key, words", [
    ("--optim.lrr=1", "unknown key optim.lrr; did you mean optim.lr?"),
    ("--train.epochs=3", "train.steps and train.epochs are both set; set one"),
    ("--lora.alpha=3", "lora.alpha is set, but lora.rank is 0"),
    ("--train.micro_batch_size=1000000", "of memory"),
    ("--run.dir=README.md/run", "README.md/run"),
], ids=["unknown", "conflict", "lora", "memory", "unwritable"])
def test_keys(tmp_path, key, words):
    status = 1 if "README" in key else 2
    given = [k for k in keys(tmp_path) if not (str(k).startswith("--run.dir") and "run.dir" in key)]
    refused(tmp_path, status, words, *given, key)


def test_errors_are_said_once_on_several_ranks(tmp_path):
    refused(tmp_path, 2, "unknown key optim.lrr; did you mean optim.lr?", *keys(tmp_path, "--optim.lrr=1"), ranks=2)
