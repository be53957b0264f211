// The dropout mask of a DropoutKey, applied to plain tensors (no gradients). x [T, C], one row id a row.
#pragma once

#include "kernels/kernels.h"
#include "ops/loops.h"
#include "ops/ops.h"

namespace trireme {

class DropoutMask {
 public:
  explicit DropoutMask(const DropoutKey& key);
  bool active() const { return key_.p > 0.0; }
  at::Tensor apply(const at::Tensor& x_TC) const;                     // mask(x), of contiguous x
  void add_to(const at::Tensor& x_TC, const at::Tensor& y_TC) const;  // y += mask(x), both contiguous

  // The products of an adapter (low_rank.cpp). Kernels do not round mask(x) on the way; others do.
  at::Tensor down(const at::Tensor& x_TC, const at::Tensor& a_RC) const;                // mask(x) a^T, of an active mask
  void add_up(const at::Tensor& x_TR, const at::Tensor& a_RC, at::Tensor& y_TC) const;  // y += mask(x a); not active: y += x a
  at::Tensor gradient(const at::Tensor& grad_TR, const at::Tensor& x_TC) const;         // grad^T mask(x); not active: grad^T x

 private:
  at::Tensor row_ids(const at::Tensor& x_TC) const;  // contiguous
  kernels::LoraDropout lora_dropout(const at::Tensor& row_ids) const;
  void run(const at::Tensor& x_TC, const at::Tensor& y_TC, bool add) const;
  DropoutKey key_;
  DropoutBits bits_;
};

// Of an adapter whose inputs x [T, width] begin at feature first_feature: whether a device's kernels multiply by mask(x) without
// writing it. If not, the words for it, which the first such product on a device logs where they have not been said before.
struct LoraDropoutShape {
  at::ScalarType dtype;
  int64_t rank, width, first_feature;
};
bool has_lora_dropout_kernels(const LoraDropoutShape& x);
std::string lora_dropout_gap(const LoraDropoutShape& x);
void set_lora_dropout_gap_said();

struct KeptMask : torch::CustomClassHolder {
  explicit KeptMask(const DropoutMask& m) : mask(m) {}
  DropoutMask mask;
};

}  // namespace trireme
