#include "train/quantize.h"

#include <algorithm>
#include <chrono>

#include "base/check.h"
#include "base/counted.h"
#include "base/log.h"
#include "checkpoint/bitsandbytes.h"
#include "checkpoint/export_folder.h"
#include "train/new_folder.h"

namespace trireme {
namespace {

// Says, at most every few seconds, how far it is.
class LayerCount {
 public:
  explicit LayerCount(size_t total) : total_(total) {}
  void add() {
    ++done_;
    const auto now = std::chrono::steady_clock::now();
    if (now - said_ < std::chrono::seconds(5)) return;
    said_ = now;
    log_info(str("quantized ", done_, " of ", counted(static_cast<int64_t>(total_), "layer"), ", once for scales and once for codes"));
  }

 private:
  size_t total_, done_ = 0;
  std::chrono::steady_clock::time_point said_ = std::chrono::steady_clock::now();
};

}  // namespace

QuantizedLayers::QuantizedLayers(Transformer& model, const FrozenBase& base) : base_(base) {
  for (const Linear* l : model.linears()) {
    if (!l->frozen) {
      skipped_.push_back(l->path);
      continue;
    }
    const std::string name = l->path + ".weight";
    weights_[name] = l->frozen;
    formats_[name] = base.stored.empty() ? StoredFormat{base.kind, base.blocks(), base.has_double(), l->out_features(), l->in_features()} : base.stored.at(l->path);
  }
}

std::vector<TensorSource> QuantizedLayers::stored(const std::vector<TensorSource>& tensors, at::ScalarType dtype, const Encode& encode) const {
  struct Last {  // of the parts of a weight, which are asked for one after the other
    std::string name;
    std::vector<at::Tensor> leaves;
    LayerCount progress;
  };
  const auto last = std::make_shared<Last>(Last{{}, {}, LayerCount(2 * weights_.size())});
  std::vector<TensorSource> parts;
  for (const TensorSource& tensor : tensors) {
    const auto format = formats_.find(tensor.name);
    if (format == formats_.end()) {
      parts.push_back(tensor);
      continue;
    }
    const auto leaves = [last, encode, tensor] {
      if (last->name != tensor.name) {
        last->name.clear(), last->leaves.clear();  // before the next is there
        last->leaves = encode(tensor);
        last->name = tensor.name;
        last->progress.add();
      }
      return last->leaves;
    };
    for (TensorSource& part : quantized_tensors(tensor.name, format->second, dtype, leaves)) parts.push_back(std::move(part));
  }
  return parts;
}

Json QuantizedLayers::config(at::ScalarType dtype) const {
  const StoredFormat& any = formats_.begin()->second;
  return quantization_config(any.kind, any.is_double, dtype_name(base_.compute.value_or(dtype)), base_.threshold, skipped_);
}

void QuantizedLayers::warn_of_rows() const {
  std::string one;
  int64_t count = 0, fits = 4096, size = 0;
  for (const auto& [name, f] : formats_) {
    if (f.kind == "int8") return;
    while (fits >= 32 && f.columns % fits != 0) fits /= 2;
    if (f.columns % f.block_size == 0) continue;
    if (count++ == 0) one = str(name.substr(0, name.rfind('.')), " with rows of ", f.columns), size = f.block_size;
  }
  if (count == 0) return;
  log_warn(str(counted(count, "layer"), ", such as ", one, ", ", count == 1 ? "has" : "have", " rows that blocks of ", size, " do not divide: bitsandbytes' CPU code reads such weights wrongly, its CUDA code and trireme do not; ",
               fits >= 32 ? str("quant.block_size=", fits, " divides all") : "no quant.block_size divides all", ", and quant.skip leaves layers as they are"));
}

void quantize_stored(const std::string& folder, const Config& config, const ModelSource& source, uint64_t max_shard_bytes) {
  at::NoGradGuard no_grad;
  const FrozenBase base = frozen_base(config);
  if (base.kind != "nf4" && base.kind != "fp4" && base.kind != "int8") throw ConfigError(str("quant.base=", config.quant.base, " is no form that is written: set it to nf4, fp4 or int8"));
  if (!source.config.quantization.empty())
    throw ConfigError(str("the weights of ", source.folder, " are in ", source.config.quantization, " already: quantize the model's original weights, or what trireme export makes of these"));
  const at::ScalarType dtype = weight_dtype(config, source);
  if (dtype == at::kDouble) throw ConfigError("bitsandbytes quantizes float32, bfloat16 and float16, but the weights are float64: set model.dtype=float32");
  check_new_folder(folder, source.folder);

  WeightFill fill;
  Config stored = config;
  stored.quant.base = "dense";
  const auto dense = build_model(stored, source, dtype, false, at::kCPU, true, {}, &fill);
  const QuantizedLayers layers(*model_shapes(config, source.config, dtype, false), base);
  std::vector<TensorSource> tensors;
  for (const Parameter& p : dense->parameters())
    tensors.push_back({p.name, dtype, p.value.sizes().vec(), [&fill, dtype, p] {
                         const at::Tensor value = at::empty(p.value.sizes(), dtype);
                         fill({{p.name, value, p.shard}});
                         return value;
                       }});
  Json json = model_config_to_json(source.config, dtype_name(dtype));
  json["quantization_config"] = layers.config(dtype);
  layers.warn_of_rows();
  write_new_folder(folder, source.folder, [&](const std::string& made) {
    const auto encode = [&](const TensorSource& weight) { return layers.weights().at(weight.name)->encode(weight.get()); };
    export_model_folder(made, source.folder, source.tokenizer_folder, json, layers.stored(tensors, dtype, encode), {}, true, max_shard_bytes);
  });
}

}  // namespace trireme
