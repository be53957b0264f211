#include "parallel/data_parallel.h"

#include <torch/csrc/autograd/function_hook.h>

#include <algorithm>
#include <mutex>
#include <unordered_map>

#include "base/check.h"
#include "optim/clip.h"

namespace trireme {

namespace {

constexpr size_t kMaxInFlight = 2;  // reductions of a group whose buffers are freed afterwards

// Passes on every accumulation into a leaf's .grad.
class AccumulationHook : public torch::autograd::PostAccumulateGradHook {
 public:
  explicit AccumulationHook(std::function<void()> arrived) : arrived_(std::move(arrived)) {}
  void operator()(const torch::autograd::Variable&) override { arrived_(); }

 private:
  std::function<void()> arrived_;
};

}  // namespace

struct GradientReducer::Impl {
  struct Leaf {
    size_t bucket = 0;
    int64_t offset = 0;             // in the bucket
    bool empty = true;              // the slice holds nothing of this step yet
    int64_t num_arrived = 0;        // in this backward, or step (counts_steps)
    int64_t num_expected = -1;      // in one; -1: not known yet
    at::Tensor late;                // came after the bucket had been sent; reduced in finish()
  };
  struct State {         // of a bucket
    at::Tensor whole;    // undefined while a transient one is not there
    at::Tensor part;     // where sums end up: this rank's part, without ZeRO all of `whole`
    at::Tensor addend;   // a further micro-batch's sums, on their way to `part`
    bool started = false, crossing = false, has_sums = false;
    Work work;           // over the ranks that share it out; `crossing`: over the replicas
    at::Tensor& target() { return addend.defined() ? addend : part; }
  };
  struct Group {
    Communicator comm;           // the ranks that share out
    Communicator replicas;       // those with the same parts
    size_t first = 0, last = 0;  // its buckets
    size_t next = 0;             // first that is not started
    size_t settled = 0;          // first whose reduction is not known to have ended
  };

  Holders holders;
  GradientReducerOptions options;
  std::vector<Parameter> parameters;         // the trained ones
  std::vector<GradientSlice> slices;         // of these
  std::vector<Leaf> leaves;                  // of the slices
  std::unordered_map<const void*, size_t> index;  // leaf's TensorImpl -> slice
  std::vector<Bucket> layout;
  std::vector<State> states;                 // of the buckets
  std::vector<Group> groups;
  std::vector<GradientPart> parts;
  std::vector<at::Tensor> spare;             // transient buffers, kept for the next bucket
  std::mutex mutex;                          // backward of one model may run in several threads
  bool in_step = false, in_backward = false, overlapping = false;
  bool counts_steps = false;                 // not backwards
  int64_t bytes_last = 0, bytes_step = 0, num_late = 0;

