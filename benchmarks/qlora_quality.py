"""What fewer bits cost in quality: a small model is pre-trained on GSM8K's questions and solutions in words (TRIREME_TEST_DATA), and then
tuned with LoRA, beside weights of each format, to give answers as they are there, with calculator annotations and the number at the end; from
the same seed over the same records. Rows are losses on test questions, as ratio beside those of bfloat16 weights. Run with the Python of the
test environment; `--keep FOLDER` leaves models and records there."""
import argparse
import json
import math
import pathlib
import re
import tempfile

import tokenizers
import transformers

import measure

VOCABULARY, PRETRAINED_RECORDS, TEST_RECORDS, RANK = 4096, 6000, 400, 16
MODEL = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
         "hidden_act": "silu", "tie_word_embeddings": True, "initializer_range": 0.02, "bos_token_id": 0, "eos_token_id": 0}
SHAPE = "256 wide, 4 layers, 4/2 heads, 4,096 tokens"
FORMATS = {"bfloat16": [], "nf4": ["--quant.base=nf4"], "nf4, scales in float32": ["--quant.base=nf4", "--quant.double=false"],
           "fp4": ["--quant.base=fp4"], "fp4, scales in float32": ["--quant.base=fp4", "--quant.double=false"], "int8": ["--quant.base=int8"]}
RECORDS = ["--data.prompt_field=question", "--data.completion_field=answer", "--data.separator=\n"]


def prepare(folder):
    """config.json, a tokenizer of GSM8K's own words, and records that no other stage has: pretrain.jsonl, tune.jsonl, test.jsonl."""
    gsm8k = pathlib.Path(measure.DATA) / "gsm8k"
    train, test = ((gsm8k / f"{name}.jsonl").read_text().splitlines() for name in ("train", "test"))
    in_words = [record | {"answer": re.sub(r"<<.*?>>|\n####.*", "", record["answer"])} for record in map(json.loads, train[:PRETRAINED_RECORDS])]
    for name, lines in (("pretrain", map(json.dumps, in_words)), ("tune", train[PRETRAINED_RECORDS:]), ("test", test[:TEST_RECORDS])):
        (folder / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    (folder / "config.json").write_text(json.dumps(MODEL))
    words = tokenizers.Tokenizer(tokenizers.models.BPE())
    words.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = tokenizers.decoders.ByteLevel()
    words.train_from_iterator((text for record in in_words for text in record.values()), tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<|endoftext|>"], initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|endoftext|>").save_pretrained(folder / "tokenizer")


def trireme(folder, verb, *keys):
    return measure.run([measure.BINARY, verb, *RECORDS, f"--data.cache={folder / 'cache'}", *keys], timeout=3600)["stdout"]


def evaluated(folder, *keys, dtype="bfloat16"):
    """The loss of the answers of test.jsonl."""
    return json.loads(trireme(folder, "eval", f"--data.eval={folder / 'test.jsonl'}", f"--model.dtype={dtype}", *keys))["loss"]


def main():
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--pretrain-steps", type=int, default=750)
    arguments.add_argument("--steps", type=int, default=240, help="of LoRA")
    arguments.add_argument("--keep", type=pathlib.Path, help="a folder for the model and the runs")
    arguments.add_argument("--print", action="store_true", help="write no result file")
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or pathlib.Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        prepare(folder)
        new = [f"--model.config={folder / 'config.json'}", f"--model.tokenizer={folder / 'tokenizer'}"]
        trireme(folder, "train", *new, "--task.kind=pretrain", f"--data.train={folder / 'pretrain.jsonl'}", "--data.max_length=256", "--data.packing=true",
                "--train.dtype=bfloat16", "--model.dtype=bfloat16", "--train.micro_batch_size=16", f"--train.steps={options.pretrain_steps}", "--optim.lr=3e-3",
                "--optim.weight_decay=0.1", "--optim.beta2=0.95", "--schedule.kind=cosine", "--schedule.warmup_steps=0.05", "--schedule.min_lr=1e-4",
                f"--run.dir={folder / 'pretrained'}")
        model = f"--model.path={folder / 'pretrained/model'}"
        before, after = {}, {}
        for name, keys in FORMATS.items():
            run = folder / f"lora-{'-'.join(keys).replace('--', '').replace('quant.', '') or 'none'}"
            trireme(folder, "train", model, *keys, f"--data.train={folder / 'tune.jsonl'}", "--data.max_length=512", "--data.packing=true", "--train.dtype=bfloat16",
                    "--train.micro_batch_size=4", f"--train.steps={options.steps}", f"--lora.rank={RANK}", f"--lora.alpha={RANK}", "--optim.lr=1e-3",
                    "--schedule.kind=linear", "--schedule.warmup_steps=0.05", f"--run.dir={run}")
            before[name] = evaluated(folder, model, *keys)
            after[name] = evaluated(folder, model, *keys, f"--lora.path={run / 'adapter'}")
        random, learnt = evaluated(folder, *new), evaluated(folder, model, dtype="float32")
    rows = [measure.row("GSM8K answers, random weights", SHAPE, "perplexity", math.exp(random)),
            measure.row("GSM8K answers, pre-trained, float32", SHAPE, "perplexity", math.exp(learnt))]
    rows += [measure.row(f"GSM8K answers, {when}, {name}", SHAPE, "nats", losses[name], *(() if name == "bfloat16" else (losses["bfloat16"], "bfloat16")),
                         target=1.01 if when == "after LoRA" and name == "nf4" else None)
             for when, losses in (("before LoRA", before), ("after LoRA", after)) for name in FORMATS]
    measure.finish("qlora_quality", rows,
                   f"{options.pretrain_steps} steps of pre-training of 16 x 256 tokens on {PRETRAINED_RECORDS} of GSM8K's training records without annotations, {options.steps} of LoRA (rank {RANK}, all linear) of "
                   f"4 x 512 on the others, learning the answers; loss of the answers of {TEST_RECORDS} test records", not options.print)


if __name__ == "__main__":
    main()
