#include "base/tensor.h"

#include "ops/float8.h"

#include "base/check.h"
#include "ops/device.h"
#include "ops/op_support.h"
#include "ops/product.h"
#include "ops/weight_leaf.h"

namespace trireme {
namespace {

using kernels::Type;

struct Codes {
  Type type;
  at::Tensor codes, scale;
};

const kernels::Kernels& kernels_for(const at::Tensor& x) {
  const kernels::Kernels* k = kernels_of(x);
  TRIREME_CHECK(k && x.dim() == 2 && x.element_size() == 2, "float8 of ", x.scalar_type(), " ", x.sizes(), " on ", x.device().str());
  return *k;
}

Codes to_codes(const at::Tensor& any, Type type) {
  const kernels::Kernels& k = kernels_for(any);
  const at::Tensor x = any.contiguous(), workspace = at::empty({kernels::kFloat8Partials}, x.options().dtype(at::kFloat));
  Codes out{type, at::empty(x.sizes(), x.options().dtype(at::kByte)), at::empty({1}, workspace.options())};
  k.to_float8({kernel_type(x), type, x.numel(), data_of(x), data_of(out.codes), out.scale.data_ptr<float>(), workspace.data_ptr<float>()}, stream_of(x));
  return out;
}

// y = a b^T (+ bias)
void product_of_codes(const Codes& a_MK, const Codes& b_NK, const at::Tensor& bias_N, at::Tensor& y_MN) {
  const int64_t m = a_MK.codes.size(0), k = a_MK.codes.size(1), n = b_NK.codes.size(0);
  TRIREME_CHECK(b_NK.codes.size(1) == k && y_MN.size(0) == m && y_MN.size(1) == n && y_MN.stride(1) == 1, a_MK.codes.sizes(), b_NK.codes.sizes(), y_MN.sizes());
  const ProductWorkspace workspace(y_MN);
  kernels_for(y_MN).matmul({a_MK.type, b_NK.type, kernel_type(y_MN), m, n, k, false, true, data_of(a_MK.codes), data_of(b_NK.codes), k, k, data_of(y_MN), y_MN.stride(0), data_of(bias_N), 1, 0,
                            false, a_MK.scale.data_ptr<float>(), b_NK.scale.data_ptr<float>(), workspace.data, workspace.num_bytes},
                           stream_of(y_MN));
}

class Float8Weight : public FrozenWeight {
 public:
  Float8Weight(const std::string& path, int64_t out_features, int64_t in_features) : FrozenWeight(path, out_features, in_features) {
    leaves_ = {whole_leaf(".weight", {out_features, in_features}, at::kByte), whole_leaf(".weight.transposed", {in_features, out_features}, at::kByte), whole_leaf(".weight.scale", {1}, at::kFloat)};
    check_sizes();
  }

  std::vector<at::Tensor> encode(const at::Tensor& whole_OI) const override {
    check_finite(path_, whole_OI);
    const Codes w = to_codes(whole_OI, Type::kFloat8E4M3);
    return {w.codes, w.codes.t().contiguous(), w.scale};
  }

  void keep(int64_t dim, int64_t begin, int64_t end) override {
    (dim == 0 ? out_features_ : in_features_) = end - begin;
    check_sizes();
    cut_leaf(leaves_[0], dim, begin, end);
    cut_leaf(leaves_[1], 1 - dim, begin, end);  // is transposed
  }

  Product times_transposed() const override { return product_with(leaves_[0].value, Type::kFloat8E4M3); }
  Product times() const override { return product_with(leaves_[1].value, Type::kFloat8E5M2); }

  int64_t product_bytes(int64_t rows, at::ScalarType) const override { return rows * std::max(in_features_, out_features_) + kernels::kFloat8Partials * 4; }

 private:
  void check_sizes() const {
    if (out_features_ % 16 == 0 && in_features_ % 16 == 0) return;
    const ShardSpec& whole = leaves_[0].place;
    const bool cut = out_features_ != whole.global_shape[0] || in_features_ != whole.global_shape[1];
    throw ConfigError(str("quant.base=fp8: ", path_, " has ", out_features_, " outputs and ", in_features_, " inputs", cut ? " on a rank" : "", ", and products of float8 take multiples of 16: add it to quant.skip",
                          cut ? ", or set another parallel.tensor" : ""));
  }

  Product product_with(const at::Tensor& codes, Type of_rows) const {
    return [of_rows, w = Codes{Type::kFloat8E4M3, codes, leaves_[2].value}](const at::Tensor& rows, const at::Tensor& bias, at::Tensor& y) {
      check_alike("float8", {"x", rows}, {{"weight", w.codes}}, at::kByte);
      product_of_codes(to_codes(rows, of_rows), w, bias.defined() ? bias.contiguous() : bias, y);
    };
  }
};

}  // namespace

std::shared_ptr<FrozenWeight> float8_weight(const std::string& path, int64_t out_features, int64_t in_features) {
  return std::make_shared<Float8Weight>(path, out_features, in_features);
}

}  // namespace trireme
