"""Encoding speed beside Hugging Face's tokenizers: one thread each, by turns, CPU time. Writes results/tokenizer.json.
  python benchmarks/tokenizer_speed.py [--data FOLDER] [--repeats N] [--program FILE] [--results FILE]
                                       [--tokenizers NAME ...] [--texts NAME ...]
The texts are read once by each tokenizer just loaded ("first pass": what a user waits for) and once more ("second pass":
both sides keep words in a cache). Theirs: encode_batch_fast for ids, encode_batch with offsets, the quickest there are.
"""
import argparse
import csv
import datetime
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile

os.environ.update(TOKENIZERS_PARALLELISM="false", RAYON_NUM_THREADS="1")
TOP = pathlib.Path(__file__).resolve().parent.parent
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
          r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def english(data):
    """Questions with answers, comments, queries, plays: no text twice."""
    gsm8k = []
    for name in ("train", "test"):
        for line in (data / f"gsm8k/{name}.jsonl").read_text().splitlines():
            record = json.loads(line)
            gsm8k.append(record["question"] + "\n" + record["answer"])
    other = []
    for name in ("train", "dev", "test"):
        other += [line.split("\t")[0] for line in (data / f"goemotions/{name}.tsv").read_text().splitlines()]
    for name in ("train", "test"):
        with open(data / f"banking77/{name}.csv", newline="") as file:
            other += [row["text"] for row in csv.DictReader(file)]
    other += re.split(r"(?<=\n\n)", (data / "tinyshakespeare/input.txt").read_text())
    return gsm8k, list(dict.fromkeys(other))


def code():
    return [path.read_text() for path in sorted([*(TOP / "src").rglob("*.cpp"), *(TOP / "src").rglob("*.h")])]


