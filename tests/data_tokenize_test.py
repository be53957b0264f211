"""`trireme tokenize` against transformers: ids of every record form, and which tokens are learnt."""
import json
import os
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(os.environ.get("TRIREME_SOURCE", Path(__file__).parent.parent))
QUICKSTART = SOURCE / "configs" / "quickstart"


def tokenize(records, folder, *keys):
    lines = "".join(json.dumps(record) + "\n" for record in records)
    done = subprocess.run([os.environ["TRIREME_BINARY"], "tokenize", f"--model.path={folder}", *keys], input=lines, text=True,
                          capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(QUICKSTART / "model")


def test_messages(tokenizer):
    records = [json.loads(line) for line in (QUICKSTART / "train.jsonl").read_text().splitlines()]
    got = tokenize(records, QUICKSTART / "model")
    assert len(got) == len(records)
    for record, out in zip(records, got):
        messages = record["messages"]
        assert out["text"] == tokenizer.apply_chat_template(messages, tokenize=False)
        ids = tokenizer(out["text"])["input_ids"]
        prompt = tokenizer(tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, tokenize=False))["input_ids"]
        newline = 1  # after the end token
        assert out["ids"] == ids
        assert out["loss"] == [0] * len(prompt) + [1] * (len(ids) - len(prompt) - newline) + [0] * newline


def test_other_chat_forms_give_the_same(tokenizer):
    question, answer = "What is packing?", "Rows\nfilled well."
    forms = [{"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]},
             {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]},
             {"instruction": question, "input": "", "output": answer},
             {"prompt": question, "completion": answer}]
    got = tokenize(forms, QUICKSTART / "model")
    assert all(out == got[0] for out in got)
    learnt = [i for i, l in zip(got[0]["ids"], got[0]["loss"]) if l]
    assert tokenizer.decode(learnt) == answer + "<|im_end|>"


@pytest.mark.parametrize("trims", [False, True])
def test_a_token_over_the_border_is_learnt_and_so_is_space_at_the_end(tmp_path, trims):
    """Whether offsets of tokens hold their white space or not."""
    from tokenizers import Tokenizer

    model = json.loads((QUICKSTART / "model/tokenizer.json").read_text())
    step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(model | {"post_processor": step if trims else None}))
    prompt, completion = "What is data paral", "lelism  "
    (out,) = tokenize([{"prompt": prompt, "completion": completion}], tmp_path)
    plain = Tokenizer.from_str(json.dumps(model | {"post_processor": None})).encode(prompt + completion)
    assert any(begin < len(prompt) < end for begin, end in plain.offsets) and plain.tokens[-1].strip("Ġ") == ""
    assert out["ids"][:-1] == plain.ids
    assert out["loss"] == [int(end > len(prompt)) for _, end in plain.offsets] + [1]


def test_without_template():
    from transformers import AutoTokenizer

    folder = Path(os.environ.get("TRIREME_TEST_DATA", SOURCE.parent / "shared" / "data")) / "tokenizers" / "gpt2"
    if not folder.exists():
        pytest.skip("TRIREME_TEST_DATA holds no tokenizers/gpt2")
    gpt2 = AutoTokenizer.from_pretrained(folder)
    pairs = [("How many?\n", "There are 5.\n#### 5"), ("Q: naïve café", " Ünï 日本 🚢"), ("", "only this")]
    got = tokenize([{"question": p, "answer": c} for p, c in pairs], folder, "--data.prompt_field=question",
                   "--data.completion_field=answer")
    for (prompt, completion), out in zip(pairs, got):
        ids = gpt2(prompt + completion)["input_ids"] + [gpt2.eos_token_id]
        masked = max(len(gpt2(prompt)["input_ids"]), 1)  # nothing comes before the first token
        assert out["ids"] == ids
        assert out["loss"] == [0] * masked + [1] * (len(ids) - masked)
    text = tokenize([{"text": "Once upon a time"}], folder)[0]
    assert text["ids"] == gpt2("Once upon a time")["input_ids"] + [gpt2.eos_token_id]
    assert text["loss"] == [0] + [1] * (len(text["ids"]) - 1)
