// A model's folder with the linear layers of its blocks in 4 or 8 bits, as transformers and bitsandbytes write it.
#pragma once

#include "checkpoint/safetensors.h"
#include "quant/stored_format.h"
#include "train/build.h"

namespace trireme {

// Writes `folder` (checkpoint/bitsandbytes.h), under another name until it is whole. This process alone reads and writes, one weight at a
// time, which it quantizes twice: for its scales and, farther behind in the file, for its codes. The codes are those of quant.base at
// load. ConfigError: quant.base is not nf4, fp4 or int8, weights of a dtype that bitsandbytes has no such of, a folder that is there or is the
// model's; the model is quantized already.
void quantize_stored(const std::string& folder, const Config& config, const ModelSource& source, uint64_t max_shard_bytes = kMaxShardBytes);

// What a file holds of the linear layers of a model with its `base` in fewer bits.
class QuantizedLayers {
 public:
  // The layers of `model`, which has this base, on the meta device.
  QuantizedLayers(Transformer& model, const FrozenBase& base);

  const std::map<std::string, std::shared_ptr<const FrozenWeight>>& weights() const { return weights_; }  // by X.weight
  // `tensors` with the parts of each of these weights in its place. `encode` gives the values of all leaves of one from its source, and is
  // called twice for each.
  using Encode = std::function<std::vector<at::Tensor>(const TensorSource& weight)>;
  std::vector<TensorSource> stored(const std::vector<TensorSource>& tensors, at::ScalarType dtype, const Encode& encode) const;
  // quantization_config of config.json.
  Json config(at::ScalarType dtype) const;
  // Says that bitsandbytes' CPU code will not read them all, where that is so.
  void warn_of_rows() const;

 private:
  FrozenBase base_;
  std::map<std::string, std::shared_ptr<const FrozenWeight>> weights_;
  std::map<std::string, StoredFormat> formats_;
  std::vector<std::string> skipped_;  // paths
};

}  // namespace trireme
