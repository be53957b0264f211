// What the operations share on their way to arch::launch: choice of types, vectors and grids.
#pragma once

#include <initializer_list>
#include <limits>
#include <type_traits>

#include "kernels/arch.h"
#include "kernels/types.h"

namespace trireme::kernels::TRIREME_ARCH {

template <int kValue>
using Constant = std::integral_constant<int, kValue>;

// f(T{}) with the arch's type.
template <typename F>
void with_type(Type type, const F& f) {
  switch (type) {
    case Type::kFloat32:
      return f(float{});
    case Type::kBFloat16:
      return f(arch::bf16{});
    case Type::kFloat16:
      return f(arch::fp16{});
    default:
      throw Refused("float8 is for matrix products alone");
  }
}

// As many blocks as it takes for so many items.
inline arch::Index3 blocks_of(int64_t num_items, int64_t per_block) {
  const int64_t blocks = (num_items + per_block - 1) / per_block;
  if (blocks > std::numeric_limits<int>::max()) throw Refused(std::to_string(num_items) + " items are more than a grid of blocks can have");
  return {static_cast<int>(blocks), 1, 1};
}

// Whether rows of so many bytes can be read 16 bytes at a time. Null pointers are no hindrance.
inline bool in_vectors(int64_t row_bytes, std::initializer_list<const void*> rows) {
  uintptr_t all = static_cast<uintptr_t>(row_bytes);
  for (const void* row : rows) all |= reinterpret_cast<uintptr_t>(row);
  return all % 16 == 0;
}

template <typename T>
ARCH_FN float rounded(float x) {
  return arch::to_float(arch::from_float<T>(x));
}

// kPer values at once: one, or 2 to 16 bytes at a multiple of as many, or several times 16.
template <typename T, int kPer>
struct alignas(kPer * sizeof(T) < 16 ? kPer * sizeof(T) : 16) Several {
  static_assert(kPer * sizeof(T) < 16 || kPer * sizeof(T) % 16 == 0);
  T value[kPer];
};
template <typename T, int kPer>
ARCH_FN void load_values(const T* from, float* to) {
  if constexpr (kPer == 1) {
    *to = arch::to_float(*from);
  } else {
    const auto values = arch::load<Several<T, kPer>>(from);
    ARCH_UNROLL
    for (int i = 0; i < kPer; ++i) to[i] = arch::to_float(values.value[i]);
  }
}
template <typename T, int kPer>
ARCH_FN void store_values(T* to, const float* from) {
  if constexpr (kPer == 1) {
    *to = arch::from_float<T>(*from);
  } else {
    Several<T, kPer> values;
    ARCH_UNROLL
    for (int i = 0; i < kPer; ++i) values.value[i] = arch::from_float<T>(from[i]);
    arch::store(to, values);
  }
}

}  // namespace trireme::kernels::TRIREME_ARCH
