#include "comm/reduce_parts.h"

#include <c10/util/Half.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <type_traits>

#include "base/check.h"

// These loops run beside the computation, so they should be short: vectorised, with AVX2 or AVX-512 where there is.
#pragma GCC optimize("O3")
#if defined(__x86_64__) && defined(__gnu_linux__) && \
    !defined(__SANITIZE_ADDRESS__)  // ASan is not up when ifuncs resolve
#define TRIREME_COMM_CLONES __attribute__((target_clones("default", "avx2", "avx512f")))
#else
#define TRIREME_COMM_CLONES
#endif

namespace trireme {

namespace {

constexpr int64_t kBlock = 2048;  // elements that stay in the first-level cache while all parts are joined

struct Bf16 { uint16_t bits; };
struct Fp16 { uint16_t bits; };

// What a type is joined in.
template <typename T> struct Accumulator { using type = T; };
template <> struct Accumulator<Bf16> { using type = float; };
template <> struct Accumulator<Fp16> { using type = float; };
template <> struct Accumulator<int64_t> { using type = uint64_t; };  // sums wrap around
template <> struct Accumulator<int32_t> { using type = uint32_t; };

TRIREME_COMM_CLONES void widen_bf16(const Bf16* x, float* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = std::bit_cast<float>(static_cast<uint32_t>(x[i].bits) << 16);
}

TRIREME_COMM_CLONES void narrow_bf16(const float* x, Bf16* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = std::bit_cast<uint32_t>(x[i]);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    y[i].bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
  }
}

void widen(const Fp16* x, float* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = c10::detail::fp16_ieee_to_fp32_value(x[i].bits);
}
void narrow(const float* x, Fp16* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i].bits = c10::detail::fp16_ieee_from_fp32_value(x[i]);
}
void widen(const Bf16* x, float* y, int64_t n) { widen_bf16(x, y, n); }
void narrow(const float* x, Bf16* y, int64_t n) { narrow_bf16(x, y, n); }

TRIREME_COMM_CLONES void add(float* a, const float* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) a[i] += x[i];
}
TRIREME_COMM_CLONES void add(double* a, const double* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) a[i] += x[i];
}
template <typename A>
void add(A* a, const A* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) a[i] = static_cast<A>(a[i] + x[i]);
}

// Signed: the type whose order counts (sums of signed integers are done in unsigned ones).
template <typename Signed, bool kMaximum, typename A>
void extreme(A* a, const A* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const Signed p = static_cast<Signed>(a[i]), q = static_cast<Signed>(x[i]);
    bool take = kMaximum ? q > p : q < p;
    if constexpr (std::is_floating_point_v<Signed>) take = (take || std::isnan(q)) && !std::isnan(p);
    if (take) a[i] = x[i];
  }
}

template <typename T>
constexpr bool kIsHalf = std::is_same_v<T, Bf16> || std::is_same_v<T, Fp16>;

template <typename T>
void reduce_typed(ReduceOp op, const std::vector<const void*>& parts, void* output, int64_t num_elements) {
  using A = typename Accumulator<T>::type;
  using Signed = std::conditional_t<kIsHalf<T>, float, T>;
  alignas(64) A sum[kBlock];
  alignas(64) A wide[kBlock];
  for (int64_t begin = 0; begin < num_elements; begin += kBlock) {
    const int64_t n = std::min(kBlock, num_elements - begin);
    for (size_t p = 0; p < parts.size(); ++p) {
      const A* values;
      if constexpr (kIsHalf<T>) {
        A* target = p == 0 ? sum : wide;
        widen(static_cast<const T*>(parts[p]) + begin, target, n);
        values = target;
      } else {
        values = static_cast<const A*>(parts[p]) + begin;
        if (p == 0) std::copy(values, values + n, sum);
      }
      if (p == 0) continue;
      if (op == ReduceOp::kSum) add(sum, values, n);
      if (op == ReduceOp::kMax) extreme<Signed, true>(sum, values, n);
      if (op == ReduceOp::kMin) extreme<Signed, false>(sum, values, n);
    }
    if constexpr (kIsHalf<T>)
      narrow(sum, static_cast<T*>(output) + begin, n);
    else
      std::copy(sum, sum + n, static_cast<A*>(output) + begin);
  }
}

}  // namespace

int64_t comm_type_bytes(CommType type) {
  switch (type) {
    case CommType::kFloat64:
    case CommType::kInt64: return 8;
    case CommType::kFloat32:
    case CommType::kInt32: return 4;
    case CommType::kBfloat16:
    case CommType::kFloat16: return 2;
    case CommType::kInt8:
    case CommType::kUint8: return 1;
  }
  return 0;
}

void reduce_parts(CommType type, ReduceOp op, const std::vector<const void*>& parts, void* output,
                  int64_t num_elements) {
  TRIREME_CHECK(!parts.empty());
  switch (type) {
    case CommType::kFloat32: return reduce_typed<float>(op, parts, output, num_elements);
    case CommType::kFloat64: return reduce_typed<double>(op, parts, output, num_elements);
    case CommType::kBfloat16: return reduce_typed<Bf16>(op, parts, output, num_elements);
    case CommType::kFloat16: return reduce_typed<Fp16>(op, parts, output, num_elements);
    case CommType::kInt64: return reduce_typed<int64_t>(op, parts, output, num_elements);
    case CommType::kInt32: return reduce_typed<int32_t>(op, parts, output, num_elements);
    case CommType::kInt8: return reduce_typed<int8_t>(op, parts, output, num_elements);
    case CommType::kUint8: return reduce_typed<uint8_t>(op, parts, output, num_elements);
  }
}

}  // namespace trireme
