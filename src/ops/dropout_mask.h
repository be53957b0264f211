// The dropout mask of a DropoutKey, applied to plain tensors (no gradients). Contiguous x [T, C], one row id a row.
#pragma once

#include "ops/loops.h"
#include "ops/ops.h"

namespace trireme {

class DropoutMask {
 public:
  explicit DropoutMask(const DropoutKey& key);
  bool active() const { return key_.p > 0.0; }
  at::Tensor apply(const at::Tensor& x_TC) const;                     // mask(x)
  void add_to(const at::Tensor& x_TC, const at::Tensor& y_TC) const;  // y += mask(x)

 private:
  void run(const at::Tensor& x_TC, const at::Tensor& y_TC, bool add) const;
  DropoutKey key_;
  DropoutBits bits_;
};

struct KeptMask : torch::CustomClassHolder {
  explicit KeptMask(const DropoutMask& m) : mask(m) {}
  DropoutMask mask;
};

}  // namespace trireme
