// trireme export: a model (with lora.path and lora.merge=true: merged), or a run's checkpoint (run.resume=FOLDER, with the run's
// model and lora keys), as a Hugging Face folder, or as a PEFT folder where the checkpoint holds adapters.
#include "base/tensor.h"

#include <algorithm>
#include <filesystem>
#include <optional>

#include "base/log.h"
#include "checkpoint/checkpoint.h"
#include "launch/verbs.h"
#include "train/build.h"

namespace trireme {
namespace {

at::ScalarType trained_dtype(const Checkpoint& checkpoint) {
  for (const auto& [name, tensor] : checkpoint.tensors())
    if (name.starts_with("model/")) return tensor.dtype;
  throw DataError(str(checkpoint.folder(), " holds no weights of a model"));
}

}  // namespace

ExitStatus verb_export(const Config& config, const CommandLine& line, const Process& process) {
  check_config(config, line);
  if (config.run.dir.empty()) throw ConfigError("run.dir is not set: the folder to write");
  if (!config.lora.path.empty() && !config.lora.merge)
    throw ConfigError("lora.path is set: say lora.merge=true to write the merged model (the adapter itself is exported already)");
  const bool from_checkpoint = config.run.resume != "auto" && config.run.resume != "never";
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
  auto model = build_model(config, source, checkpoint ? trained_dtype(*checkpoint) : weight_dtype(config, source), from_checkpoint);
  if (checkpoint && !has_lora(*model) &&
      std::any_of(checkpoint->tensors().begin(), checkpoint->tensors().end(), [](const auto& t) { return t.first.find(".lora_") != std::string::npos; }))
    throw ConfigError(str("the checkpoint ", checkpoint->folder(), " holds adapters, but lora.rank is 0: name the run's config.ini, as in "
                          "trireme export RUN/config.ini --run.resume=", config.run.resume, " --run.dir=OUT"));
  if (checkpoint) {  // it holds what was trained: all weights, or the adapters
    std::vector<NamedTensor> targets;
    for (auto& p : model->parameters())
      if (p.value.requires_grad()) targets.push_back({"model/" + p.name, p.value.detach(), p.shard});
    checkpoint->load(targets, true);
  }
  const bool adapter = has_lora(*model) && !config.lora.merge;
  Chunks whole;
  whole.push_back(std::move(model));
  (adapter ? export_adapter : export_model)(folder, whole, config, source, Communicator::self(), {});
  log_info(str("wrote ", folder));
  return kExitDone;
}

}  // namespace trireme
