"""README's tables are what the program says and what the benchmarks have kept."""
import json
import re

from program import SOURCE, run

README = (SOURCE / "README.md").read_text()
COMMON = dict(architectures=["LlamaForCausalLM"], model_type="llama", rms_norm_eps=1e-5, rope_theta=10000.0, max_position_embeddings=131072, tie_word_embeddings=False)
SHAPES = {"7B": dict(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32),
          "13B": dict(vocab_size=32000, hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40, num_key_value_heads=40),
          "70B": dict(vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8)}


def planned(work, config, *keys):
    return run(work, "plan", f"--model.config={config}", "--plan.ranks=1", "--plan.memory_gb=80", "--train.dtype=bfloat16", "--train.recompute=full", "--data.max_length=2048",
               "--lora.rank=16", *keys).stderr


def test_memory_of_quantized_bases(tmp_path):
    for name, shape in SHAPES.items():
        (tmp_path / "config.json").write_text(json.dumps(COMMON | shape))
        cells = []
        for base in ("none", "int8", "nf4"):
            said = planned(tmp_path, tmp_path / "config.json", "--train.micro_batch_size=1", f"--quant.base={base}")
            longest = re.search(r"rows of up to (\d+) tokens fit", said)
            row = "none" if not longest else "all" if longest[1] == "131072" else f"{int(longest[1]):,}"
            cells.append(f"{re.search('a rank needs ([0-9.]+ GiB)', said)[1]}, {row}")
        line = f"| {name} | {' | '.join(cells)} |"
        assert line in README.replace("all 131,072 tokens", "all"), line


def test_the_smallest_footprint(tmp_path):
    keys, rows = [], re.findall(r"^\| (?:AdamW in fp32|and `([^`]+)`) \| ([0-9.]+ GiB) \|$", README, re.M)
    assert len(rows) == 5
    for more, memory in rows:
        keys += [f"--{key}" for key in more.split()]
        said = planned(tmp_path, SOURCE / "benchmarks/gpu_llama_8b.json", "--train.micro_batch_size=2", "--quant.base=nf4", *keys)
        assert f"a rank needs {memory} of its device" in said, (keys, said)


def test_quality_of_quantized_bases():
    rows = json.loads((SOURCE / "benchmarks/results/qlora_quality.json").read_text())["rows"]
    losses = {tuple(row["what"].split(", ", 2)[1:]): row for row in rows if row["unit"] == "nats"}
    formats = [name for when, name in losses if when == "after LoRA"]
    assert len(formats) == 6
    for name in formats:
        before, after = losses["before LoRA", name], losses["after LoRA", name]
        line = f"| {name} | {before['trireme']:.3f} | {after['trireme']:.3f} | {'' if after['ratio'] is None else format(after['ratio'], '.3f')} |"
        assert line in README, line
