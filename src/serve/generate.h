// Answers, token by token, with a KV cache.
#pragma once

#include "data/tokenizer.h"
#include "serve/decoding.h"
#include "serve/sampler.h"

namespace trireme {

struct GenerateOptions {
  SamplingOptions sampling;
  int64_t max_tokens = 128;
  std::vector<int64_t> end_ids;    // a token that ends the answer and is not part of its text
  std::vector<std::string> stop;   // texts that end it, cut off with all that follows
  bool graphs = true;              // serve/decoding.h
};

struct Answer {
  std::string text;
  std::vector<int64_t> ids;
  std::string finish_reason;  // stop (an end token or a stop text) or length (max_tokens, or the model's context is full)
};

class Generator {
 public:
  // The model is left in evaluation mode. ConfigError: an empty text to stop at.
  Generator(Transformer& model, const Tokenizer& tokenizer, GenerateOptions options);

  // `prompt_index` (from 0) keys the random numbers and names the prompt in messages. `on_text` is told text as soon as no later
  // token can change it; all that it was told is the answer's text. DataError: a prompt without ids, or one that fills the context
  // (max_position_embeddings). A model that is cut over ranks: collective, with the same answer on every rank.
  Answer answer(const std::vector<int64_t>& prompt, uint64_t prompt_index, const std::function<void(const std::string&)>& on_text = {});

 private:
  const Tokenizer& tokenizer_;
  GenerateOptions options_;
  int64_t context_;
  Decoding decoding_;
};

// Of one prompt.
Answer generate(Transformer& model, const Tokenizer& tokenizer, const std::vector<int64_t>& prompt, uint64_t prompt_index,
                const GenerateOptions& options, const std::function<void(const std::string&)>& on_text = {});

}  // namespace trireme
