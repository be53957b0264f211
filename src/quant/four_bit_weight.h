// The frozen weight of a linear layer in NF4 or FP4 (QLoRA, Dettmers et al. 2023), under bitsandbytes' names.
#pragma once

#include "ops/dequantized_weight.h"
#include "quant/four_bit.h"

namespace trireme {

struct FourBitOptions {
  FourBit kind = FourBit::kNf4;
  int64_t block_size = 64;
  bool is_double = true;                 // the scales in 8 bits too
  at::ScalarType compute = at::kBFloat16;  // of the products
  bool is_stored = false;                // in the model's files, which say the blocks
};

// Leaves: .weight (the codes, uint8 [O, I / 2]), .weight.absmax (fp32, or uint8 where they are nested: [O, I / block_size] where rows have whole
// blocks, else one run) and of nested ones .weight.nested_absmax, .weight.nested_quant_map and .weight.nested_offset, which every slice
// has whole. InternalError: an odd I. ConfigError, which names the layer: a slice that would cut a block, with the block sizes that
// fit, of a weight that is not stored.
std::shared_ptr<FrozenWeight> four_bit_weight(const std::string& path, int64_t out_features, int64_t in_features, const FourBitOptions& options);

// The values of these leaves, of a whole weight [rows, columns].
std::vector<at::Tensor> four_bit_leaves(const FourBitTensor& whole, int64_t rows, int64_t columns);

}  // namespace trireme
