#include "optim/optimizer.h"

#include "base/hash.h"
#include "base/random.h"
#include "ops/device.h"
#include "ops/op_support.h"
#include "optim/adafactor.h"
#include "optim/offload.h"
#include "optim/paged.h"
#include "optim/update_loops.h"
#include "quant/dynamic_map.h"
#include "quant/quant_loops.h"

namespace trireme {

using kernels::UpdateRule;

namespace {

// Names of a rule's state, in the order m, v: PyTorch's.
std::vector<const char*> states_of(const OptimizerOptions& options) {
  switch (options.kind) {
    case OptimizerKind::kAdamW:
    case OptimizerKind::kAdamW8Bit:
      return {"exp_avg", "exp_avg_sq"};
    case OptimizerKind::kSgd:
      return options.momentum > 0 ? std::vector<const char*>{"momentum_buffer"} : std::vector<const char*>{};
    case OptimizerKind::kLion:
      return {"exp_avg"};
    case OptimizerKind::kAdafactor:
      return {};  // of its own
  }
  TRIREME_CHECK(false);
}

constexpr int64_t kLeast8Bit = 4096;  // elements of a parameter whose state has 8 bits

int64_t num_blocks(int64_t elements) { return (elements + kernels::k8BitBlock - 1) / kernels::k8BitBlock; }

// By which an element is updated; adafactor's by their direction.
UpdateRule rule_of(OptimizerKind kind, int64_t whole_size) {
  if (kind == OptimizerKind::kAdamW8Bit) return whole_size < kLeast8Bit ? UpdateRule::kAdamW : UpdateRule::kAdamW8Bit;
  if (kind == OptimizerKind::kLion) return UpdateRule::kLion;
  return kind == OptimizerKind::kAdamW ? UpdateRule::kAdamW : UpdateRule::kSgd;
}

const DynamicSearch& search_of(bool is_signed) {
  static const auto make = [](bool s) { return DynamicSearch(dynamic_map(s).data_ptr<float>()); };
  static const DynamicSearch with_sign = make(true), without = make(false);
  return is_signed ? with_sign : without;
}

// Values of whole blocks as codes, and back.
void decode(bool is_signed, int64_t count, const uint8_t* codes, const float* scales, float* values) {
  quant_loops<float>().dequantize_blockwise(search_of(is_signed).number.data(), count, kernels::k8BitBlock, codes, scales, values);
}
void encode(bool is_signed, int64_t count, const float* values, uint8_t* codes, float* scales) {
  constexpr uint8_t kZero = 127;
  quant_loops<float>().quantize_blockwise(search_of(is_signed), count, kernels::k8BitBlock, values, codes, scales);
  for (int64_t i = 0; is_signed && i < count; ++i) codes[i] = static_cast<uint8_t>(codes[i] - (values[i] < 0 && codes[i] == kZero));
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

OptimizerKind parse_optimizer_kind(const std::string& name) {
  if (name == "adamw") return OptimizerKind::kAdamW;
  if (name == "adamw8bit") return OptimizerKind::kAdamW8Bit;
  if (name == "adafactor") return OptimizerKind::kAdafactor;
  if (name == "sgd") return OptimizerKind::kSgd;
  if (name == "lion") return OptimizerKind::kLion;
  throw ConfigError("optim.kind=" + name + ": allowed are adamw, adamw8bit, adafactor, sgd, lion");
}

int64_t state_block(OptimizerKind kind) { return kind == OptimizerKind::kAdamW8Bit ? kernels::k8BitBlock : 1; }

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

bool cuts_blocks(OptimizerKind kind, at::IntArrayRef sizes, const ShardSpec& slice) {
  const int64_t whole = c10::multiply_integers(slice.global_shape), block = rule_of(kind, whole) == UpdateRule::kAdamW8Bit ? kernels::k8BitBlock : 1, size = c10::multiply_integers(sizes);
  const Places places = places_of(sizes, slice, 0);
  const bool ends_whole = size % block == 0 || places.offset + size == whole;
  return !ends_whole || places.offset % block != 0 || places.run % block != 0 || places.stride % block != 0;
}

Optimizer::Optimizer(std::vector<OptimTensor> tensors, const OptimizerOptions& options, const AcrossRanks& ranks)
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
    if (options.paged && !device.is_cpu() && !paged_) paged_ = std::make_shared<PagedState>(device, options.window_elements);
    const auto zeros = [&](int64_t count, at::ScalarType type) {
      return paged_ ? paged_->zeros({count}, type) : at::zeros({count}, at::TensorOptions(type).device(device));
    };
    State state;
    state.id = id_of(t.name);
    state.rule = rule_of(options.kind, t.whole_shape.empty() ? t.weight.numel() : c10::multiply_integers(t.whole_shape));
    const bool in_codes = state.rule == UpdateRule::kAdamW8Bit;
    TRIREME_CHECK(!in_codes || dtype == at::kFloat, t.name, " in ", c10::toString(dtype));
    const size_t num_states = states_of(options).size();
    if (num_states > 0) state.m = zeros(t.weight.numel(), in_codes ? at::kByte : dtype);
    if (num_states > 1) state.v = zeros(t.weight.numel(), in_codes ? at::kByte : dtype);
    if (in_codes) {
      const auto& p = t.places;
      TRIREME_CHECK(p.first % kernels::k8BitBlock == 0 && p.offset % kernels::k8BitBlock == 0 && p.run % kernels::k8BitBlock == 0 && p.stride % kernels::k8BitBlock == 0,
                    t.name, ": a block is cut at ", p.first, " of runs of ", p.run);
      state.m_scale = zeros(num_blocks(t.weight.numel()), dtype);
      state.v_scale = zeros(num_blocks(t.weight.numel()), dtype);
    }
    if (has_master(t.weight.scalar_type(), options.masters)) {
      if (paged_) state.master = zeros(t.weight.numel(), dtype).copy_(t.weight);
      else state.master = t.weight.to(device).to(dtype);  // what travels is the smaller
    }
    states_.push_back(std::move(state));
  }
  if (options.kind == OptimizerKind::kAdafactor) {
    TRIREME_CHECK(!options.offload);
    adafactor_ = std::make_shared<Adafactor>(tensors_, ranks);
  }
  if (options.offload) staging_ = std::make_shared<HostStaging>(tensors_, options.masters);
}

void Optimizer::step(double lr, double grad_scale) { update(lr, grad_scale, {}); }
void Optimizer::step(double lr, const at::Tensor& grad_scale) { update(lr, 1.0, grad_scale); }

void Optimizer::update(double lr, double grad_scale, const at::Tensor& device_scale) {
  ++num_steps_;
  const bool corrects = options_.kind == OptimizerKind::kAdamW || options_.kind == OptimizerKind::kAdamW8Bit;
  const double beta1 = options_.kind == OptimizerKind::kSgd ? options_.momentum : options_.beta1, t = static_cast<double>(num_steps_);
  const double correction1 = corrects ? 1.0 - std::pow(beta1, t) : 1.0, correction2 = corrects ? 1.0 - std::pow(options_.beta2, t) : 1.0;
  std::vector<size_t> on_host;
  std::vector<StatePiece> on_device;
  for (size_t i = 0; i < tensors_.size(); ++i)
    if (staging_ || !kernels_of(tensors_[i].weight)) on_host.push_back(i);
    else if (tensors_[i].weight.numel() > 0) on_device.push_back({i, 0, tensors_[i].weight.numel()});
  const bool adafactor_by_kernels = adafactor_ && adafactor_->by_kernels();
  at::Tensor scale = device_scale;
  if (!on_device.empty()) {
    const at::Tensor& weight = tensors_[on_device[0].tensor].weight;
    if (!scale.defined() && grad_scale != 1.0) scale = at::full({}, grad_scale, weight.options().dtype(at::kFloat));
    TRIREME_CHECK(!scale.defined() || (scale.device() == weight.device() && scale.scalar_type() == at::kFloat && scale.numel() == 1), scale.toString());
  }
  const auto in_windows = [&](const std::function<void(const std::vector<StatePiece>&)>& f) {
    if (!paged_) f(on_device);
    else paged_->for_windows(on_device, [&](const StatePiece& piece) { return parts_of(piece); }, f);
  };
  if (adafactor_by_kernels) adafactor_on_device(lr, scale, in_windows);
  else if (!on_device.empty()) in_windows([&](const std::vector<StatePiece>& pieces) { update_on_device(lr, correction1, correction2, scale, pieces); });

  if (on_host.empty() && (!adafactor_ || adafactor_by_kernels)) return;
  if (device_scale.defined()) {
    grad_scale = device_scale.item<double>();
    if (!std::isfinite(grad_scale)) return;
  }
  const auto update_by = [&](size_t i, int64_t first, const at::Tensor& weight, const at::Tensor& grad, const UpdateStep& step) {
    const State& state = states_[i];
    dispatch_floating(weight.scalar_type(), [&](auto zero) {
      using T = decltype(zero);
      using A = typename ComputeType<T>::type;
      T* const values = weight.data_ptr<T>();
      const A* const gradients = grad.data_ptr<A>();
      const auto part = [&](const at::Tensor& x) { return x.defined() ? x.data_ptr<A>() + first : nullptr; };
      const auto at = [](auto* p, int64_t begin) { return p ? p + begin : nullptr; };
      A* const master = part(state.master);
      const bool rounds = weight.scalar_type() == at::kBFloat16 && !master;
      const uint64_t key = options_.seed ^ static_cast<uint64_t>(RandomStream::kRounding) << 56, counter = static_cast<uint64_t>(num_steps_) << 32 | state.id;
      Places places = tensors_[i].places;
      places.first += first;
      // m and v: of the elements from begin on.
      const auto range = [&](int64_t begin, int64_t end, A* m, A* v, UpdateRule rule) {
        const auto run = [&](int64_t run_begin, int64_t run_end, const RandomRounding* rounding) {
          update_loops<T>().update[static_cast<size_t>(rule)](run_end - run_begin, values + run_begin, at(master, run_begin), gradients + run_begin,
                                                              at(m, run_begin - begin), at(v, run_begin - begin), step, rounding);
        };
        if (!rounds) return run(begin, end, nullptr);
        for_runs(places, begin, end, [&](int64_t run_begin, int64_t run_end, int64_t place) {
          const RandomRounding rounding{key, counter, place};
          run(run_begin, run_end, &rounding);
        });
      };
      if (state.rule != UpdateRule::kAdamW8Bit) {
        A *const m = part(state.m), *const v = part(state.v);
        return for_rows(weight.numel(), 1, [&](int64_t begin, int64_t end) { range(begin, end, at(m, begin), at(v, begin), state.rule); });
      }
      if constexpr (std::is_same_v<A, float>) {
        constexpr int64_t kBlock = kernels::k8BitBlock, kAtOnce = 8;  // blocks whose values fit the nearest cache
        uint8_t *const m = state.m.data_ptr<uint8_t>() + first, *const v = state.v.data_ptr<uint8_t>() + first;
        float *const m_scale = state.m_scale.data_ptr<float>() + first / kBlock, *const v_scale = state.v_scale.data_ptr<float>() + first / kBlock;
        for_rows(num_blocks(weight.numel()), kBlock, [&](int64_t first_block, int64_t last_block) {
          alignas(64) float m_values[kAtOnce * kBlock], v_values[kAtOnce * kBlock];
          for (int64_t block = first_block; block < last_block; block += kAtOnce) {
            const int64_t begin = block * kBlock, end = std::min(weight.numel(), std::min(last_block, block + kAtOnce) * kBlock), count = end - begin;
            decode(true, count, m + begin, m_scale + block, m_values);
            decode(false, count, v + begin, v_scale + block, v_values);
            range(begin, end, m_values, v_values, UpdateRule::kAdamW);
            encode(true, count, m_values, m + begin, m_scale + block);
            encode(false, count, v_values, v + begin, v_scale + block);
          }
        });
      }
    });
  };
  const auto update = [&](size_t i, int64_t first, const at::Tensor& weight, const at::Tensor& grad) {
    update_by(i, first, weight, grad, {lr, tensors_[i].weight_decay, beta1, options_.beta2, options_.epsilon, grad_scale, correction1, correction2});
  };
  if (adafactor_) {
    std::vector<at::Tensor> weights;
    for (size_t i = 0; i < tensors_.size(); ++i) weights.push_back(states_[i].master.defined() ? states_[i].master : tensors_[i].weight);
    adafactor_->measure(weights, lr, grad_scale, num_steps_);
    for (size_t i = 0; i < tensors_.size(); ++i) {
      const double rate = adafactor_->rate(i);
      update_by(i, 0, tensors_[i].weight, adafactor_->direction(i), {rate, rate > 0 ? lr * tensors_[i].weight_decay / rate : 0, 0, 0, 0, 1, 1, 1});
    }
  } else if (staging_) staging_->for_pieces(update);
  else
    for (size_t i : on_host) update(i, 0, tensors_[i].weight, tensors_[i].grad);
}

std::vector<at::Tensor> Optimizer::parts_of(const StatePiece& piece) const {
  const State& s = states_[piece.tensor];
  std::vector<at::Tensor> parts;
  const auto add = [&](const at::Tensor& x, int64_t block) {
    if (x.defined()) parts.push_back(x.slice(0, piece.begin / block, (piece.end + block - 1) / block));
  };
  add(s.m, 1), add(s.v, 1), add(s.m_scale, kernels::k8BitBlock), add(s.v_scale, kernels::k8BitBlock), add(s.master, 1);
  return parts;
}

void Optimizer::update_on_device(double lr, double correction1, double correction2, const at::Tensor& scale, const std::vector<StatePiece>& pieces) {
  std::map<std::tuple<kernels::Type, double, UpdateRule>, std::vector<kernels::UpdateTensor>> calls;  // of one type, weight decay and rule
  const auto at = [](const at::Tensor& x, int64_t begin) { return x.defined() ? static_cast<char*>(x.data_ptr()) + begin * x.element_size() : nullptr; };
  const auto floats = [&](const at::Tensor& x, int64_t begin) { return reinterpret_cast<float*>(at(x, begin)); };
  for (const StatePiece& piece : pieces) {
    const OptimTensor& of = tensors_[piece.tensor];
    const State& s = states_[piece.tensor];
    const int64_t begin = piece.begin, block = begin / kernels::k8BitBlock;
    kernels::Places places = of.places;
    places.first += begin;
    calls[{kernel_type(of.weight), of.weight_decay, s.rule}].push_back({piece.end - begin, at(of.weight, begin), floats(s.master, begin), floats(of.grad, begin), at(s.m, begin),
                                                                         at(s.v, begin), places, s.id, floats(s.m_scale, block), floats(s.v_scale, block)});
  }
  const at::Tensor& weight = tensors_[pieces[0].tensor].weight;
  const double beta1 = options_.kind == OptimizerKind::kSgd ? options_.momentum : options_.beta1;
  for (const auto& [kind, list] : calls) {
    const auto& [type, decay, rule] = kind;
    kernels_of(weight)->update({rule, type, list.data(), static_cast<int64_t>(list.size()), lr, decay, beta1, options_.beta2,
                                options_.epsilon, correction1, correction2, floats(scale, 0), options_.seed, static_cast<uint64_t>(num_steps_),
                                options_.kind == OptimizerKind::kAdamW8Bit ? floats(maps(weight.device()), 0) : nullptr}, stream_of(weight));
  }
}

void Optimizer::adafactor_on_device(double lr, const at::Tensor& scale, const InWindows& in_windows) {
  std::vector<kernels::Adafactor> calls;
  for (size_t i = 0; i < tensors_.size(); ++i) {
    const OptimTensor& of = tensors_[i];
    const auto floats = [](const at::Tensor& x) { return static_cast<float*>(data_of(x)); };
    kernels::Adafactor call{};
    call.type = kernel_type(of.weight), call.size = of.weight.numel(), call.places = of.places;
    call.weight = data_of(of.weight), call.master = floats(states_[i].master), call.grad = floats(of.grad);
    call.lr = lr, call.weight_decay = of.weight_decay, call.grad_scale = floats(scale);
    call.seed = options_.seed, call.step = static_cast<uint64_t>(num_steps_), call.id = states_[i].id;
    calls.push_back(call);
  }
  adafactor_->step(std::move(calls), [&](const std::function<void(const StatePiece&)>& f) {
    in_windows([&](const std::vector<StatePiece>& pieces) {
      for (const StatePiece& piece : pieces) f(piece);
    });
  });
}

const at::Tensor& Optimizer::maps(at::Device device) {
  if (!maps_.defined()) maps_ = at::cat({dynamic_map(true), dynamic_map(false)}).to(device);
  return maps_;
}

int64_t Optimizer::bytes_fetched() const { return staging_ ? staging_->bytes_fetched() : 0; }

std::vector<OptimState> Optimizer::state() const {
  std::vector<OptimState> all = adafactor_ ? adafactor_->state() : std::vector<OptimState>();
  for (size_t i = 0; i < tensors_.size(); ++i) {
    const std::vector<const char*> names = states_of(options_);
    if (states_[i].m.defined()) all.push_back({i, tensors_[i].name, names[0], states_[i].m});
    if (states_[i].v.defined()) all.push_back({i, tensors_[i].name, names[1], states_[i].v});
    if (states_[i].m_scale.defined()) {
      all.push_back({i, tensors_[i].name, str(names[0], "_scale"), states_[i].m_scale, kernels::k8BitBlock});
      all.push_back({i, tensors_[i].name, str(names[1], "_scale"), states_[i].v_scale, kernels::k8BitBlock});
    }
    if (states_[i].master.defined()) all.push_back({i, tensors_[i].name, "master", states_[i].master});
  }
  return all;
}

uint64_t Optimizer::state_bytes(at::ScalarType dtype, const OptimizerOptions& options, int64_t elements, at::IntArrayRef whole) {
  const auto size = static_cast<int64_t>(c10::elementSize(compute_dtype(dtype)));
  const int64_t master = has_master(dtype, options.masters) ? elements * size : 0;
  if (options.kind == OptimizerKind::kAdafactor) return Adafactor::state_bytes(dtype, elements, whole) + static_cast<uint64_t>(master);
  if (rule_of(options.kind, c10::multiply_integers(whole)) == UpdateRule::kAdamW8Bit) return static_cast<uint64_t>(2 * elements + 2 * size * num_blocks(elements) + master);
  return static_cast<uint64_t>(static_cast<int64_t>(states_of(options).size()) * elements * size + master);
}

uint64_t Optimizer::paged_bytes_there(uint64_t state, at::ScalarType dtype, const OptimizerOptions& options) {
  const uint64_t window = options.kind == OptimizerKind::kAdafactor ? static_cast<uint64_t>(options.window_elements) * c10::elementSize(compute_dtype(dtype))  // masters alone
                                                                    : state_bytes(dtype, options, options.window_elements, {options.window_elements, 1});
  return std::min(state, 2 * window);
}

}  // namespace trireme
