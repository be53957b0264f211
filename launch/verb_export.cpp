// trireme export: a model (with lora.path and lora.merge=true: merged), or a run's checkpoint (run.resume=FOLDER, with the run's
// model and lora keys), as a Hugging Face folder, or as a PEFT folder where the checkpoint holds adapters.
#include "base/tensor.h"

#include <filesystem>
#include <optional>

#include "base/log.h"
#include "launch/verbs.h"
#include "train/check_config.h"
#include "train/export.h"
#include "train/merge_check.h"

namespace trireme {

ExitStatus verb_export(const Config& config, const CommandLine& line, const Process& process) {
  check_config(config, line);
  if (config.run.dir.empty()) throw ConfigError("run.dir is not set: the folder to write");
  const bool from_checkpoint = config.run.resume != "auto" && config.run.resume != "never";
  if (!config.lora.path.empty() && !config.lora.merge && !from_checkpoint)
    throw ConfigError("lora.path is set: say lora.merge=true to write the merged model (the adapter itself is exported already)");
  if (config.lora.rank > 0 && !from_checkpoint)
    throw ConfigError("lora.rank is set, but no checkpoint with adapters: set run.resume to its folder, or lora.path to an adapter");
  if (config.lora.merge && config.lora.path.empty() && config.lora.rank == 0)
    throw ConfigError("lora.merge needs lora.path, the adapter to merge");
  if (process.rank() != 0) return kExitDone;
  std::string folder = config.run.dir;
  if (std::filesystem::exists(folder) && !std::filesystem::is_empty(folder))
    throw ConfigError(str("run.dir=", folder, " is not empty; name a new folder"));
  ModelSource source = find_model(config);
  std::optional<Checkpoint> checkpoint;
  if (from_checkpoint) checkpoint = open_checkpoint(config.run.resume);
  export_stored(folder, config, source, checkpoint);
  const bool quantized = !source.config.stored.empty() || config.quant.base == "nf4" || config.quant.base == "fp4" || config.quant.base == "int8";
  if (config.lora.merge && quantized) try {
    const at::ScalarType dtype = exported_dtype(config, source, checkpoint);
    const double difference = check_merged(folder, config, source, dtype, checkpoint);
    log_info(str("merged with what the quantized base stands for: logits differ from those of base and adapter by ", difference, " of their norm (rounding explains ",
                 merge_bound(config, dtype), ")"));
  } catch (const Error&) {
    std::filesystem::remove_all(folder);
    throw;
  }
  if (quantized && !config.lora.merge && config.lora.rank == 0 && config.quant.base != "none" && config.quant.base != "dense")
    log_info(str("these are the values that ", config.quant.base, " stands for, in ", dtype_name(exported_dtype(config, source, checkpoint)), "; trireme quantize writes the codes themselves"));
  log_info(str("wrote ", folder));
  return kExitDone;
}

}  // namespace trireme
