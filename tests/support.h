// What tests of tensors share: the one table of tolerances and the comparer that uses it.
#pragma once

#include <gtest/gtest.h>

#include <fstream>

#include "base/tensor.h"

namespace trireme::test {

// |a - b| <= absolute + relative * |b|, by the dtype the tested code computed in.
struct Tolerance {
  double relative, absolute;
};

inline Tolerance tolerance(at::ScalarType dtype) {
  switch (dtype) {
    // 2^-53 = 1.1e-16 a rounding; sums of some hundred terms in another order than the reference's.
    case at::kDouble:
      return {1e-11, 1e-12};
    // 2^-24 = 6e-8 a rounding; the same sums.
    case at::kFloat:
      return {2e-5, 1e-5};
    // 2^-9 = 2e-3 a rounding of the output, and one or two of intermediate values that the contract rounds.
    case at::kBFloat16:
      return {1.6e-2, 1.6e-2};
    // 2^-11 = 5e-4 a rounding, as above.
    case at::kHalf:
      return {4e-3, 4e-3};
    default:
      return {0.0, 0.0};  // integers are equal or wrong
  }
}

// How many bytes more than before this process held at most while f ran.
template <typename F>
int64_t memory_grown(const F& f) {
  auto resident = [](const char* key) {
    std::ifstream status("/proc/self/status");
    for (std::string word; status >> word;)
      if (word == key) return status >> word, int64_t{1024} * std::stol(word);
    return int64_t{0};
  };
  std::ofstream("/proc/self/clear_refs") << "5";  // resets the peak
  const int64_t before = resident("VmRSS:");
  f();
  return resident("VmHWM:") - before;
}

// Sums of some hundred fp64 terms in two orders, of the larger of 1 and the sum: 2^-53 = 1.1e-16 a rounding, a thousand of them.
constexpr double kSumFp64 = 1e-12;

// Success where `actual` has the shape of `expected` and every element is close to it, by the tolerance of `dtype`
// (default: that of actual) times `factor`. NaN is close to nothing, infinity only to itself. The message names the
// worst.
inline testing::AssertionResult near(const at::Tensor& actual, const at::Tensor& expected, double factor = 1.0,
                                     std::optional<at::ScalarType> dtype = std::nullopt) {
  if (!actual.defined() || !expected.defined()) return testing::AssertionFailure() << "an undefined tensor";
  if (actual.sizes() != expected.sizes())
    return testing::AssertionFailure() << "shape " << actual.sizes() << ", expected " << expected.sizes();
  const Tolerance limit = tolerance(dtype.value_or(actual.scalar_type()));
  at::Tensor a = actual.detach().to(at::kCPU, at::kDouble).contiguous().flatten();
  at::Tensor e = expected.detach().to(at::kCPU, at::kDouble).contiguous().flatten();
  const double *x = a.data_ptr<double>(), *y = e.data_ptr<double>();
  int64_t worst = -1, wrong = 0;
  double worst_excess = 0.0;
  for (int64_t i = 0; i < a.numel(); ++i) {
    if (x[i] == y[i]) continue;
    const double allowed = factor * (limit.absolute + limit.relative * std::abs(y[i]));
    const double difference = std::abs(x[i] - y[i]);
    if (difference <= allowed && std::isfinite(y[i])) continue;
    ++wrong;
    const double excess = std::isfinite(difference) ? difference - allowed : std::numeric_limits<double>::infinity();
    if (worst < 0 || excess > worst_excess) worst = i, worst_excess = excess;
  }
  if (wrong == 0) return testing::AssertionSuccess();
  return testing::AssertionFailure() << wrong << " of " << a.numel() << " elements differ; the worst at flat index "
                                     << worst << " of " << actual.sizes() << ": " << x[worst] << ", expected "
                                     << y[worst] << " (allowed: " << factor * limit.relative << " relative, "
                                     << factor * limit.absolute << " absolute)";
}

// Success where shape, dtype and every bit agree.
inline testing::AssertionResult same_bits(const at::Tensor& actual, const at::Tensor& expected) {
  if (!actual.defined() || !expected.defined()) return testing::AssertionFailure() << "an undefined tensor";
  if (actual.sizes() != expected.sizes() || actual.scalar_type() != expected.scalar_type())
    return testing::AssertionFailure() << actual.scalar_type() << " " << actual.sizes() << ", expected "
                                       << expected.scalar_type() << " " << expected.sizes();
  at::Tensor a = actual.detach().cpu().contiguous(), e = expected.detach().cpu().contiguous();
  const auto *x = static_cast<const char*>(a.data_ptr()), *y = static_cast<const char*>(e.data_ptr());
  const size_t width = a.element_size();
  for (int64_t i = 0; i < a.numel(); ++i)
    if (std::memcmp(x + static_cast<size_t>(i) * width, y + static_cast<size_t>(i) * width, width) != 0)
      return testing::AssertionFailure() << "first differing element at flat index " << i << ": "
                                         << a.flatten()[i].item<double>() << ", expected "
                                         << e.flatten()[i].item<double>();
  return testing::AssertionSuccess();
}

}  // namespace trireme::test
