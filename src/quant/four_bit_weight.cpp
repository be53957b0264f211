#include "base/tensor.h"

#include "quant/four_bit_weight.h"

#include "base/check.h"
#include "ops/weight_leaf.h"
#include "quant/dynamic_map.h"

namespace trireme {
namespace {

constexpr size_t kCodes = 0, kAbsmax = 1, kNestedAbsmax = 2, kNestedMap = 3, kNestedOffset = 4;  // the leaves

class FourBitWeight : public DequantizedWeight {
 public:
  FourBitWeight(const std::string& path, int64_t out_features, int64_t in_features, const FourBitOptions& options)
      : DequantizedWeight(path, out_features, in_features, options.compute), options_(options) {
    TRIREME_CHECK(in_features % 2 == 0, path, " has ", in_features, " inputs");
    const int64_t size = options.block_size, count = out_features * in_features, blocks = (count + size - 1) / size;
    leaves_.push_back(whole_leaf(".weight", {out_features, in_features / 2}, at::kByte));
    const auto scales = has_whole_blocks() ? std::vector<int64_t>{out_features, in_features / size} : std::vector<int64_t>{blocks};
    leaves_.push_back(whole_leaf(".weight.absmax", scales, options.is_double ? at::kByte : at::kFloat));
    if (!options.is_double) return;
    const int64_t nested = BlockScales().nested_block_size;
    leaves_.push_back(whole_leaf(".weight.nested_absmax", {(blocks + nested - 1) / nested}, at::kFloat));
    leaves_.push_back(whole_leaf(".weight.nested_quant_map", {256}, at::kFloat));
    leaves_.push_back(whole_leaf(".weight.nested_offset", {1}, at::kFloat));
  }

  std::vector<at::Tensor> encode(const at::Tensor& whole_OI) const override {
    check_finite(path_, whole_OI);
    FourBitTensor q = quantize_4bit(whole_OI.scalar_type() == at::kDouble ? whole_OI.to(at::kFloat) : whole_OI, options_.kind, options_.block_size);
    if (options_.is_double) q.scales = double_quantized(q.scales);
    return four_bit_leaves(q, whole_OI.size(0), whole_OI.size(1));
  }

  void keep(int64_t dim, int64_t begin, int64_t end) override {
    const int64_t rows = out_features_, columns = in_features_, size = options_.block_size;
    TRIREME_CHECK(slice_.first == 0 && slice_.per_row == 0, path_, " is cut twice");
    if (!four_bit_slice_fits(rows, columns, dim, begin, end, size)) refuse(dim, begin, end);
    if (dim == 0) {
      const bool by_rows = has_whole_blocks();
      cut_leaf(leaves_[kCodes], 0, begin, end);
      cut_leaf(leaves_[kAbsmax], 0, by_rows ? begin : begin * columns / size, by_rows ? end : (end * columns + size - 1) / size);
      slice_.first = begin * columns / size;
      out_features_ = end - begin;
    } else {
      cut_leaf(leaves_[kCodes], 1, begin / 2, end / 2);
      cut_leaf(leaves_[kAbsmax], 1, begin / size, end / size);
      slice_ = {begin / size, (end - begin) / size, columns / size};
      in_features_ = end - begin;
    }
  }

  void dequantize(const at::Tensor& out_OI) const override {
    std::vector<at::Tensor> values;
    for (const Leaf& leaf : leaves_) values.push_back(leaf.value);
    dequantize(values, slice_, out_OI);
  }
  void decode(const std::vector<at::Tensor>& values, const at::Tensor& out_OI) const override { dequantize(values, {}, out_OI); }

 private:
  void dequantize(const std::vector<at::Tensor>& values, const BlockSlice& slice, const at::Tensor& out_OI) const {
    BlockScales scales{.absmax = values[kAbsmax].flatten()};
    if (options_.is_double) {
      scales.nested_absmax = values[kNestedAbsmax], scales.nested_map = values[kNestedMap], scales.offset = values[kNestedOffset];
      scales.slice = slice;
    }
    const FourBitTensor q{options_.kind, options_.block_size, values[kCodes].flatten(), scales};
    if (out_OI.scalar_type() != at::kDouble) return dequantize_4bit(q, out_OI.view({-1}));
    const at::Tensor narrow = at::empty(out_OI.sizes(), out_OI.options().dtype(at::kFloat));
    dequantize_4bit(q, narrow.view({-1}));
    out_OI.copy_(narrow);
  }

  bool has_whole_blocks() const { return leaves_.empty() ? in_features_ % options_.block_size == 0 : whole_columns() % options_.block_size == 0; }
  int64_t whole_columns() const { return 2 * leaves_[kCodes].place.global_shape[1]; }

  [[noreturn]] void refuse(int64_t dim, int64_t begin, int64_t end) const {
    const std::string slice = str("a rank's ", dim == 0 ? "rows " : "columns ", begin, " to ", end - 1, " of ", path_, " (", out_features_, " x ", in_features_, ") would cut a block of ");
    if (options_.is_stored)
      throw ConfigError(str(slice, options_.block_size, " values, whose scale is one in the model's files: set another parallel.tensor, or quant.base=dense for the values that the codes stand for"));
    std::string fitting;
    for (int64_t size = 32; size <= 4096; size *= 2)
      if (four_bit_slice_fits(out_features_, in_features_, dim, begin, end, size)) fitting += str(fitting.empty() ? "" : ", ", size);
    throw ConfigError(str("quant.block_size=", options_.block_size, ": ", slice, "scales: ", fitting.empty() ? "no block size fits; " : str("take ", fitting, "; "),
                          "or set another parallel.tensor, or add the layer to quant.skip"));
  }

  FourBitOptions options_;
  BlockSlice slice_;  // of the scales
};

}  // namespace

std::vector<at::Tensor> four_bit_leaves(const FourBitTensor& q, int64_t rows, int64_t columns) {
  const bool has_whole_blocks = columns % q.block_size == 0;
  std::vector<at::Tensor> values = {q.codes.view({rows, -1}), has_whole_blocks ? q.scales.absmax.view({rows, -1}) : q.scales.absmax};
  if (q.scales.is_nested()) values.insert(values.end(), {q.scales.nested_absmax, q.scales.nested_map, q.scales.offset});
  return values;
}

std::shared_ptr<FrozenWeight> four_bit_weight(const std::string& path, int64_t out_features, int64_t in_features, const FourBitOptions& options) {
  return std::make_shared<FourBitWeight>(path, out_features, in_features, options);
}

}  // namespace trireme
