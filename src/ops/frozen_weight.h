// A frozen weight [O, I] of a linear layer that is kept as something else than a tensor of the model's dtype: the tensors
// that it is made of, how it is cut, and the two products that a layer needs of it.
#pragma once

#include <memory>

#include "base/parameter.h"

namespace trireme {

class FrozenWeight {
 public:
  struct Leaf {
    std::string suffix;  // behind the layer's path it is the parameter's name: .weight, .weight.scale
    at::Tensor value;    // on the meta device until the model is given memory
    ShardSpec place;
  };
  // y = the product with these rows, which are all or some of them.
  using Product = std::function<void(const at::Tensor& rows, const at::Tensor& bias, at::Tensor& y)>;

  virtual ~FrozenWeight() = default;
  int64_t out_features() const { return out_features_; }
  int64_t in_features() const { return in_features_; }
  const std::vector<Leaf>& leaves() const { return leaves_; }
  std::vector<Leaf>& leaves() { return leaves_; }  // to give the values other memory

  // The values of all leaves of the whole weight, from the tensor in the model's dtype, where that is.
  virtual std::vector<at::Tensor> encode(const at::Tensor& whole_OI) const = 0;
  // Only rows (dim 0) or columns (dim 1) begin .. end - 1 of the whole weight from here on; before there is memory. ConfigError where they
  // cannot be cut so.
  virtual void keep(int64_t dim, int64_t begin, int64_t end) = 0;

  // Each is asked for once for all rows of a pass, so that what it prepares is prepared once.
  virtual Product times_transposed() const = 0;  // y [T, O] = x w^T (+ bias)
  virtual Product times() const = 0;             // y [T, I] = g w
  // Whether times_transposed() has to see all rows of a pass at once.
  virtual bool takes_rows_together() const { return false; }
  // Makes numbers of rows the largest of the ranks that hold the weight's other columns, for who looks at whole rows; null: there are none.
  std::function<void(at::Tensor)> maximum_over_inputs;
  // Memory of a product of so many rows beside the rows and y, which are of `dtype`, at most.
  virtual int64_t product_bytes(int64_t rows, at::ScalarType dtype) const = 0;

  void set(const at::Tensor& whole_OI);  // encoded, as the leaves' values
  int64_t num_bytes() const;             // of all leaves

 protected:
  FrozenWeight(std::string path, int64_t out_features, int64_t in_features) : path_(std::move(path)), out_features_(out_features), in_features_(in_features) {}

  std::string path_;  // of the layer, for messages
  int64_t out_features_, in_features_;
  std::vector<Leaf> leaves_;
  uint64_t times_set_ = 0;
};

// The weight of a linear layer, in either form.
struct LinearWeight {
  LinearWeight(at::Tensor w_OI) : dense_OI(std::move(w_OI)) {}
  template <typename T>
  LinearWeight(std::shared_ptr<T> w) : frozen(std::move(w)) {}

  at::Tensor dense_OI;                         // or
  std::shared_ptr<const FrozenWeight> frozen;  // null where it is dense

  int64_t out_features() const { return frozen ? frozen->out_features() : dense_OI.size(0); }
  int64_t in_features() const { return frozen ? frozen->in_features() : dense_OI.size(1); }
};

}  // namespace trireme
