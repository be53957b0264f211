#include "data/loader.h"

#include <algorithm>

#include "base/check.h"
#include "data/sampler.h"

namespace trireme {

Loader::Loader(std::shared_ptr<const Dataset> dataset, const BatchShape& shape, bool shuffle, uint64_t seed)
    : dataset_(std::move(dataset)), shape_(shape), shuffle_(shuffle), seed_(seed) {
  TRIREME_CHECK(dataset_ && dataset_->num_rows() > 0);
  TRIREME_CHECK(shape.micro_batch_size > 0 && shape.accumulation > 0 && shape.data_rank >= 0 &&
                shape.data_rank < shape.data_size);
}

std::vector<int64_t> Loader::rows(int64_t micro) const {
  TRIREME_CHECK(micro >= 0 && micro < shape_.accumulation, micro);
  int64_t n = rows_per_epoch();
  int64_t first = next_row_ + (shape_.data_rank * shape_.accumulation + micro) * shape_.micro_batch_size;
  std::vector<int64_t> rows;
  for (int64_t g = first; g < first + shape_.micro_batch_size; ++g)
    rows.push_back(shuffle_ ? Permutation(seed_, g / n, n)(g % n) : g % n);
  return rows;
}

SequenceBatch Loader::batch(int64_t micro) const {
  SequenceBatch batch;
  int64_t n = rows_per_epoch();
  int64_t g = next_row_ + (shape_.data_rank * shape_.accumulation + micro) * shape_.micro_batch_size;
  for (int64_t row : rows(micro)) dataset_->append_row(row, g++ / n, batch);
  return batch;
}

double Loader::epoch() const { return static_cast<double>(next_row_) / static_cast<double>(rows_per_epoch()); }

DataPosition Loader::state() const { return {seed_, next_row_ / rows_per_epoch(), next_row_ % rows_per_epoch()}; }

void Loader::set_state(const DataPosition& position) {
  if (position.seed != seed_)
    throw DataError(str("the checkpoint's data order was drawn with seed ", position.seed, ", this run has run.seed=",
                        seed_, "; set the seed back"));
  if (position.epoch < 0 || position.index < 0 || position.index >= rows_per_epoch() ||
      position.epoch > (int64_t{1} << 40) / rows_per_epoch())
    throw DataError(str("the checkpoint stands at row ", position.index, " of epoch ", position.epoch,
                        ", but the training data has ", rows_per_epoch(), " rows; it is not the data of that run"));
  next_row_ = position.epoch * rows_per_epoch() + position.index;
}

EvalLoader::EvalLoader(std::shared_ptr<const Dataset> dataset, int64_t rows_per_batch, int64_t data_rank, int64_t data_size)
    : dataset_(std::move(dataset)), first_rows_{0}, data_rank_(data_rank), data_size_(data_size) {
  TRIREME_CHECK(dataset_ && rows_per_batch >= 0 && data_rank >= 0 && data_rank < data_size);
  const int64_t rows = dataset_->num_rows(), most = std::clamp<int64_t>(dataset_->counts().tokens / data_size, 1, kEvalTokens);
  int64_t tokens = 0;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t own = dataset_->row_tokens(row);
    const bool full = rows_per_batch > 0 ? row - first_rows_.back() == rows_per_batch : tokens + own > most;
    if (full && row > first_rows_.back()) first_rows_.push_back(row), tokens = 0;
    tokens += own;
  }
  first_rows_.push_back(rows);
}

int64_t EvalLoader::num_batches() const {
  return (static_cast<int64_t>(first_rows_.size()) - 1 - data_rank_ + data_size_ - 1) / data_size_;
}

SequenceBatch EvalLoader::batch(int64_t i) const {
  TRIREME_CHECK(i >= 0 && i < num_batches(), i);
  SequenceBatch batch;
  const auto which = static_cast<size_t>(i * data_size_ + data_rank_);
  for (int64_t row = first_rows_[which]; row < first_rows_[which + 1]; ++row) dataset_->append_row(row, 0, batch);
  return batch;
}

}  // namespace trireme
