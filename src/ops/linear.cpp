#include "ops/delayed_gradients.h"
#include "ops/device.h"
#include "ops/dropout_mask.h"
#include "ops/op_support.h"
#include "ops/ops.h"
#include "ops/product.h"

namespace trireme {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::Variable;
using torch::autograd::variable_list;

// [T, features] whose rows f makes of the rows of x, which it is told the number of the first of. With `sum` [T / n, features]:
// piece by piece of every rank's rows, each on its way while the next is made; with `together` all at once. Not `is_read`: its values are left
// as they come.
at::Tensor over_rows(const ArrivingRows& x_TI, int64_t features, const RowSum* sum, bool together, bool is_read,
                     const std::function<void(int64_t first, const at::Tensor& x, at::Tensor y)>& f) {
  const int64_t rows = x_TI.promised().size(0);
  if (!is_read) return at::empty({rows / (sum ? sum->num_ranks : 1), features}, x_TI.promised().options());
  at::Tensor y_TO = at::empty({rows, features}, x_TI.promised().options());
  if (!sum) {
    if (together) f(0, x_TI.wait(), y_TO);
    else x_TI.in_order([&](int64_t first, const at::Tensor& x) { f(first, x, y_TO.narrow(0, first, x.size(0))); });
    return y_TO;
  }
  const int64_t n = sum->num_ranks, share = rows / n, pieces = together ? 1 : sum->num_pieces(share, y_TO.is_cuda());
  TRIREME_CHECK(share * n == rows, rows, " rows over ", n, " ranks");
  at::Tensor part_tO = at::empty({share, features}, y_TO.options());
  std::vector<std::function<void()>> waits;
  for (int64_t p = 0; p < pieces; ++p) {
    const int64_t begin = share * p / pieces, length = share * (p + 1) / pieces - begin;
    const at::Tensor piece = y_TO.narrow(0, n * begin, n * length);
    for (int64_t r = 0; r < (pieces == 1 ? 1 : n); ++r) {
      const int64_t count = pieces == 1 ? rows : length, first = r * share + begin;
      f(first, x_TI.wait().narrow(0, first, count), piece.narrow(0, r * count, count));
    }
    waits.push_back(sum->start(part_tO.narrow(0, begin, length), piece));
  }
  for (const auto& wait : waits) wait();
  return part_tO;
}

template <typename T>
struct KeptValue : torch::CustomClassHolder {
  explicit KeptValue(T v) : value(std::move(v)) {}
  T value;
};
template <typename T>
void keep_value(AutogradContext* ctx, const char* name, const T& value) {
  ctx->saved_data[name] = c10::IValue::make_capsule(c10::make_intrusive<KeptValue<T>>(value));
}
template <typename T>
const T& kept_value(AutogradContext* ctx, const char* name) {
  return c10::static_intrusive_pointer_cast<KeptValue<T>>(ctx->saved_data.at(name).toCapsule())->value;
}

using Sum = std::shared_ptr<const RowSum>;
void keep_sum(AutogradContext* ctx, const Sum& sum) {
  if (sum) keep_value(ctx, "sum", sum);
}

// The gradient of the product's own output, from that of what the op returned.
ArrivingRows gradient_of_product(AutogradContext* ctx, const at::Tensor& grad) {
  return ctx->saved_data.count("sum") ? kept_value<Sum>(ctx, "sum")->gather(grad.contiguous()) : grad.contiguous();
}

FrozenWeight::Product times_transposed(const LinearWeight& w) {
  if (w.frozen) return w.frozen->times_transposed();
  return [w_OI = w.dense_OI](const at::Tensor& x_TI, const at::Tensor& bias_O, at::Tensor& y_TO) { linear_product(x_TI, w_OI, bias_O, y_TO); };
}

at::Tensor gradient_of_rows(const ArrivingRows& grad_TO, const LinearWeight& w) {
  const FrozenWeight::Product times = w.frozen ? w.frozen->times() : [&](const at::Tensor& grad, const at::Tensor&, at::Tensor& y) { product(grad, w.dense_OI, y); };
  return over_rows(grad_TO, w.in_features(), nullptr, false, true, [&](int64_t, const at::Tensor& grad, at::Tensor y) { times(grad, {}, y); });
}

// An undefined tensor may not enter a Function; an empty optional may, and has no edge in the graph: so it comes last.
std::optional<at::Tensor> optional(const at::Tensor& t) { return t.defined() ? std::optional(t) : std::nullopt; }

struct LinearFunction : Function<LinearFunction> {
  static Variable forward(AutogradContext* ctx, const Variable& x_TI, const Variable& w_OI,
                          const std::optional<at::Tensor>& bias_O, bool keep_x, const ArrivingRows& rows,
                          const Sum& sum, bool is_read) {
    at::AutoDispatchBelowADInplaceOrView guard;
    if (keep_x) keep(ctx, "x", x_TI);  // only the weight's gradient needs it
    ctx->saved_data["bias"] = bias_O.has_value();
    keep_sum(ctx, sum);
    ctx->save_for_backward({w_OI});
    return over_rows(rows, w_OI.size(0), sum.get(), false, is_read,
                     [&](int64_t, const at::Tensor& x, at::Tensor y) { linear_product(x, w_OI, bias_O.value_or(at::Tensor()), y); });
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    at::Tensor grad_x, grad_w, grad_bias;
    const at::Tensor w_OI = ctx->get_saved_variables()[0];
    const ArrivingRows arriving = gradient_of_product(ctx, grads[0]);
    if (ctx->needs_input_grad(0)) grad_x = gradient_of_rows(arriving, w_OI);
    const at::Tensor grad_y = arriving.wait();
    if (ctx->needs_input_grad(1))
      grad_w = weight_gradient(w_OI, [grad_y, x_TI = take(ctx, "x")] { return product(grad_y.t(), x_TI); });
    if (ctx->saved_data.at("bias").toBool() && ctx->needs_input_grad(2)) grad_bias = sum_rows(grad_y);
    return {grad_x, grad_w, grad_bias, {}, {}, {}, {}};
  }
};

// Of a weight that is kept in another form: it has no gradient.
struct FrozenLinear : Function<FrozenLinear> {
  static Variable forward(AutogradContext* ctx, const Variable&, const LinearWeight& w, const std::optional<at::Tensor>& bias_O, const ArrivingRows& rows,
                          const Sum& sum, bool is_read) {
    at::AutoDispatchBelowADInplaceOrView guard;
    keep_sum(ctx, sum);
    keep_value(ctx, "weight", w);
    const FrozenWeight::Product times = is_read ? times_transposed(w) : nullptr;
    return over_rows(rows, w.out_features(), sum.get(), w.frozen->takes_rows_together(), is_read,
                     [&](int64_t, const at::Tensor& x, at::Tensor y) { times(x, bias_O.value_or(at::Tensor()), y); });
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    return {gradient_of_rows(gradient_of_product(ctx, grads[0]), kept_value<LinearWeight>(ctx, "weight")), {}, {}, {}, {}, {}};
  }
};

// Of a frozen weight, in either form.
struct LoraLinear : Function<LoraLinear> {
  static Variable forward(AutogradContext* ctx, const Variable& x_TI, const Variable& a_RI, const Variable& b_OR, const LinearWeight& w,
                          const std::optional<at::Tensor>& bias_O, double scale,
                          const DropoutMask& mask, const ArrivingRows& rows, const Sum& sum, bool is_read) {
    at::AutoDispatchBelowADInplaceOrView guard;
    at::Tensor xa_TR;
    auto reduce = [&] {
      if (!xa_TR.defined() && mask.active()) xa_TR = mask.down(rows.wait(), a_RI);
      if (!xa_TR.defined()) linear_product(rows.wait(), a_RI, {}, xa_TR = at::empty({rows.promised().size(0), a_RI.size(0)}, rows.promised().options()));
    };
    auto adapt = [&](int64_t first, at::Tensor y) {
      reduce();
      add_linear_product(xa_TR.narrow(0, first, y.size(0)), b_OR, scale, y);
    };
    const FrozenWeight::Product times = is_read ? times_transposed(w) : nullptr;
    at::Tensor y_TO = over_rows(rows, w.out_features(), sum.get(), w.frozen && w.frozen->takes_rows_together(), is_read, [&](int64_t first, const at::Tensor& x, at::Tensor y) {
      times(x, bias_O.value_or(at::Tensor()), y);
      if (sum) adapt(first, y);  // before it leaves
    });
    if (!is_read) reduce();
    else if (!sum) adapt(0, y_TO);
    keep(ctx, "x", x_TI);
    keep_sum(ctx, sum);
    ctx->saved_data["xa"] = xa_TR;
    ctx->saved_data["scale"] = scale;
    ctx->saved_data["mask"] = c10::IValue::make_capsule(c10::make_intrusive<KeptMask>(mask));
    keep_value(ctx, "weight", w);
    ctx->save_for_backward({a_RI, b_OR});
    return y_TO;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    auto saved = ctx->get_saved_variables();
    at::Tensor &a_RI = saved[0], &b_OR = saved[1];
    const DropoutMask mask = c10::static_intrusive_pointer_cast<KeptMask>(ctx->saved_data.at("mask").toCapsule())->mask;
    const double scale = ctx->saved_data.at("scale").toDouble();
    at::Tensor xa_TR = ctx->saved_data.at("xa").toTensor();
    at::Tensor grad_x, grad_a, grad_b;
    const ArrivingRows arriving = gradient_of_product(ctx, grads[0]);
    if (ctx->needs_input_grad(0)) grad_x = gradient_of_rows(arriving, kept_value<LinearWeight>(ctx, "weight"));
    const at::Tensor grad_y = arriving.wait();
    at::Tensor grad_xa_TR = product(grad_y, b_OR, scale);
    at::Tensor x_TI = take(ctx, "x");
    if (ctx->needs_input_grad(1)) grad_a = mask.gradient(grad_xa_TR, x_TI);
    if (ctx->needs_input_grad(2)) grad_b = product(grad_y.t(), xa_TR, scale);
    if (ctx->needs_input_grad(0)) mask.add_up(grad_xa_TR, a_RI, grad_x);
    ctx->saved_data.clear();
    return {grad_x, grad_a, grad_b, {}, {}, {}, {}, {}, {}, {}};
  }
};

struct SumOverRanks : Function<SumOverRanks> {
  static Variable forward(AutogradContext* ctx, const Variable& part_TO, const Sum& sum, bool is_read) {
    at::AutoDispatchBelowADInplaceOrView guard;
    keep_sum(ctx, sum);
    return over_rows(part_TO, part_TO.size(1), sum.get(), false, is_read, [](int64_t, const at::Tensor& x, at::Tensor y) { y.copy_(x); });
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) { return {gradient_of_product(ctx, grads[0]).wait(), {}, {}}; }
};

}  // namespace

