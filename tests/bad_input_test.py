"""Bad input: one clear sentence and the right status on every rank, nothing lost, every rank ended, no stack trace."""
import hashlib
import json
import os
import pathlib
import re
import resource
import shutil
import signal
import struct
import subprocess
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from program import RUN_LOCAL, SOURCE, TRACES, TRAIN, assert_all_ended, command, end_of, environment, override, ranks_of, run, small_run, start, wait_for

QUICKSTART = SOURCE / "configs/quickstart/model"


def contents(work):
    """Every file of the work folder by its hash, but those that a refused run may add lines to."""
    return {path: hashlib.sha256(path.read_bytes()).digest() for path in work.rglob("*")
            if path.is_file() and path.name not in ("log.txt", "run.lock") and work / "cache" not in path.parents}


def check_refusal(work, done, status, sentence, started=False):
    text = done.stdout + done.stderr
    assert text.count("error: ") == 1, text
    said = text.split("error: ")[1].rstrip("\n")
    if isinstance(sentence, re.Pattern):
        assert sentence.fullmatch(said), said
    else:
        assert said == sentence, text
    assert done.returncode == status, text
    assert not any(trace in text for trace in TRACES), text
    assert started or "step 1/" not in text, "it was not said before the first step"
    assert_all_ended(work, done)


def refused(work, status, sentence, *keys, ranks=1, verb="train"):
    before = contents(work)
    done = run(work, verb, *keys, ranks=ranks)
    check_refusal(work, done, status, sentence)
    after = contents(work)
    assert {path: after.get(path) for path in before} == before, "a file was changed or lost"


# --- data files


@pytest.mark.parametrize("content, sentence, ranks", [
    ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n' * 6 + '{"messages": [\n', "DATA:7: not valid JSON at byte 15: syntax error while parsing value - unexpected end of input; expected '[', '{', or a literal", 2),
    ('{"messages": "hello"}\n', "DATA:1: field 'messages' is a string; it must be a list", 1),
    ('{"messages": [{"role": "user", "content": 5}]}\n', "DATA:1: messages[0]: field 'content' is a number; it must be a string", 1),
    ('{"prompt": 5, "completion": "a"}\n', "DATA:1: field 'prompt' is a number; it must be a string", 1),
    ('[1, 2]\n', "DATA:1: a record must be an object, this is a number", 1),
    ('{"colour": "red"}\n', "DATA:1: no usable field; fields found: 'colour'; accepted are \"messages\" (a list of {role, content}), \"conversations\" "
     "(a list of {from, value}), \"prompt\" and \"completion\", \"instruction\" and \"output\", \"text\"; or name the fields with "
     "data.prompt_field and data.completion_field, or data.text_field", 1),
    ('{"text": "good"}\n{"text": "a"}\0more {{{\n', "DATA:2: not valid JSON at byte 14: a NUL byte", 1),
    ("", "data file 'DATA' is empty", 1),
    ("\n \n", "data file 'DATA' holds no record, only blank lines", 1),
    ('{"text": "good"}\n{"text": "\udcff"}\n', "DATA:2: invalid UTF-8 (byte 0xff at position 11); convert the file, for example with iconv -f LATIN1 -t UTF-8", 1),
    ('{"text": "' + "x" * 11_000_000 + '"}\n', "DATA:1: a record of more than 10 MB; split it, or is this one JSON value over many records? One record a line, or a JSON "
     "array of records", 1),
], ids=["line 7", "messages", "content", "prompt", "array", "no field", "nul", "empty", "blank", "utf8", "10 MB line"])
def test_data_files(tmp_path, content, sentence, ranks):
    data = tmp_path / "data.jsonl"
    data.write_bytes(content.encode("utf-8", "surrogateescape"))
    refused(tmp_path, 3, sentence.replace("DATA", str(data)), "configs/quickstart.ini", f"--run.dir={tmp_path / 'run'}",
            f"--data.train={data}", ranks=ranks)


def test_a_line_of_10_mb_is_read(tmp_path):
    (tmp_path / "data.jsonl").write_text('{"text": "' + "a word " * 1_490_000 + '"}\n')
    assert run(tmp_path, "train", "configs/quickstart.ini", f"--data.train={tmp_path / 'data.jsonl'}", f"--run.dir={tmp_path / 'run'}",
               "--dry-run").returncode == 0


# --- model folders


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of the quickstart's model, whose model folder is whole."""
    work = tmp_path_factory.mktemp("trained")
    assert run(work, "train", *small_run(work)).returncode == 0
    return work / "run"


@pytest.fixture
def model(tmp_path, trained):
    return pathlib.Path(shutil.copytree(trained / "model", tmp_path / "model"))


def with_model(work, model, *more):
    ini = work / "bare.ini"
    ini.write_text("[train]\nsteps = 2\n")
    return (ini, f"--run.dir={work / 'run'}", f"--data.train={TRAIN}:20", f"--model.path={model}", *more)


def edit_header(file, edit):
    data = file.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8:8 + size])
    edit(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size:])


def edit_tensors(file, edit):
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)


