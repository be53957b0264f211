// rope, swiglu, geglu and dropout.
#include "ops/device.h"
#include "ops/dropout_mask.h"
#include "ops/op_support.h"
#include "ops/ops.h"

namespace trireme {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::Variable;
using torch::autograd::variable_list;

at::Tensor run_rope(const at::Tensor& x_THD, const at::Tensor& cos_TR, const at::Tensor& sin_TR, bool inverse) {
  at::Tensor y = at::empty_like(x_THD);
  const int64_t tokens = x_THD.size(0), heads = x_THD.size(1), dim = x_THD.size(2), rotary = cos_TR.size(1);
  if (const kernels::Kernels* k = kernels_of(x_THD)) {
    k->rope({kernel_type(x_THD), tokens, heads, dim, rotary, data_of(x_THD), heads * dim, cos_TR.data_ptr<float>(), sin_TR.data_ptr<float>(), data_of(y), heads * dim,
             inverse}, stream_of(x_THD));
    return y;
  }
  dispatch_floating(x_THD.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = typename ComputeType<T>::type;
    for_rows(tokens, heads * dim, [&](int64_t begin, int64_t end) {
      const int64_t at = begin * heads * dim;
      loops<T>().rope(end - begin, heads, dim, rotary, x_THD.data_ptr<T>() + at, cos_TR.data_ptr<A>() + begin * rotary,
                      sin_TR.data_ptr<A>() + begin * rotary, y.data_ptr<T>() + at, inverse);
    });
  });
  return y;
}

struct Rope : Function<Rope> {
  static Variable forward(AutogradContext* ctx, const Variable& x_THD, const Variable& cos_TR, const Variable& sin_TR) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({cos_TR, sin_TR});
    return run_rope(x_THD.contiguous(), cos_TR, sin_TR, false);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    auto saved = ctx->get_saved_variables();
    return {run_rope(grads[0].contiguous(), saved[0], saved[1], true), {}, {}};
  }
};

using kernels::Gate;  // kSilu or kGeluTanh

at::Tensor run_glu(Gate activation, const at::Tensor& gate, const at::Tensor& up) {
  at::Tensor y = at::empty_like(gate);
  if (const kernels::Kernels* k = kernels_of(gate)) {
    k->glu_forward({kernel_type(gate), activation, 1, gate.numel(), gate.numel(), data_of(gate), data_of(up), data_of(y)}, stream_of(gate));
    return y;
  }
  dispatch_floating(gate.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto glu = activation == Gate::kSilu ? loops<T>().swiglu : loops<T>().geglu;
    for_rows(gate.numel(), 1, [&](int64_t begin, int64_t end) {
      glu(end - begin, gate.data_ptr<T>() + begin, up.data_ptr<T>() + begin, y.data_ptr<T>() + begin);
    });
  });
  return y;
}

struct Glu : Function<Glu> {
  static Variable forward(AutogradContext* ctx, const Variable& gate_in, const Variable& up_in, Gate activation) {
    at::AutoDispatchBelowADInplaceOrView guard;
    at::Tensor gate = gate_in.contiguous(), up = up_in.contiguous();
    ctx->save_for_backward({gate, up});
    ctx->saved_data["activation"] = static_cast<int64_t>(activation);
    return run_glu(activation, gate, up);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    auto saved = ctx->get_saved_variables();
    const auto activation = static_cast<Gate>(ctx->saved_data.at("activation").toInt());
    const bool is_ours = !grads[0].is_contiguous() || (grads[0].use_count() == 1 && grads[0].storage().use_count() == 1);  // nobody else looks at it
    at::Tensor grad_y = grads[0].contiguous();
    at::Tensor grad_gate = at::empty_like(saved[0]), grad_up = is_ours ? grad_y : at::empty_like(saved[0]);
    if (const kernels::Kernels* k = kernels_of(grad_y)) {
      k->glu_backward({kernel_type(grad_y), activation, 1, grad_y.numel(), grad_y.numel(), data_of(grad_y), data_of(saved[0]), data_of(saved[1]),
                       data_of(grad_gate), data_of(grad_up)}, stream_of(grad_y));
      return {grad_gate, grad_up, {}};
    }
    dispatch_floating(grad_y.scalar_type(), [&](auto zero) {
      using T = decltype(zero);
      const auto glu_backward = activation == Gate::kSilu ? loops<T>().swiglu_backward : loops<T>().geglu_backward;
      for_rows(grad_y.numel(), 1, [&](int64_t begin, int64_t end) {
        glu_backward(end - begin, grad_y.data_ptr<T>() + begin, saved[0].data_ptr<T>() + begin, saved[1].data_ptr<T>() + begin, grad_gate.data_ptr<T>() + begin,
                     grad_up.data_ptr<T>() + begin);
      });
    });
    return {grad_gate, grad_up, {}};
  }
};

