#include "base/tensor.h"

#include "quant/int8_weight.h"

#include "base/check.h"
#include "ops/weight_leaf.h"

namespace trireme {
namespace {

class Int8Weight : public DequantizedWeight {
 public:
  Int8Weight(const std::string& path, int64_t out_features, int64_t in_features, at::ScalarType dtype, double threshold)
      : DequantizedWeight(path, out_features, in_features, dtype), threshold_(static_cast<float>(threshold)), dtype_size_(static_cast<int64_t>(c10::elementSize(dtype))) {
    leaves_ = {whole_leaf(".weight", {out_features, in_features}, at::kChar), whole_leaf(".SCB", {out_features}, at::kFloat)};
    check_sizes();
  }

  std::vector<at::Tensor> encode(const at::Tensor& whole_OI) const override {
    check_finite(path_, whole_OI);
    const Int8Rows q = quantize_int8_rows(whole_OI);
    return {q.codes_RC, q.absmax_R};
  }

  void keep(int64_t dim, int64_t begin, int64_t end) override {
    (dim == 0 ? out_features_ : in_features_) = end - begin;
    check_sizes();
    for (Leaf& leaf : leaves_)
      if (dim < leaf.value.dim()) cut_leaf(leaf, dim, begin, end);
  }

  Product times_transposed() const override {
    return [q = rows(), threshold = threshold_, maximum = maximum_over_inputs](const at::Tensor& x_TI, const at::Tensor& bias_O, at::Tensor& y_TO) {
      int8_linear(x_TI, q, bias_O, y_TO, threshold, maximum);
    };
  }
  bool takes_rows_together() const override { return true; }  // outliers are of columns of all rows
  void dequantize(const at::Tensor& out_OI) const override { dequantize_int8_rows(rows(), out_OI); }
  void decode(const std::vector<at::Tensor>& values, const at::Tensor& out_OI) const override { dequantize_int8_rows({values.at(0), values.at(1)}, out_OI); }

  // Codes of the inputs and the product in int32; outliers and what they meet, at most all of both.
  int64_t product_bytes(int64_t num_rows) const override {
    return DequantizedWeight::product_bytes(num_rows) + num_rows * (in_features_ + 4 * out_features_) + dtype_size_ * num_rows * in_features_;
  }

 private:
  Int8Rows rows() const { return {leaves_[0].value, leaves_[1].value}; }

  void check_sizes() const {
    constexpr int64_t kMostColumns = 133144;  // of products of 127 in int32
    if (out_features_ % 8 != 0 || in_features_ % 8 != 0 || in_features_ > kMostColumns)
      throw ConfigError(str("quant.base=int8: ", path_, " has ", out_features_, " outputs and ", in_features_, " inputs", in_features_ != leaves_[0].place.global_shape[1] || out_features_ != leaves_[0].place.global_shape[0] ? " on a rank" : "",
                            "; multiples of 8 are allowed, and at most ", kMostColumns, " inputs: add it to quant.skip; weights that are stored so can be had by quant.base=dense"));
  }

  float threshold_;
  int64_t dtype_size_;
};

}  // namespace

std::shared_ptr<FrozenWeight> int8_weight(const std::string& path, int64_t out_features, int64_t in_features, at::ScalarType dtype, double threshold) {
  return std::make_shared<Int8Weight>(path, out_features, in_features, dtype, threshold);
}

}  // namespace trireme
