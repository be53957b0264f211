// What tests of emulated kernels share: buffers whose ends are guarded, and the comparison with the reference. The same tests run on a
// device in device_kernels_test.
#pragma once

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "kernels/arch.h"
#include "kernels/kernels.h"
#include "kernels/reference.h"
#ifdef TRIREME_DEVICE_TESTS
#include "device_memory.h"
#endif

namespace trireme::kernels::test {

using reference::Values;

#ifndef TRIREME_DEVICE_TESTS
// Device memory: `num_bytes` that end where a page begins that nobody may touch, and begin behind another, up to the
// alignment of 16. Holds NaNs at first.
class Guarded {
 public:
  explicit Guarded(int64_t num_bytes) : num_bytes_(static_cast<size_t>(num_bytes)) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), pages = (num_bytes_ + page - 1) / page * page;
    map_bytes_ = pages + 2 * page;
    map_ = static_cast<char*>(mmap(nullptr, map_bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (map_ == MAP_FAILED || mprotect(map_ + page, pages, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
    data_ = map_ + page + (pages - num_bytes_) / 16 * 16;
    std::memset(map_ + page, 0xff, pages);
  }
  ~Guarded() { munmap(map_, map_bytes_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  template <typename T = void>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }
  size_t num_bytes() const { return num_bytes_; }
  std::string bits() const { return {data_, num_bytes_}; }

 private:
  size_t num_bytes_, map_bytes_;
  char *map_, *data_;
};
#endif

// Values of the program where a kernel finds them.
template <typename T>
class OnDevice {
 public:
  explicit OnDevice(const std::vector<T>& values) : memory_(static_cast<int64_t>(values.size() * sizeof(T))) {
    std::copy(values.begin(), values.end(), memory_.as<T>());
  }
  explicit OnDevice(T value) : OnDevice(std::vector<T>{value}) {}
  T* data() const { return memory_.template as<T>(); }
  T& operator*() const { return *data(); }

 private:
  Guarded memory_;
};

// A tensor of a type in guarded memory.
struct Tensor {
  Tensor(Type t, int64_t n) : type(t), size(n), memory(n * size_of(t)) {}
  Tensor(Type t, const Values& values) : Tensor(t, static_cast<int64_t>(values.size())) {
    void* const all = memory.as();  // waits for a device
    for (size_t i = 0; i < values.size(); ++i) {
      const float x = static_cast<float>(values[i]);
      if (t == Type::kFloat32) static_cast<float*>(all)[i] = x;
      else if (t == Type::kBFloat16) static_cast<emulated::arch::bf16*>(all)[i] = emulated::arch::from_float<emulated::arch::bf16>(x);
      else static_cast<emulated::arch::fp16*>(all)[i] = emulated::arch::from_float<emulated::arch::fp16>(x);
    }
  }
  void* data() { return memory.as(); }
  Values values() {
    Values out;
    const void* const all = memory.as();
    for (int64_t i = 0; i < size; ++i)
      out.push_back(type == Type::kFloat32    ? static_cast<const float*>(all)[i]
                    : type == Type::kBFloat16 ? emulated::arch::to_float(static_cast<const emulated::arch::bf16*>(all)[i])
                                              : emulated::arch::to_float(static_cast<const emulated::arch::fp16*>(all)[i]));
    return out;
  }

  Type type;
  int64_t size;
  Guarded memory;
};

// Normal values, of the type.
inline Values random_values(Type type, int64_t n, uint64_t seed, double deviation = 1) {
  std::mt19937_64 random(seed);
  std::normal_distribution<double> normal(0, deviation);
  Values out(static_cast<size_t>(n));
  for (double& x : out) x = reference::round_to(type, normal(random));
  return out;
}

// Half a unit in the last place of a value of the type, relative: one rounding.
inline double unit(Type type) { return type == Type::kFloat32 ? 0x1p-24 : type == Type::kBFloat16 ? 0x1p-8 : 0x1p-11; }

// The same, absolute, of numbers so small that they have fewer digits.
inline double smallest_unit(Type type) { return type == Type::kFloat16 ? 0x1p-25 : 0; }

// |actual - expected| <= absolute + relative * |expected|, everywhere.
inline testing::AssertionResult near(const Values& actual, const Values& expected, double relative, double absolute) {
  if (actual.size() != expected.size()) return testing::AssertionFailure() << actual.size() << " values, expected " << expected.size();
  size_t worst = 0, wrong = 0;
  double excess = 0;
  for (size_t i = 0; i < actual.size(); ++i) {
    const double over = std::abs(actual[i] - expected[i]) - absolute - relative * std::abs(expected[i]);
    if (over <= 0) continue;
    if (!(over <= excess)) worst = i, excess = over;
    ++wrong;
  }
  if (wrong == 0) return testing::AssertionSuccess();
  return testing::AssertionFailure() << wrong << " of " << actual.size() << " values differ; the worst, number " << worst << ", is " << actual[worst] << ", expected "
                                     << expected[worst];
}

inline std::string name_of(Type type) { return type == Type::kFloat32 ? "float32" : type == Type::kBFloat16 ? "bfloat16" : "float16"; }

}  // namespace trireme::kernels::test
