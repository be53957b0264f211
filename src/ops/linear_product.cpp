#include "base/tensor.h"

#include "ops/device.h"
#include "ops/op_support.h"
#include "ops/product.h"

namespace trireme {
namespace {

// Few rows in 16 bits, as when text is generated: oneDNN would arrange the whole weight anew for them, which takes longer
// than to read it.
bool has_few_rows(const at::Tensor& x_TI, const at::Tensor& w_OI) {
  constexpr int64_t kFew = 4;
  return !kernels_of(x_TI) && c10::isReducedFloatingType(x_TI.scalar_type()) && x_TI.size(0) <= kFew && w_OI.is_contiguous();
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

}  // namespace

void linear_product(const at::Tensor& x_TI, const at::Tensor& w_OI, const at::Tensor& bias_O, at::Tensor& y_TO) {
  if (has_few_rows(x_TI, w_OI))
    product_of_few_rows(x_TI, w_OI, 1.0, bias_O.defined() ? bias_O.contiguous().expand_as(y_TO) : at::Tensor(), y_TO);
  else
    product(x_TI, w_OI.t(), y_TO, {.bias_N = bias_O});
}

void add_linear_product(const at::Tensor& x_TI, const at::Tensor& w_OI, double scale, at::Tensor& y_TO) {
  if (has_few_rows(x_TI, w_OI))
    product_of_few_rows(x_TI, w_OI, scale, y_TO, y_TO);
  else
    product(x_TI, w_OI.t(), y_TO, {.scale = scale, .add = true});
}

}  // namespace trireme
