// From a configuration to what turns text into tokens: tokenizer, chat template, data options.
#pragma once

#include <optional>

#include "config/config.h"
#include "data/chat_template.h"
#include "data/dataset.h"
#include "data/tokenizer.h"
#include "model/hf_config.h"

namespace trireme {

struct TextTools {
  Tokenizer tokenizer;
  std::optional<ChatTemplate> chat;
  int64_t bos_id = -1, eos_id = -1;
};

// Tokenizer and chat template. ConfigError where there is no tokenizer; DataError where its ids exceed the embedding.
TextTools load_text_tools(const Config& config, const std::string& tokenizer_folder, const ModelConfig* model);

// The token that ends a turn by the chat template; none where there is no template, or it shows none.
std::optional<int64_t> end_of_turn(const Config& config, const TextTools& tools);

DataOptions data_options(const Config& config, const TextTools& tools, int64_t embedding_rows);

}  // namespace trireme
