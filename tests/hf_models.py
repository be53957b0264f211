"""Tiny random Hugging Face folders, one for each family and option that the model room knows, and the program itself."""
import os
import pathlib
import shutil
import subprocess

import torch
import transformers

SOURCE = pathlib.Path(os.environ.get("TRIREME_SOURCE", pathlib.Path(__file__).parent.parent))
BINARY = os.environ.get("TRIREME_BINARY", str(SOURCE / "build/release/trireme"))
TOKENIZER = SOURCE / "configs/quickstart/model"
VOCAB = 1152  # of the quickstart's tokenizer, rounded up
END = 2       # its <|im_end|>

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16, "rope_theta": 10000.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
WINDOW = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}


def heads(query, key, size=8):
    return {"num_attention_heads": query, "num_key_value_heads": key, "hidden_size": query * size}


# name: (model_type, what differs from the common shape)
CASES = {
    "llama": ("llama", {}),
    "llama_tied_odd_heads": ("llama", {**heads(3, 3), "tie_word_embeddings": True}),
    "llama_single_kv": ("llama", heads(9, 1)),
    "llama_biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama_head_dim": ("llama", {"head_dim": 16}),
    "llama_rope_llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama_rope_yarn": ("llama", {"rope_parameters": YARN}),
    # Borders of the ramp that lie between two dims: only there truncation counts.
    "llama_rope_yarn_factor": ("llama", {"head_dim": 32, "rope_parameters": {**YARN, "attention_factor": 1.3, "truncate": False}}),
    "llama_rope_yarn_mscale": ("llama", {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.2}}),
    "llama_rope_yarn_ratio": ("llama", {"rope_parameters": {**YARN, "factor": 3.0}}),
    "llama_rope_linear": ("llama", {"rope_parameters": LINEAR}),
    "mistral": ("mistral", {**heads(9, 3), "sliding_window": None}),
    "mistral_window": ("mistral", {**heads(5, 1), "sliding_window": 5, "tie_word_embeddings": True}),
    "mistral_long_window": ("mistral", {"sliding_window": 30}),
    "qwen2": ("qwen2", {**heads(9, 3), "tie_word_embeddings": True}),
    "qwen2_window": ("qwen2", {**heads(7, 1), **WINDOW}),
    "qwen2_layer_types": ("qwen2", {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3_tied": ("qwen3", {**heads(9, 1), "head_dim": 8, "tie_word_embeddings": True}),
    "qwen3_epsilon": ("qwen3", {"head_dim": 16, "rms_norm_eps": 0.01}),
    "qwen3_bias_window": ("qwen3", {**WINDOW, "head_dim": 16, "attention_bias": True}),
    "smollm3": ("smollm3", {**heads(9, 3), "no_rope_layer_interval": 2, "tie_word_embeddings": False}),
    "smollm3_tied_layers": ("smollm3", {**heads(3, 1), "no_rope_layers": [0, 1]}),
    "smollm3_biases": ("smollm3", {"attention_bias": True, "mlp_bias": True}),
    "smollm3_window": ("smollm3", {**WINDOW, "no_rope_layers": [1, 0]}),
}


def make(name, folder, seed=1):
    """Writes the folder of case `name` (fp32, every parameter random, norms and biases too) with the quickstart's tokenizer;
    returns the model."""
    model_type, options = CASES[name]
    shape = {"vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 6,
             "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": END,
             "pad_token_id": 0, **options}
    config = transformers.AutoConfig.for_model(model_type, **shape)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    add_tokenizer(folder)
    return model


def add_tokenizer(folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder)


def run(*words, ranks=1, cache=None, timeout=120, **options):
    """The program's finished process."""
    launch = [] if ranks == 1 else ["mpirun", "-q", "--bind-to", "none", "--oversubscribe", "-n", str(ranks)]
    env = dict(os.environ, OMP_NUM_THREADS="1", OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
    if cache:
        env["TRIREME_CACHE"] = str(cache)
    return subprocess.run(launch + [BINARY, *map(str, words)], env=env, capture_output=True, text=True, timeout=timeout,
                          **options)


def succeed(*words, **options):
    done = run(*words, **options)
    assert done.returncode == 0, done.stderr
    return done
