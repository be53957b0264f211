#include "train/state.h"

#include <cmath>
#include <functional>
#include <set>

#include "base/check.h"

namespace trireme {

Json TrainState::to_json() const {
  Json json;
  json["step"] = step;
  json["position"] = {{"seed", position.seed}, {"epoch", position.epoch}, {"index", position.index}};
  json["micro_batch_size"] = micro_batch_size;
  json["accumulation"] = accumulation;
  json["rows_per_step"] = rows_per_step;
  json["total_steps"] = total_steps;
  json["best"] = std::isnan(best) ? Json() : Json(best);
  json["best_step"] = best_step;
  json["evaluations_without_better"] = evaluations_without_better;
  json["metric"] = metric;
  json["eval_data"] = eval_data;
  json["seconds"] = seconds;
  json["stopped_early"] = stopped_early;
  json["ranks"] = ranks;
  json["threads"] = threads;
  json["vectors"] = vectors;
  json["loss_scale"] = loss_scale;
  json["clean_steps"] = clean_steps;
  json["origin"] = origin;
  json["identity"] = identity;
  return json;
}

void TrainState::forget_best() {
  best = std::numeric_limits<double>::quiet_NaN();
  best_step = evaluations_without_better = 0;
}

TrainState TrainState::from_json(const Json& json, const std::string& source) try {
  TrainState s;
  s.step = json.at("step");
  s.position = {json.at("position").at("seed"), json.at("position").at("epoch"), json.at("position").at("index")};
  s.micro_batch_size = json.at("micro_batch_size");
  s.accumulation = json.at("accumulation");
  s.rows_per_step = json.at("rows_per_step");
  s.total_steps = json.at("total_steps");
  if (!json.at("best").is_null()) s.best = json.at("best");
  s.best_step = json.at("best_step");
  s.evaluations_without_better = json.at("evaluations_without_better");
  s.metric = json.value("metric", "");  // these and others with value() are younger than the first checkpoints
  s.eval_data = json.value("eval_data", "");
  s.seconds = json.at("seconds");
  s.stopped_early = json.at("stopped_early");
  s.ranks = json.value("ranks", s.ranks);
  s.threads = json.value("threads", s.threads);
  s.vectors = json.value("vectors", s.vectors);
  s.loss_scale = json.value("loss_scale", s.loss_scale);
  s.clean_steps = json.value("clean_steps", s.clean_steps);
  s.origin = json.value("origin", Json());
  s.identity = json.at("identity");
  if (!s.identity.at("config.json").is_object()) throw DataError(str(source, ": its manifest.json does not say which model it belongs to"));
  for (const char* part : {"weights", "data"})
    for (const char* key : {"of", "hash"}) (void)s.identity.at(part).at(key).get<std::string>();
  return s;
} catch (const Json::exception& error) {
  throw DataError(str(source, ": the state in its manifest.json is not that of a run: ", error.what()));
}

Json run_identity(Config config, const Json& model, const Json& data) {
  // Keys that do not change what is learnt, or that a resumed run may change.
  static const std::set<std::string> free_sections = {"parallel", "log", "eval", "checkpoint", "comm", "generate", "tokenize", "plan"};
  static const std::set<std::string> free_keys = {
      "run.dir", "run.resume", "run.device", "train.steps", "train.epochs", "train.stop_after", "train.threads", "train.gradients",
      "train.accumulation", "train.micro_batch_size", "train.recompute", "train.offload_activations", "train.mlp_tokens", "optim.offload", "optim.paged", "data.cache", "data.show", "lora.merge", "lora.requantize",
      // their content is what counts: the fingerprints
      "model.path", "model.config", "model.tokenizer", "model.revision", "model.embedding", "data.train", "data.eval", "lora.path"};
  Json identity = model;
  identity["data"] = data;
  for (const auto& f : fields(config)) {
    std::string section = f.key.substr(0, f.key.find('.'));
    if (!free_sections.count(section) && !free_keys.count(f.key)) identity[f.key] = f.text();
  }
  return identity;
}

void check_identity(const Json& saved, const Json& now, const std::string& checkpoint) {
  std::string differences;
  auto differs = [&](const std::string& what, const std::string& then, const std::string& here, const char* more = "") {
    const auto said = [](const std::string& value) { return value.empty() ? "nothing" : value; };
    differences += str("\n  ", what, ": ", said(then), " then, ", said(here), " now", more);
  };
  Config defaults;
  for (const auto& f : fields(defaults)) {
    if (!now.contains(f.key)) continue;
    std::string then = saved.value(f.key, f.text());  // a key that is younger than the checkpoint had its default then
    // What "not set" stands for, and how it was said once.
    static const std::map<std::string, std::string> kOnce = {{"quant.threshold", "6"}, {"quant.block_size", "64"}, {"quant.double", "true"}};
    const auto meant = [&](const std::string& value) { return kOnce.count(f.key) && kOnce.at(f.key) == value ? f.text() : value; };
    if (meant(now[f.key]) != meant(then)) differs(f.key, then, now[f.key]);
  }
  const Json &old_fields = saved.at("config.json"), &new_fields = now.at("config.json");
  constexpr size_t kShown = 100;
  const std::function<void(const std::string&, const Json&, const Json&)> compare = [&](const std::string& place, const Json& old_side, const Json& new_side) {
    std::set<std::string> names;
    for (const Json* side : {&old_side, &new_side})
      for (const auto& [name, value] : side->items()) names.insert(name);
    const auto text = [](const Json& side, const std::string& name) { return side.contains(name) ? dump_json(side[name]) : "absent"; };
    const auto begin = [](const std::string& text) { return text.size() > kShown ? text.substr(0, kShown) + "..." : text; };
    for (const auto& name : names) {
      const std::string then = text(old_side, name), here = text(new_side, name);
      if (then == here) continue;
      if (then.starts_with("{") && here.starts_with("{")) compare(str(place, " ", name), old_side[name], new_side[name]);
      else differs(str(place, " ", name), begin(then), begin(here));
    }
  };
  compare("config.json", old_fields, new_fields);
  for (const char* part : {"weights", "data"}) {
    const Json &then = saved.at(part), &here = now.at(part);
    if (then.at("hash") == here.at("hash")) continue;
    // The hash of the data also changes with the keys that order and cut it, which are listed already.
    if (differences.empty() || then.at("of") != here.at("of")) differs(part, then.at("of"), here.at("of"), "; the content differs");
  }
  if (!differences.empty())
    throw ConfigError(str("cannot go on from ", checkpoint, ", it belongs to another run:", differences,
                          "\nSet these back, or start a new run with another run.dir. On a run that goes on, train.steps and "
                          "train.epochs may grow; the keys of parallel, checkpoint, eval, comm and log, run.device, model.embedding, optim.offload, optim.paged, train.recompute, "
                          "train.offload_activations, train.mlp_tokens and train.threads may change, and train.micro_batch_size and train.accumulation where a step keeps its rows."));
}

}  // namespace trireme
