// Which rows a rank computes at which step. All is a function of a position that is a few integers; the stream of rows is
// the same for any number of ranks.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "data/dataset.h"

namespace trireme {

// How a step's B = micro_batch_size * accumulation * data_size rows are shared out: rank d takes rows
// [d B / data_size, (d+1) B / data_size), its micro-batch m the m-th part of those.
struct BatchShape {
  int64_t micro_batch_size = 1, accumulation = 1;
  int64_t data_rank = 0, data_size = 1;  // along the data axis of the mesh
  int64_t rows_per_step() const { return micro_batch_size * accumulation * data_size; }
};

// Survives a restart: row `index` of epoch `epoch` under `seed` comes next.
struct DataPosition {
  uint64_t seed = 0;
  int64_t epoch = 0, index = 0;
  bool operator==(const DataPosition&) const = default;
};

// The endless stream of rows: row g is row g % n of epoch g / n, in the epoch's order. A step takes the next B rows, across the
// end of an epoch where need be, so every step has B rows. Without shuffling and packing step s (from 1) takes
// records (s-1)B .. sB-1.
class Loader {
 public:
  Loader(std::shared_ptr<const Dataset> dataset, const BatchShape& shape, bool shuffle, uint64_t seed);

  int64_t rows_per_epoch() const { return dataset_->num_rows(); }
  SequenceBatch batch(int64_t micro) const;        // micro-batch `micro` of the step to come, for this rank
  std::vector<int64_t> rows(int64_t micro) const;  // its dataset rows
  void advance() { next_row_ += shape_.rows_per_step(); }
  double epoch() const;                            // epochs done before the step to come; 1.5 = half of the second

  DataPosition state() const;
  // DataError where the seed or the number of rows is another: the order would not be the one of the run.
  void set_state(const DataPosition& position);

  const Dataset& dataset() const { return *dataset_; }

 private:
  std::shared_ptr<const Dataset> dataset_;
  BatchShape shape_;
  bool shuffle_;
  uint64_t seed_;
  int64_t next_row_ = 0;
};

constexpr int64_t kEvalTokens = 2048;  // of a batch: enough for matrix products at full speed

// Every row of a dataset once, in batches dealt to the ranks in turn (some ranks may have one batch fewer, or none).
class EvalLoader {
 public:
  // Batches of `rows_per_batch` rows; 0: of rows that together have at most kEvalTokens, or of one longer row, and fewer where
  // a rank would be left without.
  EvalLoader(std::shared_ptr<const Dataset> dataset, int64_t rows_per_batch, int64_t data_rank, int64_t data_size);
  int64_t num_batches() const;          // of this rank
  SequenceBatch batch(int64_t i) const;

 private:
  std::shared_ptr<const Dataset> dataset_;
  std::vector<int64_t> first_rows_;  // of all ranks' batches, and the number of rows
  int64_t data_rank_, data_size_;
};

}  // namespace trireme