at::Tensor glu(std::string_view name, Gate activation, const at::Tensor& gate_TF, const at::Tensor& up_TF) {
  check_alike(name, {"gate", gate_TF}, {{"up", up_TF}});
  TRIREME_CHECK(gate_TF.sizes() == up_TF.sizes(), gate_TF.sizes(), up_TF.sizes());
  at::Tensor y = Glu::apply(gate_TF, up_TF, activation);
  if (selective_recompute())
    register_recipe(y, [activation, gate = gate_TF.detach(), up = up_TF.detach()] { return run_glu(activation, gate.contiguous(), up.contiguous()); });
  return y;
}

struct Dropout : Function<Dropout> {
  static Variable forward(AutogradContext* ctx, const Variable& x_TC, const DropoutMask& mask) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->saved_data["mask"] = c10::IValue::make_capsule(c10::make_intrusive<KeptMask>(mask));
    return mask.apply(x_TC.contiguous());
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    auto kept = c10::static_intrusive_pointer_cast<KeptMask>(ctx->saved_data.at("mask").toCapsule());
    return {kept->mask.apply(grads[0].contiguous()), {}};
  }
};

}  // namespace

DropoutMask::DropoutMask(const DropoutKey& key) : key_(key) {
  TRIREME_CHECK(key.p >= 0.0 && key.p < 1.0, "dropout probability ", key.p);
  bits_.seed = key.seed;
  bits_.module = key.module;
  bits_.threshold = static_cast<uint32_t>(std::min(4294967295.0, std::floor(key.p * 4294967296.0)));
  bits_.keep_scale = 1.0 / (1.0 - key.p);
  bits_.first_feature = key.first_feature;
}

at::Tensor DropoutMask::row_ids(const at::Tensor& x_TC) const {
  const at::Tensor& ids = key_.row_ids_T;
  TRIREME_CHECK(ids.defined() && ids.numel() == x_TC.size(0), "dropout needs one row id for each of ", x_TC.size(0), " rows");
  check_alike("dropout", {"x", x_TC}, {{"row ids", ids}}, at::kLong);
  return ids.contiguous();
}

void DropoutMask::run(const at::Tensor& x_TC, const at::Tensor& y_TC, bool add) const {
  const int64_t rows = x_TC.size(0), size = x_TC.size(1);
  const at::Tensor ids = row_ids(x_TC);
  if (const kernels::Kernels* k = kernels_of(x_TC)) {
    k->dropout({kernel_type(x_TC), rows, size, data_of(x_TC), ids.data_ptr<int64_t>(), key_.seed, key_.module, key_.first_feature, key_.p, add, data_of(y_TC)},
               stream_of(x_TC));
    return;
  }
  dispatch_floating(x_TC.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    for_rows(rows, size, [&](int64_t begin, int64_t end) {
      loops<T>().dropout(end - begin, size, x_TC.data_ptr<T>() + begin * size, ids.data_ptr<int64_t>() + begin, bits_,
                         add, y_TC.data_ptr<T>() + begin * size);
    });
  });
}

at::Tensor DropoutMask::apply(const at::Tensor& x_TC) const {
  at::Tensor y = at::empty_like(x_TC);
  run(x_TC, y, false);
  return y;
}
void DropoutMask::add_to(const at::Tensor& x_TC, const at::Tensor& y_TC) const { run(x_TC, y_TC, true); }

at::Tensor rope(const at::Tensor& x_THD, const at::Tensor& cos_TR, const at::Tensor& sin_TR) {
  check_alike("rope", {"x", x_THD}, {{"cos", cos_TR}, {"sin", sin_TR}}, compute_dtype(x_THD.scalar_type()));
  TRIREME_CHECK(x_THD.dim() == 3 && cos_TR.dim() == 2 && cos_TR.sizes() == sin_TR.sizes() &&
                    cos_TR.size(0) == x_THD.size(0) && cos_TR.size(1) <= x_THD.size(2) && cos_TR.size(1) % 2 == 0,
                x_THD.sizes(), cos_TR.sizes(), sin_TR.sizes());
  at::Tensor cos = cos_TR.contiguous(), sin = sin_TR.contiguous();
  at::Tensor y = Rope::apply(x_THD, cos, sin);
  if (selective_recompute()) {
    auto kept = std::make_shared<Kept>(x_THD);
    register_recipe(y, [kept, cos, sin] { return run_rope(kept->take().contiguous(), cos, sin, false); });
  }
  return y;
}

at::Tensor swiglu(const at::Tensor& gate_TF, const at::Tensor& up_TF) { return glu("swiglu", Gate::kSilu, gate_TF, up_TF); }
at::Tensor geglu(const at::Tensor& gate_TF, const at::Tensor& up_TF) { return glu("geglu", Gate::kGeluTanh, gate_TF, up_TF); }

at::Tensor dropout(const at::Tensor& x_TC, const DropoutKey& key) {
  if (key.p == 0.0) return x_TC;
  TRIREME_CHECK(x_TC.dim() == 2, x_TC.sizes());
  DropoutMask mask(key);
  at::Tensor y = Dropout::apply(x_TC, mask);
  if (selective_recompute()) {
    auto kept = std::make_shared<Kept>(x_TC);
    register_recipe(y, [kept, mask] { return mask.apply(kept->take().contiguous()); });
  }
  return y;
}

}  // namespace trireme
