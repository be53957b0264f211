// trireme export: a model (with lora.path and lora.merge=true: merged), or a run's checkpoint, as a Hugging Face folder.
#include "base/tensor.h"

#include <filesystem>

#include "base/log.h"
#include "checkpoint/checkpoint.h"
#include "launch/verbs.h"
#include "train/build.h"

namespace trireme {

ExitStatus verb_export(const Config& config, const CommandLine& line, const Process& process) {
  check_config(config, line);
  if (config.run.dir.empty()) throw ConfigError("run.dir is not set: the folder to write");
  if (!config.lora.path.empty() && !config.lora.merge)
    throw ConfigError("lora.path is set: say lora.merge=true to write the merged model (the adapter itself is exported already)");
  if (config.lora.merge && config.lora.path.empty()) throw ConfigError("lora.merge needs lora.path, the adapter to merge");
  if (process.rank() != 0) return kExitDone;
  std::string folder = config.run.dir;
  if (std::filesystem::exists(folder) && !std::filesystem::is_empty(folder))
    throw ConfigError(str("run.dir=", folder, " is not empty; name a new folder"));
  ModelSource source = find_model(config);
  auto model = build_model(config, source, weight_dtype(config, source), false);
  if (config.run.resume != "auto" && config.run.resume != "never") {
    std::vector<NamedTensor> targets;
    for (auto& p : model->parameters()) targets.push_back({"model/" + p.name, p.value.detach(), p.shard});
    open_checkpoint(config.run.resume).load(targets, true);
  }
  export_model(folder, *model, source);
  log_info(str("wrote ", folder));
  return kExitDone;
}

}  // namespace trireme
