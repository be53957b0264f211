// trireme export: a model (with lora.path and lora.merge=true: merged), or a run's checkpoint (run.resume=FOLDER, with the run's
// model and lora keys), as a Hugging Face folder, or as a PEFT folder where the checkpoint holds adapters.
#include "base/tensor.h"

#include <algorithm>
#include <optional>
#include <regex>

#include "base/counted.h"
#include "base/log.h"
#include "checkpoint/peft.h"
#include "launch/verbs.h"
#include "train/check_config.h"
#include "train/export.h"
#include "train/merge_check.h"
#include "train/new_folder.h"

namespace trireme {
namespace {

void check_requantize(const Config& config, const ModelSource& source, at::ScalarType dtype) {
  if (!config.lora.requantize) return;
  const bool stored = !source.config.stored.empty() && config.quant.base != "dense";
  if (!stored && config.quant.base != "nf4" && config.quant.base != "fp4" && config.quant.base != "int8")
    throw ConfigError(str("lora.requantize=true, but quant.base is ", config.quant.base, " and ", source.folder.empty() ? source.config.source : source.folder,
                          " is not quantized: set quant.base to nf4, fp4 or int8, as the adapter was trained beside, or leave lora.requantize out"));
  if (dtype == at::kDouble) throw ConfigError("lora.requantize=true is not possible with float64, of which bitsandbytes has no codes: set model.dtype=float32, or leave lora.requantize out");
}

// The keys that give a base in the words of quantized_base(); "" where an adapter's file has others.
std::string keys_of(const std::string& base) {
  static const std::regex words("(nf4|fp4|int8)(, blocks of ([0-9]+), scales in (8|32) bits)?(, without (.+))?");
  std::smatch found;
  if (base.size() > 1000 || !std::regex_match(base, found, words)) return "";
  const std::string block_size = found[3], scale_bits = found[4], skipped = found[6];
  return str("quant.base=", found[1].str(), block_size.empty() || block_size == str(FrozenBase().blocks()) ? "" : " quant.block_size=" + block_size, scale_bits == "32" ? " quant.double=false" : "",
             skipped.empty() ? "" : " quant.skip=" + skipped);
}

// As a run's checkpoint says it.
std::string base_of_run(const Checkpoint& checkpoint, const ModelConfig& model) {
  const Json& state = checkpoint.state();
  if (!state.is_object() || !state.contains("identity") || !state["identity"].is_object()) return "";
  Config config;
  for (const auto& f : fields(config))
    if (const Json& text = state["identity"].value(f.key, Json()); f.key.starts_with("quant.") && text.is_string()) (void)f.set(text.get<std::string>());
  return quantized_base(config, model);
}

// An adapter makes up for what its base had lost by rounding: beside another base that is too much. ConfigError, unless weights of 16 bits or more are
// asked for by name.
void check_base_of_adapter(const Config& config, const CommandLine& line, const ModelSource& source, const std::optional<Checkpoint>& checkpoint) {
  if (!config.lora.merge) return;
  const bool from_folder = !config.lora.path.empty(), is_stored = !source.config.stored.empty();
  const auto form = [&](const std::string& base) { return is_stored ? base.substr(0, base.find(", without ")) : base; };  // a folder says itself which layers
  const std::string then = from_folder ? base_of_adapter(config.lora.path) : checkpoint ? base_of_run(*checkpoint, source.config) : "", now = quantized_base(config, source.config);
  const char* const values = is_stored ? "dense" : "none";
  if (then.empty() || form(then) == form(now) || (now.empty() && line.is_given("quant.base") && config.quant.base == values)) return;
  const std::string keys = is_stored ? "" : keys_of(then);
  throw ConfigError(str(from_folder ? "lora.path=" + config.lora.path : "run.resume=" + config.run.resume, " was trained beside a base in ", then, ", and would be merged into ",
                        now.empty() ? "weights that are not quantized" : "one in " + now, ": ", keys.empty() ? "set model.path to that base" : "set " + keys,
                        ", or quant.base=", values, " to merge into these weights all the same"));
}

// An adapter brings its own rank and the like: beside lora.path those of a run's config.ini are left out, as eval and generate do. Of a
// checkpoint they are what it holds.
Config beside_adapter(Config config, const CommandLine& line, bool from_checkpoint) {
  if (config.lora.path.empty() || from_checkpoint || line.config_file.empty()) return config;
  Config own;
  own.lora.path = config.lora.path, own.lora.merge = config.lora.merge, own.lora.requantize = config.lora.requantize;
  config.lora = own.lora;
  return config;
}

void say_left(const std::vector<UpdateLeft>& all) {
  if (all.empty()) return;
  const auto least = std::min_element(all.begin(), all.end(), [](const UpdateLeft& a, const UpdateLeft& b) { return a.left < b.left; });
  const auto most = std::max_element(all.begin(), all.end(), [](const UpdateLeft& a, const UpdateLeft& b) { return a.error < b.error; });
  double left = 0, error = 0;
  for (const UpdateLeft& layer : all) left += layer.left / static_cast<double>(all.size()), error += layer.error / static_cast<double>(all.size());
  log_info(str("of the adapter's updates ", left, " is left, the mean of ", counted(all.size(), "layer"), ", least in ", least->layer, " (", least->left, "); rounding changes weights by ", error,
               " of their norm beside, most in ", most->layer, " (", most->error, ")"));
}

}  // namespace

ExitStatus verb_export(const Config& given, const CommandLine& line, const Process& process) {
  const bool from_checkpoint = given.run.resume != "auto" && given.run.resume != "never";
  const Config config = beside_adapter(given, line, from_checkpoint);
  check_config(config, line);
  if (config.run.dir.empty()) throw ConfigError("run.dir is not set: the folder to write");
  if (!config.lora.path.empty() && !config.lora.merge && !from_checkpoint)
    throw ConfigError("lora.path is set: say lora.merge=true to write the merged model (the adapter itself is exported already)");
  if (config.lora.rank > 0 && !from_checkpoint)
    throw ConfigError(config.lora.path.empty() ? "lora.rank is set, but no checkpoint with adapters: set run.resume to its folder, or lora.path to an adapter"
                                               : "lora.rank and lora.path are both set: the adapter of lora.path has a rank; set one");
  if (config.lora.merge && config.lora.path.empty() && config.lora.rank == 0)
    throw ConfigError("lora.merge needs lora.path, the adapter to merge");
  if (process.rank() != 0) return kExitDone;
  check_new_folder(config.run.dir, config.model.path);
  const ModelSource source = find_model(config);
  std::optional<Checkpoint> checkpoint;
  if (from_checkpoint) checkpoint = open_checkpoint(config.run.resume);
  const at::ScalarType dtype = exported_dtype(config, source, checkpoint);
  check_requantize(config, source, dtype);
  const bool quantized = !source.config.stored.empty() || config.quant.base == "nf4" || config.quant.base == "fp4" || config.quant.base == "int8";
  check_base_of_adapter(config, line, source, checkpoint);
  write_new_folder(config.run.dir, source.folder, [&](const std::string& folder) {
    const std::vector<UpdateLeft> left = export_stored(folder, config, source, checkpoint);
    if (config.lora.requantize) {
      const RequantizedLogits differ = compare_requantized(folder, config, source, dtype, checkpoint);
      log_info(str("merged and quantized again: logits differ from those of base and adapter by ", differ.written, " of their norm, those of merged weights in ", dtype_name(dtype), " by ", differ.merged));
      say_left(left);
    } else if (config.lora.merge && quantized) {
      log_info(str("merged with what the quantized base stands for: logits differ from those of base and adapter by ", check_merged(folder, config, source, dtype, checkpoint),
                   " of their norm (rounding explains ", merge_bound(config, source.config, dtype), ")"));
    }
  });
  if (quantized && !config.lora.merge && config.lora.rank == 0 && config.quant.base != "none" && config.quant.base != "dense")
    log_info(str("these are the values that ", config.quant.base, " stands for, in ", dtype_name(dtype), "; trireme quantize writes the codes themselves"));
  log_info(str("wrote ", config.run.dir));
  return kExitDone;
}

}  // namespace trireme
