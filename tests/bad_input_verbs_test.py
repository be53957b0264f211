"""What eval, generate, export, tokenize and prepare refuse, word for word, on one rank and on two; full disks everywhere."""
import re
import resource
import subprocess

import pytest
from safetensors.torch import load_file, save_file

from bad_input_test import check_refusal, contents, refused
from program import SOURCE, TRAIN, command, end_of, environment, run, small_run, start

MODEL = SOURCE / "configs/quickstart/model"
RANDOM = f"--model.config={MODEL}/config.json"
BROKEN = "WORK/broken.jsonl:7: not valid JSON at byte 9: syntax error while parsing value - unexpected end of input; expected '[', '{', or a literal"
NO_DATA = "data.train is not set: name one or more .jsonl, .json or .txt files"


@pytest.fixture
def work(tmp_path):
    (tmp_path / "broken.jsonl").write_text('{"text": "good"}\n' * 6 + '{"text":\n')
    (tmp_path / "ids.json").write_text("[[1, 2], [5, 5000]]")
    (tmp_path / "row.json").write_text("[[1, 2], []]")
    (tmp_path / "no-rows.json").write_text("[]")
    (tmp_path / "blank.txt").write_text("\n\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    (tmp_path / "role.jsonl").write_text('{"messages": [{"role": 5}]}\n')
    (tmp_path / "bare").mkdir()
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / "bare" / name).write_text((MODEL / name).read_text())
    return tmp_path


