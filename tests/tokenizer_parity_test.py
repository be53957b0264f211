"""Ids, offsets and decoded text of `trireme tokenize` against Hugging Face tokenizers: 100,000 strings a tokenizer."""
import json
import os
import pathlib
import random
import subprocess
import unicodedata

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

SOURCE = pathlib.Path(os.environ.get("TRIREME_SOURCE", pathlib.Path(__file__).parent.parent))
BINARY = os.environ.get("TRIREME_BINARY", str(SOURCE / "build/release/trireme"))
DATA = pathlib.Path(os.environ.get("TRIREME_TEST_DATA", SOURCE.parent / "shared/data"))
COUNT = int(os.environ.get("TRIREME_TOKENIZER_STRINGS", "100000"))
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
          r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace("{1,3}", "")
FILES = [*sorted(SOURCE.glob("configs/quickstart/*.jsonl")), *sorted((SOURCE / "src").rglob("*.cpp"))]
CORPUS = [line for path in FILES for line in path.read_text().splitlines()]
WORDS = ["hello", "World", " the", "don't", "I'LL", "it'ſ", "été", "e\u0301", "naïve", "日本語", "こんにちは", "한국어", "각",
         "\u1100\u1161", "привет", "Ελλάδα", "ΣΟΦΟΣ", "İstanbul", "שלום", "مرحبا", "हिन्दी", "ไทย", "👩‍👩‍👧", "🇩🇪",
         "🏽", "1234567", "3.14", "½", "٣", "²", "\t", "\n", "\r\n", "  ", "   ", "\n \n", "\u00a0", "\u3000",
         "\u200b", "\u2029", "\u2028", "\x85", "\u180e", "{", "}", "==", "->", "//", "::", "_x", "\\n", "|", "▁",
         "<0x41>", "Ġ", "##a", "[MASK]", "[SEP]", "<|im_start|>", "<|im_end|>", "<s>", "<|tool|>", " <|tool|> ",
         "MARK", "ﬁ", "Å", "\ufffd", "…", "...", "!?", "\x00", "q\u0323\u0307", "\u0344", "ẛ̣", "㌔", "ｶﾞ", "a" * 33]
RANGES = [(0x20, 0x7E), (0xA0, 0x24F), (0x250, 0x36F), (0x370, 0x5FF), (0x600, 0xDFF), (0xE00, 0x1FFF),
          (0x2000, 0x2BFF), (0x3040, 0x9FFF), (0xA000, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x1FFFF),
          (0x20000, 0x10FFFF)]


def strings():
    rng = random.Random(7)
    out = ["", " ", "\n", "a", "é", "👍", "é" * 400, "ab" * 3000, " " * 500, "日本" * 300]
    while len(out) < COUNT:
        kind = rng.random()
        if kind < 0.05:
            out.append(rng.choice(CORPUS))
        elif kind < 0.75:
            out.append("".join(rng.choice(WORDS) + rng.choice(["", " ", ""]) for _ in range(rng.randint(1, 5))))
        else:
            low, high = rng.choice(RANGES)
            low2, high2 = rng.choice(RANGES[:5])
            out.append("".join(chr(rng.randint(low, high) if rng.random() < 0.6 else rng.randint(low2, high2))
                               for _ in range(rng.randint(1, 9))))
    return out


TEXTS = strings()


def trained(t, size=1500, special=(), alphabet=(), trainer=trainers.BpeTrainer):
    t.train_from_iterator(CORPUS[::3], trainer(vocab_size=size, special_tokens=list(special),
                                          initial_alphabet=list(alphabet), show_progress=False))
    return t


def byte_level(pattern, normalizer=None, ignore_merges=False):
    t = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    if normalizer:
        t.normalizer = normalizer
    t.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"),
                                               pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    t.decoder = decoders.ByteLevel()
    return trained(t, special=["<s>", "<|im_start|>", "<|im_end|>"], alphabet=pre_tokenizers.ByteLevel.alphabet())


def llama3():
    t = byte_level(LLAMA3, ignore_merges=True)
    t.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    t.add_tokens([AddedToken("<|tool|>", lstrip=True, rstrip=True, normalized=False),
                  AddedToken("MARK", single_word=True)])
    return t


def qwen2():
    t = byte_level(QWEN2, normalizers.NFC())
    t.post_processor = processors.ByteLevel(trim_offsets=True)
    t.add_tokens([AddedToken("<|tool|>", lstrip=True), AddedToken("e\u0301", normalized=True)])
    return t


def roberta():
    t = Tokenizer(models.BPE())
    t.normalizer = normalizers.Sequence([normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()])
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    t.decoder = decoders.ByteLevel()
    trained(t, special=["<s>", "</s>", "<mask>"], alphabet=pre_tokenizers.ByteLevel.alphabet())
    t.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 0), trim_offsets=True, add_prefix_space=True)
    t.add_tokens([AddedToken("MARK", lstrip=True)])
    return t


def sentencepiece():
    """As Llama 2, its merges within words (so that texts are cut), bytes for what it does not know."""
    t = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    t.pre_tokenizer = pre_tokenizers.Metaspace()
    trained(t, special=["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)])
    t.pre_tokenizer = None
    t.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    t.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                   decoders.Strip(" ", 1, 0)])
    t.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return t


