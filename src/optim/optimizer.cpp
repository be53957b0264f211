#include "optim/optimizer.h"

#include "base/hash.h"
#include "base/random.h"
#include "ops/device.h"
#include "ops/op_support.h"
#include "optim/offload.h"
#include "optim/update_loops.h"

namespace trireme {
namespace {

// Names of a rule's state, in the order m, v: PyTorch's.
std::vector<const char*> states_of(const OptimizerOptions& options) {
  switch (options.rule) {
    case UpdateRule::kAdamW:
      return {"exp_avg", "exp_avg_sq"};
    case UpdateRule::kSgd:
      return options.momentum > 0 ? std::vector<const char*>{"momentum_buffer"} : std::vector<const char*>{};
    case UpdateRule::kLion:
      return {"exp_avg"};
  }
  TRIREME_CHECK(false);
}

// By which whole parameters are told apart, the same on every mesh.
uint32_t id_of(const std::string& name) { return static_cast<uint32_t>(std::stoul(hash_bytes(name).substr(0, 8), nullptr, 16)); }

// f(begin, end, place of begin) of the parts of [begin, end) whose elements stand together in the whole tensor.
template <typename F>
void for_runs(const Places& places, int64_t begin, int64_t end, const F& f) {
  while (begin < end) {
    const int64_t in_slice = places.first + begin, in_run = in_slice % places.run, next = std::min(end, begin + places.run - in_run);
    f(begin, next, places.offset + in_slice / places.run * places.stride + in_run);
    begin = next;
  }
}

}  // namespace

UpdateRule parse_update_rule(const std::string& kind) {
  if (kind == "adamw") return UpdateRule::kAdamW;
  if (kind == "sgd") return UpdateRule::kSgd;
  if (kind == "lion") return UpdateRule::kLion;
  throw ConfigError("optim.kind=" + kind + ": allowed are adamw, sgd, lion");
}

bool has_master(at::ScalarType dtype, bool masters) { return compute_dtype(dtype) != dtype && (masters || dtype != at::kBFloat16); }

Places places_of(at::IntArrayRef sizes, const ShardSpec& slice, int64_t begin) {
  const std::vector<int64_t>& whole = slice.global_shape;
  Places places;
  places.first = begin;
  int64_t cut = static_cast<int64_t>(sizes.size()) - 1, inner = 1;  // the last dim that is cut, and elements of one index of it
  while (cut > 0 && sizes[static_cast<size_t>(cut)] == whole[static_cast<size_t>(cut)]) inner *= sizes[static_cast<size_t>(cut--)];
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0; stride *= whole[d]) {
    TRIREME_CHECK(d == 0 || static_cast<int64_t>(d) >= cut || sizes[d] == whole[d], sizes, whole);
    places.offset += slice.offset[d] * stride;
  }
  if (cut > 0) {
    places.run = sizes[static_cast<size_t>(cut)] * inner;
    places.stride = whole[static_cast<size_t>(cut)] * inner;
  }
  return places;
}

Optimizer::Optimizer(std::vector<OptimTensor> tensors, const OptimizerOptions& options)
    : tensors_(std::move(tensors)), options_(options) {
  for (auto& t : tensors_) {
    const auto dtype = compute_dtype(t.weight.scalar_type());
    check_alike("the optimizer of " + t.name, {"weight", t.weight}, {{"gradient", t.grad}}, dtype);
    TRIREME_CHECK(t.weight.dim() == 1 && t.weight.is_contiguous() && t.grad.is_contiguous() && t.grad.sizes() == t.weight.sizes(),
                  t.name, " ", t.weight.sizes(), ", gradient ", t.grad.sizes());
    TRIREME_CHECK(options.masters || t.weight.scalar_type() != at::kHalf, t.name, " in float16 needs a master");
    t.weight = t.weight.detach();
    const at::Device device = options.offload ? at::kCPU : t.weight.device();
    if (!device.is_cpu()) kernels_of(t.weight);  // there are some
    const auto state_options = at::TensorOptions(dtype).device(device);
    State state{{}, {}, {}, id_of(t.name)};
    const size_t num_states = states_of(options).size();
    if (num_states > 0) state.m = at::zeros(t.weight.sizes(), state_options);
    if (num_states > 1) state.v = at::zeros(t.weight.sizes(), state_options);
    if (has_master(t.weight.scalar_type(), options.masters)) state.master = t.weight.to(device).to(dtype);  // what travels is the smaller
    states_.push_back(std::move(state));
  }
  if (options.offload) staging_ = std::make_shared<HostStaging>(tensors_, options.masters);
}

void Optimizer::step(double lr, double grad_scale) { update(lr, grad_scale, {}); }
void Optimizer::step(double lr, const at::Tensor& grad_scale) { update(lr, 1.0, grad_scale); }

