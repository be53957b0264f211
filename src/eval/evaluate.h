// Metrics of a model over a data set, computed by all ranks together.
#pragma once

#include "comm/communicator.h"
#include "data/loader.h"
#include "tasks/task.h"

namespace trireme {

// Runs a part in which a rank may fail alone; collective.
using Phase = std::function<void(const std::function<void()>& part)>;

// Every row once, in the batches of EvalLoader, dealt over the ranks of `data`; the task's metrics from the sums of all ranks of
// `adding`: those of `data`, and of every stage where the model's layers are dealt out. No dropout, no gradients. Collective.
// `phase` lets the ranks agree on errors before they meet in sums.
std::map<std::string, double> evaluate(Transformer& model, const Task& task, std::shared_ptr<const Dataset> dataset,
                                       int64_t rows_per_batch, const Communicator& data, const Communicator& adding, const Phase& phase);

// The same from what `mine` gives: this rank's part of the task's sums, none where others have computed them.
std::map<std::string, double> evaluate(const Task& task, const std::function<std::map<std::string, double>()>& mine,
                                       const Communicator& comm, const Phase& phase);

// Adds the sums of all ranks. The names must be the same on every rank that has any.
std::map<std::string, double> sum_over_ranks(const std::map<std::string, double>& sums, const Communicator& comm);

}  // namespace trireme
