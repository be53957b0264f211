"""Tiny random Hugging Face folders, one for each family and option that the model room knows."""
import torch
import transformers

VOCAB = 97
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16, "rope_theta": 10000.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}

# name: (model_type, what differs from the common shape)
CASES = {
    "llama": ("llama", {}),
    "llama_tied_odd_heads": ("llama", {"num_attention_heads": 3, "num_key_value_heads": 3, "hidden_size": 24,
                                       "tie_word_embeddings": True}),
    "llama_single_kv": ("llama", {"num_attention_heads": 9, "num_key_value_heads": 1, "hidden_size": 72}),
    "llama_biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama_head_dim": ("llama", {"head_dim": 16}),
    "llama_rope_llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama_rope_yarn": ("llama", {"rope_parameters": YARN}),
    "llama_rope_yarn_factor": ("llama", {"rope_parameters": {**YARN, "attention_factor": 1.3, "truncate": False}}),
    "llama_rope_linear": ("llama", {"rope_parameters": LINEAR}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral_window": ("mistral", {"sliding_window": 5}),
    "qwen2": ("qwen2", {}),
    "qwen2_window": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3_tied": ("qwen3", {"head_dim": 8, "tie_word_embeddings": True}),
}


def make(name, folder, seed=1):
    """Writes the folder of case `name` (fp32, every parameter random, norms and biases too); returns the model."""
    model_type, options = CASES[name]
    shape = {"vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
             "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 64, **options}
    config = transformers.AutoConfig.for_model(model_type, **shape)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    return model
