"""The verbs that show data (prepare, tokenize, generate's prompts, eval's counts), seen from the binary."""
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(os.environ.get("TRIREME_SOURCE", Path(__file__).parent.parent))
BINARY = os.environ.get("TRIREME_BINARY", str(SOURCE / "build/release/trireme"))
MODEL = SOURCE / "configs/quickstart/model"


@pytest.fixture
def trireme(tmp_path):
    def run(verb, *keys, status=0, lines=None):
        stdin = "".join((line if verb == "generate" and isinstance(line, str) else json.dumps(line)) + "\n" for line in lines or [])
        done = subprocess.run([BINARY, verb, *map(str, keys)], input=stdin, capture_output=True, text=True, timeout=120, cwd=tmp_path,
                              env=dict(os.environ, TRIREME_CACHE=str(tmp_path / "cache"), OMP_NUM_THREADS="1"))
        assert done.returncode == status, done.stderr
        return done
    return run


def chat(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def answers(done):
    return [json.loads(line) for line in done.stdout.splitlines()]


# --- prepare

def test_prepare_prints_percentiles_shares_and_examples(trireme, tmp_path):
    short, long = chat("Hi?", "Yes."), chat("Hi?", "Yes, " * 60 + "and so on.")
    data = write(tmp_path / "a.jsonl", [short] * 8 + [long] * 2)
    lengths = [len(out["ids"]) for out in answers(trireme("tokenize", f"--model.path={MODEL}", lines=[short, long]))]
    # The tokenizer alone will do.
    out = trireme("prepare", f"--model.tokenizer={MODEL}", f"--data.train={data}", "--data.max_length=40", "--data.show=3").stdout
    assert out.startswith("training data\n10 records, 10 samples in 10 rows, "), out
    assert "; 2 samples (20.0 %) truncated, " in out
    assert ("tokens a record (before truncation):  min {0}  5 % {0}  25 % {0}  50 % {0}  75 % {0}  95 % {1}  99 % {1}  max {1}\n"
            .format(*lengths)) in out
    assert "longer than data.max_length=40: 20.00 %" in out
    example = "⟦<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n⟧Yes.<|im_end|>⟦\n⟧\n"
    for n in (1, 2, 3):
        assert f"--- {n}: {data}:{n}, {lengths[0]} tokens\n{example}" in out
    assert "--- 4" not in out


def test_several_files_with_a_limit_each(trireme, tmp_path):
    a = write(tmp_path / "a.jsonl", [chat(f"a{i}", "yes") for i in range(5)])
    b = write(tmp_path / "b.jsonl", [chat(f"b{i}", "yes") for i in range(5)])
    out = trireme("prepare", f"--model.tokenizer={MODEL}", f"--data.train={a}:2,{b}:3,{a}", "--data.show=20").stdout
    shown = [line.split()[2] for line in out.splitlines() if line.startswith("--- ")]
    assert shown == [f"{file}:{line}," for file, n in ((a, 2), (b, 3), (a, 5)) for line in range(1, n + 1)]


def test_a_copy_goes_by_its_own_name(trireme, tmp_path):
    """Its tokens are those of the file that was there first."""
    a, b = (write(tmp_path / name, [{"text": "a text that is not short"}]) for name in ("a.jsonl", "b.jsonl"))
    keys = [f"--model.tokenizer={MODEL}", "--data.show=1"]
    assert f"--- 1: {a}:1, " in trireme("prepare", *keys, f"--data.train={a}").stdout
    assert f"--- 1: {b}:1, " in trireme("prepare", *keys, f"--data.train={b}").stdout
    assert len(list((tmp_path / "cache/tokens").glob("*.h5"))) == 1
    done = trireme("prepare", *keys, f"--data.train={b}", "--data.truncation=error", "--data.max_length=4", status=3)
    assert done.stderr.startswith(f"error: {b}:1: the record has "), done.stderr


def test_text_files(trireme, tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("".join(f"Line {i} of a long text.\n" for i in range(20_000)))
    keys = (f"--model.tokenizer={MODEL}", f"--data.train={text}", "--data.eval_fraction=0.1", "--data.max_length=256")
    out = trireme("prepare", *keys, "--task.kind=pretrain").stdout
    assert out.count("1 record cut into several samples") == 2 and "evaluation data\n1 record, " in out, out
    plan = trireme("train", SOURCE / "configs/pretrain.ini", f"--model.config={SOURCE}/configs/models/llama_25m.json", *keys,
                   f"--run.dir={tmp_path / 'run'}", "--dry-run").stderr
    assert "evaluation data: 1 record, " in plan and "plan: " in plan
    text.write_bytes(b"fine\n" * 3 + b"caf\xe9\n")
    error = trireme("prepare", *keys, status=3).stderr
    assert f"{text}:4: invalid UTF-8 (byte 0xe9 at position 4); convert the file, for example with iconv -f LATIN1 -t UTF-8" in error


@pytest.mark.parametrize("line, words", [
    (b'{"text": "' + b"x" * (10 << 20) + b'"}', ": a record of more than 10 MB; split it, or is this one JSON value over many "
     "records? One record a line, or a JSON array of records"),
    (b'{"text": "caf\xe9"}', ": invalid UTF-8 (byte 0xe9 at position 14); convert the file, for example with iconv -f LATIN1 -t UTF-8"),
    (b'{"text": "a", "score": NaN}', ": field 'score' is NaN, a number that JSON does not have; write null in its place, or leave the "
     "field out (Python's json.dumps refuses it with allow_nan=False)"),
    (b'{"text": "a"', ": not valid JSON at byte "),
], ids=["10 MB", "UTF-8", "NaN", "JSON"])
def test_bad_line(trireme, tmp_path, line, words):
    data = tmp_path / "a.jsonl"
    data.write_bytes(b'{"text": "good"}\n' * 6 + line + b"\n")
    keys = (f"--model.tokenizer={MODEL}", f"--data.train={data}")
    assert f"{data}:7{words}" in trireme("prepare", *keys, status=3).stderr
    if b"xx" in line:  # what a file is read by is not for one record to break
        return
    done = trireme("prepare", *keys, "--data.on_error=skip")
    assert "6 records, " in done.stdout and "; 1 record left out: cannot be used (data.on_error=skip)" in done.stdout
    assert f"left out: {data}:7{words}" in done.stderr


def test_a_line_just_below_the_limit(trireme, tmp_path):
    data = write(tmp_path / "a.jsonl", [{"text": "An ordinary sentence. " * 470_000}])
    assert 9 << 20 < data.stat().st_size < 10 << 20
    out = trireme("prepare", f"--model.tokenizer={MODEL}", f"--data.train={data}").stdout
    assert "1 record cut into several samples" in out


# A template may loop as long as it likes: it gets a million steps (a tenth of a second), and one for each byte of the chat.
@pytest.mark.parametrize("loop", [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% set ns = namespace(n=0) %}{% for a in range(99999) %}{% for b in range(99999) %}{% set ns.n = ns.n + 1 %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{{ messages[0].content | upper | trim }}{% endfor %}{% endfor %}",
])
def test_endless_template(trireme, tmp_path, loop):
    (tmp_path / "t.jinja").write_text(loop + "{{ messages }}")
    data = write(tmp_path / "a.jsonl", [chat("a", "b")] * 40)
    error = trireme("prepare", f"--model.tokenizer={MODEL}", f"--data.train={data}", f"--data.chat_template={tmp_path}/t.jinja",
                    status=3).stderr
    assert "the template ran for more than 1000015 steps and was stopped" in error


# --- tokenize

LLAMA_STYLE = {"post_processor": {"type": "TemplateProcessing",
                                  "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                                  "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                                  "special_tokens": {"<s>": {"id": "<s>", "ids": [600], "tokens": ["<s>"]}}}}


@pytest.fixture
def begins_with_bos(tmp_path):
    """The quickstart's tokenizer with a beginning token before every text, and no word about special tokens but in config.json."""
    folder = tmp_path / "bos"
    folder.mkdir()
    tokenizer = json.loads((MODEL / "tokenizer.json").read_text()) | LLAMA_STYLE
    bos = max(t["id"] for t in tokenizer["added_tokens"]) + 10_000
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][0] | {"id": bos, "content": "<s>", "special": True})
    tokenizer["post_processor"]["special_tokens"]["<s>"]["ids"] = [bos]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    end = next(t["id"] for t in tokenizer["added_tokens"] if t["content"] == "<|im_end|>")
    (folder / "config.json").write_text(json.dumps({"model_type": "unheard_of", "bos_token_id": bos, "eos_token_id": [end, 1]}))
    return folder, bos, end


