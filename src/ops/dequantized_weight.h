// A frozen weight that is brought to a tensor for every product: into one scratch for all layers of a device, as large as the largest.
// What it holds last is not brought again: where the recomputation of a block ends, its backward begins.
#pragma once

#include "ops/frozen_weight.h"

namespace trireme {

class DequantizedWeight : public FrozenWeight {
 public:
  Product times_transposed() const override;
  Product times() const override;
  int64_t product_bytes(int64_t rows, at::ScalarType dtype) const override;  // the scratch, and rows and y in the dtype of products where that is another

  // In the dtype of products, until the next product of another weight.
  at::Tensor in_scratch() const;
  // The values, in any dtype that there is code for; [O, I], contiguous.
  virtual void dequantize(const at::Tensor& out_OI) const = 0;
  // The same of the values that encode() gave of a whole weight.
  virtual void decode(const std::vector<at::Tensor>& values, const at::Tensor& out_OI) const = 0;

 protected:
  // `compute`: dtype that products are made in; rows are converted to it.
  DequantizedWeight(std::string path, int64_t out_features, int64_t in_features, at::ScalarType compute);

 private:
  at::ScalarType compute_;
  uint64_t id_;  // of no other weight
};

int64_t num_dequantized();  // weights brought to the scratch so far, by all threads; for tests

}  // namespace trireme
