#include "base/tensor.h"

#include "ops/dequantized_weight.h"

#include <atomic>
#include <mutex>

#include "base/check.h"
#include "ops/product.h"

namespace trireme {
namespace {

// What is used on one stream, one product after another, as all ops of a device are.
struct Scratch {
  at::Tensor memory;        // bytes
  uint64_t weight = 0;      // that is in it
  uint64_t times_set = 0;
  uint64_t version = 0;     // of its first leaf
  at::ScalarType dtype = at::kFloat;
};

std::atomic<uint64_t> last_id{0};
std::atomic<int64_t> count{0};

Scratch& scratch_of(at::Device device) {
  static std::mutex mutex;
  static std::map<std::pair<at::DeviceType, int>, Scratch> all;
  const std::lock_guard lock(mutex);
  return all[{device.type(), device.index()}];
}

// f with rows and result in `compute`, whatever they are.
FrozenWeight::Product in_dtype(at::ScalarType compute, FrozenWeight::Product f) {
  return [compute, f = std::move(f)](const at::Tensor& rows, const at::Tensor& bias, at::Tensor& y) {
    if (rows.scalar_type() == compute) return f(rows, bias, y);
    at::Tensor wide = at::empty(y.sizes(), y.options().dtype(compute));
    f(rows.to(compute), bias.defined() ? bias.to(compute) : bias, wide);
    y.copy_(wide);
  };
}

}  // namespace

DequantizedWeight::DequantizedWeight(std::string path, int64_t out_features, int64_t in_features, at::ScalarType compute)
    : FrozenWeight(std::move(path), out_features, in_features), compute_(compute), id_(++last_id) {}

at::Tensor DequantizedWeight::in_scratch() const {
  const at::Tensor& leaf = leaves_[0].value;
  Scratch& scratch = scratch_of(leaf.device());
  const int64_t bytes = out_features_ * in_features_ * static_cast<int64_t>(c10::elementSize(compute_));
  if (!scratch.memory.defined() || scratch.memory.numel() < bytes) {
    scratch = {};
    scratch.memory = at::empty({bytes}, leaf.options().dtype(at::kByte));
  }
  const at::Tensor w_OI = scratch.memory.narrow(0, 0, bytes).view(compute_).view({out_features_, in_features_});
  const auto version = static_cast<uint64_t>(leaf._version());
  if (scratch.weight == id_ && scratch.times_set == times_set_ && scratch.version == version && scratch.dtype == compute_) return w_OI;
  scratch.weight = 0;  // until it is there
  dequantize(w_OI);
  ++count;
  scratch.weight = id_, scratch.times_set = times_set_, scratch.version = version, scratch.dtype = compute_;
  return w_OI;
}

FrozenWeight::Product DequantizedWeight::times_transposed() const {
  return in_dtype(compute_, [w_OI = in_scratch()](const at::Tensor& x_TI, const at::Tensor& bias_O, at::Tensor& y_TO) { linear_product(x_TI, w_OI, bias_O, y_TO); });
}

FrozenWeight::Product DequantizedWeight::times() const {
  return in_dtype(compute_, [w_OI = in_scratch()](const at::Tensor& grad_TO, const at::Tensor&, at::Tensor& y_TI) { product(grad_TO, w_OI, y_TI); });
}

int64_t DequantizedWeight::product_bytes(int64_t rows, at::ScalarType dtype) const {
  const int64_t converted = dtype == compute_ ? 0 : rows * (out_features_ + in_features_);
  return (out_features_ * in_features_ + converted) * static_cast<int64_t>(c10::elementSize(compute_));
}

int64_t num_dequantized() { return count; }

}  // namespace trireme
