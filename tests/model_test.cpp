// The model room on one device: config.json, initial weights, LoRA, the KV cache. Logits are compared with transformers in
// parity_model_test.py.
#include "support.h"
#include "tiny_model.h"

#include <ATen/Parallel.h>

#include <map>

#include "base/check.h"
#include "model/initialize.h"
#include "model/lora.h"
#include "model/transformer.h"
#include "ops/ops.h"

namespace trireme {
namespace {

using test::config_of;
using test::input_of;
using test::learnt;
using test::near;
using test::random_row;
using test::same_bits;
using test::small_config;

template <typename E, typename F>
std::string error_of(const F& f) {
  try {
    f();
  } catch (const E& error) {
    return error.what();
  }
  return "accepted";
}

std::string refusal(const Json& json) { return error_of<DataError>([&] { config_of(json); }); }

at::Tensor logits_of(Transformer& model, const ModelInput& input, KvCache* cache = nullptr) {
  at::NoGradGuard no_grad;
  return model.logits(model.forward(input, cache));
}

TEST(HfConfig, RefusesWithExactWords) {
  const std::pair<Json, std::string> cases[] = {
      {{{"model_type", "gpt2"}},
       "config.json: model_type \"gpt2\" is not supported; supported are llama, mistral, qwen2, qwen3, smollm3 (SmolLM and "
       "SmolLM2 are llama)"},
      {{{"hidden_size", 30}, {"head_dim", nullptr}},
       "config.json: hidden_size 30 is no multiple of num_attention_heads 4, and there is no head_dim"},
      {{{"num_key_value_heads", 3}}, "config.json: num_attention_heads 4 is no multiple of num_key_value_heads 3"},
      {{{"head_dim", 7}}, "config.json: head_dim 7 is odd; rotary embedding needs an even one"},
      {{{"num_hidden_layers", 0}}, "config.json: \"num_hidden_layers\" is 0; allowed are 1 to 4096"},
      {{{"vocab_size", 1LL << 40}}, "config.json: \"vocab_size\" is 1099511627776; allowed are 1 to 16777216"},
      {{{"hidden_size", "32"}}, "config.json: \"hidden_size\" must be an integer, found \"32\""},
      {{{"hidden_act", "gelu"}}, "config.json: hidden_act \"gelu\" is not supported; supported is silu"},
      {{{"rms_norm_eps", -1}}, "config.json: \"rms_norm_eps\" is -1; it must be positive"},
      {{{"dtype", "int8"}},
       "config.json: dtype \"int8\" is not supported; supported are float32, bfloat16, float16, float64"},
      {{{"eos_token_id", "x"}}, "config.json: \"eos_token_id\" must be an id or a list of ids"},
      {{{"attention_dropout", 0.1}}, "config.json: an attention_dropout other than 0 is not supported"},
      {{{"quantization_config", {{"bits", 4}}}},
       "config.json: quantization_config: load_in_4bit=false is not supported; supported is bitsandbytes in 4 or 8 bits. Take the model's original weights"},
      {{{"quantization_config", 4}}, "config.json: quantization_config: an object is expected, found number"},
      {{{"rope_scaling", {{"type", "dynamic"}, {"factor", 2.0}}}},
       "config.json: rope_scaling: rope type \"dynamic\" is not supported; supported are default, linear, llama3, yarn"},
      {{{"rope_parameters", {{"rope_type", "linear"}}}}, "config.json: rope_parameters: the key \"factor\" is missing"},
      {{{"rope_scaling", {{"type", "linear"}, {"factor", 0}}}},
       "config.json: rope_scaling: \"factor\" is 0; it must be positive"},
      {{{"rope_scaling", {{"rope_type", "linear"}, {"factor", 2.0}}}, {"rope_parameters", {{"rope_type", "linear"}, {"factor", 4.0}}}},
       "config.json: rope_scaling and rope_parameters contradict each other; remove one"},
      {{{"rope_theta", 1e4}, {"rope_parameters", {{"rope_theta", 5e5}}}},
       "config.json: rope_parameters: rope_theta 500000 contradicts the rope_theta 10000 beside it; remove one"},
      {{{"rope_parameters", {{"rope_type", "llama3"}, {"factor", 8.0}, {"low_freq_factor", 4.0}, {"high_freq_factor", 4.0}}}},
       "config.json: rope_parameters: high_freq_factor must be above low_freq_factor"},
      {{{"rope_parameters", {{"full_attention", {{"rope_type", "default"}}}}}},
       "config.json: rope_parameters has parameters by kind of layer, which is not supported"},
      {{{"rope_scaling", 3}}, "config.json: rope_scaling: an object is expected"},
      {{{"partial_rotary_factor", 0.5}}, "config.json: a partial_rotary_factor other than 1 is not supported"},
  };
  for (const auto& [change, words] : cases) EXPECT_EQ(refusal(small_config("llama", change)), words) << change;
  EXPECT_EQ(refusal(Json::array()), "config.json: an object is expected");
  Json lacks = small_config("llama");
  lacks.erase("hidden_size");
  EXPECT_EQ(refusal(lacks), "config.json: the key \"hidden_size\" is missing");
  const Json windows = {{"use_sliding_window", true}, {"sliding_window", 4}};
  Json layers = windows;
  layers["layer_types"] = {"full_attention"};
  EXPECT_EQ(refusal(small_config("qwen2", layers)), "config.json: \"layer_types\" must list 2 layers");
  layers["layer_types"] = {"full_attention", "linear_attention"};
  EXPECT_EQ(refusal(small_config("qwen2", layers)),
            "config.json: \"layer_types\" has \"linear_attention\"; supported are full_attention, sliding_attention");
  EXPECT_EQ(refusal(small_config("smollm3", {{"no_rope_layers", {1}}})),
            "config.json: \"no_rope_layers\" must list 2 layers");
  EXPECT_EQ(refusal(small_config("llama")), "accepted");
}

TEST(HfConfig, OldAndNewSpellingsAreOneModel) {
  const Json options = {{"factor", 8.0}, {"low_freq_factor", 1.0}, {"high_freq_factor", 4.0}, {"original_max_position_embeddings", 16}};
  Json old_options = options, new_options = options;
  old_options["type"] = "llama3";
  new_options["rope_type"] = "llama3";
  new_options["rope_theta"] = 5e5;
  ModelConfig older = config_of(small_config("llama", {{"rope_theta", 5e5}, {"rope_scaling", old_options}, {"torch_dtype", "bfloat16"}}));
  ModelConfig newer = config_of(small_config("llama", {{"rope_parameters", new_options}, {"dtype", "bfloat16"}}));
  ModelConfig both = config_of(small_config("llama", {{"rope_theta", 5e5}, {"rope_scaling", old_options}, {"rope_parameters", new_options}}));
  EXPECT_EQ(older.rope, newer.rope);
  EXPECT_EQ(older.rope, both.rope);
  EXPECT_EQ(older.rope.theta, 5e5);
  EXPECT_EQ(older.rope.original_max_positions, 16);
  EXPECT_EQ(older.dtype, "bfloat16");
  EXPECT_EQ(newer.dtype, "bfloat16");
  EXPECT_EQ(config_of(small_config("llama", {{"rope_theta", 5e5}, {"rope_scaling", nullptr}})).rope.theta, 5e5);
  // Beside the object it counts before that within.
  EXPECT_EQ(config_of(small_config("llama", {{"rope_parameters", new_options}, {"original_max_position_embeddings", 32}})).rope.original_max_positions, 32);
}

TEST(HfConfig, SilentFilesHaveTheDefaultsOfTheirFamily) {
  auto without = [](const std::string& type, const std::string& key) {
    Json json = small_config(type, {{"num_attention_heads", 32}});
    json.erase(key);
    return config_of(json);
  };
  EXPECT_EQ(without("llama", "num_key_value_heads").num_kv_heads, 32);
  EXPECT_EQ(without("mistral", "num_key_value_heads").num_kv_heads, 8);
  EXPECT_EQ(without("smollm3", "num_key_value_heads").num_kv_heads, 4);
  EXPECT_EQ(config_of(small_config("mistral", {{"num_key_value_heads", nullptr}})).num_kv_heads, 4);
  EXPECT_EQ(without("llama", "max_position_embeddings").max_positions, 2048);
  EXPECT_EQ(without("qwen3", "head_dim").head_dim, 128);
  EXPECT_EQ(config_of(small_config("llama")).rope.theta, 1e4);
  EXPECT_EQ(config_of(small_config("smollm3")).rope.theta, 2e6);
  EXPECT_EQ(config_of(small_config("smollm3", {{"rope_parameters", {{"rope_type", "default"}}}})).rope.theta, 2e6);
  EXPECT_TRUE(config_of(small_config("smollm3")).tie_embeddings);
  EXPECT_FALSE(config_of(small_config("qwen2")).tie_embeddings);
}

TEST(HfConfig, WindowsAndLayersWithoutRope) {
  using Windows = std::vector<int64_t>;
  EXPECT_EQ(config_of(small_config("mistral")).window, Windows({4096, 4096}));
  EXPECT_EQ(config_of(small_config("mistral", {{"sliding_window", nullptr}})).window, Windows({-1, -1}));
  EXPECT_EQ(config_of(small_config("mistral", {{"sliding_window", 5}})).window, Windows({5, 5}));
  EXPECT_EQ(config_of(small_config("llama", {{"sliding_window", 5}})).window, Windows({-1, -1}));
  EXPECT_EQ(config_of(small_config("qwen2", {{"sliding_window", 5}, {"max_window_layers", 0}})).window, Windows({-1, -1}));
  const Json slides = {{"use_sliding_window", true}, {"sliding_window", 5}, {"max_window_layers", 1}};
  EXPECT_EQ(config_of(small_config("qwen3", slides)).window, Windows({-1, 5}));
  Json listed = slides;
  listed["layer_types"] = {"sliding_attention", "full_attention"};
  EXPECT_EQ(config_of(small_config("qwen2", listed)).window, Windows({5, -1}));
  ModelConfig smol = config_of(small_config("smollm3", {{"no_rope_layers", {1, 0}}, {"use_sliding_window", true}, {"sliding_window", 5}}));
  EXPECT_EQ(smol.uses_rope, std::vector<bool>({true, false}));
  EXPECT_EQ(smol.window, Windows({-1, 5}));
  EXPECT_EQ(config_of(small_config("smollm3", {{"no_rope_layer_interval", 2}})).uses_rope, std::vector<bool>({true, false}));
}

TEST(HfConfig, WhatIsWrittenFromFieldsReadsBackTheSame) {
  const Json cases[] = {
      small_config("llama", {{"attention_bias", true}, {"mlp_bias", true}, {"eos_token_id", {1, 2}}, {"bos_token_id", 0}}),
      small_config("llama", {{"rope_parameters", {{"rope_type", "yarn"}, {"factor", 4.0}, {"original_max_position_embeddings", 16}, {"mscale", 1.5}, {"mscale_all_dim", 1.2}, {"truncate", false}}}}),
      small_config("mistral", {{"sliding_window", 5}}),
      small_config("mistral", {{"sliding_window", nullptr}}),
      small_config("qwen2", {{"tie_word_embeddings", true}}),
      small_config("qwen3", {{"use_sliding_window", true}, {"sliding_window", 5}, {"max_window_layers", 1}}),
      small_config("smollm3", {{"no_rope_layers", {1, 0}}, {"use_sliding_window", true}, {"sliding_window", 5}}),
  };
  for (const Json& json : cases) {
    Json first = model_config_from_fields(config_of(json), "float32");
    ModelConfig again = config_of(first), given = config_of(json);
    EXPECT_EQ(model_config_from_fields(again, "float32"), first) << json;
    EXPECT_EQ(again.rope, given.rope);
    EXPECT_EQ(again.window, given.window) << json;
    EXPECT_EQ(again.uses_rope, given.uses_rope);
    EXPECT_EQ(again.eos_ids, given.eos_ids);
    EXPECT_EQ(again.num_parameters(), given.num_parameters());
  }
  Json raw = small_config("llama", {{"dtype", "float32"}, {"of_another_program", 7}});
  Json out = model_config_to_json(config_of(raw), "bfloat16");
  EXPECT_EQ(out["dtype"], "bfloat16");
  EXPECT_EQ(out["of_another_program"], 7);
  EXPECT_FALSE(out.contains("torch_dtype"));
}

TEST(HfConfig, BiasesOfTheFamilies) {
  struct {
    const char* type;
    bool asked, qkv, output, mlp;
  } cases[] = {{"llama", false, false, false, false}, {"llama", true, true, true, true},     {"mistral", true, false, false, false},
               {"qwen2", false, true, false, false},  {"qwen2", true, true, false, false},   {"qwen3", false, false, false, false},
               {"qwen3", true, true, true, false},    {"smollm3", true, true, true, true}};
  for (const auto& c : cases) {
    ModelConfig config = config_of(small_config(c.type, {{"attention_bias", c.asked}, {"mlp_bias", c.asked}}));
    EXPECT_EQ(config.qkv_bias, c.qkv) << c.type << c.asked;
    EXPECT_EQ(config.output_bias, c.output) << c.type << c.asked;
    EXPECT_EQ(config.mlp_bias, c.mlp) << c.type << c.asked;
    EXPECT_EQ(config.qk_norm, std::string(c.type) == "qwen3");
  }
}

TEST(HfConfig, ParametersAreCountedAsTheModelHasThem) {
  for (const char* type : {"llama", "mistral", "qwen2", "qwen3", "smollm3"})
    for (bool more : {false, true}) {
      ModelConfig config = config_of(small_config(type, {{"attention_bias", more}, {"mlp_bias", more}, {"tie_word_embeddings", more}}));
      Transformer model(config, at::kFloat, 0, Weights::kUninitialized, at::kMeta);
      int64_t count = 0;
      for (const auto& p : model.parameters()) count += p.value.numel();
      EXPECT_EQ(config.num_parameters(), count) << type << more;
    }
}

TEST(HfConfig, YarnsOptions) {
  const Json least = {{"rope_type", "yarn"}, {"factor", 4.0}};
  RopeConfig rope = config_of(small_config("llama", {{"rope_parameters", least}})).rope;
  EXPECT_EQ(rope.original_max_positions, 64);  // max_position_embeddings
  EXPECT_EQ(rope.beta_fast, 32);
  EXPECT_EQ(rope.beta_slow, 1);
  EXPECT_FALSE(rope.attention_factor);
  EXPECT_TRUE(rope.truncate);
  Json all = least;
  all.update({{"original_max_position_embeddings", 16}, {"beta_fast", 24}, {"beta_slow", 2}, {"attention_factor", 1.5}, {"mscale", 0.7}, {"mscale_all_dim", 1.2}, {"truncate", false}});
  rope = config_of(small_config("llama", {{"rope_parameters", all}})).rope;
  EXPECT_EQ(rope, (RopeConfig{"yarn", 1e4, 4, 1, 4, 16, 24, 2, 1.5, 0.7, 1.2, false}));
}

TEST(HfConfig, IdsAndDtypes) {
  ModelConfig config = config_of(small_config("llama", {{"eos_token_id", {2, 7}}, {"bos_token_id", 1}, {"pad_token_id", nullptr}, {"torch_dtype", "auto"}}));
  EXPECT_EQ(config.eos_ids, std::vector<int64_t>({2, 7}));
  EXPECT_EQ(config.bos_id, 1);
  EXPECT_FALSE(config.pad_id);
  EXPECT_EQ(config.dtype, "");
  EXPECT_EQ(config_of(small_config("llama", {{"eos_token_id", 3}})).eos_ids, std::vector<int64_t>({3}));
  EXPECT_EQ(parse_dtype("bf16", "train.dtype"), at::kBFloat16);
  EXPECT_EQ(parse_dtype(dtype_name(at::kHalf), "train.dtype"), at::kHalf);
  EXPECT_EQ(error_of<ConfigError>([] { parse_dtype("int8", "train.dtype"); }),
            "train.dtype=int8: allowed are float32, bfloat16, float16, float64");
}

// --- weights ---------------------------------------------------------------------------------------------------------

TEST(InitialWeights, AreAFunctionOfSeedNameAndPlace) {
  ModelConfig config = config_of(small_config("qwen2", {{"hidden_size", 320}, {"vocab_size", 200}}));
  const int before = at::get_num_threads();
  at::set_num_threads(1);
  Transformer one(config, at::kFloat, 7);
  at::set_num_threads(2);
  Transformer two(config, at::kFloat, 7), other(config, at::kFloat, 8), half(config, at::kBFloat16, 7);
  at::set_num_threads(before);
  auto a = one.parameters(), b = two.parameters(), c = other.parameters(), d = half.parameters();
  ASSERT_EQ(a.size(), b.size());
  int64_t count = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    count += a[i].value.numel();
    EXPECT_TRUE(same_bits(a[i].value, b[i].value)) << a[i].name;
    EXPECT_TRUE(same_bits(a[i].value.to(at::kBFloat16), d[i].value)) << a[i].name;
    if (a[i].value.dim() < 2) {
      const double expected = a[i].name.ends_with(".bias") ? 0.0 : 1.0;
      EXPECT_TRUE(same_bits(a[i].value, at::full_like(a[i].value, expected))) << a[i].name;
      continue;
    }
    EXPECT_FALSE(at::equal(a[i].value, c[i].value)) << a[i].name;
    for (size_t j = 0; j < i; ++j)
      EXPECT_FALSE(a[j].value.sizes() == a[i].value.sizes() && at::equal(a[j].value, a[i].value)) << a[i].name << a[j].name;
    // Standard error of the mean of n values is std / sqrt(n), of their std std / sqrt(2 n): six of them.
    const double n = static_cast<double>(a[i].value.numel()), std = config.initializer_range;
    EXPECT_NEAR(a[i].value.mean().item<double>(), 0.0, 6 * std / std::sqrt(n)) << a[i].name;
    EXPECT_NEAR(a[i].value.std().item<double>(), std, 6 * std / std::sqrt(2 * n)) << a[i].name;
  }
  EXPECT_EQ(count, config.num_parameters());
}

TEST(InitialWeights, UniformStaysWithinItsBound) {
  at::Tensor w = at::empty({200, 50});
  fill_uniform({"w", w, ShardSpec::whole(w)}, 3, 0.25);
  EXPECT_LT(w.max().item<double>(), 0.25);
  EXPECT_GE(w.min().item<double>(), -0.25);
  EXPECT_NEAR(w.mean().item<double>(), 0.0, 6 * 0.25 / std::sqrt(3.0 * 10000));
  EXPECT_NEAR(w.std().item<double>(), 0.25 / std::sqrt(3.0), 0.01);
}

// --- LoRA ------------------------------------------------------------------------------------------------------------

std::vector<std::string> adapted(Transformer& model) {
  std::vector<std::string> out;
  for (Linear* l : model.linears())
    if (l->lora) out.push_back(l->path);
  return out;
}

TEST(Lora, StartsAsTheBaseWithTheBaseFrozen) {
  Transformer model(config_of(small_config("llama")), at::kFloat, 1);
  ModelInput input = input_of({random_row(9, 1), random_row(5, 2)});
  at::Tensor base = logits_of(model, input);
  attach_lora(model, {4, 8.0, 0.0, false, {"all-linear"}}, 5);
  EXPECT_TRUE(same_bits(logits_of(model, input), base));
  int64_t trained = 0;
  for (const auto& p : model.parameters()) {
    EXPECT_EQ(p.value.requires_grad(), p.name.find(".lora_") != std::string::npos) << p.name;
    trained += p.value.requires_grad();
    if (p.name.ends_with(".lora_B.weight")) {
      EXPECT_EQ(p.value.abs().max().item<double>(), 0.0);
    }
    if (!p.name.ends_with(".lora_A.weight")) continue;
    const double bound = 1 / std::sqrt(static_cast<double>(p.value.size(1)));  // PEFT: kaiming_uniform with a = sqrt(5)
    EXPECT_LE(p.value.abs().max().item<double>(), bound) << p.name;
    EXPECT_GT(p.value.abs().max().item<double>(), 0.8 * bound) << p.name;
  }
  EXPECT_EQ(trained, 2 * 7 * 2);
}

TEST(Lora, TargetsByNamePathPatternAndAll) {
  const ModelConfig config = config_of(small_config("llama"));
  auto attach = [&](const std::vector<std::string>& targets) {
    Transformer model(config, at::kFloat, 1);
    attach_lora(model, {2, 2.0, 0.0, false, targets}, 1);
    return std::pair(adapted(model), lora_targets(model));
  };
  using Names = std::vector<std::string>;
  EXPECT_EQ(attach({"all-linear"}).first.size(), 14u);
  EXPECT_EQ(attach({"q_proj", "down_proj"}).first,
            Names({"model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"}));
  EXPECT_EQ(attach({"q_proj", "down_proj"}).second, Names({"down_proj", "q_proj"}));
  EXPECT_EQ(attach({"layers.1.mlp.up_proj"}).first, Names({"model.layers.1.mlp.up_proj"}));
  EXPECT_EQ(attach({"layers.1.mlp.up_proj"}).second, Names({"model.layers.1.mlp.up_proj"}));
  EXPECT_EQ(attach({".*\\.0\\..*_attn\\.(q|v)_proj"}).first, Names({"model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"}));
}

TEST(Lora, WhatCannotBeIsRefused) {
  auto words = [](const LoraConfig& lora) {
    Transformer model(config_of(small_config("llama")), at::kFloat, 1);
    return error_of<ConfigError>([&] { attach_lora(model, lora, 1); });
  };
  EXPECT_EQ(words({2, 2.0, 0.0, false, {"q_proj", "qq_proj"}}),
            "lora.targets=qq_proj: no linear layer has this name; there are down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, "
            "v_proj, or all-linear");
  EXPECT_EQ(words({2, 2.0, 0.0, false, {"proj"}}).substr(0, 55), "lora.targets=proj: no linear layer has this name; there");
  EXPECT_EQ(words({2, 2.0, 0.0, false, {"(q_proj"}}).substr(0, 48), "lora.targets=(q_proj: not a regular expression: ");
  EXPECT_EQ(words({0, 2.0, 0.0, false, {"q_proj"}}), "lora.rank=0: must be at least 1");
  EXPECT_EQ(words({2, 2.0, 1.0, false, {"q_proj"}}), "lora.dropout=1: must be from 0 to below 1");
}

TEST(Lora, AdaptersAreAFunctionOfSeedAndLayerInTheModelsDtype) {
  auto adapters = [](uint64_t seed, const std::vector<std::string>& targets, at::ScalarType dtype = at::kFloat) {
    Transformer model(config_of(small_config("llama")), dtype, 1);
    attach_lora(model, {4, 8.0, 0.0, false, targets}, seed);
    std::map<std::string, at::Tensor> out;
    for (auto& p : model.parameters())
      if (p.name.find(".lora_") != std::string::npos) out[p.name] = p.value.detach();
    return out;
  };
  auto all = adapters(5, {"all-linear"}), some = adapters(5, {"q_proj"}), other = adapters(6, {"q_proj"});
  const std::string name = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight";
  EXPECT_EQ(some.size(), 4u);
  EXPECT_TRUE(same_bits(all.at(name), some.at(name)));
  EXPECT_FALSE(at::equal(some.at(name), other.at(name)));
  EXPECT_FALSE(at::equal(all.at(name), all.at("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight")));
  EXPECT_EQ(all.at(name).sizes(), at::IntArrayRef({4, 32}));
  EXPECT_EQ(all.at("base_model.model.model.layers.1.mlp.up_proj.lora_B.weight").sizes(), at::IntArrayRef({40, 4}));
  for (const auto& [key, value] : adapters(5, {"all-linear"}, at::kBFloat16))
    EXPECT_TRUE(same_bits(value, all.at(key).to(at::kBFloat16))) << key;
}

void randomise_adapters(Transformer& model) {
  at::NoGradGuard no_grad;
  for (auto& p : model.parameters())
    if (p.name.find(".lora_") != std::string::npos) fill_normal(p, 11, 0.2);
}

TEST(Lora, MergedIsUnmergedAndTheScaleCounts) {
  for (bool stabilized : {false, true}) {
    LoraConfig lora{4, 6.0, 0.3, stabilized, {"q_proj", "v_proj", "down_proj"}};
    EXPECT_DOUBLE_EQ(lora.scale(), stabilized ? 3.0 : 1.5);
    Transformer model(config_of(small_config("qwen3")), at::kDouble, 1), plain(config_of(small_config("qwen3")), at::kDouble, 1);
    ModelInput input = input_of({random_row(12, 1)});
    attach_lora(model, lora, 1);
    randomise_adapters(model);
    at::Tensor unmerged = logits_of(model, input);  // evaluation: no dropout
    // By hand: W + scale B A.
    auto theirs = plain.linears();
    at::NoGradGuard no_grad;
    for (size_t i = 0; i < theirs.size(); ++i) {
      Linear* ours = model.linears()[i];
      if (ours->lora) theirs[i]->weight_OI.add_(at::mm(ours->lora->b_OR, ours->lora->a_RI) * lora.scale());
    }
    EXPECT_TRUE(near(unmerged, logits_of(plain, input)));
    for (Linear* l : model.linears())
      if (l->lora) merge_lora(l->weight_OI, *std::exchange(l->lora, nullptr));
    EXPECT_FALSE(has_lora(model));
    EXPECT_TRUE(near(logits_of(model, input), unmerged));
    EXPECT_FALSE(at::allclose(unmerged, logits_of(*std::make_unique<Transformer>(config_of(small_config("qwen3")), at::kDouble, 1), input)));
  }
}

TEST(Lora, MergingIn16BitRoundsOnce) {
  Transformer model(config_of(small_config("llama")), at::kBFloat16, 1);
  attach_lora(model, {4, 8.0, 0.0, false, {"all-linear"}}, 1);
  randomise_adapters(model);
  std::vector<at::Tensor> expected;
  for (Linear* l : model.linears())
    expected.push_back(l->weight_OI.detach().to(at::kDouble) + at::mm(l->lora->b_OR.detach().to(at::kDouble), l->lora->a_RI.detach().to(at::kDouble)) * 2.0);
  for (Linear* l : model.linears()) merge_lora(l->weight_OI, *l->lora);
  for (size_t i = 0; i < expected.size(); ++i) {
    at::Tensor merged = model.linears()[i]->weight_OI.detach().to(at::kDouble);
    // Half a unit of the last of 8 bits, and a little for the fp32 sum.
    at::Tensor allowed = expected[i].abs() * std::ldexp(1.001, -8) + 1e-6;
    EXPECT_TRUE(((merged - expected[i]).abs() <= allowed).all().item<bool>()) << model.linears()[i]->path;
  }
}

// --- forward ---------------------------------------------------------------------------------------------------------

struct Family {
  const char* name;
  const char* type;
  Json more;
};

class FamilyTest : public testing::TestWithParam<Family> {
 protected:
  FamilyTest() { at::set_num_threads(1); }  // on matrices this small threads only wait for each other
  static Transformer model(at::ScalarType dtype) {
    Json json = small_config(GetParam().type, {{"max_position_embeddings", 256}});
    json.update(GetParam().more);
    return Transformer(config_of(json), dtype, 1);
  }
};

struct Gradients {
  double loss = 0;
  std::vector<at::Tensor> of;  // parameters(), where they are trained
};

Gradients gradients(Transformer& model, const std::vector<ModelInput>& inputs) {
  model.set_training(true);
  for (auto& p : model.parameters()) p.value.mutable_grad().reset();
  Gradients out;
  for (const auto& input : inputs) {
    LossSum loss = model.cross_entropy(model.forward(input), input.targets_T);
    loss.sum.backward();
    out.loss += loss.sum.item<double>();
  }
  for (auto& p : model.parameters())
    if (p.value.requires_grad()) out.of.push_back(p.value.grad());
  return out;
}

TEST_P(FamilyTest, PackedRowsDoNotSeeEachOther) {
  Transformer one = model(at::kDouble);
  const std::vector<std::vector<int64_t>> rows = {random_row(9, 1), random_row(2, 2), random_row(40, 3)};
  std::vector<ModelInput> alone;
  at::Tensor packed = logits_of(one, input_of(rows));
  for (size_t s = 0, begin = 0; s < rows.size(); begin += rows[s++].size()) {
    alone.push_back(learnt(input_of({rows[s]})));
    EXPECT_TRUE(near(packed.narrow(0, static_cast<int64_t>(begin), alone[s].tokens_T.size(0)), logits_of(one, alone[s]))) << s;
  }
  Gradients together = gradients(one, {learnt(input_of(rows))}), apart = gradients(one, alone);
  EXPECT_NEAR(together.loss, apart.loss, 1e-12 * apart.loss);
  for (size_t i = 0; i < together.of.size(); ++i)
    EXPECT_TRUE(near(together.of[i], apart.of[i], 10)) << one.parameters()[i].name;  // of size 1 to 100
}

TEST_P(FamilyTest, RecomputationChangesNoBit) {
  for (at::ScalarType dtype : {at::kFloat, at::kBFloat16})
    for (bool lora : {false, true}) {
      Transformer one = model(dtype);
      if (lora) {
        attach_lora(one, {4, 8.0, 0.2, false, {"all-linear"}}, 1);
        at::NoGradGuard no_grad;
        for (auto& p : one.parameters())
          if (p.name.ends_with(".lora_B.weight")) fill_normal(p, 11, 0.2);
      }
      const std::vector<ModelInput> input = {learnt(input_of({random_row(9, 1), random_row(70, 2)}))};
      one.set_recompute(Recompute::kNone);
      Gradients kept = gradients(one, input);
      for (Recompute mode : {Recompute::kSelective, Recompute::kFull}) {
        one.set_recompute(mode);
        Gradients again = gradients(one, input);
        EXPECT_EQ(again.loss, kept.loss);
        for (size_t i = 0; i < kept.of.size(); ++i) EXPECT_TRUE(same_bits(again.of[i], kept.of[i])) << i << " " << dtype << " " << lora;
      }
    }
}

// Biases, dropout, DoRA: whatever a family's layers have.
TEST_P(FamilyTest, AnMlpInPiecesIsTheWhole) {
  for (int kind : {0, 1, 2}) {
    Transformer one = model(at::kDouble);
    if (kind > 0) {
      LoraConfig lora{4, 8.0, 0.2, false, {"all-linear"}};
      lora.dora = kind == 2;
      attach_lora(one, lora, 1, Weights::kUninitialized);
      at::NoGradGuard no_grad;
      for (auto& p : one.parameters())
        if (p.name.find(".lora_") != std::string::npos) fill_normal(p, 11, 0.2);
    }
    const std::vector<ModelInput> input = {learnt(input_of({random_row(9, 1), random_row(70, 2)}))};
    for (Recompute mode : {Recompute::kNone, Recompute::kSelective, Recompute::kFull}) {
      one.set_recompute(mode);
      one.set_mlp_rows(0);
      const Gradients whole = gradients(one, input);
      for (int64_t rows : {1, 32, 79}) {
        one.set_mlp_rows(rows);
        const Gradients pieces = gradients(one, input);
        EXPECT_NEAR(pieces.loss, whole.loss, 1e-12 * whole.loss) << rows;
        for (size_t i = 0; i < whole.of.size(); ++i) EXPECT_TRUE(near(pieces.of[i], whole.of[i], 10)) << i << " rows " << rows << " kind " << kind;
      }
    }
  }
}

// In pieces of every kind: long, single tokens, up to the cache's last row; and over again in the same memory.
TEST_P(FamilyTest, ThroughACacheComeTheLogitsOfTheWholeForward) {
  for (at::ScalarType dtype : {at::kDouble, at::kFloat, at::kBFloat16, at::kHalf}) {
    Transformer one = model(dtype);
    const std::vector<int64_t> row = random_row(150, 1);
    KvCache cache = one.new_cache(150);
    logits_of(one, input_of({random_row(90, 2)}), &cache);  // of another sequence, which is to be forgotten
    cache.set_empty(true);
    std::vector<at::Tensor> parts;
    int64_t seen = 0;
    for (int64_t n : {30, 1, 1, 69, 1, 48}) {
      parts.push_back(logits_of(one, input_of({{row.begin() + seen, row.begin() + seen + n}}, seen), &cache));
      seen += n;
    }
    ASSERT_EQ(seen, cache.capacity());
    // Logits are of size 1 to 10 here; 16-bit roundings of two layers add up.
    const double factor = dtype == at::kBFloat16 || dtype == at::kHalf ? 8.0 : 4.0;
    EXPECT_TRUE(near(at::cat(parts), logits_of(one, input_of({row})), factor, dtype)) << dtype;
  }
}

const Json kWindow = {{"use_sliding_window", true}, {"sliding_window", 20}, {"max_window_layers", 1}};
const Json kLlama3 = {{"rope_type", "llama3"}, {"factor", 8.0}, {"low_freq_factor", 1.0}, {"high_freq_factor", 4.0}, {"original_max_position_embeddings", 16}};

Json with_window(Json more) {
  more.update(kWindow);
  return more;
}

INSTANTIATE_TEST_SUITE_P(Families, FamilyTest,
                         testing::Values(Family{"llama", "llama", {{"attention_bias", true}, {"mlp_bias", true}}},
                                         Family{"single_kv", "llama", {{"num_key_value_heads", 1}, {"tie_word_embeddings", true}}},
                                         Family{"llama3_rope", "llama", {{"rope_parameters", kLlama3}}},
                                         Family{"mistral", "mistral", Json::object()},
                                         Family{"mistral_short_window", "mistral", {{"sliding_window", 7}}},
                                         Family{"mistral_long_window", "mistral", {{"sliding_window", 60}}},
                                         Family{"qwen2_window", "qwen2", kWindow},
                                         Family{"qwen3", "qwen3", {{"num_key_value_heads", 4}}},
                                         Family{"qwen3_window", "qwen3", with_window({{"attention_bias", true}})},
                                         Family{"smollm3", "smollm3", {{"no_rope_layers", {1, 0}}}},
                                         Family{"smollm3_window", "smollm3", with_window({{"no_rope_layers", {0, 1}}})}),
                         [](const auto& info) { return std::string(info.param.name); });

// A mask belongs to a sample's token: rows may be packed and ordered in any way, on any rank.
TEST(Lora, DropoutIsKeyedBySampleAndPosition) {
  Transformer model(config_of(small_config("llama")), at::kDouble, 1);
  attach_lora(model, {4, 8.0, 0.5, false, {"all-linear"}}, 1);
  randomise_adapters(model);
  auto hidden = [&](const std::vector<std::vector<int64_t>>& rows, const std::vector<int64_t>& ids, uint64_t seed) {
    at::NoGradGuard no_grad;
    model.set_training(true);
    ModelInput input = input_of(rows);
    input.sample_ids = ids;
    input.dropout_seed = seed;
    return model.forward(input);
  };
  const auto a = random_row(9, 1), b = random_row(12, 2);
  at::Tensor together = hidden({a, b}, {4, 9}, 3);
  EXPECT_TRUE(near(together, at::cat({hidden({a}, {4}, 3), hidden({b}, {9}, 3)})));
  at::Tensor turned = hidden({b, a}, {9, 4}, 3);
  EXPECT_TRUE(near(together, at::cat({turned.slice(0, 12), turned.slice(0, 0, 12)})));
  EXPECT_FALSE(at::allclose(hidden({a}, {4}, 3), hidden({a}, {5}, 3)));
  EXPECT_FALSE(at::allclose(hidden({a}, {4}, 3), hidden({a}, {4}, 7)));
  const at::Tensor equal = hidden({{7, 7}}, {4}, 3);  // nothing but the mask tells these two from each other
  EXPECT_FALSE(at::allclose(equal[0], equal[1]));
  model.set_training(false);
  at::NoGradGuard no_grad;
  EXPECT_TRUE(near(model.forward(input_of({a})), model.forward(input_of({a, b})).slice(0, 0, 9)));
}

TEST(Transformer, FirstNonfiniteNamesTheFirstPlace) {
  ModelInput input = input_of({random_row(6, 1)});
  Transformer model(config_of(small_config("qwen3")), at::kFloat, 1);
  EXPECT_EQ(model.first_nonfinite(input), "");
  at::NoGradGuard no_grad;
  // Each is finite, their product is not. Layer 0 stays whole.
  model.blocks()[1].up.weight_OI.mul_(1e20);
  model.blocks()[1].gate.weight_OI.mul_(1e20);
  EXPECT_EQ(model.first_nonfinite(input).substr(0, 33), "model.layers.1.mlp.down_proj: 192");
  model.blocks()[1].q.weight_OI.mul_(3e38);
  EXPECT_EQ(model.first_nonfinite(input).substr(0, 32), "model.layers.1.self_attn.q_proj:");
  model.blocks()[1].k.weight_OI[0][0] = std::nan("");
  EXPECT_EQ(model.first_nonfinite(input), "model.layers.1.self_attn.k_proj.weight: 1 of 512 values are not finite");
}

}  // namespace
}  // namespace trireme