@pytest.mark.parametrize("verb, keys, status, sentence, ranks", [
    ("eval", [RANDOM], 2, "nothing to evaluate: set data.eval to record files, or eval.token_ids to a JSON file of ids", 2),
    ("eval", [RANDOM, "--data.eval=x", "--eval.logits=y"], 2, "eval.logits needs eval.token_ids", 1),
    ("eval", [RANDOM, "--eval.token_ids=WORK/ids.json"], 3, "WORK/ids.json: element 1 has 5000; ids are 0 to 1151", 2),
    ("eval", [RANDOM, "--eval.token_ids=WORK/ids.json", "--eval.logits=WORK/out/logits.safetensors"], 2, "eval.logits=WORK/out/logits.safetensors: there is "
     "no folder WORK/out; make it, or name a file in one that is there", 2),
    ("eval", [RANDOM, "--eval.token_ids=WORK/row.json"], 3, "WORK/row.json: element 1 is no array of ids, or empty", 1),
    ("eval", [RANDOM, "--eval.token_ids=WORK/no-rows.json"], 3, "WORK/no-rows.json: an array of arrays of ids is expected", 1),
    ("eval", [RANDOM, "--data.eval=WORK/none.jsonl"], 3, "data file 'WORK/none.jsonl' cannot be opened: No such file or directory", 1),
    ("eval", [RANDOM, "--data.eval=WORK/broken.jsonl"], 3, BROKEN, 2),
    ("eval", ["--model.path=WORK/none", "--data.eval=x"], 3, "model.path=WORK/none does not exist: name a Hugging Face model folder, or a hub name (org/name) that is in its cache", 2),
    ("prepare", [RANDOM], 2, NO_DATA, 2),
    ("prepare", [RANDOM, "--data.train=WORK/broken.jsonl"], 3, BROKEN, 2),
    ("prepare", [RANDOM, "--data.train=WORK/none.jsonl"], 3, "data file 'WORK/none.jsonl' cannot be opened: No such file or directory", 2),
    ("generate", ["hello"], 2, "neither model.path nor model.config is set: set model.path to a Hugging Face folder, or model.config to a "
     "config.json for random weights", 2),
    ("generate", [RANDOM, "--generate.file=x", "hello"], 2, "generate.file and a prompt are both given; give one", 1),
    ("generate", [RANDOM, "--generate.file=WORK/none"], 3, "cannot open WORK/none: No such file or directory", 2),
    ("generate", [RANDOM, "--generate.file=WORK/blank.txt"], 3, "WORK/blank.txt holds no prompt: one a line is expected", 2),
    ("generate", [RANDOM, "--generate.file=WORK/latin.txt"], 3, "WORK/latin.txt:1: invalid UTF-8 (byte 0xe9 at position 4); convert the file, for "
     "example with iconv -f LATIN1 -t UTF-8", 1),
    ("generate", [RANDOM, "--generate.file=WORK/role.jsonl"], 3, "WORK/role.jsonl:1: messages[0]: field 'role' is a number; it must be a string", 1),
    ("generate", ["--model.config=WORK/bare/config.json", "--generate.chat=true", "hello"], 2, "generate.chat needs a chat template and the model "
     "has none: set data.chat_template to alpaca, chatml, gemma, llama3, mistral, phi3, or a file", 1),
    ("tokenize", [], 2, "model.path is not set: name a folder with a tokenizer.json", 2),
    ("tokenize", ["--model.path=WORK"], 3, "WORK/tokenizer.json is not there; a folder with a tokenizer.json is needed (set model.tokenizer)",
     1),
    ("tokenize", ["--model.path=WORK/none"], 3, "model.path=WORK/none does not exist: name a folder with a tokenizer.json, or a hub name (org/name) that is in its cache", 2),
    ("export", [RANDOM], 2, "run.dir is not set: the folder to write", 2),
    ("export", [RANDOM, "--run.dir=WORK"], 2, "run.dir=WORK is not empty; name a new folder", 2),
    ("export", [f"--model.path={MODEL}", "--run.dir=WORK/out"], 3, f"{MODEL} has neither model.safetensors nor model.safetensors.index.json.", 2),
    ("export", [RANDOM, "--run.dir=WORK/out", "--run.resume=WORK/none"], 2,
     "run.resume=WORK/none is not there: allowed are auto, never, and the folder of a checkpoint, RUN/checkpoints/step-N", 1),
    ("export", [RANDOM, "--run.dir=WORK/out", "--lora.requantize=true"], 2, "lora.requantize=true needs lora.merge=true: it is what becomes of merged weights; trireme quantize writes a "
     "model without an adapter", 1),
    ("export", [RANDOM, "--run.dir=WORK/out", "--lora.path=x"], 2, "lora.path is set: say lora.merge=true to write the merged model (the adapter "
     "itself is exported already)", 1),
    ("export", [RANDOM, "--run.dir=WORK/out", "--lora.path=WORK", "--lora.merge=true"], 3, "lora.path=WORK is no PEFT adapter: there is no "
     "adapter_config.json in it", 1),
    ("export", [RANDOM, "--run.dir=WORK/out", "--lora.rank=4"], 2, "lora.rank is set, but no checkpoint with adapters: set run.resume to its "
     "folder, or lora.path to an adapter", 1),
    ("export", [RANDOM, "--run.dir=WORK/out", "--lora.rank=4", "--lora.path=WORK", "--lora.merge=true"], 2, "lora.rank and lora.path are both set: the adapter of lora.path has a rank; "
     "set one", 1),
    ("export", [RANDOM, "--run.dir=WORK/out", "--lora.merge=true"], 2, "lora.merge needs lora.path, the adapter to merge", 1),
    ("doctor", ["--optim.lr=1"], 2, "optim.lr is read by train, plan, not by doctor: leave it out (a configuration file may hold it)", 2),
])
def test_what_a_verb_refuses(work, verb, keys, status, sentence, ranks):
    here = lambda text: text.replace("WORK", str(work))
    refused(work, status, here(sentence), *map(here, keys), verb=verb, ranks=ranks)
    assert not (work / "out").exists()


@pytest.mark.parametrize("line, keys, sentence", [
    ('{"a"', [], "standard input:2: not valid JSON at byte 5: syntax error while parsing object separator - unexpected end of input; expected ':'"),
    ("[1.5]", ["--tokenize.decode=true"], "standard input:2: an array of ids is expected"),
    ("[1, 1146]", ["--tokenize.decode=true"], "standard input:2: 1146 is no id of this tokenizer; ids are 0 to 1145"),
    ("[-1]", ["--tokenize.decode=true"], "standard input:2: -1 is no id of this tokenizer; ids are 0 to 1145"),
    ('{"text": 5}', [], "standard input:2: field 'text' is a number; it must be a string"),
])
def test_lines_that_tokenize_refuses(work, line, keys, sentence):
    good = "[1]" if keys else '"a"'
    (work / "lines").write_text(f"{good}\n{line}\n")
    with open(work / "lines") as lines:
        done = end_of(start(work, command("tokenize", f"--model.path={MODEL}", *keys), {}, stdin=lines))
    check_refusal(work, done, 3, sentence)
    assert done.stdout.startswith('{"text":"'), "the line before it is answered"


