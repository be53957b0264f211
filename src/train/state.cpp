#include "train/state.h"

#include <cmath>
#include <set>

#include "base/check.h"

namespace trireme {

Json TrainState::to_json() const {
  Json json;
  json["step"] = step;
  json["position"] = {{"seed", position.seed}, {"epoch", position.epoch}, {"index", position.index}};
  json["rows_per_step"] = rows_per_step;
  json["total_steps"] = total_steps;
  json["best"] = std::isnan(best) ? Json() : Json(best);
  json["best_step"] = best_step;
  json["evaluations_without_better"] = evaluations_without_better;
  json["seconds"] = seconds;
  json["stopped_early"] = stopped_early;
  json["identity"] = identity;
  return json;
}

TrainState TrainState::from_json(const Json& json, const std::string& source) {
  TrainState s;
  s.step = json_get<int64_t>(json, "step", source);
  const Json& position = json.at("position");
  s.position.seed = position.at("seed").get<uint64_t>();
  s.position.epoch = json_get<int64_t>(position, "epoch", source);
  s.position.index = json_get<int64_t>(position, "index", source);
  s.rows_per_step = json_get<int64_t>(json, "rows_per_step", source);
  s.total_steps = json_get<int64_t>(json, "total_steps", source);
  s.best = json_get_or<double>(json, "best", s.best, source);
  s.best_step = json_get<int64_t>(json, "best_step", source);
  s.evaluations_without_better = json_get<int64_t>(json, "evaluations_without_better", source);
  s.seconds = json_get<double>(json, "seconds", source);
  s.stopped_early = json_get<bool>(json, "stopped_early", source);
  s.identity = json.at("identity");
  return s;
}

Json run_identity(Config config, const std::string& model_fingerprint, const std::string& data_fingerprint) {
  // Keys that do not change what is learnt, or that a resumed run may change.
  static const std::set<std::string> free_sections = {"parallel", "log", "eval", "checkpoint", "comm", "generate", "tokenize"};
  static const std::set<std::string> free_keys = {
      "run.dir", "run.resume", "train.steps", "train.epochs", "train.stop_after", "train.threads", "train.gradients",
      "train.accumulation", "train.micro_batch_size", "train.recompute", "data.cache", "data.show", "lora.merge",
      // their content is what counts: the fingerprints
      "model.path", "model.config", "model.tokenizer", "model.revision", "data.train", "data.eval", "lora.path"};
  Json identity;
  identity["model"] = model_fingerprint;
  identity["data"] = data_fingerprint;
  for (const auto& f : fields(config)) {
    std::string section = f.key.substr(0, f.key.find('.'));
    if (!free_sections.count(section) && !free_keys.count(f.key)) identity[f.key] = f.text();
  }
  return identity;
}

void check_identity(const Json& saved, const Json& now, const std::string& checkpoint) {
  std::string differences;
  for (const auto& item : now.items()) {
    std::string before = saved.contains(item.key()) ? saved[item.key()].get<std::string>() : "";
    std::string after = item.value().get<std::string>();
    if (before == after) continue;
    bool is_file = item.key() == "model" || item.key() == "data";
    differences += str("\n  ", item.key(), is_file ? str(": the ", item.key(), " is another one (its content differs)")
                                                   : str(": ", before, " then, ", after, " now"));
  }
  if (!differences.empty())
    throw ConfigError(str("cannot go on from ", checkpoint, ", it belongs to another run:", differences,
                          "\nSet these back, or start a new run with another run.dir"));
}

}  // namespace trireme
