"""The configuration from outside: what is printed reads back; every configs/*.ini passes its dry run; plan and doctor tell the truth."""
import json
import os
import pathlib
import re
import shutil
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from program import SOURCE, TRAIN, assert_all_ended, override, run, small_run

DATA = os.environ.get("TRIREME_TEST_DATA")


def test_printed_configuration_reads_back_to_itself(tmp_path):
    keys = ["--optim.lr=0.1234567890123456789", "--data.train=a b.jsonl,c\\,d.jsonl:7", '--data.template_args={"x": "# \\" é"}',
            "--generate.stop=\n", "--generate.system= # ", "--data.separator=  ", "--run.seed=9000000000000000000", "--eval.every=0.3333333333333333", "--model.path=x"]
    first = run(tmp_path, "train", *keys, "--print-config")
    assert first.returncode == 0 and first.stderr == ""
    (tmp_path / "printed.ini").write_text(first.stdout)
    second = run(tmp_path, "train", tmp_path / "printed.ini", "--print-config")
    assert second.stdout == first.stdout and second.returncode == 0
    assert "lr = 0.12345678901234568\n" in first.stdout and 'system = " # "\n' in first.stdout


def test_the_configuration_of_a_run_folder_starts_that_run(tmp_path):
    assert run(tmp_path, "train", *small_run(tmp_path, "run", "--train.stop_after=1")).returncode == 75
    again = run(tmp_path, "train", tmp_path / "run/config.ini", "--train.stop_after=0")
    assert again.returncode == 0, again.stderr
    assert f"going on from {tmp_path}/run/checkpoints/step-1, step 1 of 4" in again.stderr


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    work = tmp_path_factory.mktemp("model")
    assert run(work, "train", *small_run(work)).returncode == 0
    config = json.loads((work / "run/model/config.json").read_text())
    (work / "run/model/config.json").write_text(json.dumps(config | {"max_position_embeddings": 2048}))
    return work / "run/model"


@pytest.mark.parametrize("name", sorted(path.name for path in (SOURCE / "configs").glob("*.ini")))
def test_shipped_configurations_pass_their_dry_run(tmp_path, small_model, name):
    """What their first comment tells to give is given: our data, the quickstart's tokenizer and model."""
    file = SOURCE / "configs" / name
    text, keys = file.read_text(), [f"--run.dir={tmp_path / 'run'}"]
    if "--model.path=" in text: keys.append(f"--model.path={small_model}")
    if "--model.tokenizer=" in text: keys.append(f"--model.tokenizer={small_model}")
    of_gsm8k = "--data.train=gsm8k" in text
    ranks = int(found[1]) if (found := re.search(r"^#.*mpirun -n (\d+)", text, re.M)) else 1
    if "--data.train=" in text and not of_gsm8k: keys.append(f"--data.train={TRAIN}")
    if of_gsm8k:
        if not DATA or not pathlib.Path(DATA, "gsm8k/train.jsonl").exists():
            pytest.skip("TRIREME_TEST_DATA has no gsm8k")
        keys.append(f"--data.train={DATA}/gsm8k/train.jsonl:500")
    done = run(tmp_path, "train", file, *keys, "--dry-run", ranks=ranks)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^plan: [\d.]+ [kMB] parameters, [\d.]+ [kMB] trained; [1-9]\d* steps? of [1-9]\d* rows?", done.stderr, re.M), done.stderr
    assert not (tmp_path / "run").exists()
    assert run(tmp_path, "train", file, *keys, "--dry-run", "--train.colour=red", ranks=ranks).returncode == 2


def test_pretraining_learns_every_token(tmp_path):
    keys = small_run(tmp_path, "run", "--data.eval=", "--eval.every=0", "--dry-run")
    learnt = {}
    for kind in ("sft", "pretrain"):
        text = run(tmp_path, "train", *keys, f"--task.kind={kind}").stderr
        learnt[kind] = [int(number) for number in re.search(r"(\d+) samples in \d+ rows, (\d+) tokens, (\d+) learnt", text).groups()]
    samples, tokens, some = learnt["sft"]
    assert learnt["pretrain"] == [samples, tokens, tokens - samples] and some < tokens - samples  # the first token has none before it