def test_offsets_special_tokens_and_config_json(trireme, begins_with_bos):
    folder, bos, end = begins_with_bos
    records = [{"text": "naïve 🚢 text"}, {"prompt": "naïve ", "completion": "🚢 x"}, "naïve 🚢"]
    given = answers(trireme("tokenize", f"--model.path={folder}", "--tokenize.offsets=true", lines=records))
    for out in given:
        assert len(out["offsets"]) == len(out["ids"]) == len(out["loss"])
        assert out["ids"][0] == bos and out["offsets"][0] == [0, 0] and out["loss"][0] == 0
        words = [out["text"][b:e] for b, e in dict.fromkeys(map(tuple, out["offsets"]))]  # tokens may share a character
        assert "naïve" == "".join(words).strip()[:5]
    for out in given[:2]:
        assert out["ids"][-1] == end and out["loss"][-1] == 1 and out["offsets"][-1] == [len(out["text"])] * 2
    bare = answers(trireme("tokenize", f"--model.path={folder}", "--tokenize.special=false", lines=records))
    assert [b["ids"] for b in bare] == [given[0]["ids"][1:-1], given[1]["ids"][1:-1], given[2]["ids"][1:]]


def test_alpaca_begins_and_ends_as_the_tokenizer_and_config_json_say(trireme, begins_with_bos):
    folder, bos, end = begins_with_bos
    record = {"instruction": "Add.", "input": "1 2", "output": "3"}
    out, = answers(trireme("tokenize", f"--model.path={folder}", "--data.chat_template=alpaca", lines=[record]))
    assert out["text"] == ("<s>Below is an instruction that describes a task, paired with an input that provides further context. Write "
                           "a response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n"
                           "### Response:\n3<|im_end|>")
    assert (out["ids"][0], out["ids"][1] == bos, out["ids"][-1]) == (bos, False, end)
    assert sum(out["loss"]) == 2
    # An end of turn that the tokenizer has no token for is refused.
    error = trireme("tokenize", f"--model.path={folder}", "--data.chat_template=gemma", status=3, lines=[record]).stderr
    assert ("standard input:1: no end token to learn: '<end_of_turn>', which the chat template (built-in gemma) writes at the end of "
            "the assistant's turn, is not a token of the tokenizer") in error


