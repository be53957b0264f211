#include "parallel/sharded_weights.h"

#include <algorithm>
#include <limits>

#include "base/check.h"

namespace trireme {
namespace {

// The memory of a tensor and of all its views: `bytes` without content, or none.
void set_memory(const at::Tensor& whole, size_t bytes) {
  c10::StorageImpl* storage = whole.storage().unsafeGetStorageImpl();
  storage->set_data_ptr_noswap(bytes > 0 ? storage->allocator()->allocate(bytes) : at::DataPtr(nullptr, storage->device()));
  storage->set_nbytes(bytes);
}

size_t size_of(const at::Tensor& whole) { return static_cast<size_t>(whole.numel()) * whole.itemsize(); }

}  // namespace

ShardedWeights::ShardedWeights(const std::vector<Parameter>& parameters, const Holders& holders, const GradientReducer& reducer,
                               int zero, int64_t bucket_bytes, const WeightFill& fill, bool overlap)
    : zero_(zero), overlap_(overlap) {
  TRIREME_CHECK(zero >= 1 && zero <= 3 && (zero == 3 || !fill), zero);
  // Gathers of backward fall between the reducer's collectives in an order of their own.
  for (const Communicator& group : reducer.groups()) groups_.push_back(group.split(0, group.rank(), "weights"));
  std::vector<Parameter> trained, frozen;
  Holders of_frozen{holders.all, reducer.groups(), {}};
  std::vector<size_t> numbers;
  std::vector<Parameter> kept, *unfilled = fill ? &kept : nullptr;
  for (const GradientSlice& s : reducer.slices()) trained.push_back({s.name, s.weight, s.shard});
  for (const Bucket& bucket : reducer.layout()) add(bucket, trained, unfilled);
  if (zero_ < 3) return;
  for (size_t i = 0; i < parameters.size(); ++i) {
    if (parameters[i].value.requires_grad()) continue;
    if (parameters[i].on_host) {
      if (fill) kept.push_back(parameters[i]);
      continue;
    }
    numbers.push_back(frozen.size());
    frozen.push_back(parameters[i]);
    of_frozen.group_of.push_back(holders.group_of[i]);
  }
  std::vector<Bucket> buckets = reducer.layout();
  for (const Bucket& bucket : cut_buckets(frozen, numbers, of_frozen, bucket_bytes, true)) {
    add(bucket, frozen, unfilled);
    buckets.push_back(bucket);
  }
  first_ = std::numeric_limits<int64_t>::max(), last_ = -1;
  for (size_t b = 0; b < buckets.size(); ++b) {
    const int64_t block = buckets[b].unit;
    if (block >= 0) first_ = std::min(first_, block), last_ = std::max(last_, block);
    if (static_cast<size_t>(block + 2) > units_.size()) units_.resize(static_cast<size_t>(block + 2));
    units_[static_cast<size_t>(block + 1)].flats.push_back(b);
  }
  if (fill) fill(kept);
}

void ShardedWeights::add(const Bucket& bucket, const std::vector<Parameter>& parameters, std::vector<Parameter>* unfilled) {
  at::NoGradGuard no_grad;
  const Communicator& group = groups_[bucket.group];
  Flat flat{group, at::empty({bucket.num_elements}, bucket.options), at::Tensor()};
  int64_t used = 0;
  for (size_t k = 0; k < bucket.parameters.size(); ++k) {
    at::Tensor leaf = parameters[bucket.parameters[k]].value;
    at::Tensor view = flat.whole.narrow(0, bucket.offsets[k], leaf.numel()).view(leaf.sizes());
    if (!unfilled) {
      view.copy_(leaf.detach());
      flat.whole.narrow(0, used, bucket.offsets[k] - used).zero_();
    }
    leaf.set_data(view);
    used = bucket.offsets[k] + leaf.numel();
  }
  if (!unfilled) flat.whole.narrow(0, used, bucket.num_elements - used).zero_();
  const int64_t size = bucket.num_elements / group.size();
  flat.part = flat.whole.narrow(0, group.rank() * size, size);
  if (zero_ == 3) {
    flat.part = unfilled ? at::zeros_like(flat.part) : flat.part.clone();
    set_memory(flat.whole, 0);
  }
  if (unfilled)
    for (const PartRange& r : ranges_of_part(bucket, parameters, group.rank(), group.size())) {
      const Parameter& p = parameters[r.parameter];
      for (Parameter& piece : rectangles(p.name, flat.part.narrow(0, r.offset, r.end - r.begin), p.value.sizes(), p.shard, r.begin, r.end))
        unfilled->push_back(std::move(piece));
    }
  flats_.push_back(std::move(flat));
}

void ShardedWeights::updated() {
  if (zero_ == 3) return release_all();
  std::vector<Work> work;
  for (Flat& flat : flats_) work.push_back(flat.group.start_all_gather(flat.whole, flat.part));
  for (Work& w : work) w.wait();
}

void ShardedWeights::start(Unit& unit) {
  if (unit.there) return;
  unit.there = true;
  for (size_t b : unit.flats) {
    Flat& flat = flats_[b];
    set_memory(flat.whole, size_of(flat.whole));
    unit.work.push_back(flat.group.start_all_gather(flat.whole, flat.part));
  }
}

void ShardedWeights::wait(Unit& unit) {
  for (Work& work : unit.work) work.wait();
  unit.work.clear();
}

void ShardedWeights::drop(Unit& unit) {
  if (!unit.there) return;
  wait(unit);
  for (size_t b : unit.flats) set_memory(flats_[b].whole, 0);
  unit.there = false;
}

void ShardedWeights::prefetch() {
  if (zero_ == 3) start(units_[0]);
}

void ShardedWeights::acquire(int64_t block, bool backward) {
  if (zero_ < 3) return;
  Unit& unit = units_.at(static_cast<size_t>(block + 1));
  start(unit);
  ++unit.num_uses;
  wait(unit);
  const int64_t next = block < 0 ? first_ : backward ? block - 1 : block + 1;
  if (overlap_ && next >= first_ && next <= last_) start(units_[static_cast<size_t>(next + 1)]);
}

void ShardedWeights::release(int64_t block, bool backward) {
  if (zero_ < 3) return;
  Unit& unit = units_.at(static_cast<size_t>(block + 1));
  if (--unit.num_uses > 0) return;
  // Backward begins where forward ends.
  if (!backward && block == last_ && at::GradMode::is_enabled()) return;
  drop(unit);
}

void ShardedWeights::acquire_all() {
  for (Unit& unit : units_) {
    start(unit);
    ++unit.num_uses;  // no block's release drops it
  }
  for (Unit& unit : units_) wait(unit);
}

void ShardedWeights::hold(const std::string& name) {
  if (zero_ < 3) return;
  const auto number = static_cast<size_t>(block_of(name) + 1);
  Unit& unit = units_.at(number);
  if (number > 0 && number != held_) {
    if (held_ > 0) drop(units_[held_]);
    held_ = number;
  }
  start(unit);
  wait(unit);
}

void ShardedWeights::release_all() {
  held_ = 0;
  for (Unit& unit : units_) {
    unit.num_uses = 0;
    drop(unit);
  }
}

int64_t ShardedWeights::bytes_held() const {
  size_t bytes = 0;
  for (const Flat& flat : flats_) bytes += flat.whole.storage().nbytes() + (zero_ == 3 ? flat.part.nbytes() : 0);
  return static_cast<int64_t>(bytes);
}

int64_t ShardedWeights::bytes_gathered() const {
  int64_t bytes = 0;
  for (const Communicator& group : groups_)
    for (const auto& line : group.size() > 1 ? group.statistics().lines : std::vector<CommStatistics::Line>()) bytes += line.op == "all_gather" ? line.num_bytes : 0;
  return bytes;
}

std::map<int64_t, int64_t> ShardedWeights::elements() const {
  std::map<int64_t, int64_t> all;
  for (size_t u = 0; u < units_.size(); ++u)
    for (size_t b : units_[u].flats) all[static_cast<int64_t>(u) - 1] += flats_[b].whole.numel();
  return all;
}

}  // namespace trireme
