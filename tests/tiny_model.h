// Models of a few thousand weights and inputs for them, for tests of the model and of what spreads it over ranks.
#pragma once

#include "base/tensor.h"

#include "base/json.h"
#include "model/transformer.h"

namespace trireme::test {

inline Json small_config(const std::string& type, const Json& more = Json::object()) {
  Json json = {{"model_type", type},       {"vocab_size", 61},         {"hidden_size", 32},
               {"intermediate_size", 40},  {"num_hidden_layers", 2},   {"num_attention_heads", 4},
               {"num_key_value_heads", 2}, {"rms_norm_eps", 1e-5},     {"max_position_embeddings", 64},
               {"head_dim", 8},            {"initializer_range", 0.3}};
  json.update(more);
  return json;
}

inline ModelConfig config_of(const Json& json) { return model_config_from_json(json, "config.json"); }

inline ModelInput input_of(const std::vector<std::vector<int64_t>>& rows, int64_t start = 0) {
  std::vector<int64_t> tokens, positions;
  ModelInput input;
  input.cu_seqlens = {0};
  for (size_t s = 0; s < rows.size(); ++s) {
    for (size_t i = 0; i < rows[s].size(); ++i) {
      tokens.push_back(rows[s][i]);
      positions.push_back(start + static_cast<int64_t>(i));
    }
    input.cu_seqlens.push_back(static_cast<int64_t>(tokens.size()));
    input.sample_ids.push_back(static_cast<int64_t>(s));
  }
  input.tokens_T = at::tensor(tokens, at::kLong);
  input.positions_T = at::tensor(positions, at::kLong);
  return input;
}

inline std::vector<int64_t> random_row(int64_t length, int64_t seed, int64_t vocabulary = 61) {
  std::vector<int64_t> row;
  for (int64_t i = 0; i < length; ++i) row.push_back((i * 7919 + seed * 104729 + i * i * 31) % vocabulary);
  return row;
}

// Every next token is learnt.
inline ModelInput learnt(ModelInput input) {
  std::vector<at::Tensor> targets;
  for (size_t s = 0; s + 1 < input.cu_seqlens.size(); ++s) {
    at::Tensor row = input.tokens_T.slice(0, input.cu_seqlens[s], input.cu_seqlens[s + 1]);
    targets.insert(targets.end(), {row.slice(0, 1), at::full({1}, -100, at::kLong)});
  }
  input.targets_T = at::cat(targets);
  return input;
}

}  // namespace trireme::test
