// Keys and values of the tokens already seen, for generation.
#pragma once

#include "base/tensor.h"

namespace trireme {

// One cache serves a fixed number of sequences. forward(input, &cache) treats segment s of the input as the
// continuation of sequence s (a segment may be empty) and appends to it; positions_T must go on from length(s).
// Without gradients only.
class KvCache {
 public:
  KvCache(int64_t num_layers, int64_t num_sequences);

  int64_t num_sequences() const { return static_cast<int64_t>(lengths_.size()); }
  int64_t length(int64_t sequence) const { return lengths_[static_cast<size_t>(sequence)]; }

  // For the model: appends k, v [T, K, D] of one layer, cut by cu_seqlens, and returns all keys and values of all
  // sequences, flat [S, K, D]. Lengths grow only at advance(), once all layers have appended.
  std::pair<at::Tensor, at::Tensor> append(int64_t layer, const at::Tensor& k_TKD, const at::Tensor& v_TKD,
                                           const std::vector<int64_t>& cu_seqlens);
  // Bounds of the sequences in what append() returns.
  std::vector<int64_t> cu_seqlens_after(const std::vector<int64_t>& cu_seqlens) const;
  void advance(const std::vector<int64_t>& cu_seqlens);

 private:
  struct Store {
    at::Tensor k, v;  // [capacity, K, D]; undefined while empty
  };
  std::vector<std::vector<Store>> stores_;  // [layer][sequence]
  std::vector<int64_t> lengths_;            // [sequence]
};

}  // namespace trireme