def test_a_step_of_more_rows_than_there_are_is_said(tmp_path):
    said = lambda records: run(tmp_path, "plan", *small_run(tmp_path, "run", "--train.micro_batch_size=8", records=records)).stderr
    assert ("warning: a step takes 8 rows, but the training data has 5: each is learnt more than once a step; lower train.accumulation or "
            "train.micro_batch_size\n") in said(5)
    assert "warning" not in said(8)


# --- the dry run checks all that the run would


def test_the_dry_run_looks_at_the_run_folder_and_its_checkpoint(tmp_path):
    """And changes nothing there."""
    assert run(tmp_path, "train", *small_run(tmp_path, "run", "--train.stop_after=2")).returncode == 75
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    dry = lambda *keys: run(tmp_path, "train", *override(small_run(tmp_path, "run", "--dry-run"), keys))
    assert f"going on from {tmp_path}/run/checkpoints/step-2, step 2 of 4\n" in dry().stderr
    for keys, status, words in [(["--optim.lr=5"], 2, "\n  optim.lr: 0.002 then, 5 now\n"),
                                (["--run.resume=never"], 2, " holds a run and run.resume is never; set another run.dir\n"),
                                (["--run.resume=nosuch"], 2, "error: run.resume=nosuch is not there: allowed are auto, never, "),
                                ([f"--run.dir={TRAIN}/x"], 1, f"error: cannot create the run folder {TRAIN}/x: Not a directory; ")]:
        done = dry(*keys)
        assert done.returncode == status and words in done.stderr, done.stderr
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}


def broken_models(small_model, folder):
    """Folders that only reading all headers and names tells from good ones, with the sentence for each."""
    weights = load_file(small_model / "model.safetensors")
    for name, change in {"missing": lambda t: t.pop("model.norm.weight"), "shape": lambda t: t.update({"model.norm.weight": torch.ones(7)})}.items():
        shutil.copytree(small_model, folder / name)
        tensors = dict(weights)
        change(tensors)
        save_file(tensors, folder / name / "model.safetensors")


@pytest.mark.parametrize("verb, more", [("train", ["--dry-run"]), ("plan", []), ("train", [])], ids=["dry run", "plan", "run"])
def test_the_dry_run_refuses_what_the_run_refuses(tmp_path, small_model, verb, more):
    ini = tmp_path / "bare.ini"
    ini.write_text("[train]\nsteps = 2\n")
    broken_models(small_model, tmp_path)
    adapter = tmp_path / "adapter"
    assert run(tmp_path, "train", *small_run(tmp_path, "lora", "--lora.rank=4", "--lora.targets=q_proj")).returncode == 0
    shutil.move(tmp_path / "lora/adapter", adapter)
    shutil.copytree(adapter, tmp_path / "cut")
    tensors = load_file(tmp_path / "cut/adapter_model.safetensors")
    name = sorted(tensors)[0]
    save_file(tensors | {name: torch.ones(1, 2)}, tmp_path / "cut/adapter_model.safetensors")
    shutil.copytree(adapter, tmp_path / "qalora")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (tmp_path / "qalora/adapter_config.json").write_text(json.dumps(config | {"use_qalora": True}))
    describes = "the tensors are not those of the model that config.json describes."
    for model, keys, status, sentence in [
        ("missing", [], 3, f"{tmp_path}/missing: {describes} Missing (1): model.norm.weight."),
        ("shape", [], 3, f"{tmp_path}/shape: {describes} Of another shape (1): model.norm.weight is [7] in the file, but the model's is [192]."),
        (None, ["--lora.rank=4", "--lora.targets=nonsense"], 2, "lora.targets=nonsense: no linear layer has this name; there are down_proj, "
                                                                  "gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj, or all-linear"),
        (None, ["--lora.path=/nowhere"], 3, "lora.path=/nowhere is no PEFT adapter: there is no adapter_config.json in it"),
        (None, [f"--lora.path={tmp_path / 'cut'}"], 3, f"{tmp_path}/cut: {describes} Of another shape (1): {name} is [1, 2] in the file, but the "
                                                  "model's is [4, 192]."),
        (None, [f"--lora.path={tmp_path / 'qalora'}"], 3, f"{tmp_path}/qalora/adapter_config.json: 'use_qalora' is true, which is not supported. Retrain the "
                                                   "adapter without it, or merge it into its base model with PEFT (merge_and_unload)."),
        (None, [f"--lora.path={adapter}", "--lora.rank=4"], 2, "lora.rank and lora.path are both set: the adapter of lora.path has a rank; set one"),
    ]:
        done = run(tmp_path, verb, ini, f"--run.dir={tmp_path / 'run'}", f"--data.train={TRAIN}:20",
                   f"--model.path={tmp_path / model if model else small_model}", *keys, *more)
        assert done.stderr.split("error: ")[-1] == sentence + "\n", done.stderr
        assert done.returncode == status
        assert "training data" not in done.stderr, "it was said after the data was tokenised"
        assert not (tmp_path / "run").exists()


