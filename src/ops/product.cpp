#include "ops/product.h"

#include "base/check.h"
#include "ops/device.h"
#include "ops/op_support.h"

namespace trireme {
namespace {

// A matrix as it lies in memory: rows, or the columns where it is transposed, whose values stand side by side.
struct Rows {
  explicit Rows(const at::Tensor& x) : tensor(x) {
    if (!lies(x) && lies(x.t())) transposed = true;
    else if (!lies(x)) tensor = x.contiguous();
    const at::Tensor rows = transposed ? tensor.t() : tensor;
    stride = std::max<int64_t>(1, rows.size(0) > 1 ? rows.stride(0) : rows.size(1));  // of one row it says nothing
  }
  static bool lies(const at::Tensor& x) { return x.stride(1) == 1 && (x.size(0) <= 1 || x.stride(0) >= x.size(1)); }

  at::Tensor tensor;
  int64_t stride;
  bool transposed = false;
};

void product_of_kernels(const kernels::Kernels& k, const at::Tensor& a_MK, const at::Tensor& b_KN, at::Tensor& y_MN, const ProductTerms& terms) {
  const Rows a(a_MK), b(b_KN), y(y_MN);
  TRIREME_CHECK(!y.transposed && y.tensor.is_same(y_MN), "rows of the result are not contiguous: ", y_MN.sizes(), y_MN.strides());
  const at::Tensor bias = terms.bias_N.defined() ? terms.bias_N.contiguous() : at::Tensor();
  const ProductWorkspace workspace(a_MK);
  k.matmul({kernel_type(a_MK), kernel_type(b_KN), kernel_type(y_MN), a_MK.size(0), b_KN.size(1), a_MK.size(1), a.transposed, b.transposed, data_of(a.tensor), data_of(b.tensor),
            a.stride, b.stride, data_of(y_MN), y.stride, data_of(bias), static_cast<float>(terms.scale), terms.add ? 1.0f : 0.0f, kernel_settings().tf32, nullptr, nullptr,
            workspace.data, workspace.num_bytes},
           stream_of(a_MK));
}

}  // namespace

ProductWorkspace::ProductWorkspace(const at::Tensor& x) : memory(at::empty({kernels::kMatMulWorkspace}, x.options().dtype(at::kByte))) {
  constexpr uintptr_t kAlignment = 256;  // which the host's allocator does not give
  const uintptr_t address = reinterpret_cast<uintptr_t>(memory.data_ptr()), begin = (address + kAlignment - 1) / kAlignment * kAlignment;
  data = reinterpret_cast<void*>(begin);
  num_bytes = kernels::kMatMulWorkspace - static_cast<int64_t>(begin - address);
}

void product(const at::Tensor& a_MK, const at::Tensor& b_KN, at::Tensor& y_MN, const ProductTerms& terms) {
  TRIREME_CHECK(a_MK.dim() == 2 && b_KN.dim() == 2 && y_MN.dim() == 2 && a_MK.size(1) == b_KN.size(0) && y_MN.size(0) == a_MK.size(0) && y_MN.size(1) == b_KN.size(1) &&
                    !(terms.add && terms.bias_N.defined()),
                a_MK.sizes(), b_KN.sizes(), y_MN.sizes());
  check_alike("product", {"a", a_MK}, {{"b", b_KN}});
  check_alike("product", {"a", a_MK}, {{"y", y_MN}}, y_MN.scalar_type() == at::kFloat ? at::kFloat : a_MK.scalar_type());
  check_alike("product", {"y", y_MN}, {{"bias", terms.bias_N}});
  const kernels::Kernels* k = kernels_of(a_MK);
  if (k && k->matmul && a_MK.size(1) > 0) return product_of_kernels(*k, a_MK, b_KN, y_MN, terms);
  if (y_MN.scalar_type() != a_MK.scalar_type()) {
    const at::Tensor part = product(a_MK, b_KN, terms.scale);
    if (terms.add) y_MN.add_(part);
    else y_MN.copy_(part);
    if (terms.bias_N.defined()) y_MN.add_(terms.bias_N);
    return;
  }
  if (terms.bias_N.defined()) at::addmm_out(y_MN, terms.bias_N, a_MK, b_KN, 1.0, terms.scale);
  else if (terms.add) y_MN.addmm_(a_MK, b_KN, 1.0, terms.scale);
  else at::mm_out(y_MN, a_MK, b_KN);
  if (!terms.bias_N.defined() && !terms.add && terms.scale != 1) y_MN.mul_(terms.scale);
}

at::Tensor product(const at::Tensor& a_MK, const at::Tensor& b_KN, double scale) {
  at::Tensor y_MN = at::empty({a_MK.size(0), b_KN.size(1)}, a_MK.options());
  product(a_MK, b_KN, y_MN, {.scale = scale});
  return y_MN;
}

}  // namespace trireme
