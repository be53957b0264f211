#include "parallel/data_parallel.h"

#include <torch/csrc/autograd/function_hook.h>

#include <algorithm>
#include <mutex>
#include <unordered_map>

#include "base/check.h"
#include "base/hash.h"
#include "optim/clip.h"

namespace trireme {

namespace {

// Passes on every accumulation into a leaf's .grad.
class AccumulationHook : public torch::autograd::PostAccumulateGradHook {
 public:
  explicit AccumulationHook(std::function<void()> arrived) : arrived_(std::move(arrived)) {}
  void operator()(const torch::autograd::Variable&) override { arrived_(); }

 private:
  std::function<void()> arrived_;
};

at::ScalarType gradient_type(const at::Tensor& weight) {
  return weight.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

}  // namespace

struct GradientReducer::Impl {
  struct Leaf {
    size_t bucket = 0;
    bool empty = true;              // the slice holds nothing of this step yet
    int64_t num_arrived = 0;        // in this backward
    int64_t num_expected = -1;      // a backward; -1: not known yet
    at::Tensor late;                // came after the bucket had been sent; reduced in finish()
  };
  struct Bucket {
    std::vector<size_t> leaves;
    bool started = false;
    Work work;
  };

  Communicator data;
  GradientReducerOptions options;
  std::vector<GradientSlice> slices;
  std::vector<Leaf> leaves;                  // of the slices
  std::unordered_map<const void*, size_t> index;  // leaf's TensorImpl -> slice
  std::vector<at::Tensor> flat;              // of the buckets
  std::vector<Bucket> buckets;               // in the order in which they are sent: last parameters first
  std::mutex mutex;                          // backward of one model may run in several threads
  bool in_step = false, in_backward = false, overlapping = false;
  size_t next_bucket = 0;                    // first that is not started
  int64_t bytes_last = 0, bytes_step = 0, num_late = 0;

