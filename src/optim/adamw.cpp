#include "optim/adamw.h"

#include "ops/device.h"
#include "ops/op_support.h"
#include "optim/offload.h"
#include "optim/update_loops.h"

namespace trireme {

AdamW::AdamW(std::vector<OptimTensor> tensors, const AdamWOptions& options)
    : tensors_(std::move(tensors)), options_(options) {
  for (auto& t : tensors_) {
    const auto dtype = compute_dtype(t.weight.scalar_type());
    check_alike("AdamW of " + t.name, {"weight", t.weight}, {{"gradient", t.grad}}, dtype);
    TRIREME_CHECK(t.weight.dim() == 1 && t.weight.is_contiguous() && t.grad.is_contiguous() && t.grad.sizes() == t.weight.sizes(),
                  t.name, " ", t.weight.sizes(), ", gradient ", t.grad.sizes());
    t.weight = t.weight.detach();
    const at::Device device = options.offload ? at::kCPU : t.weight.device();
    if (!device.is_cpu()) kernels_of(t.weight);  // there are some
    const auto state_options = at::TensorOptions(dtype).device(device);
    Moments moments{at::zeros(t.weight.sizes(), state_options), at::zeros(t.weight.sizes(), state_options), {}};
    if (dtype != t.weight.scalar_type()) moments.master = t.weight.to(device).to(dtype);  // what travels is the smaller
    moments_.push_back(std::move(moments));
  }
  if (options.offload) staging_ = std::make_shared<HostStaging>(tensors_);
}

void AdamW::step(double lr, double grad_scale) { update(lr, grad_scale, {}); }
void AdamW::step(double lr, const at::Tensor& grad_scale) { update(lr, 1.0, grad_scale); }

void AdamW::update(double lr, double grad_scale, const at::Tensor& device_scale) {
  ++num_steps_;
  const double t = static_cast<double>(num_steps_), correction1 = 1.0 - std::pow(options_.beta1, t), correction2 = 1.0 - std::pow(options_.beta2, t);
  std::vector<size_t> on_host;
  std::map<std::pair<at::ScalarType, double>, std::vector<size_t>> by_kernels;  // of one dtype and weight decay: a call
  for (size_t i = 0; i < tensors_.size(); ++i)
    if (staging_ || !kernels_of(tensors_[i].weight)) on_host.push_back(i);
    else by_kernels[{tensors_[i].weight.scalar_type(), tensors_[i].weight_decay}].push_back(i);

  for (const auto& [kind, numbers] : by_kernels) {
    std::vector<kernels::AdamWTensor> list;
    for (size_t i : numbers) {
      const Moments& m = moments_[i];
      list.push_back({tensors_[i].weight.numel(), data_of(tensors_[i].weight), static_cast<float*>(data_of(m.master)), tensors_[i].grad.data_ptr<float>(),
                      m.exp_avg.data_ptr<float>(), m.exp_avg_sq.data_ptr<float>(), 0, static_cast<uint32_t>(i)});
    }
    const at::Tensor& weight = tensors_[numbers[0]].weight;
    at::Tensor scale = device_scale;
    if (!scale.defined() && grad_scale != 1.0) scale = at::full({}, grad_scale, weight.options().dtype(at::kFloat));
    TRIREME_CHECK(!scale.defined() || (scale.device() == weight.device() && scale.scalar_type() == at::kFloat && scale.numel() == 1), scale.toString());
    kernels_of(weight)->adamw({kernel_type(weight), list.data(), static_cast<int64_t>(list.size()), lr, kind.second, options_.beta1, options_.beta2, options_.epsilon,
                               correction1, correction2, static_cast<float*>(data_of(scale)), 0, 0}, stream_of(weight));
  }

  if (on_host.empty()) return;
  if (device_scale.defined()) {
    grad_scale = device_scale.item<double>();
    if (!std::isfinite(grad_scale)) return;
  }
  const auto update = [&](size_t i, int64_t first, const at::Tensor& weight, const at::Tensor& grad) {
    const Moments& moments = moments_[i];
    const AdamWStep step{lr, tensors_[i].weight_decay, options_.beta1, options_.beta2, options_.epsilon, grad_scale, correction1, correction2};
    dispatch_floating(weight.scalar_type(), [&](auto zero) {
      using T = decltype(zero);
      using A = typename ComputeType<T>::type;
      T* const values = weight.data_ptr<T>();
      const A* const gradients = grad.data_ptr<A>();
      A* const exp_avg = moments.exp_avg.data_ptr<A>() + first;
      A* const exp_avg_sq = moments.exp_avg_sq.data_ptr<A>() + first;
      A* const master = moments.master.defined() ? moments.master.data_ptr<A>() + first : nullptr;
      for_rows(weight.numel(), 1, [&](int64_t begin, int64_t end) {
        update_loops<T>().adamw(end - begin, values + begin, master ? master + begin : nullptr, gradients + begin, exp_avg + begin,
                                exp_avg_sq + begin, step);
      });
    });
  };
  if (staging_) staging_->for_pieces(update);
  else
    for (size_t i : on_host) update(i, 0, tensors_[i].weight, tensors_[i].grad);
}

int64_t AdamW::bytes_fetched() const { return staging_ ? staging_->bytes_fetched() : 0; }

std::vector<OptimState> AdamW::state() const {
  std::vector<OptimState> all;
  for (size_t i = 0; i < tensors_.size(); ++i) {
    all.push_back({i, tensors_[i].name, "exp_avg", moments_[i].exp_avg});
    all.push_back({i, tensors_[i].name, "exp_avg_sq", moments_[i].exp_avg_sq});
    if (moments_[i].master.defined()) all.push_back({i, tensors_[i].name, "master", moments_[i].master});
  }
  return all;
}

uint64_t AdamW::state_bytes_per_element(at::ScalarType dtype) {
  return dtype == at::kDouble ? 16 : dtype == at::kFloat ? 8 : 12;
}

}  // namespace trireme
