// trireme eval: one JSON object on stdout; logits to a file for whoever compares them.
#include "base/tensor.h"

#include <iostream>

#include "base/log.h"
#include "checkpoint/safetensors.h"
#include "comm/mesh.h"
#include "comm/watchdog.h"
#include "eval/evaluate.h"
#include "eval/token_ids.h"
#include "launch/verbs.h"
#include "tasks/task.h"
#include "train/agreement.h"
#include "train/build.h"
#include "train/check_config.h"
#include "train/device.h"
#include "train/text_tools.h"

namespace trireme {
namespace {

std::map<std::string, double> eval_token_ids(const Config& config, const ModelSource& source, Transformer& model, const Task& task,
                                             const Communicator& copy, bool counts) {
  at::NoGradGuard no_grad;
  TensorSums found;
  std::vector<TensorSource> logits;  // computed when they are written: one row's are in memory at a time
  const auto batches = token_ids_from_json(read_json_file(config.eval.token_ids), source.config.vocab_size, config.eval.token_ids);
  SequenceBatch together;  // rows for one forward
  for (const auto& row : batches) {
    together.append(row);
    if (together.num_tokens() >= kEvalTokens || &row == &batches.back())
      add(found, task.run(model, to_model(std::exchange(together, {}), model)).sums);
    logits.push_back({str("logits.", logits.size()), at::kFloat, {row.num_tokens(), source.config.vocab_size},
                      [&] { return model.logits(model.all_rows(model.forward(to_model(row, model)))).narrow(0, 0, row.num_tokens()); }});
  }
  if (!config.eval.logits.empty()) write_safetensors(config.eval.logits, logits, {}, copy.rank() == 0);
  auto sums = sum_over_ranks(counts ? read(found) : std::map<std::string, double>(), copy);
  // One-token rows have logits, but nothing to predict.
  if (sums["count"] == 0 && !config.eval.logits.empty()) return {{"tokens", 0.0}};
  return task.metrics(sums);
}

}  // namespace

ExitStatus verb_eval(const Config& config, const CommandLine& line, const Process& process) {
  check_config(config, line);
  if (config.eval.token_ids.empty() && config.data.eval.empty())
    throw ConfigError("nothing to evaluate: set data.eval to record files, or eval.token_ids to a JSON file of ids");
  if (!config.eval.logits.empty() && config.eval.token_ids.empty()) throw ConfigError("eval.logits needs eval.token_ids");
  Communicator world = Communicator::world();
  const MeshComms comms(mesh_of(config, process.size()), world);
  const Communicator adding = world.split(comms.coords.tensor, world.rank(), "sums"), copy = world.split(comms.coords.data, world.rank(), "copy");
  ModelSource source;
  std::unique_ptr<Transformer> model;
  std::map<std::string, double> metrics;
  auto task = make_task(config.task.kind);
  ModelCut cut;
  at::Device device = at::kCPU;
  agree_on(world, [&] {
    device = choose_device(config, world);
    source = find_model(config);
    check_dtype(config, weight_dtype(config, source), device.type(), "model.dtype");
    if (!device.is_cpu()) say_kernel_gaps(kernel_gaps(source.config, weight_dtype(config, source)));
    cut = forward_cut(source.config, comms);
  });
  if (!config.eval.token_ids.empty()) {
    agree_on(world, [&] {
      if (comms.coords.data != 0) return;
      model = build_model(config, source, weight_dtype(config, source), false, device, false, cut);
      metrics = eval_token_ids(config, source, *model, *task, copy, comms.coords.tensor == 0);
    });
  } else {
    DataOptions options;
    std::string file;
    std::shared_ptr<const Dataset> dataset;
    {
      CommTimeoutPause pause(process.rank() != 0);  // rank 0 may tokenise for long
      agree_on(world, [&] {
        TextTools tools = load_text_tools(config, source.tokenizer_folder, &source.config);
        options = data_options(config, tools, source.config.vocab_size);
        options.train = options.eval;  // prepare() wants a training set; only the evaluation files are read
        if (process.rank() == 0) file = Dataset::prepare(options, Split::kEval, tools.tokenizer, tools.chat ? &*tools.chat : nullptr);
      });
    }
    file = world.broadcast_bytes(file);
    agree_on(world, [&] {
      dataset = Dataset::open(options, Split::kEval, file);
      if (process.rank() == 0) log_info(str("evaluation data: ", dataset->counts().text()));
      model = build_model(config, source, weight_dtype(config, source), false, device, false, cut);
    });
    const auto together = [&](const std::function<void()>& part) {
      agree_on(world, [&] {
        name_out_of_memory(device, [&] { return bytes_of(model->parameters()); },
                           "Lower eval.micro_batch_size or data.max_length, set model.dtype=bfloat16, or share the model out: parallel.tensor", part);
      });
    };
    metrics = evaluate(*model, *task, dataset, config.eval.micro_batch_size, comms.data, adding, together);
  }
  if (metrics.contains("loss") && !std::isfinite(metrics.at("loss")))  // the same on every rank
    throw AgreedError(kExitData, "the loss is not finite: the model's weights are damaged, or model.dtype is too narrow for them");
  if (process.rank() == 0) {
    Json out;
    for (const auto& [name, value] : metrics) out[name] = name == "tokens" ? Json(static_cast<int64_t>(value)) : Json(value);
    std::cout << dump_json(out) << std::endl;
  }
  return kExitDone;
}

}  // namespace trireme