at::Tensor linear(const ArrivingRows& rows, const LinearWeight& w, const at::Tensor& bias_O, const std::shared_ptr<const RowSum>& sum, bool is_read) {
  const at::Tensor& x_TI = rows.promised();
  check_alike("linear", {"x", x_TI}, {{"weight", w.dense_OI}, {"bias", bias_O}});
  TRIREME_CHECK(x_TI.dim() == 2 && (w.frozen || w.dense_OI.dim() == 2) && x_TI.size(1) == w.in_features(), x_TI.sizes(), w.out_features(), w.in_features());
  TRIREME_CHECK(!sum || !bias_O.defined(), "a bias would be added once a rank");
  if (!w.frozen) return LinearFunction::apply(x_TI, w.dense_OI, optional(bias_O), wants_gradient(w.dense_OI), rows, sum, is_read);
  TRIREME_CHECK(!wants_gradient(bias_O), "the bias of a frozen layer is frozen");
  return FrozenLinear::apply(x_TI, w, optional(bias_O), rows, sum, is_read);
}

at::Tensor lora_linear(const ArrivingRows& rows, const LinearWeight& w, const at::Tensor& bias_O, const at::Tensor& a_RI,
                       const at::Tensor& b_OR, double scale, const DropoutKey& key, const std::shared_ptr<const RowSum>& sum, bool is_read) {
  const at::Tensor& x_TI = rows.promised();
  check_alike("lora_linear", {"x", x_TI}, {{"weight", w.dense_OI}, {"bias", bias_O}, {"A", a_RI}, {"B", b_OR}});
  TRIREME_CHECK(x_TI.dim() == 2 && (w.frozen || w.dense_OI.dim() == 2) && x_TI.size(1) == w.in_features() && a_RI.size(1) == w.in_features() &&
                    b_OR.size(0) == w.out_features() && a_RI.size(0) == b_OR.size(1),
                x_TI.sizes(), w.out_features(), w.in_features(), a_RI.sizes(), b_OR.sizes());
  TRIREME_CHECK(!wants_gradient(w.dense_OI) && !wants_gradient(bias_O), "the base of a LoRA layer is frozen");
  TRIREME_CHECK(!sum || !bias_O.defined(), "a bias would be added once a rank");
  return LoraLinear::apply(x_TI, a_RI, b_OR, w, optional(bias_O), scale, DropoutMask(key), rows, sum, is_read);
}

at::Tensor sum_over_ranks(const at::Tensor& part_TO, const std::shared_ptr<const RowSum>& sum, bool is_read) {
  TRIREME_CHECK(part_TO.dim() == 2 && sum && part_TO.size(0) % sum->num_ranks == 0, part_TO.sizes());
  return SumOverRanks::apply(part_TO.contiguous(), sum, is_read);
}

}  // namespace trireme