def across_words():
    """Merges across spaces, a part of the bytes, unknown tokens one by one."""
    t = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=False))
    t.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(r"\s{2,}"), " "),
                                         normalizers.Replace(" ", "▁")])
    t.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()])
    return trained(t, special=["<unk>"] + [f"<0x{b:02X}>" for b in range(240)])


def metaspace():
    t = Tokenizer(models.BPE(unk_token="<unk>"))
    t.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    t.decoder = decoders.Metaspace(prepend_scheme="first")
    return trained(t, special=["<unk>", "<s>"])


def bert():
    t = Tokenizer(models.WordPiece(unk_token="[UNK]", max_input_chars_per_word=30))
    t.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=True)
    t.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    t.decoder = decoders.WordPiece(cleanup=False)
    trained(t, special=["[UNK]", "[CLS]", "[SEP]"], trainer=trainers.WordPieceTrainer)
    t.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return t


def pieces():
    """Pre-tokenizers one after the other, those that drop characters among them."""
    t = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    t.normalizer = normalizers.Sequence([normalizers.Strip(), normalizers.NFD(), normalizers.Lowercase()])
    t.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.CharDelimiterSplit("|"), pre_tokenizers.WhitespaceSplit(),
        pre_tokenizers.Punctuation("merged_with_previous"), pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.Split("e", "merged_with_next"), pre_tokenizers.Split("o", "contiguous"),
        pre_tokenizers.Whitespace()])
    return trained(t, special=["<unk>"])


def folder_tokenizer(folder):
    if not (folder / "tokenizer.json").exists():
        pytest.skip(f"{folder} is not there; TRIREME_TEST_DATA names the data folder")
    t = Tokenizer.from_file(str(folder / "tokenizer.json"))
    t.no_truncation()
    t.no_padding()
    return t


MAKERS = {"quickstart": lambda: folder_tokenizer(SOURCE / "configs/quickstart/model"),
          "gpt2": lambda: folder_tokenizer(DATA / "tokenizers/gpt2"),
          "bert-base-uncased": lambda: folder_tokenizer(DATA / "tokenizers/bert-base-uncased"),
          **{make.__name__: make for make in (llama3, qwen2, roberta, sentencepiece, across_words, metaspace, bert,
                                              pieces)}}


def quoted(text):
    return json.dumps(text, ensure_ascii=False)


def numbers(values):
    return str(values).replace(" ", "").replace("(", "[").replace(")", "]")


LINES = "".join(json.dumps(text) + "\n" for text in TEXTS).encode()
QUOTED = [quoted(text) for text in TEXTS]


def check(folder, given, expected, *keys):
    """The bytes that the program answers, a line for each; what is not equal is looked for only where something is."""
    (folder / "given").write_bytes(given)
    with open(folder / "given") as stdin, open(folder / "answered", "wb") as stdout:
        done = subprocess.run([BINARY, "tokenize", f"--model.path={folder}", *keys], stdin=stdin, stdout=stdout, stderr=subprocess.PIPE,
                              timeout=600)
    assert done.returncode == 0, done.stderr.decode()
    answered = (folder / "answered").read_bytes()
    if answered != "".join(expected).encode():
        lines = answered.decode().split("\n")[:-1]
        for ours, theirs in zip(lines, expected):
            assert ours == theirs[:-1]
        assert len(lines) == len(expected), "an answer a line"


@pytest.mark.parametrize("name", MAKERS)
def test_ids_offsets_and_text(name, tmp_path):
    reference = MAKERS[name]()
    reference.save(str(tmp_path / "tokenizer.json"))
    plain, with_offsets, some = [], [], []
    for text, theirs in zip(QUOTED, reference.encode_batch(TEXTS)):
        ids = theirs.ids
        loss = "0" + ",1" * (len(ids) - 1) if ids else ""
        line = f'{{"text":{text},"ids":{numbers(ids)},"loss":[{loss}]'
        plain.append(line + "}\n")
        with_offsets.append(f'{line},"offsets":{numbers(theirs.offsets)}}}\n')
        if len(some) < 20000:
            some.append(ids)
    check(tmp_path, LINES, with_offsets, "--tokenize.offsets=true")
    check(tmp_path, LINES, plain)  # without offsets the ids are found another way
    rng = random.Random(3)
    size = reference.get_vocab_size()
    some += [[rng.randrange(size) for _ in range(6)] for _ in range(5000)]  # broken UTF-8 as well
    decoded = [f'{{"text":{quoted(text)},"ids":{numbers(ids)}}}\n'
               for ids, text in zip(some, reference.decode_batch(some, skip_special_tokens=False))]
    check(tmp_path, "".join(numbers(ids) + "\n" for ids in some).encode(), decoded, "--tokenize.decode=true")


def test_the_strings_are_wild():
    every = set("Lu Ll Lt Lm Lo Mn Mc Me Nd Nl No Pc Pd Ps Pe Pi Pf Po Sm Sc Sk So Zs Zl Zp Cc Cf Co Cn".split())
    assert {unicodedata.category(c) for text in TEXTS for c in text} == every
