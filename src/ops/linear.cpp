#include "ops/delayed_gradients.h"
#include "ops/dropout_mask.h"
#include "ops/op_support.h"
#include "ops/ops.h"

namespace trireme {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::Variable;
using torch::autograd::variable_list;

// Few rows in 16 bits, as when text is generated: oneDNN would arrange the whole weight anew for them, which takes longer
// than to read it.
bool has_few_rows(const at::Tensor& x_TI, const at::Tensor& w_OI) {
  constexpr int64_t kFew = 4;
  return x_TI.is_cpu() && c10::isReducedFloatingType(x_TI.scalar_type()) && x_TI.size(0) <= kFew && w_OI.is_contiguous();
}

// y = scale * x w^T + plus; `plus` [T, O] may be y, undefined is 0. For has_few_rows only.
void product_of_few_rows(const at::Tensor& x_in, const at::Tensor& w_OI, double scale, const at::Tensor& plus_TO,
                         at::Tensor& y_TO) {
  const at::Tensor x_TI = x_in.contiguous();
  const int64_t rows = x_TI.size(0), size = x_TI.size(1), features = w_OI.size(0);
  dispatch_floating(y_TO.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T* plus = plus_TO.defined() ? plus_TO.data_ptr<T>() : nullptr;
    for_rows(features, rows * size, [&](int64_t begin, int64_t end) {
      loops<T>().product(rows, end - begin, size, x_TI.data_ptr<T>(), w_OI.data_ptr<T>() + begin * size, scale,
                         plus ? plus + begin : nullptr, plus ? plus_TO.stride(0) : 0, y_TO.data_ptr<T>() + begin, features);
    });
  });
}

// x w^T (+ bias)
at::Tensor product(const at::Tensor& x_TI, const at::Tensor& w_OI, const std::optional<at::Tensor>& bias_O = {}) {
  if (!has_few_rows(x_TI, w_OI)) return bias_O ? at::addmm(*bias_O, x_TI, w_OI.t()) : at::mm(x_TI, w_OI.t());
  at::Tensor y_TO = at::empty({x_TI.size(0), w_OI.size(0)}, x_TI.options());
  product_of_few_rows(x_TI, w_OI, 1.0, bias_O ? bias_O->contiguous().expand_as(y_TO) : at::Tensor(), y_TO);
  return y_TO;
}

// y += scale * x w^T
void add_product(const at::Tensor& x_TI, const at::Tensor& w_OI, double scale, at::Tensor& y_TO) {
  if (has_few_rows(x_TI, w_OI))
    product_of_few_rows(x_TI, w_OI, scale, y_TO, y_TO);
  else
    y_TO.addmm_(x_TI, w_OI.t(), 1.0, scale);
}

// An undefined tensor may not enter a Function; an empty optional may, and has no edge in the graph: so it comes last.
std::optional<at::Tensor> optional(const at::Tensor& t) { return t.defined() ? std::optional(t) : std::nullopt; }

struct LinearFunction : Function<LinearFunction> {
  static Variable forward(AutogradContext* ctx, const Variable& x_TI, const Variable& w_OI,
                          const std::optional<at::Tensor>& bias_O, bool keep_x) {
    at::AutoDispatchBelowADInplaceOrView guard;
    if (keep_x) keep(ctx, "x", x_TI);  // only the weight's gradient needs it
    ctx->saved_data["bias"] = bias_O.has_value();
    ctx->save_for_backward({w_OI});
    return product(x_TI, w_OI, bias_O);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    at::Tensor grad_y = grads[0].contiguous(), grad_x, grad_w, grad_bias;
    const at::Tensor w_OI = ctx->get_saved_variables()[0];
    if (ctx->needs_input_grad(0)) grad_x = at::mm(grad_y, w_OI);
    if (ctx->needs_input_grad(1))
      grad_w = weight_gradient(w_OI, [grad_y, x_TI = take(ctx, "x")] { return at::mm(grad_y.t(), x_TI); });
    if (ctx->saved_data.at("bias").toBool() && ctx->needs_input_grad(2)) grad_bias = sum_rows(grad_y);
    return {grad_x, grad_w, grad_bias, {}};
  }
};

