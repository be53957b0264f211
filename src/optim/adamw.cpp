#include "optim/adamw.h"

#include "ops/op_support.h"
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
    t.weight = t.weight.detach();
    auto state_options = t.weight.options().dtype(dtype);
    Moments moments{at::zeros(t.weight.sizes(), state_options), at::zeros(t.weight.sizes(), state_options), {}};
    if (dtype != t.weight.scalar_type()) moments.master = t.weight.to(dtype);
    moments_.push_back(std::move(moments));
  }
}

void AdamW::step(double lr, double grad_scale) {
  ++num_steps_;
  const double t = static_cast<double>(num_steps_);
  for (size_t i = 0; i < tensors_.size(); ++i) {
    const OptimTensor& tensor = tensors_[i];
    const Moments& moments = moments_[i];
    const AdamWStep step{lr,
                         tensor.weight_decay,
                         options_.beta1,
                         options_.beta2,
                         options_.epsilon,
                         grad_scale,
                         1.0 - std::pow(options_.beta1, t),
                         1.0 - std::pow(options_.beta2, t)};
    dispatch_floating(tensor.weight.scalar_type(), [&](auto zero) {
      using T = decltype(zero);
      using A = typename ComputeType<T>::type;
      A* master = moments.master.defined() ? moments.master.data_ptr<A>() : nullptr;
      for_rows(tensor.weight.numel(), 1, [&](int64_t begin, int64_t end) {
        update_loops<T>().adamw(end - begin, tensor.weight.data_ptr<T>() + begin, master ? master + begin : nullptr,
                                tensor.grad.data_ptr<A>() + begin, moments.exp_avg.data_ptr<A>() + begin,
                                moments.exp_avg_sq.data_ptr<A>() + begin, step);
      });
    });
  }
}

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
