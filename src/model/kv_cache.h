// Keys and values of the tokens already seen, for generation.
#pragma once

#include "base/tensor.h"

namespace trireme {

// Of one sequence: forward(input, &cache) treats the one segment of the input as its continuation and appends to it;
// positions_T must go on from length(). Without gradients only.
class KvCache {
 public:
  explicit KvCache(int64_t num_layers) : stores_(static_cast<size_t>(num_layers)) {}

  int64_t length() const { return length_; }

  // For the model: appends k, v [T, K, D] of one layer and returns all keys and values [S, K, D]. The length grows only at
  // advance(), once all layers have appended.
  std::pair<at::Tensor, at::Tensor> append(int64_t layer, const at::Tensor& k_TKD, const at::Tensor& v_TKD);
  void advance(int64_t num_tokens) { length_ += num_tokens; }
  void forget_last(int64_t num_tokens) { length_ -= num_tokens; }

 private:
  struct Store {
    at::Tensor k, v;  // [capacity, K, D]; undefined while empty
  };
  std::vector<Store> stores_;  // [layer]
  int64_t length_ = 0;
};

}  // namespace trireme