  void lay_out(const std::vector<Parameter>& parameters);
  void arrived(size_t i, at::Tensor gradient);
  bool complete(const Bucket& bucket) const;
  void start_complete_buckets();
  void start(size_t b);
  void end_backward();
  void reduce_late();
};

void GradientReducer::Impl::lay_out(const std::vector<Parameter>& parameters) {
  for (const Parameter& p : parameters) {
    if (!p.value.requires_grad()) continue;
    TRIREME_CHECK(p.value.is_leaf(), p.name);
    if (!index.emplace(p.value.unsafeGetTensorImpl(), slices.size()).second) continue;  // tied: known by its first name
    slices.push_back({p.name, p.value, at::Tensor(), p.shard});
  }
  leaves.resize(slices.size());
  // A model, or its adapters, that would fit into a few buckets gets more of them: all but the last travel during backward.
  constexpr int64_t kNumBuckets = 8, kSmallest = 64 << 10;
  int64_t total = 0;
  for (const GradientSlice& s : slices) total += s.weight.numel() * static_cast<int64_t>(c10::elementSize(gradient_type(s.weight)));
  const int64_t bucket_bytes = std::min(options.bucket_bytes, std::max(kSmallest, total / kNumBuckets));

  std::vector<int64_t> sizes;  // of the buckets, in elements
  std::vector<int64_t> offsets(slices.size());
  at::ScalarType type = at::kFloat;
  for (size_t i = slices.size(); i-- > 0;) {
    const at::ScalarType wanted = gradient_type(slices[i].weight);
    const int64_t limit = bucket_bytes / static_cast<int64_t>(c10::elementSize(wanted));
    if (buckets.empty() || wanted != type || sizes.back() + slices[i].weight.numel() > limit) {
      buckets.emplace_back();
      sizes.push_back(0);
      type = wanted;
    }
    buckets.back().leaves.push_back(i);
    leaves[i].bucket = buckets.size() - 1;
    offsets[i] = sizes.back();
    sizes.back() += slices[i].weight.numel();
  }
  for (size_t b = 0; b < buckets.size(); ++b) {
    const at::Tensor& weight = slices[buckets[b].leaves[0]].weight;
    const int64_t padded = (sizes[b] + data.size() - 1) / data.size() * data.size();
    flat.push_back(at::zeros({padded}, weight.options().dtype(gradient_type(weight)).requires_grad(false)));
    for (size_t i : buckets[b].leaves)
      slices[i].gradient = flat[b].narrow(0, offsets[i], slices[i].weight.numel()).view(slices[i].weight.sizes());
  }
}

void GradientReducer::Impl::arrived(size_t i, at::Tensor gradient) {
  std::lock_guard lock(mutex);
  TRIREME_CHECK(in_step, slices[i].name, ": a gradient outside of begin_step() .. finish()");
  TRIREME_CHECK(gradient.layout() == at::kStrided && gradient.sizes() == slices[i].weight.sizes(), slices[i].name);
  at::NoGradGuard no_grad;
  Leaf& leaf = leaves[i];
  ++leaf.num_arrived;
  if (buckets[leaf.bucket].started) {  // the slice belongs to the collective now
    ++num_late;
    if (leaf.late.defined())
      leaf.late.add_(gradient);
    else
      leaf.late = gradient.to(slices[i].gradient.scalar_type(), /*non_blocking=*/false, /*copy=*/true).contiguous();
  } else if (leaf.empty) {
    slices[i].gradient.copy_(gradient);
    leaf.empty = false;
  } else {
    slices[i].gradient.add_(gradient);
  }
  start_complete_buckets();
}

bool GradientReducer::Impl::complete(const Bucket& bucket) const {
  return std::all_of(bucket.leaves.begin(), bucket.leaves.end(), [&](size_t i) {
    return leaves[i].num_expected >= 0 && leaves[i].num_arrived >= leaves[i].num_expected;
  });
}

// In the buckets' own order only: all ranks must start the same collectives in the same order.
void GradientReducer::Impl::start_complete_buckets() {
  if (!overlapping) return;
  while (next_bucket < buckets.size() && complete(buckets[next_bucket])) start(next_bucket);
  for (size_t b = 0; b < next_bucket; ++b)
    if (!buckets[b].work.test()) break;  // the ones behind it are moved on by the same call
}

void GradientReducer::Impl::start(size_t b) {
  TRIREME_CHECK(b == next_bucket);
  for (size_t i : buckets[b].leaves)
    if (leaves[i].empty) slices[i].gradient.zero_();
  buckets[b].started = true;
  ++next_bucket;
  if (data.size() > 1) buckets[b].work = data.start_all_reduce(flat[b]);
  bytes_step += static_cast<int64_t>(flat[b].nbytes());
}

// What this backward brought is what the next one is expected to bring. The largest number seen counts: waiting for a
// contribution that does not come costs only overlap (finish() starts the bucket), a late one a second reduction.
void GradientReducer::Impl::end_backward() {
  if (!in_backward) return;
  for (size_t i = 0; i < leaves.size(); ++i) {
    Leaf& leaf = leaves[i];
    leaf.num_expected = std::max(leaf.num_expected, leaf.num_arrived);
    leaf.num_arrived = 0;
  }
  in_backward = overlapping = false;
}

// Contributions that missed their bucket, of any rank: the sum is linear, so their sum is added afterwards.
void GradientReducer::Impl::reduce_late() {
  at::Tensor late = at::zeros({static_cast<int64_t>(buckets.size())}, at::kByte);
  for (const Leaf& leaf : leaves)
    if (leaf.late.defined()) late.data_ptr<uint8_t>()[leaf.bucket] = 1;
  data.all_reduce(late, ReduceOp::kMax);
  for (size_t b = 0; b < buckets.size(); ++b) {
    if (!late.data_ptr<uint8_t>()[b]) continue;
    at::Tensor difference = at::zeros_like(flat[b]);
    for (size_t i : buckets[b].leaves) {
      if (!leaves[i].late.defined()) continue;
      difference
          .as_strided(slices[i].gradient.sizes(), slices[i].gradient.strides(), slices[i].gradient.storage_offset())
          .copy_(leaves[i].late);
      leaves[i].late.reset();
    }
    data.all_reduce(difference);
    flat[b].add_(difference);
    bytes_step += static_cast<int64_t>(difference.nbytes());
  }
}

GradientReducer::GradientReducer(const std::vector<Parameter>& parameters, Communicator data,
                                 const GradientReducerOptions& options)
    : impl_(std::make_unique<Impl>()) {
  TRIREME_CHECK(options.bucket_bytes > 0, options.bucket_bytes);
  impl_->data = std::move(data);
  impl_->options = options;
  // Before anything that may fail on one rank alone, such as the memory for the gradients.
  std::string description;
  for (const Parameter& p : parameters)
    if (p.value.requires_grad())
      description += trireme::str(p.name, " ", p.value.sizes(), " ", p.value.scalar_type(), "\n");
  const std::string rank0 = impl_->data.broadcast_bytes(description);
  TRIREME_CHECK(impl_->data.agree(description != rank0) == 0,
                "the ranks of a data-parallel group train different parameters; here:\n", description,
                "on its rank 0:\n", rank0);

  impl_->lay_out(parameters);
  for (size_t i = 0; i < impl_->slices.size(); ++i) {
    Impl* impl = impl_.get();
    torch::autograd::impl::set_post_acc_grad_hooks(impl->slices[i].weight,
                                                   std::make_unique<AccumulationHook>([impl, i] {
                                                     at::Tensor& gradient = impl->slices[i].weight.mutable_grad();
                                                     if (!gradient.defined())
                                                       return;  // a Function that returned none: not a contribution
                                                     impl->arrived(i, std::exchange(gradient, at::Tensor()));
                                                   }));
  }
}

GradientReducer::~GradientReducer() {
  for (GradientSlice& s : impl_->slices) torch::autograd::impl::set_post_acc_grad_hooks(s.weight, nullptr);
}

void GradientReducer::begin_step() {
  TRIREME_CHECK(!impl_->in_step, "begin_step() twice without finish()");
  impl_->in_step = true;
  impl_->next_bucket = 0;
  impl_->bytes_step = 0;
  for (auto& leaf : impl_->leaves) leaf.empty = true;
  for (auto& bucket : impl_->buckets) bucket.started = false;
}

void GradientReducer::before_backward(bool is_last) {
  TRIREME_CHECK(impl_->in_step && !impl_->overlapping,
                "before_backward() outside of a step, or after the last one of it");
  impl_->end_backward();
  impl_->in_backward = true;
  impl_->overlapping = is_last && impl_->options.overlap;
}

void GradientReducer::contribute(const at::Tensor& weight, const at::Tensor& gradient) {
  auto found = impl_->index.find(weight.unsafeGetTensorImpl());
  TRIREME_CHECK(found != impl_->index.end(), "not a parameter of this reducer");
  impl_->arrived(found->second, gradient);
}

void GradientReducer::finish(const std::function<bool(bool)>& any_rank) {
  TRIREME_CHECK(impl_->in_step, "finish() without begin_step()");
  at::NoGradGuard no_grad;
  for (size_t i = 0; i < impl_->slices.size(); ++i)  // put into .grad past the hooks
    if (at::Tensor& gradient = impl_->slices[i].weight.mutable_grad(); gradient.defined())
      impl_->arrived(i, std::exchange(gradient, at::Tensor()));
  impl_->overlapping = false;
  while (impl_->next_bucket < impl_->buckets.size()) impl_->start(impl_->next_bucket);
  for (auto& bucket : impl_->buckets) bucket.work.wait();
  impl_->end_backward();
  bool late = std::any_of(impl_->leaves.begin(), impl_->leaves.end(), [](const auto& leaf) { return leaf.late.defined(); });
  late = any_rank ? any_rank(late) : impl_->data.agree(late) != 0;
  if (late && impl_->data.size() > 1) impl_->reduce_late();
  for (auto& leaf : impl_->leaves)  // a group of one: nothing was sent, but a bucket counts as started
    if (leaf.late.defined()) {
      const size_t i = static_cast<size_t>(&leaf - impl_->leaves.data());
      impl_->slices[i].gradient.add_(leaf.late);
      leaf.late.reset();
    }
  impl_->bytes_last = impl_->bytes_step;
  impl_->in_step = false;
}

void GradientReducer::scale(double factor) {
  TRIREME_CHECK(!impl_->in_step, "scale() before finish()");
  for (at::Tensor& bucket : impl_->flat) bucket.mul_(factor);
}

const std::vector<GradientSlice>& GradientReducer::slices() const { return impl_->slices; }
const std::vector<at::Tensor>& GradientReducer::buckets() const { return impl_->flat; }
int64_t GradientReducer::bytes_reduced() const { return impl_->bytes_last; }
int64_t GradientReducer::num_late_contributions() const { return impl_->num_late; }

double GradientReducer::squared_norm() const { return trireme::squared_norm(impl_->flat); }

void check_parameters_equal(const std::vector<Parameter>& parameters, const Communicator& data) {
  std::string hashes;
  for (const Parameter& p : parameters) {
    const at::Tensor value = p.value.detach().contiguous();
    hashes += hash_bytes(value.const_data_ptr(), value.nbytes());
  }
  const std::string rank0 = data.broadcast_bytes(hashes);
  std::string different;
  for (size_t i = 0; i < parameters.size() && different.empty(); ++i)
    if (rank0.compare(i * 32, 32, hashes, i * 32, 32) != 0) different = parameters[i].name;
  if (rank0.size() != hashes.size() && different.empty()) different = "(another number of parameters)";
  if (data.agree(different.empty() ? 0 : 1) == 0) return;
  throw SystemError(different.empty()
                        ? "the parameters of another rank of the data-parallel group differ from rank 0's"
                        : trireme::str("parameter ", different,
                                       " differs from rank 0's of the data-parallel group: a rank has lost step"));
}

}  // namespace trireme
