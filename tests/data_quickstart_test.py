"""The quickstart's data, tokenizer and model configuration belong together."""
import json
import os
from pathlib import Path

import pytest
from tokenizers import Tokenizer

ROOT = Path(os.environ.get("TRIREME_SOURCE", Path(__file__).parent.parent)) / "configs" / "quickstart"


def records(name):
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    pairs = []
    for line in lines:
        user, assistant = json.loads(line)["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        pairs.append((user["content"], assistant["content"]))
    return pairs


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(ROOT / "model" / "tokenizer.json"))


@pytest.fixture(scope="module")
def config():
    return json.loads((ROOT / "model" / "config.json").read_text())


def test_held_out_phrasings_ask_for_learnt_answers():
    train, evaluation = records("train.jsonl"), records("eval.jsonl")
    assert len(train) >= 300 and len(evaluation) >= 60
    questions = [q for q, _ in train + evaluation]
    assert len(set(questions)) == len(questions)
    answers = {a for _, a in train}
    assert {a for _, a in evaluation} == answers
    for answer in answers:
        assert sum(a == answer for _, a in train) >= 4, answer


def test_model_fits_tokenizer_and_data(tokenizer, config):
    assert tokenizer.get_vocab_size() <= config["vocab_size"]
    assert config["num_attention_heads"] * config["head_dim"] == config["hidden_size"]
    longest = max(len(tokenizer.encode(q + a).ids) for q, a in records("train.jsonl") + records("eval.jsonl"))
    assert longest + 20 <= config["max_position_embeddings"]
    settings = json.loads((ROOT / "model" / "tokenizer_config.json").read_text())
    assert tokenizer.token_to_id(settings["eos_token"]) == config["eos_token_id"]


def test_tokenizer_reads_every_text_back(tokenizer):
    for question, answer in records("train.jsonl") + records("eval.jsonl") + [("Ünïcödé 🚢\n\tx", "日本")]:
        for text in (question, answer):
            assert tokenizer.decode(tokenizer.encode(text).ids) == text
    for special in ("<|im_start|>", "<|im_end|>"):
        assert len(tokenizer.encode(special).ids) == 1


def test_transformers_loads_the_folder():
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(ROOT / "model")
    question, answer = records("train.jsonl")[0]
    chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    prompt = loaded.apply_chat_template(chat[:1], add_generation_prompt=True, tokenize=False)
    whole = loaded.apply_chat_template(chat, tokenize=False)
    assert whole == prompt + answer + loaded.eos_token + "\n"