# --- the plan


@pytest.mark.parametrize("keys", [["--train.epochs=2"], ["--train.epochs=2", "--lora.rank=4", "--lora.targets=q_proj,layers.0.mlp.up_proj"],
                                  ["--train.epochs=1", "--lora.rank=2", "--lora.targets=.*\\.(k|v)_proj", "--train.accumulation=3"]],
                         ids=["full", "names", "expression"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_plan_is_what_the_run_then_holds(tmp_path, keys, ranks):
    full = len(keys) == 1
    keys = small_run(tmp_path, "run", *keys, "--train.steps=0", "--eval.every=0")
    said = run(tmp_path, "plan", *keys, ranks=ranks)
    assert said.returncode == 0, said.stderr
    done = run(tmp_path, "train", *keys, "--train.stop_after=1", ranks=ranks)
    assert done.returncode == 75
    *plan, fits = [line for line in said.stderr.splitlines() if line.startswith("plan: ")]
    assert fits.endswith(": it fits")
    assert plan == [line for line in done.stderr.splitlines() if line.startswith("plan: ")]
    parameters, trained, steps, rows, epoch_rows, epoch_steps = re.search(
        r"([\d.]+ \w) parameters, ([\d.]+ \w) trained; (\d+) steps of (\d+) rows \(about \d+ tokens\), (\d+) rows an epoch \((\d+) steps\)", plan[0]).groups()

    text = lambda count: f"{count / 1e6:.2f} M" if count >= 1e6 else f"{count / 1e3:.1f} k"
    manifest = json.loads((tmp_path / "run/checkpoints/step-1/manifest.json").read_text())
    held = {name: torch.Size(t["shape"]).numel() for name, t in manifest["tensors"].items()}
    trainable = sum(count for name, count in held.items() if name.startswith("model/"))
    config = json.loads((SOURCE / "configs/quickstart/model/config.json").read_text())
    width, layers = config["hidden_size"], config["num_hidden_layers"]
    head = config.get("head_dim") or width // config["num_attention_heads"]
    attention = 2 * width * head * (config["num_attention_heads"] + config["num_key_value_heads"])
    everything = config["vocab_size"] * width * (1 if config.get("tie_word_embeddings") else 2) + width + layers * (
        attention + 3 * width * config["intermediate_size"] + 2 * width)
    assert (parameters, trained) == (text(everything), text(trainable))
    assert full == (trainable == everything)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    state = manifest["state"]
    assert (int(steps), int(rows), int(epoch_rows)) == (state["total_steps"], state["rows_per_step"], 40)
    assert state["position"] == {"seed": 0, "epoch": 0, "index": int(rows)} and lines[0]["epoch"] == 0
    assert int(epoch_steps) == -(-40 // int(rows))
    optimizer = sum(4 * count for name, count in held.items() if name.startswith("optimizer/"))
    assert f"optimizer {optimizer / 2**20:.2f} MiB" in plan[1]


def test_a_run_is_planned_again_when_it_has_checkpoints(tmp_path):
    keys = small_run(tmp_path, "run", "--train.steps=2", "--data.eval=", "--eval.every=0")
    assert run(tmp_path, "train", *keys).returncode == 0
    done = run(tmp_path, "plan", *override(keys, ["--train.steps=4", "--run.device=cpu"]), "--plan.memory_gb=80")
    assert done.returncode == 0 and "74.51 GiB: it fits" in done.stderr, done.stderr


# --- doctor


@pytest.mark.parametrize("ranks", [1, 2])
def test_doctor(tmp_path, ranks):
    done = run(tmp_path, "doctor", f"--run.dir={tmp_path / 'not/there/yet'}", ranks=ranks)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    lines = [re.split(" {2,}", line, maxsplit=1) for line in done.stdout.splitlines() if not line.startswith(" ")]
    found = {line[0]: line[1] for line in lines}
    assert list(found)[:8] == ["trireme", "MPI", "host", "cores", "memory", "file system", "token cache", "libtorch"], done.stdout
    assert found["MPI"].startswith("Open MPI v")
    assert found["host"] == f"{os.uname().nodename}: {ranks} rank{'s' * (ranks > 1)} in all, {ranks} here"
    cores = len(os.sched_getaffinity(0))
    assert found["cores"] == f"{cores} for {ranks} rank{'s' * (ranks > 1)} of 1 thread"
    assert ("change: more threads than cores" in done.stdout) == (ranks > cores)
    free = os.statvfs(tmp_path)
    assert found["file system"].startswith(f"{tmp_path}: ")
    assert float(found["file system"].split()[1]) == pytest.approx(free.f_bavail * free.f_frsize / 2**30, rel=0.2)
    assert found["token cache"].startswith(f"{tmp_path}/cache/tokens: ")
    assert found["libtorch"].startswith(torch.__version__.split("+")[0])
    assert "runtime" not in found["CUDA"] or re.fullmatch(r"13\.\d+\.\d+|not found; not needed on the CPU", found["cuBLASLt"]), done.stdout


def test_the_token_cache_forgets_what_nobody_uses(tmp_path):
    """Age is the last use, not the making; whatever is left of an interrupted start goes as well."""
    cache = tmp_path / "cache/tokens"
    prepare = lambda records, *keys: run(tmp_path, "prepare", "configs/quickstart.ini", f"--data.train={TRAIN}:{records}", "--data.eval=", *keys)
    for records in (5, 6):
        assert prepare(records).returncode == 0
    files = set(cache.iterdir())
    assert len([path for path in files if path.suffix == ".h5"]) == 2
    left, mine = cache / f"{'0' * 32}.123.tokens", cache / "my.notes.txt"
    for path in (left, mine):
        path.write_bytes(b"x" * 100)
    long_ago = time.time() - 31 * 86400
    for path in cache.iterdir():
        os.utime(path, (long_ago, long_ago))
    assert prepare(6).stderr.count("deleted") == 0  # found in the cache: used, and nothing is made
    done = prepare(7)
    assert f"token cache {cache}: deleted 1 token files (0 MiB) that were not used for 30 days\n" in done.stderr, done.stderr
    assert len(list(cache.glob("*.h5"))) == 2 and not left.exists() and mine.exists()
    assert prepare(6).stderr == "" and re.search(r"token cache +\S+: 2 files, ", run(tmp_path, "doctor").stdout)