def trained(texts, kind):
    """A tokenizer of the kind, of 32,000 tokens, learnt from the texts."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    if kind == "llama3":
        t = Tokenizer(models.BPE())
        t.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
                                                   pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        t.decoder = decoders.ByteLevel()
        alphabet, special = pre_tokenizers.ByteLevel.alphabet(), []
    else:
        t = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        t.pre_tokenizer = pre_tokenizers.Metaspace()
        alphabet, special = [], ["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)]
    t.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=32000, special_tokens=special,
                                                     initial_alphabet=alphabet, show_progress=False))
    if kind == "llama2":  # as Llama 2 has it: no pre-tokenizer, spaces are marked by the normalizer
        t.pre_tokenizer = None
        t.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return t


def theirs(tokenizer, texts_file):
    """What bench_tokenizer_speed prints, of the library."""
    import time
    from tokenizers import Tokenizer
    texts = [json.loads(line) for line in open(texts_file)]
    out = {}
    for what in ("ids", "offsets"):
        begin = time.process_time()
        t = Tokenizer.from_file(tokenizer)
        t.no_truncation()
        t.no_padding()
        out[what] = {"load": time.process_time() - begin}
        encode = t.encode_batch_fast if what == "ids" else t.encode_batch
        for turn in ("first", "second"):
            spent, tokens, total = 0.0, 0, 0
            for at in range(0, len(texts), 1000):
                begin = time.process_time()
                encodings = encode(texts[at:at + 1000], add_special_tokens=False)
                spent += time.process_time() - begin
                for e in encodings:
                    ids = e.ids
                    tokens += len(ids)
                    total += sum(ids)
            out[what].update({turn: spent, "tokens": tokens, "sum": total})
    print(json.dumps(out))


def hardware():
    cpu = next(line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name"))
    memory = int(next(line.split()[1] for line in open("/proc/meminfo") if line.startswith("MemTotal")))
    return {"cpu": cpu, "cores": os.cpu_count(), "memory_gb": round(memory / 2**20)}


def measure(name, tokenizer, text_name, texts, options, folder):
    texts_file = folder / "texts.jsonl"
    texts_file.write_text("".join(json.dumps(t) + "\n" for t in texts))
    size = sum(len(t.encode()) for t in texts)
    commands = {"trireme": [options.program, tokenizer, texts_file],
                "baseline": [sys.executable, __file__, "--theirs", tokenizer, texts_file]}
    runs = []
    for _ in range(options.repeats):
        run = {}
        for side, command in commands.items():
            done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
            run[side] = json.loads(done.stdout)
        for what in ("ids", "offsets"):
            for key in ("tokens", "sum"):
                assert run["trireme"][what][key] == run["baseline"][what][key], (name, text_name, what, key)
        runs.append(run)
    rows = []
    for what in ("ids", "offsets"):
        for turn in ("first", "second"):
            speeds = {side: [size / 1e6 / run[side][what][turn] for run in runs] for side in commands}
            ratios = [a / b for a, b in zip(speeds["trireme"], speeds["baseline"])]
            rows.append({"what": f"{name} on {text_name}: {what}, {turn} pass",
                         "shape": f"{len(texts)} texts, {size / 1e6:.2f} MB", "unit": "MB/s",
                         "trireme": round(statistics.median(speeds["trireme"]), 2),
                         "baseline": round(statistics.median(speeds["baseline"]), 2),
                         "baseline_name": "Hugging Face tokenizers",
                         "ratio": round(statistics.median(ratios), 2), "target": 4})
            best = max(speeds["trireme"]) / max(speeds["baseline"])
            print(json.dumps(rows[-1]), f"pairs {[round(r, 2) for r in ratios]}, best of each {best:.2f}", flush=True)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=pathlib.Path, default=TOP.parent / "shared/data")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--program", type=pathlib.Path, default=TOP / "build/release/benchmarks/bench_tokenizer_speed")
    parser.add_argument("--results", type=pathlib.Path, default=TOP / "benchmarks/results/tokenizer.json")
    parser.add_argument("--tokenizers", nargs="+", default=["gpt2", "llama2", "metaspace", "llama3"])
    parser.add_argument("--texts", nargs="+", default=["gsm8k", "other English", "C++"])
    parser.add_argument("--theirs", nargs=2, metavar=("TOKENIZER", "TEXTS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.theirs:
        return theirs(*options.theirs)
    import tokenizers
    gsm8k, other = english(options.data)
    texts = {"gsm8k": gsm8k, "other English": other, "C++": code()}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        for name in options.tokenizers:
            tokenizer = options.data / "tokenizers/gpt2/tokenizer.json"
            if name != "gpt2":
                tokenizer = folder / f"{name}.json"
                trained(gsm8k[::2] + other[::2] + texts["C++"][::2], name).save(str(tokenizer))
            for text_name in options.texts:
                rows += measure(name, tokenizer, text_name, texts[text_name], options, folder)
    commit = subprocess.run(["git", "-C", TOP, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout
    notes = (f"One thread each, CPU time, {options.repeats} runs by turns, a new process each; medians. Baseline: tokenizers "
             f"{tokenizers.__version__}, encode_batch_fast (ids) and encode_batch (offsets), 1,000 texts a call. Both give "
             "the same ids (their number and sum are compared). llama2, metaspace and llama3 have 32,000 tokens each, "
             "trained on half of the texts; llama2 has no pre-tokenizer. Word caches start empty in the first pass. Load "
             f"average of the machine: {os.getloadavg()[0]:.1f}.")
    measured = {row["what"] for row in rows}
    if options.results.exists():  # rows that this run did not measure stay
        rows = [row for row in json.loads(options.results.read_text())["rows"] if row["what"] not in measured] + rows
    options.results.write_text(json.dumps({
        "benchmark": "tokenizer", "date": datetime.date.today().isoformat(), "commit": commit.strip(),
        "hardware": hardware(), "rows": rows, "notes": notes}, indent=1) + "\n")


if __name__ == "__main__":
    main()
