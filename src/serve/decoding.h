// The tokens of an answer, one after another: the model, its KV cache, and what a device does for a token recorded once.
#pragma once

#include "model/transformer.h"
#include "ops/step_graph.h"

namespace trireme {

// One sequence at a time. On a device the likeliest token never goes through the host: the next step begins before this one's token has
// been read. Every step is the same launches at the same addresses, so that after a first one they are recorded (ops/step_graph.h) and
// launched as one; where ranks share a model they are not, for their messages are not recorded.
class Decoding {
 public:
  using Choose = std::function<int64_t(const at::Tensor& logits_V)>;  // fp32, on the host

  // `likeliest`: the next token is always the likeliest, the first of equals, which a device finds by itself. `graphs`: where it has any.
  Decoding(Transformer& model, bool likeliest, bool graphs);

  // Of the cache for such an answer, on this rank.
  static int64_t cache_bytes(const Transformer& model, int64_t prompt_size, int64_t max_tokens);

  // Runs a prompt, which is not empty; next() may be called max_tokens times. Memory of the one before serves again where it has the right
  // size, which depends on this prompt alone, as the answer does. c10::OutOfMemoryError: there is none.
  void begin(const std::vector<int64_t>& prompt, int64_t max_tokens);
  // The next token: chosen from the logits, or the likeliest. DataError: the logits are not finite.
  int64_t next(const Choose& choose);

 private:
  void step();                                     // of tokens_ at positions_
  void finish(const at::Tensor& hidden_TC, int64_t row);
  void advance();

  Transformer& model_;
  bool likeliest_, graphs_;
  int64_t rows_;                                   // of a step: the token, and what fills them up where ranks share the rows
  // At the same place for every step.
  at::Tensor tokens_T, positions_T;                // int64 [rows_]
  at::Tensor logits_1V;                            // of the last step
  at::Tensor found_;                               // int64 {the likeliest, whether its logit is finite}
  std::optional<KvCache> cache_;
  std::unique_ptr<StepGraph> graph_;
  bool prepared_ = false;                          // a step has run
  int64_t max_tokens_ = 0, num_tokens_ = 0, last_ = 0;
};

}  // namespace trireme
