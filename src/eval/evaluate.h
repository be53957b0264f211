// Metrics of a model over a data set, computed by all ranks together.
#pragma once

#include "comm/communicator.h"
#include "data/loader.h"
#include "tasks/task.h"

namespace trireme {

// Every row once, dealt over the ranks of `data`; the task's metrics from the sums of all. No dropout, no gradients.
// `progress` is told the batches done and in all, on this rank. Collective.
std::map<std::string, double> evaluate(Transformer& model, const Task& task, std::shared_ptr<const Dataset> dataset,
                                       int64_t micro_batch_size, const Communicator& data,
                                       const std::function<void(int64_t, int64_t)>& progress = {});

// Adds the sums of all ranks. The names must be the same on every rank that has any.
std::map<std::string, double> sum_over_ranks(const std::map<std::string, double>& sums, const Communicator& comm);

}  // namespace trireme
