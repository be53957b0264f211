// Work on the values of rows one by one: which thread has which, 16 bytes at a time where addresses allow.
#pragma once

#include "kernels/launch.h"

namespace trireme::kernels::TRIREME_ARCH {

// The first `count` of kPer values; the others are left as they are.
template <typename T, int kPer>
ARCH_FN void load_part(const T* from, int64_t count, float* to) {
  if (count >= kPer) return load_values<T, kPer>(from, to);
  ARCH_UNROLL
  for (int i = 0; i < kPer; ++i)
    if (i < count) to[i] = arch::to_float(from[i]);
}
template <typename T, int kPer>
ARCH_FN void store_part(T* to, int64_t count, const float* from) {
  if (count >= kPer) return store_values<T, kPer>(to, from);
  ARCH_UNROLL
  for (int i = 0; i < kPer; ++i)
    if (i < count) to[i] = arch::from_float<T>(from[i]);
}

// Rows of `width` values in parts of kPer for each thread: so many blocks a row.
struct Parts {
  static constexpr int kThreads = 256;
  int64_t num_rows, width;
  int blocks_per_row;

  // Rows that stand `stride` apart; where nothing is between them, they are one.
  static Parts of(int64_t num_rows, int64_t width, bool is_dense, int per) {
    if (is_dense) width *= num_rows, num_rows = std::min<int64_t>(num_rows, 1);
    return {num_rows, width, blocks_of(width, int64_t{kThreads} * per).x};
  }
  arch::Index3 grid() const { return blocks_of(num_rows * blocks_per_row, 1); }
};

// f(row, column, count) for this thread's part, if it has one.
template <int kPer, typename F>
ARCH_FN void with_part(const Parts& parts, const F& f) {
  const int block = arch::block_index().x, row = block / parts.blocks_per_row;
  const int64_t column = (int64_t{block - row * parts.blocks_per_row} * Parts::kThreads + arch::thread_index()) * kPer;
  if (column < parts.width) f(int64_t{row}, column, parts.width - column);
}

}  // namespace trireme::kernels::TRIREME_ARCH
