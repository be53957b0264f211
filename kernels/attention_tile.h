// What the attention kernels for any architecture are made of: tiles of rows in shared memory, and products of a warp with them. A
// tile's rows have D elements and 8 more that nobody uses: an odd number of 16-byte pieces, so that the 8 rows that
// ldmatrix reads at once lie in different banks.
#pragma once

#include "kernels/attention_rows.h"

namespace trireme::kernels::TRIREME_ARCH::attention {

template <int kWidth>
inline constexpr int kPitch = kWidth + 8;
template <typename T, int kRows, int kWidth>
inline constexpr int kTileBytes = kRows * kPitch<kWidth> * static_cast<int>(sizeof(T));

// --- tiles -------------------------------------------------------------------------------------------------------------

// Rows row .. row + count - 1 of a head into the tile, and zeros into the rest of its kRows. To be committed.
template <int kRows, int kWidth, int kThreads, typename T>
ARCH_FN void copy_tile(const Shared<T>& tile, const ConstHeads& from, int row, int head, int count) {
  constexpr int kLanes = kWidth % 64 == 0 ? 8 : 4, kRowsAtOnce = kThreads / kLanes;  // lanes a row
  static_assert(kRows % kRowsAtOnce == 0);
  const int own = arch::thread_index() / kLanes, column = arch::thread_index() % kLanes * 8;
  const T* source = row_of<T>(from, row + own, arch::recomputed(head)) + column;
  ARCH_UNROLL
  for (int r = 0; r < kRows; r += kRowsAtOnce, source += kRowsAtOnce * from.row_stride) {
    const bool valid = own + r < count;
    ARCH_UNROLL
    for (int c = 0; c < kWidth; c += 8 * kLanes)
      arch::copy_async(tile.at((own + r) * kPitch<kWidth> + column + c, 8), source + c, valid);
  }
}

// Row l % 16 and column l / 16 * 8 of lane l: its address for 16 x 16 elements, read as they lie or transposed.
template <int kWidth, typename T>
ARCH_FN const T* corner(const Shared<T>& tile, int row, int column) {
  const int lane = arch::lane_index();
  return tile.at((row + lane % 16) * kPitch<kWidth> + column + lane / 16 * 8, 8);
}
// The same with the two 8 x 8 quarters off the diagonal exchanged.
template <int kWidth, typename T>
ARCH_FN const T* exchanged_corner(const Shared<T>& tile, int row, int column) {
  const int lane = arch::lane_index();
  return tile.at((row + lane % 8 + lane / 16 * 8) * kPitch<kWidth> + column + lane / 8 % 2 * 8, 8);
}

// d[16 kM, 8 kN] += a b^T: rows a_row .. of tile a with rows b_row .. of tile b.
template <int kWidth, typename T, int kM, int kN>
ARCH_FN void multiply_rows(float (&d)[kM][kN][4], const Shared<T>& a, int a_row, const Shared<T>& b, int b_row) {
  ARCH_UNROLL
  for (int k = 0; k < kWidth; k += 16) {
    uint32_t left[kM][4];
    ARCH_UNROLL
    for (int m = 0; m < kM; ++m) arch::load_matrix(left[m], corner<kWidth>(a, a_row + 16 * m, k));
    ARCH_UNROLL
    for (int n = 0; n < kN; n += 2) {
      uint32_t right[4];
      arch::load_matrix(right, exchanged_corner<kWidth>(b, b_row + 8 * n, k));
      ARCH_UNROLL
      for (int m = 0; m < kM; ++m) {
        arch::mma<T>(d[m][n], left[m], right[0], right[1]);
        arch::mma<T>(d[m][n + 1], left[m], right[2], right[3]);
      }
    }
  }
}

// d[16 kM, 8 kN] += a b: 16 of the inner dimension, with rows b_row .. of tile b, columns b_column ...
template <int kWidth, typename T, int kM, int kN>
ARCH_FN void multiply_step(float (&d)[kM][kN][4], const uint32_t (&left)[kM][4], const Shared<T>& b, int b_row, int b_column) {
  ARCH_UNROLL
  for (int n = 0; n < kN; n += 2) {
    uint32_t right[4];
    arch::load_matrix_transposed(right, corner<kWidth>(b, b_row, b_column + 8 * n));
    ARCH_UNROLL
    for (int m = 0; m < kM; ++m) {
      arch::mma<T>(d[m][n], left[m], right[0], right[1]);
      arch::mma<T>(d[m][n + 1], left[m], right[2], right[3]);
    }
  }
}

// d += x b, x [16 kM, 8 kInner] a result of products.
template <int kWidth, typename T, int kM, int kN, int kInner>
ARCH_FN void multiply_result(float (&d)[kM][kN][4], const float (&x)[kM][kInner][4], const Shared<T>& b, int b_column) {
  ARCH_UNROLL
  for (int k = 0; k < kInner; k += 2) {
    uint32_t left[kM][4];
    ARCH_UNROLL
    for (int m = 0; m < kM; ++m) as_left<T>(left[m], x[m][k], x[m][k + 1]);
    multiply_step<kWidth>(d, left, b, 8 * k, b_column);
  }
}

// x into 16 rows of a tile from (row, column) on; rows l / 4 times `low`, rows l / 4 + 8 times `high`.
template <int kWidth, typename T, int kN>
ARCH_FN void put_result(const Shared<T>& tile, int row, int column, const float (&x)[kN][4], float low, float high) {
  const int lane = arch::lane_index();
  const int at = (row + lane / 4) * kPitch<kWidth> + column + 2 * (lane % 4);
  ARCH_UNROLL
  for (int n = 0; n < kN; ++n) {
    arch::store(tile.at(at + 8 * n, 2), arch::pack<T>(x[n][0] * low, x[n][1] * low));
    arch::store(tile.at(at + 8 * n + 8 * kPitch<kWidth>, 2), arch::pack<T>(x[n][2] * high, x[n][3] * high));
  }
}

// Rows `row` .. row + kRows - 1 of a tile, columns kColumns from `column` on, to rows to[0 .. count), by one warp.
template <int kWidth, int kRows, int kColumns, typename T>
ARCH_FN void write_rows(const Shared<T>& tile, int row, int column, T* to, int64_t stride, int count) {
  constexpr int kPieces = kColumns / 8;
  ARCH_UNROLL
  for (int i = 0; i < kRows * kPieces; i += arch::kWarp) {
    const int r = (i + arch::lane_index()) / kPieces, c = column + (i + arch::lane_index()) % kPieces * 8;
    if (r < count) arch::store(to + r * stride + c, arch::load<arch::Bytes16>(tile.at((row + r) * kPitch<kWidth> + c, 8)));
  }
}

}  // namespace trireme::kernels::TRIREME_ARCH::attention
