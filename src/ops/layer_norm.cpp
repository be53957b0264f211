// Of the CPU by ATen in fp32 (fp64); but the sums over the rows, which ATen cuts by the number of threads.
#include "ops/device.h"
#include "ops/op_support.h"
#include "ops/ops.h"

namespace trireme {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::Variable;
using torch::autograd::variable_list;

struct NormResult {
  at::Tensor sum, y, mean, rstd;  // the last two [rows]; sum: with a residual only
};

NormResult run_layer_norm(const at::Tensor& x, const at::Tensor& residual, const at::Tensor& weight_C, const at::Tensor& bias_C, double eps) {
  const int64_t size = weight_C.numel(), rows = x.numel() / size;
  NormResult out;
  if (const kernels::Kernels* k = kernels_of(x)) {
    out.y = at::empty_like(x);
    out.mean = at::empty({rows}, x.options().dtype(at::kFloat)), out.rstd = at::empty_like(out.mean);
    if (residual.defined()) out.sum = at::empty_like(x);
    k->layer_norm_forward({kernel_type(x), rows, size, data_of(x), data_of(residual), data_of(weight_C), data_of(bias_C), static_cast<float>(eps), data_of(out.y), data_of(out.sum),
                           out.mean.data_ptr<float>(), out.rstd.data_ptr<float>()}, stream_of(x));
    return out;
  }
  const auto dtype = compute_dtype(x.scalar_type());
  if (residual.defined()) out.sum = x + residual;
  auto [y, mean, rstd] = at::native_layer_norm((residual.defined() ? out.sum : x).to(dtype), {size}, weight_C.to(dtype), bias_C.to(dtype), eps);
  out.y = y.to(x.scalar_type()), out.mean = mean.view({rows}), out.rstd = rstd.view({rows});
  return out;
}

struct Gradients {
  at::Tensor x, weight_C, bias_C;  // the last two undefined where not wanted
};

// s: what has been normalised.
Gradients run_layer_norm_backward(const at::Tensor& grad_y, const at::Tensor& grad_sum, const at::Tensor& s, const at::Tensor& weight_C, const at::Tensor& mean, const at::Tensor& rstd,
                                  bool want_weights) {
  const int64_t size = weight_C.numel(), rows = s.numel() / size;
  Gradients grads;
  if (const kernels::Kernels* k = kernels_of(s)) {
    grads.x = at::empty_like(s);
    at::Tensor weights, workspace;  // [2, C]: of weight and bias
    if (want_weights) weights = at::empty({2, size}, mean.options()), workspace = at::empty({kernels::layer_norm_workspace(rows, size)}, mean.options());
    float* const grad_weight = static_cast<float*>(data_of(weights));
    k->layer_norm_backward({kernel_type(s), rows, size, data_of(grad_y), data_of(grad_sum), data_of(s), data_of(weight_C), mean.data_ptr<float>(), rstd.data_ptr<float>(),
                            data_of(grads.x), grad_weight, grad_weight ? grad_weight + size : nullptr, static_cast<float*>(data_of(workspace))}, stream_of(s));
    if (want_weights) grads.weight_C = weights[0].to(s.scalar_type()), grads.bias_C = weights[1].to(s.scalar_type());
    return grads;
  }
  const auto dtype = compute_dtype(s.scalar_type());
  const at::Tensor grad_NC = grad_y.to(dtype).view({rows, size}), s_NC = s.to(dtype).view({rows, size}), mean_N1 = mean.unsqueeze(1), rstd_N1 = rstd.unsqueeze(1);
  at::Tensor grad_x = std::get<0>(at::native_layer_norm_backward(grad_NC, s_NC, {size}, mean_N1, rstd_N1, weight_C.to(dtype), {}, {true, false, false}));
  if (grad_sum.defined()) grad_x = grad_x + grad_sum.to(dtype).view({rows, size});
  grads.x = grad_x.to(s.scalar_type()).view(s.sizes());
  if (!want_weights) return grads;
  grads.weight_C = sum_rows(grad_NC * (s_NC - mean_N1) * rstd_N1).to(s.scalar_type());
  grads.bias_C = sum_rows(grad_NC).to(s.scalar_type());
  return grads;
}

struct LayerNorm : Function<LayerNorm> {
  static Variable forward(AutogradContext* ctx, const Variable& x_in, const Variable& weight_C, const Variable& bias_C, double eps) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const at::Tensor x = x_in.contiguous();
    const NormResult out = run_layer_norm(x, {}, weight_C, bias_C, eps);
    keep(ctx, "x", x.is_same(x_in) ? x_in : x);
    ctx->saved_data["mean"] = out.mean, ctx->saved_data["rstd"] = out.rstd;
    ctx->save_for_backward({weight_C});
    return out.y;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Gradients g = run_layer_norm_backward(grads[0].contiguous(), {}, take(ctx, "x"), ctx->get_saved_variables()[0], ctx->saved_data.at("mean").toTensor(),
                                                ctx->saved_data.at("rstd").toTensor(), ctx->needs_input_grad(1) || ctx->needs_input_grad(2));
    ctx->saved_data.clear();
    return {g.x, g.weight_C, g.bias_C, {}};
  }
};