def begin_with_the_first(header):
    header["model.norm.weight"]["data_offsets"] = [0, 768]


def move_the_last(header):
    last = max(header, key=lambda name: header[name].get("data_offsets", [0])[0])
    header[last]["data_offsets"] = [at + 10**12 for at in header[last]["data_offsets"]]


@pytest.mark.parametrize("change, sentence", [
    (lambda f: f.write_bytes(f.read_bytes()[:-4]), "MODEL/model.safetensors: cut short: tensor 'model.norm.weight' ends at 7183104, but only 7183100 bytes of values are there. "
     "Download or copy it again."),
    (lambda f: f.write_text("<!DOCTYPE html><html><body>Sign in</body></html>"), "MODEL/model.safetensors: not a safetensors file but a web page (HTML), as a server "
     "sends one that asks to log in or reports an error; download the file again"),
    (lambda f: f.write_bytes(struct.pack("<Q", 1000) + b"{}"), "MODEL/model.safetensors: cut short: the header has 1000 bytes, but the file ends after 2 of them. Download or copy it again."),
    (lambda f: edit_header(f, begin_with_the_first), "MODEL/model.safetensors: tensor 'model.embed_tokens.weight' begins at 0, but the tensor before it ends at 768: they overlap."),
    (lambda f: edit_header(f, move_the_last), "MODEL/model.safetensors: tensor 'model.norm.weight' begins at 1000007182336, but the tensor before it ends at 7182336: there "
     "is a hole."),
    (lambda f: edit_tensors(f, lambda t: t.update({"model.norm.weight": torch.ones(7)})), "MODEL: the tensors are not those of the model that config.json describes. Of another shape (1): model.norm.weight is [7] in "
     "the file, but the model's is [192]."),
    (lambda f: edit_tensors(f, lambda t: t.update({"model.layers.9.mlp.up_proj.weight": torch.ones(7)})), "MODEL: the tensors are not those of the model that config.json describes. Not part of the model (1): "
     "model.layers.9.mlp.up_proj.weight."),
    (lambda f: edit_tensors(f, lambda t: t.pop("model.norm.weight")), "MODEL: the tensors are not those of the model that config.json describes. Missing (1): model.norm.weight."),
    (lambda f: f.unlink(), "MODEL has neither model.safetensors nor model.safetensors.index.json."),
], ids=["truncated", "web page", "header", "overlapping", "out of range", "shape", "surplus", "missing", "no file"])
def test_safetensors(tmp_path, model, change, sentence):
    change(model / "model.safetensors")
    refused(tmp_path, 3, sentence.replace("MODEL", str(model)), *with_model(tmp_path, model))


def test_missing_model_folder(tmp_path):
    refused(tmp_path, 3, "model.path=/not/there/at/all does not exist: name a Hugging Face model folder, or a hub name (org/name) that is in its cache", *with_model(tmp_path, "/not/there/at/all"), ranks=2)


def test_empty_model_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    refused(tmp_path, 3, f"model folder {tmp_path}/empty is empty; model.path wants a Hugging Face model folder",
            *with_model(tmp_path, tmp_path / "empty"))


@pytest.mark.parametrize("change, sentence", [
    ({"model_type": "gpt_neox"}, 'MODEL/config.json: model_type "gpt_neox" is not supported; supported are llama, mistral, qwen2, qwen3, smollm3 (SmolLM and '
     'SmolLM2 are llama)'),
    ({"num_key_value_heads": 4}, "MODEL/config.json: num_attention_heads 6 is no multiple of num_key_value_heads 4"),
    ({"vocab_size": 100}, "MODEL/tokenizer.json: the vocabulary has 1146 ids, but the embedding of the model (MODEL/config.json) has vocab_size 100; use "
     "the model's own tokenizer"),
    ({"hidden_size": -1}, 'MODEL/config.json: "hidden_size" is -1; allowed are 1 to 1048576'),
    ({"hidden_size": "big"}, 'MODEL/config.json: "hidden_size" must be an integer, found "big"'),
    ({"eos_token_id": [2, 1152]}, "MODEL/config.json: eos_token_id 1152 is not below vocab_size 1152; a text would never end"),
], ids=["family", "heads", "vocabulary", "size", "type", "end"])
def test_config_json(tmp_path, model, change, sentence):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | change))
    refused(tmp_path, 3, sentence.replace("MODEL", str(model)), *with_model(tmp_path, model))


