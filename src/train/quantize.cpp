#include "train/quantize.h"

#include <chrono>
#include <filesystem>

#include "base/check.h"
#include "base/counted.h"
#include "base/file.h"
#include "base/log.h"
#include "checkpoint/bitsandbytes.h"
#include "checkpoint/export_folder.h"
#include "checkpoint/run_lock.h"

namespace trireme {
namespace {

namespace fs = std::filesystem;

constexpr const char* kLock = "run.lock";

void check_target(const std::string& folder, const ModelSource& source) {
  std::error_code none;
  if (fs::is_symlink(folder) && !fs::exists(folder)) throw ConfigError(str("run.dir=", folder, " is a link to nothing; name a new folder"));
  if (!fs::exists(folder)) return;
  if (fs::equivalent(folder, source.folder, none)) throw ConfigError(str("run.dir=", folder, " is the folder of the model itself; name a new folder"));
  if (!fs::is_directory(folder)) throw ConfigError(str("run.dir=", folder, " is a file; name a new folder"));
  if (!fs::is_empty(folder)) throw ConfigError(str("run.dir=", folder, " is not empty; name a new folder"));
}

// What a killed writer leaves behind is written over; of its files under temporary names others may be left. Its lock tells it from
// what is somebody else's.
void clear_temporaries(const std::string& folder) {
  if (fs::exists(folder) && !fs::is_empty(folder) && !fs::exists(folder + "/" + kLock))
    throw ConfigError(str(folder, " is in the way, and no unfinished trireme quantize: move it, or name another run.dir"));
  fs::create_directories(folder);
}

void clear_files(const std::string& folder) {
  for (const auto& entry : fs::directory_iterator(folder))
    if (entry.path().extension() == ".tmp") fs::remove(entry.path());
}

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

void quantize_stored(const std::string& folder, const Config& config, const ModelSource& source, uint64_t max_shard_bytes) {
  at::NoGradGuard no_grad;
  const FrozenBase base = frozen_base(config);
  if (base.kind != "nf4" && base.kind != "fp4" && base.kind != "int8") throw ConfigError(str("quant.base=", config.quant.base, " is no form that is written: set it to nf4, fp4 or int8"));
  if (!source.config.quantization.empty())
    throw ConfigError(str("the weights of ", source.folder, " are in ", source.config.quantization, " already: quantize the model's original weights, or what trireme export makes of these"));
  const at::ScalarType dtype = weight_dtype(config, source);
  if (dtype == at::kDouble) throw ConfigError("bitsandbytes quantizes float32, bfloat16 and float16, but the weights are float64: set model.dtype=float32");
  check_target(folder, source);

  WeightFill fill;
  Config stored = config;
  stored.quant.base = "dense";
  const auto dense = build_model(stored, source, dtype, false, at::kCPU, true, {}, &fill), quantized = model_shapes(config, source.config, dtype, false);
  std::map<std::string, std::shared_ptr<const FrozenWeight>> in_fewer_bits;
  std::vector<std::string> skipped;
  for (const Linear* l : quantized->linears())
    if (l->frozen) in_fewer_bits[l->path + ".weight"] = l->frozen;
    else skipped.push_back(l->path);
  if (in_fewer_bits.empty()) throw ConfigError("quant.skip leaves no layer to quantize");
  const auto read = [&](const Parameter& p) {
    const at::Tensor value = at::empty(p.value.sizes(), dtype);
    fill({{p.name, value, p.shard}});
    return value;
  };
  std::pair<std::string, std::vector<at::Tensor>> last;  // of the parts of a weight, which are asked for one after the other
  LayerCount progress(2 * in_fewer_bits.size());
  const auto leaves = [&](const Parameter& p) {
    if (last.first != p.name) {
      last = {};  // before the next is there
      last = {p.name, in_fewer_bits.at(p.name)->encode(read(p))};
      progress.add();
    }
    return last.second;
  };
  std::vector<TensorSource> tensors;
  for (const Parameter& p : dense->parameters())
    if (!in_fewer_bits.count(p.name)) {
      tensors.push_back({p.name, dtype, p.value.sizes().vec(), [&read, p] { return read(p); }});
    } else {
      const StoredFormat format{base.kind, base.block_size, base.is_double, p.value.size(0), p.value.size(1)};
      const auto parts = quantized_tensors(p.name, format, dtype, [&leaves, p] { return leaves(p); });
      tensors.insert(tensors.end(), parts.begin(), parts.end());
    }

  Json json = model_config_to_json(source.config, dtype_name(dtype));
  json["quantization_config"] = quantization_config(base.kind, base.is_double, dtype_name(base.compute.value_or(dtype)), base.threshold, skipped);
  const std::string whole = fs::absolute(folder + "/").lexically_normal().parent_path().string(), made = whole + ".tmp";
  try {
    clear_temporaries(made);
    const RunLock lock(made);
    check_target(folder, source);  // another writer may have been faster
    clear_files(made);
    export_model_folder(made, source.folder, source.tokenizer_folder, json, tensors, {}, true, max_shard_bytes);
    fs::remove(made + "/" + kLock);
    fsync_path(made);
    fs::rename(made, whole);
    fsync_path(fs::path(whole).parent_path().string());
  } catch (const fs::filesystem_error& error) {
    throw SystemError(str("run.dir=", folder, " cannot be written (", error.code().message(), ": ", error.path1().string(), "); name a folder where there is room and leave to write"));
  }
}

}  // namespace trireme
