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
  at::Tensor sum, y, rstd;
};

NormResult run_rms_norm(const at::Tensor& x, const at::Tensor& residual, const at::Tensor& weight_C, double eps) {
  const int64_t size = weight_C.numel(), rows = size ? x.numel() / size : 0;
  NormResult out;
  out.y = at::empty_like(x);
  out.rstd = at::empty({rows}, x.options().dtype(compute_dtype(x.scalar_type())));
  if (residual.defined()) out.sum = at::empty_like(x);
  if (const kernels::Kernels* k = kernels_of(x)) {
    k->rms_norm_forward({kernel_type(x), rows, size, data_of(x), data_of(residual), data_of(weight_C), static_cast<float>(eps), data_of(out.y), data_of(out.sum),
                         out.rstd.data_ptr<float>()}, stream_of(x));
    return out;
  }
  dispatch_floating(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = typename ComputeType<T>::type;
    const T* r = residual.defined() ? residual.data_ptr<T>() : nullptr;
    for_rows(rows, size, [&](int64_t begin, int64_t end) {
      const int64_t at = begin * size;
      loops<T>().rms_norm(end - begin, size, x.data_ptr<T>() + at, r ? r + at : nullptr,
                          r ? out.sum.data_ptr<T>() + at : nullptr, weight_C.data_ptr<T>(), eps,
                          out.y.data_ptr<T>() + at, out.rstd.data_ptr<A>() + begin);
    });
  });
  return out;
}

// {grad_x, grad_weight}, each undefined where not wanted.
std::pair<at::Tensor, at::Tensor> run_rms_norm_backward(const at::Tensor& grad_y, const at::Tensor& grad_sum,
                                                        const at::Tensor& x, const at::Tensor& weight_C,
                                                        const at::Tensor& rstd, bool want_x, bool want_weight) {
  const int64_t size = weight_C.numel(), rows = size ? x.numel() / size : 0;
  at::Tensor grad_x = want_x ? at::empty_like(x) : at::Tensor(), grad_weight;
  if (const kernels::Kernels* k = kernels_of(x)) {
    at::Tensor workspace;
    if (want_weight) {
      grad_weight = at::empty({size}, rstd.options());
      workspace = at::empty({kernels::rms_norm_workspace(rows, size)}, rstd.options());
    }
    k->rms_norm_backward({kernel_type(x), rows, size, data_of(grad_y), data_of(grad_sum), data_of(x), data_of(weight_C), rstd.data_ptr<float>(), data_of(grad_x),
                          static_cast<float*>(data_of(grad_weight)), static_cast<float*>(data_of(workspace))}, stream_of(x));
    return {grad_x, want_weight ? grad_weight.to(x.scalar_type()) : grad_weight};
  }
  dispatch_floating(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = typename ComputeType<T>::type;
    auto run = [&](int64_t begin, int64_t end, A* partial) {
      const int64_t at = begin * size;
      loops<T>().rms_norm_backward(end - begin, size, grad_y.data_ptr<T>() + at,
                                   grad_sum.defined() ? grad_sum.data_ptr<T>() + at : nullptr, x.data_ptr<T>() + at,
                                   weight_C.data_ptr<T>(), rstd.data_ptr<A>() + begin,
                                   want_x ? grad_x.data_ptr<T>() + at : nullptr, partial);
    };
    if (want_weight) {
      RowChunks chunks(rows);
      grad_weight = sum_chunks<T>(
          chunks, size, [&](int64_t chunk, A* partial) { run(chunks.begin(chunk), chunks.end(chunk), partial); });
    } else {
      for_rows(rows, size, [&](int64_t begin, int64_t end) { run(begin, end, nullptr); });
    }
  });
  return {grad_x, grad_weight};
}

void check_norm(const at::Tensor& x, const at::Tensor& weight_C) {
  TRIREME_CHECK(x.dim() > 0 && weight_C.dim() == 1 && x.size(-1) == weight_C.size(0), x.sizes(), weight_C.sizes());
}