def test_unknown_tokenizer_component(tmp_path, model):
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Rot13"}
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused(tmp_path, 3, f'{model}/tokenizer.json: the normalizer "Rot13" is not supported', *with_model(tmp_path, model))


# --- chat templates


@pytest.mark.parametrize("template, sentence", [
    ("{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
     r"the template ran for more than 10\d{5} steps and was stopped"),
    ("{% set s = 'a' * 10000000 %}{% for a in range(100000) %}{% if s|length == 3 %}{% endif %}{% endfor %}",
     r"the template ran for more than 10\d{5} steps and was stopped"),
    ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "the template nests or recurses deeper than 1000 levels"),
    ("{{ raise_exception('no such role') }}", "no such role"),
], ids=["loops", "loops over a long text", "recurses", "raises"])
def test_template(tmp_path, template, sentence):
    (tmp_path / "t.jinja").write_text(template)
    refused(tmp_path, 3, re.compile(re.escape(f"{TRAIN}:1: {tmp_path}/t.jinja line 1: ") + sentence),
            *small_run(tmp_path, "run", f"--data.chat_template={tmp_path / 't.jinja'}"))


def test_a_message_without_text_that_the_template_does_not_take(tmp_path):
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}
    data = tmp_path / "calls.jsonl"
    data.write_text("".join(json.dumps({"messages": [{"role": "user", "content": "Hi"}, answer]}) + "\n" for answer in
                            ({"role": "assistant", "content": "Hello"}, call)))
    refused(tmp_path, 3, f"{data}:2: configs/quickstart/model/tokenizer_config.json:chat_template line 2: can only concatenate str (not \"NoneType\") to str; "
            "messages[1] has 'content' null: write \"content\": \"\" where the template wants a text",
            *small_run(tmp_path, "run", f"--data.train={data}"))


# --- configuration


@pytest.mark.parametrize("keys, sentence", [
    (["--optim.lrr=1"], "unknown key optim.lrr; did you mean optim.lr?; trireme VERB --help lists all keys"),
    (["--train.epochs=3", "--lora.alpha=3", "--data.eval_fraction=0.5", f"--model.path={QUICKSTART}"], "model.path and model.config are both set: set model.path to a Hugging Face folder, or model.config to a config.json for random "
     "weights\ntrain.steps and train.epochs are both set; set one, and the other to 0 where a file sets it\nlora.alpha is set, but lora.rank is 0: set lora.rank, or leave lora.alpha "
     "out\ndata.eval and data.eval_fraction are both set; set one"),
    (["--train.epochs=3", "--optim.lrr=1", "--task.kind=sfd"], "unknown key optim.lrr; did you mean optim.lr?; trireme VERB --help lists all keys\ntask.kind=sfd: allowed are sft, pretrain; did "
     "you mean sft?\ntrain.steps and train.epochs are both set; set one, and the other to 0 where a file sets it"),
    (["--lora.path=x", "--lora.rank=3", "--lora.dropout=0.5"], "lora.dropout and lora.path are both set: the adapter of lora.path brings its own; leave lora.dropout out\nlora.rank and lora.path "
     "are both set: the adapter of lora.path has a rank; set one\nlora.path=x is no PEFT adapter: there is no adapter_config.json in it"),
    (["--eval.metric=foo", "--parallel.data=3", "--data.train=no.jsonl:5"], "eval.metric=foo: this task has loss, perplexity, token_accuracy\n"
     "parallel.data=3 x parallel.tensor=1 x parallel.pipeline=1 is 3, but there are 2 ranks: start 3 (mpirun -n 3 ...), or take one of these meshes: "
     "data 2 x tensor 1 x pipeline 1, data 1 x tensor 1 x pipeline 2, data 1 x tensor 2 x pipeline 1\ndata file 'no.jsonl' cannot be opened: No such file or directory"),
], ids=["unknown", "conflicts", "all together", "lora", "ranks and files"])
def test_keys(tmp_path, keys, sentence):
    refused(tmp_path, 2, sentence, *small_run(tmp_path, "run", *keys), ranks=2 if "parallel.data" in sentence or len(keys) == 1 else 1)
    assert not (tmp_path / "run").exists()