struct AddLayerNorm : Function<AddLayerNorm> {
  static variable_list forward(AutogradContext* ctx, const Variable& x, const Variable& residual, const Variable& weight_C, const Variable& bias_C, double eps) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const NormResult out = run_layer_norm(x.contiguous(), residual.contiguous(), weight_C, bias_C, eps);
    ctx->saved_data["mean"] = out.mean, ctx->saved_data["rstd"] = out.rstd;
    ctx->save_for_backward({out.sum, weight_C});
    ctx->set_materialize_grads(false);
    return {out.sum, out.y};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    if (!grads[1].defined()) return {grads[0], grads[0], {}, {}, {}};
    const auto saved = ctx->get_saved_variables();
    const Gradients g = run_layer_norm_backward(grads[1].contiguous(), grads[0].defined() ? grads[0].contiguous() : at::Tensor(), saved[0], saved[1], ctx->saved_data.at("mean").toTensor(),
                                                ctx->saved_data.at("rstd").toTensor(), ctx->needs_input_grad(2) || ctx->needs_input_grad(3));
    ctx->saved_data.clear();
    return {g.x, g.x, g.weight_C, g.bias_C, {}};
  }
};

void check_norm(const at::Tensor& x, const at::Tensor& weight_C, const at::Tensor& bias_C) {
  TRIREME_CHECK(x.dim() > 0 && weight_C.dim() == 1 && weight_C.numel() > 0 && x.size(-1) == weight_C.size(0) && bias_C.sizes() == weight_C.sizes(), x.sizes(), weight_C.sizes(),
                bias_C.sizes());
}

}  // namespace

at::Tensor layer_norm(const at::Tensor& x, const at::Tensor& any_weight_C, const at::Tensor& any_bias_C, double eps) {
  check_alike("layer_norm", {"x", x}, {{"weight", any_weight_C}, {"bias", any_bias_C}});
  check_norm(x, any_weight_C, any_bias_C);
  const at::Tensor weight_C = any_weight_C.contiguous(), bias_C = any_bias_C.contiguous();
  at::Tensor y = LayerNorm::apply(x, weight_C, bias_C, eps);
  if (selective_recompute()) {
    auto kept = std::make_shared<Kept>(x);
    register_recipe(y, [kept, weight = weight_C.detach(), bias = bias_C.detach(), eps] { return run_layer_norm(kept->take().contiguous(), {}, weight, bias, eps).y; });
  }
  return y;
}

std::pair<at::Tensor, at::Tensor> add_layer_norm(const at::Tensor& x, const at::Tensor& residual, const at::Tensor& any_weight_C, const at::Tensor& any_bias_C, double eps) {
  check_alike("add_layer_norm", {"x", x}, {{"residual", residual}, {"weight", any_weight_C}, {"bias", any_bias_C}});
  check_norm(x, any_weight_C, any_bias_C);
  TRIREME_CHECK(x.sizes() == residual.sizes(), x.sizes(), residual.sizes());
  const at::Tensor weight_C = any_weight_C.contiguous(), bias_C = any_bias_C.contiguous();
  auto out = AddLayerNorm::apply(x, residual, weight_C, bias_C, eps);
  if (selective_recompute())
    register_recipe(out[1], [sum = out[0].detach(), weight = weight_C.detach(), bias = bias_C.detach(), eps] { return run_layer_norm(sum, {}, weight, bias, eps).y; });
  return {out[0], out[1]};
}

}  // namespace trireme
