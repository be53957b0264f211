// Weights of linear layers in the form in which bitsandbytes and transformers store them in model folders (bitsandbytes'
// QuantState.as_dict, read with its version 0.50.2). Of the layer X with a weight [R, C], N = R C values in B = ceil(N / blocksize) blocks:
//   X.weight                                uint8 [ceil(N / 2), 1]: the codes (quant/four_bit.h); another dtype (bnb_4bit_quant_storage)
//                                           has the same bytes
//   X.weight.absmax                         fp32 [B], the scales, or uint8 [B], their codes (quant/scales.h)
//   X.weight.quant_map                      fp32 [16], the numbers of the codes
//   X.weight.nested_absmax                  fp32 [ceil(B / 256)], where the scales are codes
//   X.weight.nested_quant_map               fp32 [256], the numbers of these; it is the file's that counts
//   X.weight.quant_state.bitsandbytes__nf4  (or __fp4) uint8, text: JSON {quant_type, blocksize, dtype, shape: [R, C], and where scales are
//                                           codes nested_blocksize: 256, nested_dtype: "float32", nested_offset}
// And in 8 bits (LLM.int8(), quant/int8.h):
//   X.weight                                int8 [R, C]
//   X.SCB                                   fp32 [R], the largest magnitude of each row
//   X.weight_format                         uint8 []: 0, rows as they are (others are layouts of old GPUs)
// All of it is foreign: what is missing, of another size or dtype, or contradicts itself is a DataError that names file and tensor.
#pragma once

#include <set>

#include "base/json.h"
#include "base/parameter.h"
#include "checkpoint/load_weights.h"
#include "quant/four_bit.h"
#include "quant/stored_format.h"

namespace trireme {

class QuantizedFolder {
 public:
  // Reads and checks all but codes and scales.
  explicit QuantizedFolder(std::shared_ptr<const SafetensorsFolder> files);

  // By the path of the layer in the model (a folder of a bare model lacks "model." in its names).
  const std::map<std::string, StoredFormat>& layers() const { return formats_; }
  bool holds(const std::string& parameter) const;  // whether this is X.weight of one of them
  bool owns(const std::string& name) const { return owned_.count(name) != 0; }  // whether this tensor of the files is part of one
  // DataError where the quantization_config of `source`, which says `kind`, is not that of the files.
  void check_config(const std::string& kind, const Json& quantization_config, const std::string& source) const;

  // Codes and scales of a whole X.weight, as four_bit_weight() or int8_weight() has them, as views of the mapped files, whose pages count
  // as memory until the tensors are gone. DataError: a scale that is no number, infinite or negative.
  std::vector<at::Tensor> leaves(const std::string& parameter) const;
  // The values of X.weight, or of the slice of it that `target` is, rounded once to the target's dtype. The whole weight is in memory
  // meanwhile. DataError: as leaves(), or the model's weight has another shape.
  void load(const Parameter& target) const;
  void check_shape(const Parameter& target) const;

 private:
  struct Layer {
    std::string weight;  // X.weight as the file names it
    float offset = 0;
  };

  std::pair<StoredFormat, Layer> check(const std::string& weight, const std::vector<std::string>& states);
  StoredFormat check_rows(const std::string& path);
  FourBitTensor read(const std::string& parameter) const;
  void check(const std::string& weight, const BlockScales& scales) const;
  void insert(const std::string& name, const StoredFormat& format, const Layer& layer);
  const SafetensorsInfo& part(const std::string& name, at::ScalarType dtype, int64_t count) const;
  at::Tensor view_until_gone(const std::string& name) const;

  std::shared_ptr<const SafetensorsFolder> files_;
  std::map<std::string, StoredFormat> formats_;
  std::map<std::string, Layer> layers_;
  std::set<std::string> owned_;
};

// DataError where a tensor is part of a quantized weight, of which the config.json `source` says nothing.
void check_not_quantized(const SafetensorsFolder& files, const std::string& source);

// The tensors of X.weight in a file that is written. `leaves` gives the values that four_bit_weight() or int8_weight() has of it, and is called for each;
// `dtype`: of the weight before. The state ends in spaces: it is as long as one with any offset.
std::vector<TensorSource> quantized_tensors(const std::string& weight, const StoredFormat& format, at::ScalarType dtype, const std::function<std::vector<at::Tensor>()>& leaves);

// quantization_config of config.json, as transformers' BitsAndBytesConfig.to_dict has it; `skipped`: linear layers that stay as they are,
// beside the output layer.
Json quantization_config(const std::string& kind, bool is_double, const std::string& compute_dtype, double threshold, std::vector<std::string> skipped);

}  // namespace trireme