def test_form_keys_count(trireme):
    both = {"messages": [{"role": "user", "content": "no"}], "text": "this"}
    model = f"--model.path={MODEL}"
    assert answers(trireme("tokenize", model, "--data.format=text", lines=[both]))[0]["text"] == "this"
    pair = {"q": "a", "a": "b"}
    fields = ("--data.prompt_field=q", "--data.completion_field=a")
    error = trireme("tokenize", model, fields[0], status=2, lines=[pair]).stderr
    assert "data.prompt_field is set without data.completion_field; set both or none" in error
    learnt = answers(trireme("tokenize", model, *fields, "--task.kind=pretrain", lines=[pair]))[0]["loss"]
    assert learnt == [0] + [1] * (len(learnt) - 1)
    plain, = answers(trireme("tokenize", model, lines=["ab cd"]))
    assert plain["loss"] == [0] + [1] * (len(plain["ids"]) - 1)


def test_separator(trireme):
    gpt2 = Path(os.environ.get("TRIREME_TEST_DATA", SOURCE.parent / "shared" / "data")) / "tokenizers" / "gpt2"
    if not gpt2.exists():
        pytest.skip("TRIREME_TEST_DATA holds no tokenizers/gpt2")
    out, = answers(trireme("tokenize", f"--model.path={gpt2}", "--data.separator=\n", lines=[{"prompt": "How many?", "completion": "5"}]))
    assert out["text"] == "How many?\n5" and out["loss"] == [0, 0, 0, 0, 1, 1]


