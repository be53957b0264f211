#include "base/tensor.h"

#include "quant/int8_weight.h"

#include <algorithm>

#include "base/check.h"
#include "ops/weight_leaf.h"

namespace trireme {
namespace {

class Int8Weight : public DequantizedWeight {
 public:
  Int8Weight(const std::string& path, int64_t out_features, int64_t in_features, at::ScalarType dtype, double threshold)
      : DequantizedWeight(path, out_features, in_features, dtype), threshold_(static_cast<float>(threshold)), dtype_size_(static_cast<int64_t>(c10::elementSize(dtype))) {
    leaves_ = {whole_leaf(".weight", {out_features, in_features}, at::kChar), whole_leaf(".SCB", {out_features}, at::kFloat)};
    TRIREME_CHECK(in_features <= kInt8MostColumns, path, " has ", in_features, " inputs");
  }

  // As bitsandbytes has them: of the weights in float16. Some rows at a time, so that no second copy of the whole is there.
  std::vector<at::Tensor> encode(const at::Tensor& whole_OI) const override {
    check_finite(path_, whole_OI);
    const int64_t rows = whole_OI.size(0), at_once = std::max<int64_t>(1, (int64_t{1} << 20) / whole_OI.size(1));
    const Int8Rows q{at::empty(whole_OI.sizes(), whole_OI.options().dtype(at::kChar)), at::empty({rows}, whole_OI.options().dtype(at::kFloat))};
    for (int64_t first = 0; first < rows; first += at_once) {
      const int64_t count = std::min(at_once, rows - first);
      const Int8Rows part = quantize_int8_rows(whole_OI.narrow(0, first, count).to(at::kHalf));
      q.codes_RC.narrow(0, first, count).copy_(part.codes_RC);
      q.absmax_R.narrow(0, first, count).copy_(part.absmax_R);
    }
    if (!q.absmax_R.isfinite().all().item<bool>())
      throw ConfigError(str("quant.base=int8: ", path_, ".weight has values of up to ", whole_OI.abs().max().item<double>(), ", but LLM.int8() takes weights in float16, of 65504 at most: add it to quant.skip, or set quant.base=nf4"));
    return {q.codes_RC, q.absmax_R};
  }

  void keep(int64_t dim, int64_t begin, int64_t end) override {
    (dim == 0 ? out_features_ : in_features_) = end - begin;
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
  int64_t product_bytes(int64_t num_rows, at::ScalarType dtype) const override {
    return DequantizedWeight::product_bytes(num_rows, dtype) + num_rows * (in_features_ + 4 * out_features_) + dtype_size_ * num_rows * in_features_;
  }

 private:
  Int8Rows rows() const { return {leaves_[0].value, leaves_[1].value}; }

  float threshold_;
  int64_t dtype_size_;
};

}  // namespace

std::shared_ptr<FrozenWeight> int8_weight(const std::string& path, int64_t out_features, int64_t in_features, at::ScalarType dtype, double threshold) {
  return std::make_shared<Int8Weight>(path, out_features, in_features, dtype, threshold);
}

}  // namespace trireme