# --- full disks. A file that may not grow (RLIMIT_FSIZE) fails as on a full disk, with other words of the system.


def limited(work, limit, verb, *keys):
    return end_of(start(work, command(verb, *keys), {}, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))))


def test_no_room_for_an_export(work):
    before = contents(work)
    done = limited(work, 1 << 20, "export", RANDOM, f"--run.dir={work / 'out'}")
    check_refusal(work, done, 1, f"cannot write {work}/out.tmp/model.safetensors.tmp: File too large.")
    assert contents(work) == before


@pytest.mark.parametrize("limit, sentence", [
    (20 << 10, r"cannot write CACHE/[0-9a-f]{32}\.h5\.\d+\.tokens: File too large; set data\.cache to another folder"),
    (60 << 10, r"cannot write CACHE/[0-9a-f]{32}\.h5\.\d+\.tmp: File too large\.")], ids=["while encoding", "the file"])
def test_no_room_for_tokens(work, limit, sentence):
    cache = work / "tokens"
    done = limited(work, limit, "prepare", RANDOM, f"--data.train={TRAIN}", f"--data.cache={cache}")
    check_refusal(work, done, 1, re.compile(sentence.replace("CACHE", re.escape(str(cache)))))
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_no_room_for_the_product_of_a_run(work):
    """The last checkpoint (21.6 MB) fits, the model (7.2 MB) beside it does not."""
    disk = work / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=26m", "tmpfs", disk], capture_output=True).returncode != 0:
        pytest.skip("this user may not mount a small disk")
    try:
        keys = small_run(work, "disk/run", "--eval.every=0")
        check_refusal(work, run(work, "train", *keys), 1, f"cannot write {disk}/run/model/model.safetensors.tmp: No space left on device.",
                      started=True)
        assert not list((disk / "run/model").glob("*"))
        subprocess.run(["mount", "-o", "remount,size=100m", disk], check=True)
        again = run(work, "train", *keys)
        assert again.returncode == 0 and f"wrote {disk}/run/model" in again.stderr, again.stderr
        assert (disk / "run/model/model.safetensors").stat().st_size > 7_000_000
    finally:
        subprocess.run(["umount", "-l", disk], capture_output=True)


@pytest.mark.parametrize("verb, keys", [("tokenize", [f"--model.path={MODEL}"]), ("doctor", [])])
def test_an_answer_that_cannot_be_written(work, verb, keys):
    with open("/dev/full", "w") as full:
        done = subprocess.run(command(verb, *keys), input='"a"\n', stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, env=environment(work))
    assert done.returncode == 1
    assert done.stderr == "error: standard output cannot be written to its end: its disk is full, or its reader has gone\n"


@pytest.mark.parametrize("ranks", [1, 2])
def test_eval_of_damaged_weights_is_no_number(tmp_path, ranks):
    assert run(tmp_path, "train", *small_run(tmp_path, "run", "--train.steps=1", "--data.eval=", "--eval.every=0")).returncode == 0
    weights = load_file(tmp_path / "run/model/model.safetensors")
    next(iter(weights.values())).view(-1)[0] = float("nan")
    save_file(weights, tmp_path / "run/model/model.safetensors", metadata={"format": "pt"})
    done = run(tmp_path, "eval", f"--model.path={tmp_path}/run/model", f"--data.eval={SOURCE}/configs/quickstart/eval.jsonl:8", ranks=ranks)
    assert (done.returncode, done.stdout) == (3, "") and done.stderr.count("the loss is not finite: the model's weights are damaged") == 1, done.stderr