PROMPTS = [{"messages": [{"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "Trireme?"}]}]},
           {"conversations": [{"from": "human", "value": "What is Trireme?"}, {"from": "gpt", "value": "no"}]},
           {"prompt": "What is Trireme?"}, {"prompt": "What is Trireme?", "completion": "no"},
           {"instruction": "What is Trireme?", "output": "no"}]


def test_generation_prompt_of_every_form(trireme):
    expected = "<|im_start|>user\nWhat is Trireme?<|im_end|>\n<|im_start|>assistant\n"
    for out in answers(trireme("tokenize", f"--model.path={MODEL}", "--tokenize.generation_prompt=true", lines=PROMPTS)):
        assert out["text"] == expected and not any(out["loss"])


# --- generate

GENERATE = ("generate", f"--model.config={MODEL}/config.json", "--generate.format=json", "--generate.max_tokens=1")


def test_generate_reads_the_same_forms(trireme):
    lines = PROMPTS + ['"What is Trireme?"', '"Hello" he said', "{not JSON either", {"q": "What is Trireme?"}]
    out = answers(trireme(*GENERATE, "--generate.chat=true", lines=lines[:-1]))
    message = [{"role": "user", "content": "What is Trireme?"}]
    assert [o["prompt"] for o in out] == [message] * 2 + ["What is Trireme?"] * 2 + [message] * 2 + [
        [{"role": "user", "content": text}] for text in lines[6:8]]
    assert len({json.dumps(o["ids"]) for o in out[:6]}) == 1  # all ask the same
    fields = ("--data.prompt_field=q", "--data.completion_field=a")
    assert answers(trireme(*GENERATE, *fields, lines=lines[-1:]))[0]["ids"] == out[0]["ids"]


@pytest.mark.parametrize("line, key, status, words", [
    ({"messages": [{"role": 5}]}, "", 3, "standard input:1: messages[0]: field 'role' is a number; it must be a string"),
    ({"messages": []}, "", 3, "standard input:1: field 'messages' is an empty list"),
    ({"messages": [{"role": "user", "content": "a"}]}, "--data.template_args=[", 2, "data.template_args"),
], ids=["role", "empty", "arguments"])
def test_generate_refuses(trireme, line, key, status, words):
    error = trireme(*GENERATE, *filter(None, [key]), status=status, lines=[line]).stderr
    assert words in error and "json.exception" not in error


# --- eval, and models of the hub

def test_eval_says_what_it_truncates(trireme, tmp_path):
    data = write(tmp_path / "a.jsonl", [chat("Hi?", "Yes, " * 60)] * 3)
    error = trireme("eval", f"--model.config={MODEL}/config.json", f"--data.eval={data}", "--data.max_length=40").stderr
    assert "evaluation data: 3 records, 3 samples in 3 rows, 120 tokens, " in error
    assert "; 3 samples (100.0 %) truncated, " in error


def test_hub_snapshot_that_is_not_complete(trireme, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--org--name/snapshots/abc"
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs/main").write_text("abc")
    shutil.copy(MODEL / "config.json", snapshot)
    data = write(tmp_path / "a.jsonl", [chat("a", "b")])
    error = trireme("plan", "--model.path=org/name", f"--data.train={data}", "--train.steps=1", status=2).stderr
    assert f"model org/name has no tokenizer.json in the Hugging Face cache ({snapshot}): not all of it was downloaded. " \
           "Complete it with: hf download org/name" in error
