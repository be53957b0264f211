#include "base/tensor.h"

#include "train/check_config.h"

#include <cmath>
#include <filesystem>

#include "base/check.h"
#include "checkpoint/hf_hub.h"
#include "checkpoint/peft.h"
#include "data/chat_template.h"
#include "data/records.h"
#include "optim/schedule.h"
#include "tasks/task.h"
#include "train/build.h"
#include "train/run_folder.h"

namespace trireme {
namespace {

namespace fs = std::filesystem;

// The base that an adapter names; empty where it names none, or is none.
std::string base_model_of(const std::string& adapter) {
  try {
    return adapter.empty() ? "" : read_peft_config(adapter).base_model;
  } catch (const Error&) {  // said elsewhere
    return "";
  }
}

// What the weights of a folder are stored in; empty where they are dense, or there is none.
std::string stored_form(const Config& c) {
  try {
    return c.model.path.empty() ? "" : read_model_config(resolve_model_folder(c.model.path, c.model.revision)).quantization;
  } catch (const Error&) {  // said elsewhere
    return "";
  }
}

// The product of a run, model/ or adapter/, never replaces what the run begins with.
void check_product(const Config& c, const std::string& run_dir, std::vector<std::string>& problems) {
  std::error_code none;
  for (const auto& [key, begin, product] : {std::tuple("model.path", c.model.path, "model"), {"lora.path", c.lora.path, "adapter"}})
    if (!begin.empty() && fs::equivalent(begin, fs::path(run_dir) / product, none))
      problems.push_back(str("run.dir=", run_dir, ": the run would write ", product, "/ over ", key, "=", begin, "; set another run.dir"));
}

}  // namespace

void find_conflicts(const Config& c, const CommandLine& line, int num_ranks, std::vector<std::string>& problems) {
  auto wrong = [&](const auto&... parts) { problems.push_back(str(parts...)); };
  const bool complete = problems.empty();  // else what seems missing may be what was misspelt
  const bool has_path = !c.model.path.empty();
  const std::string base = has_path ? "" : base_model_of(c.lora.path);
  if (line.verb == "quantize") {
    if (complete && !has_path) wrong("model.path is not set: the folder with the weights to quantize");
  } else if (has_path == !c.model.config.empty() && (complete || has_path)) {
    wrong(has_path ? "model.path and model.config are both set" : "neither model.path nor model.config is set",
          base.empty() ? ": set model.path to a Hugging Face folder, or model.config to a config.json for random weights" : str(": lora.path=", c.lora.path, " is an adapter for ", base, "; set model.path to it"),
          line.verb == "prepare" || line.verb == "tokenize" ? ", or model.tokenizer to a folder with a tokenizer.json" : "");
  }
  const std::string& resume = c.run.resume;
  // A checkpoint that is gone may be where a run began that goes on from its own.
  if (resume != "auto" && resume != "never" && !fs::is_directory(resume) && !fs::path(resume).filename().string().starts_with("step-"))
    wrong("run.resume=", resume, " is ", fs::exists(resume) ? "no folder" : "not there", ": allowed are auto, never, and the folder of a "
          "checkpoint, RUN/checkpoints/step-N");
  const bool quantizes = c.quant.base != "none" && c.quant.base != "dense";
  bool trains = line.verb == "train" || line.verb == "plan";
  if (trains) {
    check_product(c, c.run.dir.empty() ? default_run_dir(line.config_file) : c.run.dir, problems);
    const bool has_data = line.verb != "plan" || !c.data.train.empty();  // a plan does without
    if (complete && c.data.train.empty() && has_data) wrong("data.train is not set: name one or more .jsonl, .json or .txt files");
    if ((c.train.steps > 0) == (c.train.epochs > 0) && ((complete && has_data) || c.train.steps > 0))
      wrong(c.train.steps > 0 ? "train.steps and train.epochs are both set; set one, and the other to 0 where a file sets it"
                              : "the length of the run is not set: set train.steps or train.epochs");
    const Config d;  // values count, not what was written: the resolved configuration of a run names every key
    const std::pair<const char*, bool> lora_keys[] = {{"lora.alpha", c.lora.alpha != d.lora.alpha},
                                                      {"lora.dropout", c.lora.dropout != d.lora.dropout},
                                                      {"lora.targets", c.lora.targets != d.lora.targets},
                                                      {"lora.rslora", c.lora.rslora != d.lora.rslora},
                                                      {"lora.dora", c.lora.dora},
                                                      {"lora.init", c.lora.init != d.lora.init},
                                                      {"lora.loftq_iterations", c.lora.loftq_iterations != d.lora.loftq_iterations}};
    for (const auto& [key, is_set] : lora_keys)
      if (is_set && !c.lora.path.empty())
        wrong(key, " and lora.path are both set: the adapter of lora.path brings its own; leave ", key, " out");
      else if (is_set && c.lora.rank == 0)
        wrong(key, " is set, but lora.rank is 0: set lora.rank, or leave ", key, " out");
    if (c.quant.base == "fp8" && (c.lora.init != "random" || c.lora.dora))
      wrong(c.lora.dora ? "lora.dora=true" : str("lora.init=", c.lora.init), " is not possible with quant.base=fp8, whose weights are products' only: set another quant.base, or leave it out");
    if (c.lora.loftq_iterations != d.lora.loftq_iterations && c.lora.init != "loftq")
      wrong("lora.loftq_iterations is set, but lora.init is ", c.lora.init, ": set lora.init=loftq, or leave lora.loftq_iterations out");
    if (quantizes && c.lora.rank == 0 && c.lora.path.empty())
      wrong("quant.base=", c.quant.base, " freezes the weights, and nothing would be trained: set lora.rank, or leave quant.base out");
    if (c.lora.rank > 0 && !c.lora.path.empty()) wrong("lora.rank and lora.path are both set: the adapter of lora.path has a rank; set one");
    const bool is_adam = c.optim.kind == "adamw" || c.optim.kind == "adamw8bit", has_betas = is_adam || c.optim.kind == "lion";
    const std::tuple<const char*, bool, bool, const char*> optim_keys[] = {{"optim.momentum", c.optim.momentum != d.optim.momentum, c.optim.kind == "sgd", "sgd"},
                                                                           {"optim.beta1", c.optim.beta1 != d.optim.beta1, has_betas, "adamw, adamw8bit or lion"},
                                                                           {"optim.beta2", c.optim.beta2 != d.optim.beta2, has_betas, "adamw, adamw8bit or lion"},
                                                                           {"optim.epsilon", c.optim.epsilon != d.optim.epsilon, is_adam, "adamw or adamw8bit"}};
    for (const auto& [key, is_set, is_read, readers] : optim_keys)
      if (is_set && !is_read) wrong(key, " is set, but optim.kind is ", c.optim.kind, ": set optim.kind=", readers, ", or leave ", key, " out");
    if (complete && c.eval.patience > 0 && c.eval.every == 0) wrong("eval.patience needs eval.every");
    if (complete && c.eval.every > 0 && c.data.eval.empty() && c.data.eval_fraction == 0)
      wrong("eval.every is set, but there is nothing to evaluate: set data.eval or data.eval_fraction");
    for (const auto& [key, every] : {std::pair("eval.every", c.eval.every), {"checkpoint.every", c.checkpoint.every}})
      if (every >= 1 && every != std::floor(every))
        wrong(key, "=", every, ": a whole number of steps is expected, or a fraction of the run below 1");
    auto check = [&](const auto& part) {
      try {
        part();
      } catch (const ConfigError& error) {
        wrong(error.what());
      }
    };
    check([&] {
      Schedule(parse_schedule_kind(c.schedule.kind), c.optim.lr, c.train.steps > 0 ? c.train.steps : int64_t{1} << 50,
               c.schedule.warmup_steps, c.schedule.min_lr);  // of epochs the number of steps is not known yet
    });
    if (c.parallel.pipeline > 1) {
      check([&] { schedule_of(c); });
      if (c.parallel.reduce != "step") wrong("parallel.reduce=", c.parallel.reduce, " is not possible with parallel.pipeline=", c.parallel.pipeline);
    } else if (c.parallel.virtual_stages > 1) {
      wrong("parallel.virtual_stages=", c.parallel.virtual_stages, " needs parallel.pipeline of 2 or more");
    }
    if (c.train.offload_activations && c.train.recompute != "full")
      wrong("train.offload_activations=true needs train.recompute=full (it is ", c.train.recompute, "): what is kept between the blocks then is what leaves");
    if (c.parallel.reduce != "step" && c.parallel.zero < 2)
      wrong("parallel.reduce=", c.parallel.reduce, " needs parallel.zero=2 or 3: other ranks' sums would have nowhere to add up");
    check([&] { (void)make_task(c.task.kind)->larger_is_better(c.eval.metric); });
    check([&] {
      const Mesh mesh = mesh_of(c, num_ranks);
      const int64_t within = c.parallel.shard_within;
      if (within > 0 && (c.parallel.zero == 0 || mesh.num_data() % within != 0))
        throw ConfigError(str("parallel.shard_within=", within, c.parallel.zero == 0 ? " needs parallel.zero=1, 2 or 3" : str(" does not divide the ",
                              mesh.num_data(), " copies of the model: use a divisor of that, or 0: all share out")));
    });
  }
  if (const fs::path file = c.eval.logits; line.verb == "eval" && !file.empty() && file.has_parent_path() && !fs::is_directory(file.parent_path()))
    wrong("eval.logits=", c.eval.logits, ": there is no folder ", file.parent_path().string(), "; make it, or name a file in one that is there");
  const Config unset;
  const bool four_bits = c.quant.base == "nf4" || c.quant.base == "fp4";
  // A config.ini from before 0 and auto meant these names them always.
  const bool block_size = c.quant.block_size != unset.quant.block_size && c.quant.block_size != FrozenBase().blocks();
  const bool is_double = c.quant.double_quant != unset.quant.double_quant && (c.quant.double_quant == "true") != FrozenBase().has_double();
  const std::tuple<const char*, bool, bool> quant_keys[] = {{"quant.skip", c.quant.skip != unset.quant.skip, quantizes},
                                                            {"quant.threshold", c.quant.threshold != unset.quant.threshold, c.quant.base == "int8"},
                                                            {"quant.block_size", block_size, four_bits},
                                                            {"quant.double", is_double, four_bits},
                                                            {"quant.compute_dtype", c.quant.compute_dtype != unset.quant.compute_dtype, four_bits}};
  for (const auto& [key, is_set, is_read] : quant_keys)
    if (is_set && !is_read) wrong(key, " is set, but quant.base is ", c.quant.base, ": set quant.base", !quantizes ? "" : std::string_view(key) == "quant.threshold" ? " to int8" : " to nf4 or fp4", ", or leave ", key, " out");
  const std::string stored = c.lora.init == "loftq" ? stored_form(c) : "";
  if (!stored.empty() && line.verb != "export")
    wrong("lora.init=loftq begins with the weights, but those of ", c.model.path, " are stored in ", stored, " already: set lora.init=random, or quant.base=dense with lora.init=pissa");
  else if (c.lora.init == "loftq" && !four_bits)
    wrong("lora.init=loftq makes up for what 4 bits lose, but quant.base is ", c.quant.base, ": ",
          line.verb == "export" ? "name the run's config.ini, as in trireme export RUN/config.ini" : "set quant.base=nf4 or fp4, or lora.init=pissa");
  if (c.quant.threshold < 0 && c.quant.threshold != unset.quant.threshold) wrong("quant.threshold=", c.quant.threshold, ": must be 0 (no outliers) or more, or -1: 6, or what the model's folder says");
  if (line.verb == "export" && c.lora.requantize && !c.lora.merge)
    wrong("lora.requantize=true needs lora.merge=true: it is what becomes of merged weights; trireme quantize writes a model without an adapter");
  if (!c.data.eval.empty() && c.data.eval_fraction > 0) wrong("data.eval and data.eval_fraction are both set; set one");
}

void check_config(const Config& config, const CommandLine& line) {
  std::vector<std::string> problems;
  find_conflicts(config, line, 1, problems);
  if (!problems.empty()) throw ConfigError(joined(problems, "\n"));
}

void find_missing(const Config& c, const CommandLine& line, std::vector<std::string>& problems) {
  bool only_files = problems.empty();
  auto check = [&](const auto& open) {
    try {
      open();
    } catch (const Error& error) {
      problems.push_back(error.what());
      only_files = only_files && error.status() == kExitData;
    }
  };
  if (!c.model.path.empty()) check([&] { resolve_model_folder(c.model.path, c.model.revision, {true, c.model.tokenizer.empty()}); });
  if (!c.model.config.empty()) check([&] { read_model_config(c.model.config); });
  if (!c.model.tokenizer.empty()) check([&] { resolve_model_folder(c.model.tokenizer, "main", {false, true}, "model.tokenizer"); });
  check([&] { check_adapter(c.lora.path); });
  if (!c.data.chat_template.empty()) check([&] { ChatTemplate::find(c.data.chat_template, ""); });
  const std::string folder = c.run.dir.empty() ? default_run_dir(line.config_file) : c.run.dir;
  const bool plans_elsewhere = line.verb == "plan" && c.plan.ranks > 0, finished = fs::exists(folder + "/finished.json");
  if (!plans_elsewhere && (line.verb == "plan" || line.dry_run || !finished))  // a finished run needs no data
    for (const auto& [key, files] : {std::pair("data.train", &c.data.train), {"data.eval", &c.data.eval}})
      for (const std::string& file : *files)
        check([&] { RecordReader(parse_data_file(file, key, files->size())); });
  if (only_files && !problems.empty()) throw DataError(joined(problems, "\n"));
}

}  // namespace trireme