struct LoraLinear : Function<LoraLinear> {
  static Variable forward(AutogradContext* ctx, const Variable& x_TI, const Variable& w_OI, const Variable& a_RI,
                          const Variable& b_OR, const std::optional<at::Tensor>& bias_O, double scale,
                          const DropoutMask& mask) {
    at::AutoDispatchBelowADInplaceOrView guard;
    at::Tensor y_TO = product(x_TI, w_OI, bias_O);
    at::Tensor xa_TR = product(mask.active() ? mask.apply(x_TI.contiguous()) : x_TI, a_RI);
    add_product(xa_TR, b_OR, scale, y_TO);
    keep(ctx, "x", x_TI);
    ctx->saved_data["xa"] = xa_TR;
    ctx->saved_data["scale"] = scale;
    ctx->saved_data["mask"] = c10::IValue::make_capsule(c10::make_intrusive<KeptMask>(mask));
    ctx->save_for_backward({w_OI, a_RI, b_OR});
    return y_TO;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    auto saved = ctx->get_saved_variables();
    at::Tensor &w_OI = saved[0], &a_RI = saved[1], &b_OR = saved[2];
    const DropoutMask mask = c10::static_intrusive_pointer_cast<KeptMask>(ctx->saved_data.at("mask").toCapsule())->mask;
    const double scale = ctx->saved_data.at("scale").toDouble();
    at::Tensor xa_TR = ctx->saved_data.at("xa").toTensor();
    at::Tensor grad_y = grads[0].contiguous(), grad_x, grad_a, grad_b;
    at::Tensor grad_xa_TR = at::mm(grad_y, b_OR).mul_(scale);
    at::Tensor x_TI = take(ctx, "x");
    if (ctx->needs_input_grad(2)) grad_a = at::mm(grad_xa_TR.t(), mask.active() ? mask.apply(x_TI.contiguous()) : x_TI);
    if (ctx->needs_input_grad(3)) grad_b = at::mm(grad_y.t(), xa_TR).mul_(scale);
    if (ctx->needs_input_grad(0)) {
      grad_x = at::mm(grad_y, w_OI);
      if (mask.active())
        mask.add_to(at::mm(grad_xa_TR, a_RI), grad_x);
      else
        grad_x.addmm_(grad_xa_TR, a_RI);
    }
    ctx->saved_data.clear();
    return {grad_x, {}, grad_a, grad_b, {}, {}, {}};
  }
};

struct Embedding : Function<Embedding> {
  static Variable forward(AutogradContext* ctx, const Variable& w_VC, const Variable& ids_T) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->saved_data["ids"] = ids_T;
    ctx->saved_data["rows"] = w_VC.size(0);
    return at::embedding(w_VC, ids_T);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    at::Tensor grad_y = grads[0].contiguous(), ids = ctx->saved_data.at("ids").toTensor();
    const int64_t size = grad_y.size(1), count = ids.numel();
    at::Tensor grad_w = at::zeros({ctx->saved_data.at("rows").toInt(), size}, grad_y.options());
    // Places of one id stand together, in the order of t.
    std::vector<int64_t> order(static_cast<size_t>(count)), starts;
    const int64_t* id = ids.data_ptr<int64_t>();
    for (int64_t t = 0; t < count; ++t) order[static_cast<size_t>(t)] = t;
    std::stable_sort(order.begin(), order.end(), [&](int64_t s, int64_t t) { return id[s] < id[t]; });
    for (int64_t i = 0; i < count; ++i)
      if (i == 0 || id[order[static_cast<size_t>(i)]] != id[order[static_cast<size_t>(i - 1)]]) starts.push_back(i);
    const int64_t num_ids = static_cast<int64_t>(starts.size());
    starts.push_back(count);
    dispatch_floating(grad_y.scalar_type(), [&](auto zero) {
      using T = decltype(zero);
      using A = typename ComputeType<T>::type;
      for_rows(num_ids, size, [&](int64_t begin, int64_t end) {
        std::vector<A> sum(static_cast<size_t>(size));
        for (int64_t group = begin; group < end; ++group) {
          std::fill(sum.begin(), sum.end(), A(0));
          const int64_t first = starts[static_cast<size_t>(group)], last = starts[static_cast<size_t>(group + 1)];
          for (int64_t i = first; i < last; ++i)
            loops<T>().add_rows(1, size, grad_y.data_ptr<T>() + order[static_cast<size_t>(i)] * size, sum.data());
          const int64_t row = id[order[static_cast<size_t>(first)]];
          loops<T>().scale_from(size, sum.data(), 1.0, grad_w.data_ptr<T>() + row * size);
        }
      });
    });
    return {grad_w, {}};
  }
};

}  // namespace

at::Tensor linear(const at::Tensor& x_TI, const at::Tensor& w_OI, const at::Tensor& bias_O) {
  TRIREME_CHECK(x_TI.dim() == 2 && w_OI.dim() == 2 && x_TI.size(1) == w_OI.size(1), x_TI.sizes(), w_OI.sizes());
  return LinearFunction::apply(x_TI, w_OI, optional(bias_O), wants_gradient(w_OI));
}

at::Tensor lora_linear(const at::Tensor& x_TI, const at::Tensor& w_OI, const at::Tensor& bias_O, const at::Tensor& a_RI,
                       const at::Tensor& b_OR, double scale, const DropoutKey& key) {
  TRIREME_CHECK(x_TI.dim() == 2 && w_OI.dim() == 2 && x_TI.size(1) == w_OI.size(1) && a_RI.size(1) == w_OI.size(1) &&
                    b_OR.size(0) == w_OI.size(0) && a_RI.size(0) == b_OR.size(1),
                x_TI.sizes(), w_OI.sizes(), a_RI.sizes(), b_OR.sizes());
  TRIREME_CHECK(!wants_gradient(w_OI) && !wants_gradient(bias_O), "the base of a LoRA layer is frozen");
  return LoraLinear::apply(x_TI, w_OI, a_RI, b_OR, optional(bias_O), scale, DropoutMask(key));
}

at::Tensor embedding(const at::Tensor& w_VC, const at::Tensor& ids_T) {
  TRIREME_CHECK(w_VC.dim() == 2 && ids_T.dim() == 1 && ids_T.scalar_type() == at::kLong, w_VC.sizes(), ids_T.sizes());
  return Embedding::apply(w_VC, ids_T.contiguous());
}

}  // namespace trireme
