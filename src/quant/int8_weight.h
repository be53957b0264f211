// The frozen weight of a linear layer in LLM.int8() (quant/int8.h): inputs are quantized too, but for their outliers.
#pragma once

#include "ops/dequantized_weight.h"
#include "quant/int8.h"

namespace trireme {

// Leaves, under bitsandbytes' names: .weight (int8 [O, I]) and .SCB (fp32 [O], of whole rows), of weights rounded to float16 first, as
// bitsandbytes does (ConfigError, which names the layer, where one is beyond that). Gradients go back through the values that the codes
// stand for. Inputs are quantized by their rows' largest values on all ranks that have some of the columns, so that every mesh computes
// with the same codes. InternalError: more inputs than kInt8MostColumns.
std::shared_ptr<FrozenWeight> int8_weight(const std::string& path, int64_t out_features, int64_t in_features, at::ScalarType dtype, double threshold = kInt8Threshold);

}  // namespace trireme