  bool transient() const { return options.zero >= 2; }
  bool everywhere() const { return options.zero == 0 && holders.everywhere(); }  // every rank has all sums
  std::vector<at::Tensor> mine() const;  // sums that this rank gives to one over all; of what several ranks have the first's
  bool full(const Group& group) const { return transient() && group.next - group.settled >= kMaxInFlight; }
  void lay_out();
  void list_parts();
  void attach(size_t b);
  void release(size_t b);
  void arrived(size_t i, at::Tensor gradient);
  void add(size_t i, const at::Tensor& gradient);
  bool complete(const Bucket& bucket) const;
  void start_complete_buckets();
  void start(Group& group);
  bool reduced(Group& group, bool waits);
  void settle(Group& group);
  void begin_pass();
  void end_pass();
  void end_backward();
  void reduce_late();
};

void GradientReducer::Impl::lay_out() {
  std::vector<size_t> all(parameters.size());
  for (size_t i = 0; i < all.size(); ++i) all[i] = i;
  for (Communicator& comm : holders.groups) {
    const int length = comm.size() / options.num_replicas, run = comm.rank() / length;
    TRIREME_CHECK(length * options.num_replicas == comm.size(), comm.size(), options.num_replicas);
    groups.push_back({comm, Communicator::self()});
    if (options.num_replicas == 1) continue;
    groups.back() = {comm.split(run, comm.rank(), "shards"), comm.split(comm.rank() % length, run, "replicas")};
    comm = groups.back().comm;  // buckets are padded to its size
  }
  layout = cut_buckets(parameters, all, holders, options.bucket_bytes, options.zero == 3, options.align);
  for (size_t b = 0; b < layout.size(); ++b) {
    const Bucket& bucket = layout[b];
    Group& group = groups[bucket.group];
    if (group.last == 0) group.first = b;
    group.last = b + 1;
    for (size_t k = 0; k < bucket.parameters.size(); ++k) {
      leaves[bucket.parameters[k]].bucket = b;
      leaves[bucket.parameters[k]].offset = bucket.offsets[k];
    }
    const auto type = gradient_type(c10::typeMetaToScalarType(bucket.options.dtype()));
    const int64_t part = bucket.num_elements / group.comm.size();
    states.emplace_back();
    if (transient()) {
      states[b].part = at::zeros({part}, bucket.options.dtype(type));
      continue;
    }
    attach(b);
    states[b].part = options.zero == 0 ? states[b].whole : states[b].whole.narrow(0, group.comm.rank() * part, part);
  }
  list_parts();
}

void GradientReducer::Impl::list_parts() {
  for (size_t b = 0; b < layout.size(); ++b) {
    const Communicator& comm = groups[layout[b].group].comm;
    const bool whole = options.zero == 0;
    for (const PartRange& r : ranges_of_part(layout[b], parameters, whole ? 0 : comm.rank(), whole ? 1 : comm.size())) {
      const GradientSlice& s = slices[r.parameter];
      parts.push_back({s.name, s.weight, s.shard, r.begin, r.end, states[b].part.narrow(0, r.offset, r.end - r.begin), b, r.offset,
                       (whole ? comm : groups[layout[b].group].replicas).rank() == 0});
    }
  }
  std::stable_sort(parts.begin(), parts.end(), [this](const GradientPart& a, const GradientPart& b) {
    return index.at(a.weight.unsafeGetTensorImpl()) < index.at(b.weight.unsafeGetTensorImpl());
  });
}

// Gives a bucket its buffer, and its leaves their views of it.
void GradientReducer::Impl::attach(size_t b) {
  State& state = states[b];
  if (state.whole.defined()) return;
  const Bucket& bucket = layout[b];
  const auto type = gradient_type(c10::typeMetaToScalarType(bucket.options.dtype()));
  for (at::Tensor& buffer : spare)
    if (buffer.scalar_type() == type && buffer.numel() >= bucket.num_elements && !state.whole.defined()) {
      state.whole = buffer.narrow(0, 0, bucket.num_elements);
      std::swap(buffer, spare.back());
    }
  if (state.whole.defined()) spare.pop_back();
  else state.whole = at::empty({bucket.num_elements}, bucket.options.dtype(type));
  int64_t used = 0;
  for (size_t k = 0; k < bucket.parameters.size(); ++k) {
    GradientSlice& s = slices[bucket.parameters[k]];
    state.whole.narrow(0, used, bucket.offsets[k] - used).zero_();
    s.gradient = state.whole.narrow(0, bucket.offsets[k], s.weight.numel()).view(s.weight.sizes());
    used = bucket.offsets[k] + s.weight.numel();
  }
  state.whole.narrow(0, used, bucket.num_elements - used).zero_();
}

void GradientReducer::Impl::release(size_t b) {
  State& state = states[b];
  for (size_t i : layout[b].parameters) slices[i].gradient.reset();
  // The storage as a whole: it may be larger than this bucket.
  const auto size = static_cast<int64_t>(state.whole.storage().nbytes() / state.whole.itemsize());
  if (spare.size() < kMaxInFlight) spare.push_back(state.whole.as_strided({size}, {1}, 0));
  state.whole.reset();
}

void GradientReducer::Impl::add(size_t i, const at::Tensor& gradient) {
  attach(leaves[i].bucket);
  if (leaves[i].empty) slices[i].gradient.copy_(gradient);
  else slices[i].gradient.add_(gradient);
  leaves[i].empty = false;
}

void GradientReducer::Impl::arrived(size_t i, at::Tensor gradient) {
  std::lock_guard lock(mutex);
  TRIREME_CHECK(in_step, slices[i].name, ": a gradient outside of begin_step() .. finish()");
  TRIREME_CHECK(gradient.layout() == at::kStrided && gradient.sizes() == slices[i].weight.sizes(), slices[i].name);
  at::NoGradGuard no_grad;
  Leaf& leaf = leaves[i];
  ++leaf.num_arrived;
  if (!states[leaf.bucket].started) {
    add(i, gradient);
  } else {  // the slice belongs to the collective now
    ++num_late;
    if (leaf.late.defined())
      leaf.late.add_(gradient);
    else
      leaf.late = gradient.to(states[leaf.bucket].part.scalar_type(), /*non_blocking=*/false, /*copy=*/true).contiguous();
  }
  start_complete_buckets();
}

bool GradientReducer::Impl::complete(const Bucket& bucket) const {
  return std::all_of(bucket.parameters.begin(), bucket.parameters.end(), [&](size_t i) {
    return leaves[i].num_expected >= 0 && leaves[i].num_arrived >= leaves[i].num_expected;
  });
}

// In the buckets' own order only: all ranks of a group must start the same collectives in the same order.
void GradientReducer::Impl::start_complete_buckets() {
  if (!overlapping) return;
  for (Group& group : groups) {
    auto must_wait = [&] { return counts_steps && full(group) && !reduced(group, false); };
    while (group.next < group.last && complete(layout[group.next]) && !must_wait()) start(group);
    while (group.settled < group.next && reduced(group, false)) settle(group);
  }
}

void GradientReducer::Impl::start(Group& group) {
  const size_t b = group.next;
  State& state = states[b];
  while (full(group)) settle(group);
  attach(b);
  for (size_t i : layout[b].parameters)
    if (leaves[i].empty) slices[i].gradient.zero_();
  state.started = true;
  ++group.next;
  if (options.zero > 0) {
    if (state.has_sums) state.addend = at::empty_like(state.part);
    state.work = group.comm.start_reduce_scatter(state.target(), state.whole);
  } else if (group.comm.size() > 1) {
    state.work = group.comm.start_all_reduce(state.whole);
  }
  bytes_step += static_cast<int64_t>(state.whole.nbytes());
}

// Is the oldest reduction of a group done? Behind the ranks that share out come the replicas.
bool GradientReducer::Impl::reduced(Group& group, bool waits) {
  State& state = states[group.settled];
  if (waits) state.work.wait();
  else if (!state.work.test()) return false;
  if (state.crossing || group.replicas.size() == 1) return true;
  state.work = group.replicas.start_all_reduce(state.target());
  state.crossing = true;
  return reduced(group, waits);
}

// Waits for the oldest reduction of a group.
void GradientReducer::Impl::settle(Group& group) {
  State& state = states[group.settled];
  reduced(group, true);
  if (state.addend.defined()) state.part.add_(std::exchange(state.addend, at::Tensor()));
  state.has_sums = true;
  if (transient()) release(group.settled);
  ++group.settled;
}

// What goes into one reduction: a step, or a micro-batch of it.
void GradientReducer::Impl::begin_pass() {
  for (Leaf& leaf : leaves) leaf.empty = true;
  for (State& state : states) state.started = state.crossing = false;
  for (Group& group : groups) group.next = group.settled = group.first;
  for (size_t i = 0; i < leaves.size(); ++i)  // of the micro-batch before
    if (leaves[i].late.defined()) add(i, std::exchange(leaves[i].late, at::Tensor()));
}

void GradientReducer::Impl::end_pass() {
  overlapping = false;
  for (Group& group : groups)
    while (group.next < group.last) start(group);
  for (Group& group : groups)
    while (group.settled < group.next) settle(group);
  end_backward();
}

// What this backward brought is what the next one is expected to bring. The largest number seen counts: waiting for a
// contribution that does not come costs only overlap (finish() starts the bucket), a late one a second reduction.
void GradientReducer::Impl::end_backward() {
  if (!in_backward) return;
  for (Leaf& leaf : leaves) {
    leaf.num_expected = std::max(leaf.num_expected, leaf.num_arrived);
    leaf.num_arrived = 0;
  }
  in_backward = overlapping = false;
}

// Contributions that missed their bucket, of any rank: the sum is linear, so their sum is added afterwards.
void GradientReducer::Impl::reduce_late() {
  for (Group& group : groups) {
    at::Tensor late = at::zeros({static_cast<int64_t>(group.last - group.first)}, at::kByte);
    for (const Leaf& leaf : leaves)
      if (leaf.late.defined() && layout[leaf.bucket].group == static_cast<size_t>(&group - groups.data()))
        late.data_ptr<uint8_t>()[leaf.bucket - group.first] = 1;
    group.comm.all_reduce(late, ReduceOp::kMax);
    group.replicas.all_reduce(late, ReduceOp::kMax);
    for (size_t b = group.first; b < group.last; ++b) {
      if (!late.data_ptr<uint8_t>()[b - group.first]) continue;
      at::Tensor difference = at::zeros({layout[b].num_elements}, states[b].part.options());
      for (size_t i : layout[b].parameters)
        if (leaves[i].late.defined())
          difference.narrow(0, leaves[i].offset, slices[i].weight.numel())
              .view(slices[i].weight.sizes())
              .copy_(std::exchange(leaves[i].late, at::Tensor()));
      bytes_step += static_cast<int64_t>(difference.nbytes());
      if (options.zero == 0) {
        group.comm.all_reduce(difference);
        states[b].part.add_(difference);
      } else {
        at::Tensor sum = at::empty_like(states[b].part);
        group.comm.reduce_scatter(sum, difference);
        group.replicas.all_reduce(sum);
        states[b].part.add_(sum);
      }
    }
  }
}

GradientReducer::GradientReducer(const std::vector<Parameter>& parameters, const Holders& holders,
                                 const GradientReducerOptions& options)
    : impl_(std::make_unique<Impl>()) {
  TRIREME_CHECK(options.bucket_bytes > 0 && options.zero >= 0 && options.zero <= 3, options.bucket_bytes, options.zero);
  TRIREME_CHECK(!options.every_backward || options.zero >= 2, options.zero);
  TRIREME_CHECK(options.num_replicas == 1 || options.zero >= 1, options.num_replicas);
  Impl* impl = impl_.get();
  impl->options = options;
  impl->holders = {holders.all, holders.groups, {}};
  for (size_t i = 0; i < parameters.size(); ++i) {
    const Parameter& p = parameters[i];
    if (!p.value.requires_grad()) continue;
    TRIREME_CHECK(p.value.is_leaf(), p.name);
    if (!impl->index.emplace(p.value.unsafeGetTensorImpl(), impl->slices.size()).second) continue;  // tied: known by its first name
    impl->parameters.push_back(p);
    impl->holders.group_of.push_back(holders.group_of[i]);
    impl->slices.push_back({p.name, p.value, at::Tensor(), p.shard});
  }
  impl->leaves.resize(impl->slices.size());
  if (impl->transient())  // else the first backward would hold all gradients; more than one contribution is late once
    for (auto& leaf : impl->leaves) leaf.num_expected = 1;
  impl->lay_out();
  for (size_t i = 0; i < impl->slices.size(); ++i)
    torch::autograd::impl::set_post_acc_grad_hooks(impl->slices[i].weight, std::make_unique<AccumulationHook>([impl, i] {
                                                     at::Tensor& gradient = impl->slices[i].weight.mutable_grad();
                                                     if (!gradient.defined())
                                                       return;  // a Function that returned none: not a contribution
                                                     impl->arrived(i, std::exchange(gradient, at::Tensor()));
                                                   }));
}

GradientReducer::GradientReducer(const std::vector<Parameter>& parameters, const Communicator& data,
                                 const GradientReducerOptions& options)
    : GradientReducer(parameters, same_holders(parameters, data), options) {}

GradientReducer::~GradientReducer() {
  for (GradientSlice& s : impl_->slices) torch::autograd::impl::set_post_acc_grad_hooks(s.weight, nullptr);
}

void GradientReducer::begin_step() {
  TRIREME_CHECK(!impl_->in_step, "begin_step() twice without finish()");
  impl_->in_step = true;
  impl_->bytes_step = 0;
  for (auto& state : impl_->states) state.has_sums = false;
  impl_->begin_pass();
}

void GradientReducer::before_backward(bool is_last) {
  TRIREME_CHECK(impl_->in_step && !(impl_->overlapping && !impl_->options.every_backward),
                "before_backward() outside of a step, or after the last one of it");
  at::NoGradGuard no_grad;
  if (impl_->options.every_backward && impl_->in_backward) {
    impl_->end_pass();
    impl_->begin_pass();
  }
  impl_->end_backward();
  impl_->in_backward = true;
  impl_->overlapping = (is_last || impl_->options.every_backward) && impl_->options.overlap;
}

void GradientReducer::before_all_backwards() {
  TRIREME_CHECK(!impl_->options.every_backward, "a micro-batch's sums are not apart from the others'");
  before_backward(true);
  if (!std::exchange(impl_->counts_steps, true))
    for (auto& leaf : impl_->leaves) leaf.num_expected = -1;
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
  impl_->end_pass();
  const bool late = std::any_of(impl_->leaves.begin(), impl_->leaves.end(), [](const auto& leaf) { return leaf.late.defined(); });
  if (any_rank ? any_rank(late) : impl_->holders.all.agree(late) != 0) impl_->reduce_late();
  impl_->bytes_last = impl_->bytes_step;
  impl_->in_step = false;
}

void GradientReducer::scale(double factor) {
  TRIREME_CHECK(!impl_->in_step, "scale() before finish()");
  for (auto& state : impl_->states) state.part.mul_(factor);
}

const std::vector<GradientPart>& GradientReducer::parts() const { return impl_->parts; }
const std::vector<GradientSlice>& GradientReducer::slices() const { return impl_->slices; }
const std::vector<Bucket>& GradientReducer::layout() const { return impl_->layout; }
const std::vector<Communicator>& GradientReducer::groups() const { return impl_->holders.groups; }
int64_t GradientReducer::bytes_reduced() const { return impl_->bytes_last; }
int64_t GradientReducer::num_late_contributions() const { return impl_->num_late; }

int64_t GradientReducer::bytes_exchanged() const {
  int64_t bytes = 0;
  for (const auto& group : impl_->groups)
    for (const Communicator* comm : {&group.comm, &group.replicas})
      if (comm->size() > 1) bytes += comm->statistics().bytes_reduced;
  return bytes;
}

int64_t GradientReducer::bytes_held() const {
  size_t bytes = 0;
  for (const auto& state : impl_->states) bytes += state.whole.defined() ? state.whole.nbytes() : 0;
  for (const auto& state : impl_->states) bytes += impl_->transient() ? state.part.nbytes() : 0;
  for (const at::Tensor& buffer : impl_->spare) bytes += buffer.nbytes();
  return static_cast<int64_t>(bytes);
}

std::vector<GradientSlice> GradientReducer::gathered() const {
  std::vector<GradientSlice> all = impl_->slices;
  if (impl_->options.zero == 0) return all;
  for (size_t b = 0; b < impl_->layout.size(); ++b) {
    const Bucket& bucket = impl_->layout[b];
    const at::Tensor part = impl_->states[b].part;
    at::Tensor whole = at::empty({bucket.num_elements}, part.options());
    groups()[bucket.group].all_gather(whole, part);
    for (size_t k = 0; k < bucket.parameters.size(); ++k) {
      GradientSlice& s = all[bucket.parameters[k]];
      s.gradient = whole.narrow(0, bucket.offsets[k], s.weight.numel()).view(s.weight.sizes());
    }
  }
  return all;
}

std::vector<at::Tensor> GradientReducer::Impl::mine() const {
  std::vector<at::Tensor> mine;
  for (size_t b = 0; b < states.size(); ++b)
    if (const Group& g = groups[layout[b].group]; everywhere() || (options.zero == 0 ? g.comm : g.replicas).rank() == 0) mine.push_back(states[b].part);
  return mine;
}

double GradientReducer::squared_norm() const {
  const std::vector<at::Tensor> mine = impl_->mine();
  if (!impl_->states.empty() && !impl_->states[0].part.is_cpu()) {
    DeviceNorm norm(impl_->states[0].part.device());
    measure(norm, {});
    return norm.squares.item<double>();
  }
  if (impl_->everywhere()) return trireme::squared_norm(mine);
  double largest = 0;
  for (const at::Tensor& x : mine)
    if (const double m = largest_magnitude(x); m > largest || std::isnan(m)) largest = m;
  SquareSum sum(impl_->holders.all.max(largest));
  for (const at::Tensor& x : mine) sum.add(x);
  impl_->holders.all.all_reduce(at::from_blob(sum.sums.data(), {static_cast<int64_t>(sum.sums.size())}, at::kLong));
  return sum.total();
}

void GradientReducer::measure(DeviceNorm& norm, const ClipBy& by) const {
  if (impl_->everywhere()) return norm.measure(impl_->mine(), by);
  norm.measure(impl_->mine());
  impl_->holders.all.all_reduce(norm.squares);
  norm.clip(by);
}

}  // namespace trireme
