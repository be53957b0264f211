// What survives a restart besides tensors, and what must be the same for a run to go on.
#pragma once

#include <limits>

#include "config/config.h"
#include "base/json.h"
#include "data/loader.h"

namespace trireme {

struct TrainState {
  int64_t step = 0;  // done
  DataPosition position;
  int64_t micro_batch_size = 0, accumulation = 0;  // as configured
  int64_t rows_per_step = 0;
  int64_t total_steps = 0;
  double best = std::numeric_limits<double>::quiet_NaN();
  int64_t best_step = 0, evaluations_without_better = 0;
  std::string metric, eval_data;  // what `best` is: eval.metric, and the fingerprint of the data it was measured on
  double seconds = 0;        // of training, all starts together
  bool stopped_early = false;
  int64_t ranks = 0, threads = 0;  // ranks and threads of each, of the last start
  std::string vectors;             // and its vector code, or its devices
  double loss_scale = 1;     // optim/loss_scale.h
  int64_t clean_steps = 0;
  Json origin;               // run.resume=FOLDER that the run began with: {folder, manifest: its hash}; null: none
  Json identity;             // see run_identity()

  // What is known of the best model so far does not count any more.
  void forget_best();

  Json to_json() const;
  static TrainState from_json(const Json& json, const std::string& source);  // DataError
};

// The configuration keys that a resumed run must share, with ModelSource::identity and {"of": words, "hash"} of the data.
// Rows of a step and the length of the run are compared elsewhere: the one may come about in several ways, the other may
// grow.
Json run_identity(Config config, const Json& model, const Json& data);

// ConfigError that lists every difference between the run that was saved and this one: keys, fields of config.json,
// weights, data.
void check_identity(const Json& saved, const Json& now, const std::string& checkpoint);

}  // namespace trireme
