#include "ops/float8.h"

#include "base/check.h"
#include "ops/device.h"
#include "ops/op_support.h"
#include "ops/product.h"

namespace trireme {
namespace {

using kernels::Type;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::Variable;
using torch::autograd::variable_list;

struct Codes {
  Type type;
  at::Tensor codes, scale;
};

const kernels::Kernels& kernels_for(const at::Tensor& x) {
  const kernels::Kernels* k = kernels_of(x);
  TRIREME_CHECK(k && x.dim() == 2 && x.element_size() == 2, "float8 of ", x.scalar_type(), " ", x.sizes(), " on ", x.device().str());
  return *k;
}

Codes to_codes(const at::Tensor& any, Type type) {
  const kernels::Kernels& k = kernels_for(any);
  const at::Tensor x = any.contiguous(), workspace = at::empty({kernels::kFloat8Partials}, x.options().dtype(at::kFloat));
  Codes out{type, at::empty(x.sizes(), x.options().dtype(at::kByte)), at::empty({1}, workspace.options())};
  k.to_float8({kernel_type(x), type, x.numel(), data_of(x), data_of(out.codes), out.scale.data_ptr<float>(), workspace.data_ptr<float>()}, stream_of(x));
  return out;
}

// a b^T (+ bias), of the dtype of `like`
at::Tensor product_of_codes(const Codes& a_MK, const Codes& b_NK, const at::Tensor& like, const at::Tensor& bias_N) {
  const int64_t m = a_MK.codes.size(0), k = a_MK.codes.size(1), n = b_NK.codes.size(0);
  at::Tensor y_MN = at::empty({m, n}, like.options());
  const ProductWorkspace workspace(like);
  kernels_for(like).matmul({a_MK.type, b_NK.type, kernel_type(like), m, n, k, false, true, data_of(a_MK.codes), data_of(b_NK.codes), k, k, data_of(y_MN), n, data_of(bias_N), 1, 0,
                            false, a_MK.scale.data_ptr<float>(), b_NK.scale.data_ptr<float>(), workspace.data, workspace.num_bytes},
                           stream_of(like));
  return y_MN;
}

struct Float8Linear : Function<Float8Linear> {
  static Variable forward(AutogradContext* ctx, const Variable& x_TI, const Float8Weight& w, const std::optional<at::Tensor>& bias_O) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->saved_data["w"] = w.w_IO;
    ctx->saved_data["scale"] = w.scale;
    return product_of_codes(to_codes(x_TI, Type::kFloat8E4M3), {Type::kFloat8E4M3, w.w_OI, w.scale}, x_TI, bias_O ? bias_O->contiguous() : at::Tensor());
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Codes w_IO{Type::kFloat8E4M3, ctx->saved_data.at("w").toTensor(), ctx->saved_data.at("scale").toTensor()};
    return {product_of_codes(to_codes(grads[0], Type::kFloat8E5M2), w_IO, grads[0], {}), {}, {}};
  }
};

}  // namespace

Float8Weight float8_weight(const at::Tensor& w_OI) {
  TRIREME_CHECK(w_OI.dim() == 2 && w_OI.size(0) % 16 == 0 && w_OI.size(1) % 16 == 0, "float8 takes sizes that are multiples of 16, not ", w_OI.sizes());
  const Codes w = to_codes(w_OI, Type::kFloat8E4M3);
  return {w.codes, w.codes.t().contiguous(), w.scale};
}

at::Tensor float8_linear(const at::Tensor& x_TI, const Float8Weight& w, const at::Tensor& bias_O) {
  check_alike("float8_linear", {"x", x_TI}, {{"weight", w.w_OI}, {"transposed weight", w.w_IO}}, at::kByte);
  check_alike("float8_linear", {"x", x_TI}, {{"scale", w.scale}}, at::kFloat);
  check_alike("float8_linear", {"x", x_TI}, {{"bias", bias_O}});
  TRIREME_CHECK(x_TI.dim() == 2 && x_TI.size(1) == w.w_OI.size(1), x_TI.sizes(), w.w_OI.sizes());
  return Float8Linear::apply(x_TI, w, bias_O.defined() ? std::optional(bias_O) : std::nullopt);
}

}  // namespace trireme
