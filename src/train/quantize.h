// A model's folder with the linear layers of its blocks in 4 or 8 bits, as transformers and bitsandbytes write it.
#pragma once

#include "checkpoint/safetensors.h"
#include "train/build.h"

namespace trireme {

// Writes `folder` (checkpoint/bitsandbytes.h), under another name until it is whole. This process alone reads and writes, one weight at a
// time, which it quantizes twice: for its scales and, farther behind in the file, for its codes. The codes are those of quant.base at
// load. ConfigError: quant.base is not nf4, fp4 or int8, weights of a dtype that bitsandbytes has no such of, a folder that is there or is the
// model's; the model is quantized already.
void quantize_stored(const std::string& folder, const Config& config, const ModelSource& source, uint64_t max_shard_bytes = kMaxShardBytes);

}  // namespace trireme
