// trireme quantize: a model with its linear layers in 4 or 8 bits, as a folder that transformers and bitsandbytes load.
#include "base/tensor.h"

#include "base/log.h"
#include "launch/verbs.h"
#include "train/check_config.h"
#include "train/quantize.h"

namespace trireme {

ExitStatus verb_quantize(const Config& config, const CommandLine& line, const Process& process) {
  check_config(config, line);
  if (config.run.dir.empty()) throw ConfigError("run.dir is not set: the folder to write");
  if (process.rank() != 0) return kExitDone;
  quantize_stored(config.run.dir, config, find_model(config));
  log_info(str("wrote ", config.run.dir));
  return kExitDone;
}

}  // namespace trireme