void Optimizer::update(double lr, double grad_scale, const at::Tensor& device_scale) {
  ++num_steps_;
  const bool corrects = options_.rule == UpdateRule::kAdamW;
  const double beta1 = options_.rule == UpdateRule::kSgd ? options_.momentum : options_.beta1, t = static_cast<double>(num_steps_);
  const double correction1 = corrects ? 1.0 - std::pow(beta1, t) : 1.0, correction2 = corrects ? 1.0 - std::pow(options_.beta2, t) : 1.0;
  std::vector<size_t> on_host;
  std::map<std::pair<at::ScalarType, double>, std::vector<size_t>> by_kernels;  // of one dtype and weight decay: a call
  for (size_t i = 0; i < tensors_.size(); ++i)
    if (staging_ || !kernels_of(tensors_[i].weight)) on_host.push_back(i);
    else by_kernels[{tensors_[i].weight.scalar_type(), tensors_[i].weight_decay}].push_back(i);

  for (const auto& [kind, numbers] : by_kernels) {
    const auto floats = [](const at::Tensor& x) { return static_cast<float*>(data_of(x)); };
    std::vector<kernels::UpdateTensor> list;
    for (size_t i : numbers) {
      const OptimTensor& of = tensors_[i];
      const State& s = states_[i];
      list.push_back({of.weight.numel(), data_of(of.weight), floats(s.master), floats(of.grad), floats(s.m), floats(s.v), of.places, s.id});
    }
    const at::Tensor& weight = tensors_[numbers[0]].weight;
    at::Tensor scale = device_scale;
    if (!scale.defined() && grad_scale != 1.0) scale = at::full({}, grad_scale, weight.options().dtype(at::kFloat));
    TRIREME_CHECK(!scale.defined() || (scale.device() == weight.device() && scale.scalar_type() == at::kFloat && scale.numel() == 1), scale.toString());
    kernels_of(weight)->update({options_.rule, kernel_type(weight), list.data(), static_cast<int64_t>(list.size()), lr, kind.second, beta1, options_.beta2,
                                options_.epsilon, correction1, correction2, floats(scale), options_.seed, static_cast<uint64_t>(num_steps_)}, stream_of(weight));
  }

  if (on_host.empty()) return;
  if (device_scale.defined()) {
    grad_scale = device_scale.item<double>();
    if (!std::isfinite(grad_scale)) return;
  }
  const auto update = [&](size_t i, int64_t first, const at::Tensor& weight, const at::Tensor& grad) {
    const State& state = states_[i];
    const UpdateStep step{lr, tensors_[i].weight_decay, beta1, options_.beta2, options_.epsilon, grad_scale, correction1, correction2};
    dispatch_floating(weight.scalar_type(), [&](auto zero) {
      using T = decltype(zero);
      using A = typename ComputeType<T>::type;
      T* const values = weight.data_ptr<T>();
      const A* const gradients = grad.data_ptr<A>();
      const auto part = [&](const at::Tensor& x) { return x.defined() ? x.data_ptr<A>() + first : nullptr; };
      A *const m = part(state.m), *const v = part(state.v), *const master = part(state.master);
      const auto at = [](auto* p, int64_t begin) { return p ? p + begin : nullptr; };
      const auto range = [&](int64_t begin, int64_t end, const RandomRounding* rounding) {
        update_loops<T>().update[static_cast<size_t>(options_.rule)](end - begin, values + begin, at(master, begin), gradients + begin, at(m, begin), at(v, begin), step, rounding);
      };
      const bool rounds = weight.scalar_type() == at::kBFloat16 && !master;
      const uint64_t key = options_.seed ^ static_cast<uint64_t>(RandomStream::kRounding) << 56, counter = static_cast<uint64_t>(num_steps_) << 32 | state.id;
      Places places = tensors_[i].places;
      places.first += first;
      for_rows(weight.numel(), 1, [&](int64_t begin, int64_t end) {
        if (!rounds) return range(begin, end, nullptr);
        for_runs(places, begin, end, [&](int64_t run_begin, int64_t run_end, int64_t place) {
          const RandomRounding rounding{key, counter, place};
          range(run_begin, run_end, &rounding);
        });
      });
    });
  };
  if (staging_) staging_->for_pieces(update);
  else
    for (size_t i : on_host) update(i, 0, tensors_[i].weight, tensors_[i].grad);
}

int64_t Optimizer::bytes_fetched() const { return staging_ ? staging_->bytes_fetched() : 0; }

std::vector<OptimState> Optimizer::state() const {
  std::vector<OptimState> all;
  for (size_t i = 0; i < tensors_.size(); ++i) {
    const std::vector<const char*> names = states_of(options_);
    if (states_[i].m.defined()) all.push_back({i, tensors_[i].name, names[0], states_[i].m});
    if (states_[i].v.defined()) all.push_back({i, tensors_[i].name, names[1], states_[i].v});
    if (states_[i].master.defined()) all.push_back({i, tensors_[i].name, "master", states_[i].master});
  }
  return all;
}

uint64_t Optimizer::state_bytes_per_element(at::ScalarType dtype, const OptimizerOptions& options) {
  const uint64_t size = c10::elementSize(compute_dtype(dtype));
  return (states_of(options).size() + (has_master(dtype, options.masters) ? 1 : 0)) * size;
}

}  // namespace trireme
