#include "base/tensor.h"

#include "eval/evaluate.h"

#include "base/check.h"
#include "base/json.h"

namespace trireme {

std::map<std::string, double> sum_over_ranks(const std::map<std::string, double>& sums, const Communicator& comm) {
  Json mine = Json::object();
  for (const auto& [name, value] : sums) mine[name] = 0;
  // A rank without a batch has no names: it takes them from the others.
  std::string names;
  for (const auto& text : comm.gather_bytes(dump_json(mine)))
    if (text.size() > names.size()) names = text;
  const Json all_names = Json::parse(comm.broadcast_bytes(names));
  std::map<std::string, double> total;
  for (const auto& item : all_names.items()) total[item.key()] = 0;
  at::Tensor flat = at::zeros({static_cast<int64_t>(total.size())}, at::kDouble);
  int64_t i = 0;
  for (const auto& [name, zero] : total) {
    auto it = sums.find(name);
    flat.data_ptr<double>()[i++] = it == sums.end() ? 0.0 : it->second;
  }
  comm.all_reduce(flat);
  i = 0;
  for (auto& [name, value] : total) value = flat.data_ptr<double>()[i++];
  return total;
}

std::map<std::string, double> evaluate(const Task& task, const std::function<std::map<std::string, double>()>& mine,
                                       const Communicator& comm, const Phase& phase) {
  at::NoGradGuard no_grad;
  std::map<std::string, double> sums, metrics;
  phase([&] { sums = mine(); });
  sums = sum_over_ranks(sums, comm);
  phase([&] { metrics = task.metrics(sums); });
  return metrics;
}

std::map<std::string, double> evaluate(Transformer& model, const Task& task, std::shared_ptr<const Dataset> dataset,
                                       int64_t rows_per_batch, const Communicator& data, const Communicator& adding, const Phase& phase) {
  const bool was_training = model.training();
  model.set_training(false);
  auto mine = [&] {
    TensorSums sums;
    EvalLoader loader(std::move(dataset), rows_per_batch, data.rank(), data.size());
    // Weights that come from all ranks come to all at once: a rank without a batch computes on a token that counts nothing.
    const auto mine = static_cast<double>(loader.num_batches());
    const auto rounds = static_cast<int64_t>(model.block_weights() ? data.max(mine) : mine);
    for (int64_t i = 0; i < rounds; ++i) {
      if (i >= loader.num_batches()) {
        model.forward(to_model(SequenceBatch::of_nothing(), model));
        continue;
      }
      add(sums, task.run(model, to_model(loader.batch(i), model)).sums);
    }
    model.set_training(was_training);
    return read(sums);
  };
  return evaluate(task, mine, adding, phase);
}

}  // namespace trireme