struct RmsNorm : Function<RmsNorm> {
  static Variable forward(AutogradContext* ctx, const Variable& x_in, const Variable& weight_C, double eps) {
    at::AutoDispatchBelowADInplaceOrView guard;
    at::Tensor x = x_in.contiguous();
    NormResult out = run_rms_norm(x, {}, weight_C, eps);
    keep(ctx, "x", x.is_same(x_in) ? x_in : x);
    ctx->saved_data["rstd"] = out.rstd;
    ctx->save_for_backward({weight_C});
    return out.y;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    auto [grad_x, grad_weight] = run_rms_norm_backward(
        grads[0].contiguous(), {}, take(ctx, "x"), ctx->get_saved_variables()[0], ctx->saved_data.at("rstd").toTensor(),
        ctx->needs_input_grad(0), ctx->needs_input_grad(1));
    ctx->saved_data.clear();
    return {grad_x, grad_weight, {}};
  }
};

struct AddRmsNorm : Function<AddRmsNorm> {
  static variable_list forward(AutogradContext* ctx, const Variable& x, const Variable& residual,
                               const Variable& weight_C, double eps) {
    at::AutoDispatchBelowADInplaceOrView guard;
    NormResult out = run_rms_norm(x.contiguous(), residual.contiguous(), weight_C, eps);
    ctx->saved_data["rstd"] = out.rstd;
    ctx->save_for_backward({out.sum, weight_C});
    ctx->set_materialize_grads(false);
    return {out.sum, out.y};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    auto saved = ctx->get_saved_variables();
    if (!grads[1].defined()) return {grads[0], grads[0], {}, {}};
    bool want_x = ctx->needs_input_grad(0) || ctx->needs_input_grad(1);
    auto [grad_x, grad_weight] = run_rms_norm_backward(
        grads[1].contiguous(), grads[0].defined() ? grads[0].contiguous() : at::Tensor(), saved[0], saved[1],
        ctx->saved_data.at("rstd").toTensor(), want_x, ctx->needs_input_grad(2));
    ctx->saved_data.clear();
    return {grad_x, grad_x, grad_weight, {}};
  }
};

}  // namespace

at::Tensor sum_rows(const at::Tensor& x_TC) {
  at::Tensor sum;
  if (const kernels::Kernels* k = kernels_of(x_TC)) {
    const int64_t rows = x_TC.size(0), size = x_TC.size(1);
    sum = at::empty({size}, x_TC.options().dtype(at::kFloat));
    const at::Tensor workspace = at::empty({kernels::sum_rows_workspace(rows, size)}, sum.options());
    k->sum_rows({kernel_type(x_TC), rows, size, data_of(x_TC), sum.data_ptr<float>(), workspace.data_ptr<float>()}, stream_of(x_TC));
    return sum.to(x_TC.scalar_type());
  }
  dispatch_floating(x_TC.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    RowChunks chunks(x_TC.size(0));
    const int64_t size = x_TC.size(1);
    sum = sum_chunks<T>(chunks, size, [&](int64_t chunk, auto* partial) {
      loops<T>().add_rows(chunks.end(chunk) - chunks.begin(chunk), size,
                          x_TC.data_ptr<T>() + chunks.begin(chunk) * size, partial);
    });
  });
  return sum;
}

at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& any_weight_C, double eps) {
  check_alike("rms_norm", {"x", x}, {{"weight", any_weight_C}});
  check_norm(x, any_weight_C);
  const at::Tensor weight_C = any_weight_C.contiguous();
  at::Tensor y = RmsNorm::apply(x, weight_C, eps);
  if (selective_recompute()) {
    auto kept = std::make_shared<Kept>(x);
    register_recipe(y, [kept, weight = weight_C.detach(), eps] {
      return run_rms_norm(kept->take().contiguous(), {}, weight, eps).y;
    });
  }
  return y;
}

std::pair<at::Tensor, at::Tensor> add_rms_norm(const at::Tensor& x, const at::Tensor& residual,
                                               const at::Tensor& any_weight_C, double eps) {
  check_alike("add_rms_norm", {"x", x}, {{"residual", residual}, {"weight", any_weight_C}});
  check_norm(x, any_weight_C);
  TRIREME_CHECK(x.sizes() == residual.sizes(), x.sizes(), residual.sizes());
  const at::Tensor weight_C = any_weight_C.contiguous();
  auto out = AddRmsNorm::apply(x, residual, weight_C, eps);
  if (selective_recompute())
    register_recipe(out[1], [sum = out[0].detach(), weight = weight_C.detach(), eps] {
      return run_rms_norm(sum, {}, weight, eps).y;
    });
  return {out[0], out[1]};
}

}  // namespace trireme
