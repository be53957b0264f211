// The products of an adapter, whose wide side has dropout: a device's kernels drop as they multiply; elsewhere a dropped copy is
// written first.
#include <atomic>

#include "base/log.h"
#include "ops/device.h"
#include "ops/dropout_mask.h"
#include "ops/op_support.h"
#include "ops/product.h"

namespace trireme {
namespace {

bool is_aligned(const at::Tensor& x) { return x.is_contiguous() && reinterpret_cast<uintptr_t>(data_of(x)) % 16 == 0; }
at::Tensor aligned(const at::Tensor& x) { return is_aligned(x) ? x : x.clone(at::MemoryFormat::Contiguous); }

std::atomic<bool> gap_is_said = false;

// Null: these are not for the kernels.
const kernels::Kernels* kernels_for(const at::Tensor& wide_TC, int64_t rank, int64_t first_feature) {
  const kernels::Kernels* k = kernels_of(wide_TC);
  if (!k || !k->lora_down) return nullptr;
  const LoraDropoutShape shape{wide_TC.scalar_type(), rank, wide_TC.size(1), first_feature};
  if (has_lora_dropout_kernels(shape)) return k;
  if (!wide_TC.is_cpu() && !gap_is_said.exchange(true)) log_warn(lora_dropout_gap(shape));
  return nullptr;
}

}  // namespace

bool has_lora_dropout_kernels(const LoraDropoutShape& x) {
  return c10::isReducedFloatingType(x.dtype) && x.rank <= 256 && x.width % 8 == 0 && x.first_feature % 8 == 0;
}

std::string lora_dropout_gap(const LoraDropoutShape& x) {
  return str("LoRA with dropout writes dropped copies of its inputs, which takes time and memory and rounds them: the kernels that need none are for bfloat16 and float16, ranks up to "
             "256 and features in eights, not for ", x.dtype == at::kFloat ? "float32" : x.dtype == at::kHalf ? "float16" : "bfloat16", ", rank ", x.rank, ", features ", x.first_feature, " to ", x.first_feature + x.width);
}

void set_lora_dropout_gap_said() { gap_is_said = true; }

at::Tensor DropoutMask::down(const at::Tensor& x_TC, const at::Tensor& a_RC) const {
  check_alike("DropoutMask::down", {"x", x_TC}, {{"A", a_RC}});
  const kernels::Kernels* k = kernels_for(x_TC, a_RC.size(0), key_.first_feature);
  if (!k) return product(apply(x_TC.contiguous()), a_RC.t());
  const at::Tensor x = aligned(x_TC), a = aligned(a_RC), ids = row_ids(x);
  at::Tensor y_TR = at::empty({x.size(0), a.size(0)}, x.options());
  k->lora_down({kernel_type(x), x.size(0), x.size(1), a.size(0), data_of(x), data_of(a), lora_dropout(ids), data_of(y_TR)}, stream_of(x));
  return y_TR;
}

void DropoutMask::add_up(const at::Tensor& x_TR, const at::Tensor& a_RC, at::Tensor& y_TC) const {
  check_alike("DropoutMask::add_up", {"x", x_TR}, {{"A", a_RC}, {"y", y_TC}});
  if (!active()) return product(x_TR, a_RC, y_TC, {.add = true});
  const kernels::Kernels* k = is_aligned(y_TC) ? kernels_for(y_TC, a_RC.size(0), key_.first_feature) : nullptr;
  if (!k) return add_to(product(x_TR, a_RC), y_TC);
  const at::Tensor x = x_TR.contiguous(), a = aligned(a_RC), ids = row_ids(x);
  k->lora_up({kernel_type(x), x.size(0), a.size(1), a.size(0), data_of(x), data_of(a), true, 1, lora_dropout(ids), data_of(y_TC)}, stream_of(x));
}

at::Tensor DropoutMask::gradient(const at::Tensor& grad_TR, const at::Tensor& x_TC) const {
  check_alike("DropoutMask::gradient", {"x", x_TC}, {{"grad", grad_TR}});
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
