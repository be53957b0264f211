// Keys and values of the tokens already seen, for generation: static, so that a step reads and writes the same addresses for every token.
// Shape suffixes: B sequences, S rows for tokens, T tokens of a pass, K key heads, D head size.
#pragma once

#include <map>

#include "base/tensor.h"

namespace trireme {

// Of one sequence: row t holds the token at position t. It knows no length: a pass over later tokens is told their positions, and what lies
// behind them is not looked at. So tokens are forgotten by going on at an earlier position.
class KvCache {
 public:
  struct Layer {
    at::Tensor k_BSKD, v_BSKD;  // B = 1
  };
  // All memory is taken here. `key_heads`: of each layer that is here, by its number. Out of memory: c10::OutOfMemoryError.
  KvCache(const std::map<int64_t, int64_t>& key_heads, int64_t head_dim, int64_t capacity, const at::TensorOptions& options);

  int64_t capacity() const { return capacity_; }
  bool empty() const { return empty_; }  // the next pass is a prompt's
  void set_empty(bool empty) { empty_ = empty; }

  // For the model: stores k and v [T, K, D] of a layer at positions_T (int64, where k is; each below the capacity), or at 0 .. T-1 where it
  // is undefined.
  void put(int64_t layer, const at::Tensor& k_TKD, const at::Tensor& v_TKD, const at::Tensor& positions_T);
  const Layer& layer(int64_t layer) const { return layers_.at(layer); }

 private:
  std::map<int64_t, Layer> layers_;
  int64_t capacity_;
  bool empty_ = true;
};

}  // namespace trireme
