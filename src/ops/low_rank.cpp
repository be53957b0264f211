// The products of an adapter, whose wide side has dropout: a device's kernels drop as they multiply; elsewhere a dropped copy is
// written first.
#include <mutex>

#include "base/log.h"
#include "ops/device.h"
#include "ops/dropout_mask.h"
#include "ops/product.h"

namespace trireme {
namespace {

bool is_aligned(const at::Tensor& x) { return x.is_contiguous() && reinterpret_cast<uintptr_t>(data_of(x)) % 16 == 0; }
at::Tensor aligned(const at::Tensor& x) { return is_aligned(x) ? x : x.clone(at::MemoryFormat::Contiguous); }

// Null: these are not for the kernels.
const kernels::Kernels* kernels_for(const at::Tensor& wide_TC, int64_t rank, int64_t first_feature) {
  const kernels::Kernels* k = kernels_of(wide_TC);
  if (!k || !k->lora_down) return nullptr;
  if (wide_TC.element_size() == 2 && rank <= 256 && wide_TC.size(1) % 8 == 0 && first_feature % 8 == 0) return k;
  static std::once_flag once;
  if (!wide_TC.is_cpu())
    std::call_once(once, [&] {
      log_warn(str("LoRA with dropout writes dropped copies of its inputs, which takes time and memory: the kernels that need none are for bf16 and fp16, ranks up to 256 and "
                   "widths in multiples of 8, not for ",
                   wide_TC.scalar_type(), ", rank ", rank, ", width ", wide_TC.size(1)));
    });
  return nullptr;
}

}  // namespace

at::Tensor DropoutMask::down(const at::Tensor& x_TC, const at::Tensor& a_RC) const {
  const kernels::Kernels* k = kernels_for(x_TC, a_RC.size(0), key_.first_feature);
  if (!k) return product(apply(x_TC.contiguous()), a_RC.t());
  const at::Tensor x = aligned(x_TC), a = aligned(a_RC), ids = row_ids(x);
  at::Tensor y_TR = at::empty({x.size(0), a.size(0)}, x.options());
  k->lora_down({kernel_type(x), x.size(0), x.size(1), a.size(0), data_of(x), data_of(a), lora_dropout(ids), data_of(y_TR)}, stream_of(x));
  return y_TR;
}

void DropoutMask::add_up(const at::Tensor& x_TR, const at::Tensor& a_RC, at::Tensor& y_TC) const {
  if (!active()) return product(x_TR, a_RC, y_TC, {.add = true});
  const kernels::Kernels* k = is_aligned(y_TC) ? kernels_for(y_TC, a_RC.size(0), key_.first_feature) : nullptr;
  if (!k) return add_to(product(x_TR, a_RC), y_TC);
  const at::Tensor x = x_TR.contiguous(), a = aligned(a_RC), ids = row_ids(x);
  k->lora_up({kernel_type(x), x.size(0), a.size(1), a.size(0), data_of(x), data_of(a), true, 1, lora_dropout(ids), data_of(y_TC)}, stream_of(x));
}

at::Tensor DropoutMask::gradient(const at::Tensor& grad_TR, const at::Tensor& x_TC) const {
  const kernels::Kernels* k = active() ? kernels_for(x_TC, grad_TR.size(1), key_.first_feature) : nullptr;
  if (!k) return product(grad_TR.t(), active() ? apply(x_TC.contiguous()) : x_TC);
  const at::Tensor x = aligned(x_TC), grad = grad_TR.contiguous(), ids = row_ids(x);
  const int64_t rows = x.size(0), width = x.size(1), rank = grad.size(1);
  at::Tensor gradient_RC = at::empty({rank, width}, x.options()), workspace = at::empty({kernels::lora_gradient_workspace(rows, width, rank)}, x.options().dtype(at::kFloat));
  k->lora_gradient({kernel_type(x), kernel_type(x), rows, width, rank, data_of(x), data_of(grad), lora_dropout(ids), 1, true, false, data_of(gradient_RC),
                    workspace.data_ptr<float>()}, stream_of(x));
  return gradient_RC;
}

kernels::LoraDropout DropoutMask::lora_dropout(const at::Tensor& row_ids) const {
  return {row_ids.data_ptr<int64_t>(), key_.seed, key_.module, key_.first_feature, key_.p};
}

}  // namespace trireme
