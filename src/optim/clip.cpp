#include "optim/clip.h"

#include "ops/device.h"
#include "ops/op_support.h"
#include "optim/update_loops.h"

namespace trireme {
namespace {

constexpr int64_t kChunk = 1 << 16;  // so many parts of up to 2^26 steps add up exactly in a double
constexpr int kLevelBits = 26;

// f(loops, data, number of the chunk, first element, elements) over the chunks on all threads.
template <typename F>
void for_chunks(const at::Tensor& x, const F& f) {
  TRIREME_CHECK(x.is_contiguous(), x.sizes());
  const int64_t size = x.numel();
  dispatch_floating(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    at::parallel_for(0, (size + kChunk - 1) / kChunk, 1, [&](int64_t first, int64_t last) {
      for (int64_t c = first; c < last; ++c)
        f(update_loops<T>(), x.data_ptr<T>() + c * kChunk, static_cast<size_t>(c), std::min(kChunk, size - c * kChunk));
    });
  });
}

size_t num_chunks(const at::Tensor& x) { return static_cast<size_t>((x.numel() + kChunk - 1) / kChunk); }

// The exponent of a level's step: every square is below 2^top.
int step_exponent(double largest, int level) {
  int top = 0;
  std::frexp(largest * largest, &top);
  return top - kLevelBits * (level + 1);
}

}  // namespace

double largest_magnitude(const at::Tensor& x) {
  std::vector<double> most(num_chunks(x));
  for_chunks(x, [&](const auto& loops, auto* data, size_t c, int64_t count) { most[c] = loops.largest(count, data); });
  double result = 0;
  for (double m : most) result = m > result || std::isnan(m) ? m : result;  // nothing is larger than a NaN
  return result;
}

SquareSum::SquareSum(double largest_of_all) : largest(largest_of_all) {}

void SquareSum::add(const at::Tensor& x) {
  static_assert(kSquareLevels == std::tuple_size_v<decltype(sums)>);
  if (!std::isfinite(largest * largest) || largest == 0) return;
  double shifts[kSquareLevels];
  for (int level = 0; level < kSquareLevels; ++level) shifts[level] = std::ldexp(1.5, 52 + step_exponent(largest, level));
  std::vector<std::array<double, kSquareLevels>> parts(num_chunks(x));
  for_chunks(x, [&](const auto& loops, auto* data, size_t c, int64_t count) {
    loops.square_sums(count, data, shifts, parts[c].data());
  });
  for (const auto& part : parts)
    for (int level = 0; level < kSquareLevels; ++level)
      sums[static_cast<size_t>(level)] +=
          static_cast<int64_t>(std::ldexp(part[static_cast<size_t>(level)], -step_exponent(largest, level)));
}

double SquareSum::total() const {
  if (!std::isfinite(largest * largest)) return largest * largest;
  double total = 0;
  for (int level = kSquareLevels; level-- > 0;)
    total += std::ldexp(static_cast<double>(sums[static_cast<size_t>(level)]), step_exponent(largest, level));
  return total;
}

double squared_norm(const std::vector<at::Tensor>& tensors) {
  double largest = 0;
  for (const auto& x : tensors)
    if (const double m = largest_magnitude(x); m > largest || std::isnan(m)) largest = m;
  SquareSum sum(largest);
  for (const auto& x : tensors) sum.add(x);
  return sum.total();
}

double clip_scale(double norm, double max_norm) {
  if (max_norm <= 0.0) return 1.0;
  const double scale = max_norm / (norm + 1e-6);
  return scale > 1.0 ? 1.0 : scale;  // NaN stays
}

DeviceNorm::DeviceNorm(at::Device device)
    : squares(at::zeros({}, at::TensorOptions(at::kDouble).device(device))), norm(at::zeros({}, squares.options().dtype(at::kFloat))), factor(at::ones_like(norm)) {
  TRIREME_CHECK(kernels_of(norm), "no kernels for ", device.str());
}

namespace {

kernels::Clip clip_of(const DeviceNorm& to, const ClipBy& by) {
  TRIREME_CHECK(!by.loss.defined() || (by.loss.scalar_type() == at::kDouble && by.loss.device() == to.norm.device()), by.loss.toString());
  return {by.max_norm, by.scale, to.norm.data_ptr<float>(), to.factor.data_ptr<float>(), true, static_cast<const double*>(data_of(by.loss))};
}

}  // namespace

void DeviceNorm::measure(const std::vector<at::Tensor>& gradients, const ClipBy* by) {
  std::vector<kernels::GradientTensor> list;
  for (const at::Tensor& x : gradients) {
    check_alike("gradient norm", {"norm", norm}, {{"gradient", x}}, gradients[0].scalar_type());
    TRIREME_CHECK(x.is_contiguous(), x.sizes());
    list.push_back({x.numel(), data_of(x)});
  }
  const auto count = static_cast<int64_t>(list.size());
  const at::Tensor workspace = at::empty({kernels::gradient_norm_workspace(list.data(), count)}, squares.options());
  kernels_of(norm)->gradient_norm({kernel_type(list.empty() ? norm : gradients[0]), list.data(), count, workspace.data_ptr<double>(), squares.data_ptr<double>(),
                                   by ? clip_of(*this, *by) : kernels::Clip{}}, stream_of(norm));
}

void DeviceNorm::clip(const ClipBy& by) { kernels_of(norm)->clip_factor({squares.data_ptr<double>(), clip_of(*this, by)}, stream_of(norm)); }

}  // namespace trireme