def test_a_comma_in_the_name_of_a_file(tmp_path):
    data = tmp_path / "a, b.jsonl"
    data.write_text("".join(TRAIN.read_text().splitlines(True)[:40]))
    says = "data.train names 2 files, for a comma separates them (\"\\,\" is one within a name): '{}' does not exist"
    refused(tmp_path, 3, "\n".join(says.format(name) for name in (f"{tmp_path}/a", "b.jsonl")), *small_run(tmp_path, "run", f"--data.train={data}"))
    escaped = str(data).replace(",", "\\,")
    assert run(tmp_path, "train", *small_run(tmp_path, "run", f"--data.train={escaped}"), "--dry-run").returncode == 0


def test_files_that_are_not_there(tmp_path):
    """All of them at once, before there is a run folder."""
    missing = "No such file or directory"
    refused(tmp_path, 3, f"cannot open /no/config.json: {missing}\nmodel.tokenizer=/no/tokenizer does not exist: name a folder with a tokenizer.json, or a hub name (org/name) that is in its cache\nlora.path=/no/adapter is no PEFT "
            "adapter: there is no adapter_config.json in it\ndata file '/no/train.jsonl' cannot be opened: "
            f"{missing}\ndata file '/no/eval.jsonl' cannot be opened: {missing}",
            *small_run(tmp_path, "run", "--model.config=/no/config.json", "--model.tokenizer=/no/tokenizer", "--lora.path=/no/adapter",
                       "--data.train=/no/train.jsonl:5", "--data.eval=/no/eval.jsonl"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("keys", [["--train.micro_batch_size=1000000"], ["--data.max_length=1000000", "--train.micro_batch_size=1000"]],
                         ids=["batch", "length"])
def test_what_cannot_fit_memory(tmp_path, keys):
    shutil.copytree(QUICKSTART, tmp_path / "long")
    config = json.loads((tmp_path / "long/config.json").read_text())
    (tmp_path / "long/config.json").write_text(json.dumps(config | {"max_position_embeddings": 1_000_000}))
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": "a word " * 50_000}) + "\n")
    amount = r"\d+\.\d\d GiB"
    refused(tmp_path, 2, re.compile(
        rf"the run needs about {amount} of memory \(1 rank of {amount}, of which activations {amount}\), but this host has {amount} "
        r"free: lower train\.micro_batch_size or data\.max_length, set train\.recompute=full, lora\.rank or train\.dtype=bfloat16, "
        r"set checkpoint\.async=false, or start fewer ranks"), "configs/quickstart.ini", f"--run.dir={tmp_path / 'run'}", f"--data.train={tmp_path / 'long.jsonl'}",
            f"--model.config={tmp_path / 'long/config.json'}", *keys)


# --- the run folder


def test_unwritable_run_folder(tmp_path):
    (tmp_path / "file").write_text("")
    refused(tmp_path, 1, f"cannot create the run folder {tmp_path}/file/run: Not a directory; set run.dir to a folder that can be written",
            *small_run(tmp_path, "file/run"), ranks=2)


def test_run_folder_without_permission(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    (tmp_path / "shut").mkdir(mode=0o500)
    refused(tmp_path, 1, f"cannot create the run folder {tmp_path}/shut/run: Permission denied; set run.dir to a folder that can be written",
            *small_run(tmp_path, "shut/run"))


@pytest.mark.parametrize("ranks", [1, 2])
def test_full_run_folder(tmp_path, ranks):
    """A disk that takes one checkpoint and no second; without root: files that may not grow beyond 1 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    limit = None
    if os.geteuid() == 0 and subprocess.run(["mount", "-t", "tmpfs", "-o", "size=30m", "tmpfs", disk], capture_output=True).returncode == 0:
        sentence = (r"checkpoint of step 4 was not saved; the earlier ones are untouched: cannot write FOLDER/step-4\.tmp/shard-0000\d\.h5: "
                    r"No space left on device \(\d+ bytes needed so far\)\. Once that is mended, the same command goes on\.")
    elif ranks > 1:
        pytest.skip("a small disk needs root, and mpirun itself does not start where files may not grow")
    else:
        limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        sentence = (r"checkpoint of step 2 was not saved; the earlier ones are untouched: cannot write FOLDER/step-2\.tmp/shard-0000\d\.h5: "
                    r"File too large \(\d+ bytes needed so far\)\. Once that is mended, the same command goes on\.")
    try:
        folder = disk / "run/checkpoints"
        done = end_of(start(tmp_path, command("train", *small_run(tmp_path, "disk/run", "--checkpoint.async=false"), ranks=ranks),
                            preexec_fn=limit))
        text = done.stdout + done.stderr
        said = text.split("error: ")
        assert len(said) == 2 and re.fullmatch(sentence.replace("FOLDER", re.escape(str(folder))), said[1].rstrip("\n")), text
        assert done.returncode == 1
        assert not any(trace in text for trace in TRACES), text
        assert_all_ended(tmp_path, done)
        assert [path.name for path in folder.iterdir() if path.suffix == ".tmp"] == []
        if limit is None:  # with room again it goes on from the checkpoint that it has
            subprocess.run(["mount", "-o", "remount,size=200m", disk], check=True)
            again = run(tmp_path, "train", *small_run(tmp_path, "disk/run"), ranks=ranks)
            assert again.returncode == 0, again.stderr
            assert f"going on from {folder}/step-2, step 2 of 4" in again.stderr
    finally:
        subprocess.run(["umount", "-l", disk], capture_output=True)


def test_a_disk_that_fills_up_between_two_steps(tmp_path):
    """Rank 0 alone cannot write its line of metrics.jsonl."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=50m", "tmpfs", disk], capture_output=True).returncode != 0:
        pytest.skip("only root may mount a small disk")
    try:
        keys = small_run(tmp_path, "disk/run", "--train.steps=1000000", "--schedule.kind=constant", "--eval.every=0")
        metrics, fill = disk / "run/metrics.jsonl", disk / "fill"
        assert run(tmp_path, "train", *keys, "--train.stop_after=2", ranks=2).returncode == 75
        job = start(tmp_path, command("train", *keys, ranks=2))
        wait_for(lambda: metrics.read_text().count("\n") > 4, job)
        subprocess.run(["dd", "if=/dev/zero", f"of={fill}", "bs=4k"], capture_output=True)
        check_refusal(tmp_path, end_of(job), 1, f"cannot write {metrics}: No space left on device", started=True)
        fill.unlink()
        again = run(tmp_path, "train", *keys, "--train.stop_after=1", ranks=2)
        assert again.returncode == 75 and f"going on from {disk}/run/checkpoints/step-2" in again.stderr, again.stderr
        assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == [1, 2, 3]
    finally:
        subprocess.run(["umount", "-l", disk], capture_output=True)


def test_a_product_that_cannot_be_written(tmp_path):
    """The run is saved all the same, and the same command ends it."""
    keys = small_run(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.lock").touch()
    (tmp_path / "run/model").write_text("a file")
    check_refusal(tmp_path, run(tmp_path, "train", *keys, ranks=2), 1, f"cannot create {tmp_path}/run/model: Not a directory.", started=True)
    (tmp_path / "run/model").unlink()
    again = run(tmp_path, "train", *keys, ranks=2)
    assert again.returncode == 0 and f"going on from {tmp_path}/run/checkpoints/step-4, step 4 of 4" in again.stderr, again.stderr
    assert (tmp_path / "run/model/model.safetensors").exists()


def test_a_second_run_on_the_folder_of_a_living_one(tmp_path):
    keys = small_run(tmp_path, "run", "--train.steps=1000000", "--eval.every=0")
    first = subprocess.Popen(command("train", *keys), cwd=SOURCE, env=environment(tmp_path), stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: (tmp_path / "run/metrics.jsonl").exists(), first)
        second = run(tmp_path, "train", *keys, TRIREME_CACHE=str(tmp_path / "cache-2"))
        check_refusal(tmp_path / "cache-2", second, 2,
                      f"run folder {tmp_path}/run is in use by process {first.pid} on {os.uname().nodename}. Wait for it or end it, or "
                      "name another folder with run.dir.")
        assert first.poll() is None
        first.send_signal(signal.SIGTERM)
        assert first.wait(60) == 75
    finally:
        first.kill()
    steps = [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1))
    assert (tmp_path / "run/checkpoints" / f"step-{steps[-1]}").is_dir()


MAY_CHANGE = ("\nSet these back, or start a new run with another run.dir. On a run that goes on, train.steps and train.epochs may grow; the keys of parallel, "
              "checkpoint, eval, comm and log, run.device, model.embedding, optim.offload, optim.paged, train.recompute, train.offload_activations, train.mlp_tokens and train.threads may change, and "
              "train.micro_batch_size and train.accumulation where a step keeps its rows.")


def test_resume_with_another_model_or_data(tmp_path):
    keys = small_run(tmp_path)
    assert run(tmp_path, "train", *keys, "--train.stop_after=2").returncode == 75
    folder = tmp_path / "run/checkpoints/step-2"
    other = tmp_path / "other"
    shutil.copytree(QUICKSTART, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rope_theta": 500.0}))
    begin = f"cannot go on from {folder}, it belongs to another run:"
    was = f"{config['rope_theta']}" if "rope_theta" in config else "absent"
    refused(tmp_path, 2, f"{begin}\n  optim.lr: 0.002 then, 0.5 now\n  config.json rope_theta: {was} then, 500.0 now{MAY_CHANGE}",
            *keys, f"--model.config={other / 'config.json'}", "--optim.lr=0.5", ranks=2)
    fewer = small_run(tmp_path, records=39)
    refused(tmp_path, 2, f"{begin}\n  data: 40 records, 1104 tokens of {TRAIN}:40 then, 39 records, 1075 tokens of {TRAIN}:39 now; "
                         f"the content differs{MAY_CHANGE}", *fewer)
    assert run(tmp_path, "train", *keys).returncode == 0


def test_resume_on_ranks_that_cannot_share_out_the_rows(tmp_path):
    """The way out that is named is one."""
    begin = f"cannot go on from {tmp_path}/run/checkpoints/step-2: its steps have"
    keys = small_run(tmp_path, "run", "--train.micro_batch_size=2", "--train.accumulation=3")
    assert run(tmp_path, "train", *keys, "--train.stop_after=2").returncode == 75
    refused(tmp_path, 2, f"{begin} 6 rows, which 4 copies of the model with train.micro_batch_size=2 cannot share out evenly; take a number of copies "
                         "(parallel.data) that divides 3", *keys, ranks=4)
    refused(tmp_path, 2, f"{begin} 6 rows, which 2 copies of the model with train.micro_batch_size=2 cannot share out evenly; set train.micro_batch_size=1, "
                         "or take a number of copies (parallel.data) that divides 3", *keys, ranks=2)
    shutil.rmtree(tmp_path / "run")
    keys = small_run(tmp_path, "run", "--train.micro_batch_size=4")
    assert run(tmp_path, "train", *keys, "--train.stop_after=2").returncode == 75
    refused(tmp_path, 2, f"{begin} 4 rows, which 2 copies of the model with train.micro_batch_size=4 cannot share out evenly; set "
                         "train.micro_batch_size=2, or take a number of copies (parallel.data) that divides 1", *keys, ranks=2)
    assert run(tmp_path, "train", *override(keys, ["--train.micro_batch_size=2"]), ranks=2).returncode == 0


def test_resume_with_other_weights(tmp_path, model):
    keys = with_model(tmp_path, model)
    assert run(tmp_path, "train", *keys, "--train.stop_after=1").returncode == 75
    weights = model / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-2] ^= 1  # one bit of the last weight; names, shapes and the file's size stay
    with open(weights, "r+b") as file:
        file.write(data)
    refused(tmp_path, 2, f"cannot go on from {tmp_path}/run/checkpoints/step-1, it belongs to another run:\n  weights: {model} then, {model} "
                         "now; the content differs" + MAY_CHANGE, *keys)


def test_a_rank_that_is_killed(tmp_path):
    keys = small_run(tmp_path, "run", "--checkpoint.every=1", "--train.steps=1000000", "--eval.every=0")
    job = start(tmp_path, [RUN_LOCAL, "-n", "2", "train", *keys])
    wait_for(lambda: (tmp_path / "run/checkpoints/latest").exists(), job)
    killed = time.monotonic()
    os.kill(ranks_of(tmp_path)[1], signal.SIGKILL)
    done = end_of(job, killed)
    assert done.returncode == 1, done.stderr
    assert done.stderr.endswith("run_local: a rank was killed (SIGKILL), all ranks are ended; run the same command again to go on from the "
                                "last checkpoint\n"), done.stderr
    assert_all_ended(tmp_path, done)
    done = end_of(start(tmp_path, [RUN_LOCAL, "-n", "2", "train", *keys, "--train.stop_after=1"]))
    assert done.returncode == 75, done.stderr
    saved = int(re.search(r"going on from .*/step-(\d+), step", done.stderr)[1])
    steps = [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, saved + 2))
