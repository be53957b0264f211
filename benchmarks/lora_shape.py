"""The shape that LoRA training is measured on, its tokens, and a run of Trireme over them."""
import json

import measure

MODEL = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 49152, "hidden_size": 576,
         "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 9, "num_key_value_heads": 3,
         "head_dim": 64, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
         "hidden_act": "silu", "tie_word_embeddings": True, "initializer_range": 0.02, "eos_token_id": 2}
ROWS, LENGTH, RANK = 4, 256, 16
SHAPE = "576 wide, 6 layers, 9/3 heads, 49,152 tokens, rank 16 all linear, 4 x 256"
TOKENIZER = measure.SOURCE / "configs/quickstart/model"


def prepare(folder, num_rows):
    """config.json and text.txt in `folder`: text for num_rows rows at least, from the repository's own records."""
    (folder / "config.json").write_text(json.dumps(MODEL))
    records = (measure.SOURCE / "configs/quickstart/train.jsonl").read_text().splitlines()
    text = "\n".join(m["content"] for r in records for m in json.loads(r)["messages"])
    (folder / "text.txt").write_text("\n".join([text] * (1 + num_rows * LENGTH // (len(text) // 4))))


def trireme(folder, name, dtype, steps, ranks=1, threads=0):
    """What measure.run gives, and the lines of the steps."""
    run = folder / name
    out = measure.run(measure.mpirun(
        ranks, measure.BINARY, "train", f"--model.config={folder / 'config.json'}", f"--model.tokenizer={TOKENIZER}",
        f"--data.train={folder / 'text.txt'}", f"--data.max_length={LENGTH}", f"--data.cache={folder / 'cache'}",
        "--data.shuffle=false", "--task.kind=pretrain", f"--train.dtype={dtype}", f"--train.steps={steps}",
        f"--train.micro_batch_size={ROWS // ranks}", f"--lora.rank={RANK}", f"--train.threads={threads}",
        "--schedule.kind=constant", "--optim.lr=1e-4", f"--run.dir={run}"), progress=str(run / "metrics.jsonl"))
    return out, measure.train_steps(run)
