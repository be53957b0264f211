"""Ids and offsets of `trireme tokenize`, and decoded text, against Hugging Face tokenizers."""
import json
import os
import pathlib
import random
import subprocess

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

SOURCE = pathlib.Path(os.environ.get("TRIREME_SOURCE", pathlib.Path(__file__).parent.parent))
BINARY = os.environ.get("TRIREME_BINARY", str(SOURCE / "build/release/trireme"))
DATA = pathlib.Path(os.environ.get("TRIREME_TEST_DATA", SOURCE.parent / "shared/data"))
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
CORPUS = [line for path in sorted(SOURCE.glob("configs/quickstart/*.jsonl")) for line in path.read_text().splitlines()] + [
    line for path in sorted((SOURCE / "src").rglob("*.cpp")) for line in path.read_text().splitlines()]
WORDS = ["hello", "World", " the", "don't", "I'LL", "été", "e\u0301", "naïve", "日本語", "こんにちは", "한국어", "привет", "Ελλάδα", "שלום",
         "مرحبا", "हिन्दी", "ไทย", "👩‍👩‍👧", "🇩🇪", "🏽", "1234567", "3.14", "½", "\t", "\n", "\r\n", "  ", "   ", "\u00a0", "\u3000", "\u200b",
         "{", "}", "==", "->", "//", "::", "_x", "\\n", "<|im_start|>", "<|im_end|>", "<s>", "<|tool|>", "ﬁ", "Å", "\ufffd", "...", "!?", "\x00"]


def strings(count, seed):
    rng = random.Random(seed)
    out = ["", " ", "\n", "a", "é", "👍"]
    while len(out) < count:
        kind = rng.random()
        if kind < 0.3:
            out.append(rng.choice(CORPUS))
        elif kind < 0.8:
            out.append("".join(rng.choice(WORDS) + rng.choice(["", " ", ""]) for _ in range(rng.randint(1, 8))))
        else:
            text = "".join(chr(rng.choice([rng.randint(32, 126), rng.randint(160, 0x24F), rng.randint(0x370, 0x5FF),
                                           rng.randint(0x900, 0xDFF), rng.randint(0x3040, 0x9FFF), rng.randint(0x1F300, 0x1FAFF)]))
                           for _ in range(rng.randint(1, 12)))
            out.append(text)
    return out


def byte_level():
    t = Tokenizer(models.BPE(ignore_merges=True))
    t.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
                                               pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    t.decoder = decoders.ByteLevel()
    t.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=1500, special_tokens=["<s>", "<|im_start|>", "<|im_end|>"],
                                                      initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    t.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    t.add_tokens([AddedToken("<|tool|>", lstrip=True, rstrip=True, normalized=False)])
    return t


def sentencepiece():
    t = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    t.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)]
    t.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=1500, special_tokens=special, show_progress=False))
    t.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    t.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return t


def metaspace():
    t = Tokenizer(models.BPE(unk_token="<unk>"))
    t.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    t.decoder = decoders.Metaspace(prepend_scheme="first")
    t.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=1500, special_tokens=["<unk>", "<s>"], show_progress=False))
    return t


def folder_tokenizer(folder):
    if not (folder / "tokenizer.json").exists():
        pytest.skip(f"{folder} is not there; TRIREME_TEST_DATA names the data folder")
    t = Tokenizer.from_file(str(folder / "tokenizer.json"))
    t.no_truncation()
    t.no_padding()
    return t


MAKERS = {"quickstart": lambda: folder_tokenizer(SOURCE / "configs/quickstart/model"),
          "gpt2": lambda: folder_tokenizer(DATA / "tokenizers/gpt2"), "byte_level": byte_level, "sentencepiece": sentencepiece,
          "metaspace": metaspace}


def trireme(folder, lines, *keys):
    run = subprocess.run([BINARY, "tokenize", f"--model.path={folder}", *keys], input="\n".join(map(json.dumps, lines)) + "\n",
                         capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.split("\n") if line]


@pytest.mark.parametrize("name", MAKERS)
def test_ids_offsets_and_text(name, tmp_path):
    reference = MAKERS[name]()
    reference.save(str(tmp_path / "tokenizer.json"))
    texts = strings(int(os.environ.get("TRIREME_TOKENIZER_STRINGS", "100000")), seed=7)
    ours = trireme(tmp_path, texts, "--tokenize.offsets=true")
    theirs = reference.encode_batch(texts)
    assert len(ours) == len(texts)
    for text, a, b in zip(texts, ours, theirs):
        assert a["ids"] == b.ids, repr(text)
        assert [tuple(x) for x in a["offsets"]] == b.offsets, repr(text)
    some = [x["ids"] for x in ours[:20000]]
    rng = random.Random(3)
    some += [[rng.randrange(reference.get_vocab_size()) for _ in range(6)] for _ in range(5000)]  # broken UTF-8 as well
    for ids, a in zip(some, trireme(tmp_path, some, "--tokenize.decode=true")):
        assert a["text"] == reference.decode(ids, skip_special_tokens=False), ids
