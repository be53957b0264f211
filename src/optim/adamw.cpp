#include "optim/adamw.h"

#include "ops/op_support.h"
#include "optim/offload.h"
#include "optim/update_loops.h"

namespace trireme {

AdamW::AdamW(std::vector<OptimTensor> tensors, const AdamWOptions& options)
    : tensors_(std::move(tensors)), options_(options) {
  for (auto& t : tensors_) {
    const auto dtype = compute_dtype(t.weight.scalar_type());
    TRIREME_CHECK(t.weight.dim() == 1 && t.weight.is_contiguous() && t.grad.is_contiguous() &&
                      t.grad.sizes() == t.weight.sizes() && t.grad.scalar_type() == dtype,
                  t.name, " ", t.weight.sizes(), " ", t.weight.scalar_type(), ", gradient ", t.grad.sizes(), " ",
                  t.grad.scalar_type());
    if (!t.weight.is_cpu() && !options.offload)
      throw ConfigError(str("optim.offload=false, but the weights are on ", t.weight.device().str(),
                            " and the update is computed by the host: set optim.offload=true"));
    t.weight = t.weight.detach();
    const at::TensorOptions state_options = dtype;
    Moments moments{at::zeros(t.weight.sizes(), state_options), at::zeros(t.weight.sizes(), state_options), {}};
    if (dtype != t.weight.scalar_type()) moments.master = t.weight.cpu().to(dtype);
    moments_.push_back(std::move(moments));
  }
  if (options.offload) staging_ = std::make_shared<HostStaging>(tensors_);
}

void AdamW::step(double lr, double grad_scale) {
  ++num_steps_;
  const double t = static_cast<double>(num_steps_);
  const auto update = [&](size_t i, int64_t first, const at::Tensor& weight, const at::Tensor& grad) {
    const Moments& moments = moments_[i];
    const AdamWStep step{lr,
                         tensors_[i].weight_decay,
                         options_.beta1,
                         options_.beta2,
                         options_.epsilon,
                         grad_scale,
                         1.0 - std::pow(options_.beta1, t),
                         1.0 - std::pow(options_.beta2, t)};
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
    for (size_t i = 0; i < tensors_.size(); ++i) update(i, 0, tensors_[i].weight, tensors_[i].grad);
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
