// What the attention kernels are made of: which rows a block works on, tiles of rows in shared memory, and products of
// a warp with them. A tile's rows have D elements and 8 more that nobody uses: an odd number of 16-byte pieces, so that
// the 8 rows that ldmatrix reads at once lie in different banks.
#pragma once

#include <cmath>
#include <limits>

#include "kernels/attention.h"
#include "kernels/launch.h"

namespace trireme::kernels::TRIREME_ARCH::attention {

using arch::Shared;

inline constexpr float kLog2E = 1.44269504088896340736f, kLn2 = 0.69314718055994530942f;
inline constexpr float kInfinity = std::numeric_limits<float>::infinity();
inline constexpr int kEverything = 1 << 29;  // as far as any row is from another; three of them are an int
template <int kWidth>
inline constexpr int kPitch = kWidth + 8;
template <typename T, int kRows, int kWidth>
inline constexpr int kTileBytes = kRows * kPitch<kWidth> * static_cast<int>(sizeof(T));

ARCH_HOST_FN constexpr int smaller(int a, int b) { return a < b ? a : b; }
ARCH_HOST_FN constexpr int larger(int a, int b) { return a < b ? b : a; }
ARCH_HOST_FN constexpr int divide_up(int a, int b) { return (a + b - 1) / b; }

// --- rows of a block ---------------------------------------------------------------------------------------------------

// What the kernels of forward and backward are told of the shape.
struct Plan {
  const int32_t *cu_seqlens_q, *cu_seqlens_k;
  int num_segments, num_queries;  // T
  int num_heads, group;           // group: heads that share a key head
  int left, right;                // the query at position p sees keys p - left .. p + right
  float scale;
  int num_tiles, section_heads;   // the grid: see block_work
};

// The grid is sections of heads whose keys and values fit in the L2 cache together; in a section all heads of a tile
// come before the next tile.
struct Work {
  int tile, head;
};
ARCH_FN Work block_work(const Plan& p, int num_heads) {
  const int index = arch::block_index().x, per_section = p.num_tiles * p.section_heads, first = index / per_section * p.section_heads;
  const int heads = smaller(p.section_heads, num_heads - first), rest = index % per_section;
  return {rest / heads, first + rest % heads};
}

struct Segment {
  int q_begin, num_queries, k_begin, num_keys;
  int tile;  // of this segment; -1: the grid has more tiles than the segments
  ARCH_FN int offset() const { return num_keys - num_queries; }  // of a query's position from its number
};

// Tile number `tile` of all segments' tiles of so many rows, one segment after the other. Whole warps.
template <int kTileRows>
ARCH_FN Segment find_segment(const Plan& p, const int32_t* cu_seqlens, int tile) {
  const int lane = arch::lane_index();
  for (int first = 0; first < p.num_segments; first += arch::kWarp) {
    const int s = smaller(first + lane, p.num_segments - 1);
    const int tiles = first + lane < p.num_segments ? divide_up(cu_seqlens[s + 1] - cu_seqlens[s], kTileRows) : 0;
    int until = tiles;  // the tiles of this and the lanes before
    ARCH_UNROLL
    for (int d = 1; d < arch::kWarp; d *= 2) {
      const int before = arch::shuffle(until, larger(lane - d, 0));
      if (lane >= d) until += before;
    }
    const uint32_t beyond = arch::ballot(tile < until);
    if (beyond == 0) {
      tile -= arch::shuffle(until, arch::kWarp - 1);
      continue;
    }
    int found = 0;
    while (!(beyond >> found & 1)) ++found;
    const int here = tile - arch::shuffle(until - tiles, found), at = first + found;
    const int q = p.cu_seqlens_q[at], k = p.cu_seqlens_k[at];
    return {q, p.cu_seqlens_q[at + 1] - q, k, p.cu_seqlens_k[at + 1] - k, here};
  }
  return {0, 0, 0, 0, -1};
}

template <typename T>
ARCH_FN const T* row_of(const ConstHeads& x, int64_t row, int head) {
  return static_cast<const T*>(x.data) + row * x.row_stride + head * x.head_stride;
}
template <typename T>
ARCH_FN T* row_of(const Heads& x, int64_t row, int head) {
  return static_cast<T*>(x.data) + row * x.row_stride + head * x.head_stride;
}

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

// Results of products lie in registers as x[n][4]: lane l has of the n-th 8 columns the columns 2 (l % 4) and the next,
// of row l / 4 in x[n][0], x[n][1] and of row l / 4 + 8 in x[n][2], x[n][3]. Rounded, two n are the left factor of a
// product.
template <typename T>
ARCH_FN void as_left(uint32_t (&a)[4], const float (&x0)[4], const float (&x1)[4]) {
  a[0] = arch::pack<T>(x0[0], x0[1]);
  a[1] = arch::pack<T>(x0[2], x0[3]);
  a[2] = arch::pack<T>(x1[0], x1[1]);
  a[3] = arch::pack<T>(x1[2], x1[3]);
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

// Scores of keys that are not seen become -inf. Rows are queries from `position` on, columns keys from `key` on.
template <int kM, int kN>
ARCH_FN void hide_scores(float (&score)[kM][kN][4], int key, int num_keys, int position, const Plan& plan) {
  if (key + 8 * kN <= num_keys && key + 8 * kN - 1 <= position + plan.right && key >= position + 16 * kM - 1 - plan.left) return;
  const int lane = arch::lane_index();
  ARCH_UNROLL
  for (int m = 0; m < kM; ++m)
    ARCH_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int here = position + 16 * m + 8 * (i / 2) + lane / 4;
      const int from = here - plan.left - key, to = smaller(num_keys - 1, here + plan.right) - key;
      ARCH_UNROLL
      for (int n = 0; n < kN; ++n)
        if (const int j = 8 * n + 2 * (lane % 4) + i % 2; j < from || j > to) score[m][n][i] = -kInfinity;
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

// --- on the host -------------------------------------------------------------------------------------------------------

inline void refuse_unless(bool good, const std::string& what) {
  if (!good) throw Refused("attention: " + what);
}

inline ConstHeads readable(const Heads& x) { return {x.data, x.row_stride, x.head_stride}; }

inline void check_heads(const char* name, const void* data, int64_t row_stride, int64_t head_stride, bool empty) {
  refuse_unless(empty || data != nullptr, std::string(name) + " is a null pointer");
  refuse_unless(reinterpret_cast<uintptr_t>(data) % 16 == 0, std::string(name) + " is not at a multiple of 16 bytes");
  refuse_unless(row_stride % 8 == 0 && head_stride % 8 == 0,
                std::string(name) + " has strides of " + std::to_string(row_stride) + " and " + std::to_string(head_stride) +
                    " elements, which are not both multiples of 16 bytes");
}

inline void check_shape(const AttentionShape& s) {
  refuse_unless(s.type != Type::kFloat32, "the type must be bf16 or fp16");
  refuse_unless(s.head_dim == 64 || s.head_dim == 96 || s.head_dim == 128 || s.head_dim == 256,
                "a head dim of " + std::to_string(s.head_dim) + " is none of 64, 96, 128, 256");
  refuse_unless(s.num_key_heads > 0 && s.num_heads > 0 && s.num_heads % s.num_key_heads == 0,
                std::to_string(s.num_heads) + " heads are no multiple of " + std::to_string(s.num_key_heads) + " key heads");
  refuse_unless(s.window == -1 || s.causal, "a window needs causal attention");
  refuse_unless(s.window >= -1 && s.window != 0, "a window of " + std::to_string(s.window) + " keys");
  refuse_unless(std::isfinite(s.scale) && s.scale >= 0, "a scale of " + std::to_string(s.scale) + " is not positive");
  for (int64_t n : {s.num_queries, s.num_keys, s.num_segments, s.num_heads})
    refuse_unless(n >= 0 && n <= kEverything, "a size of " + std::to_string(n) + " is not within 0 .. 2^29");
  refuse_unless(s.num_segments > 0 || (s.num_queries == 0 && s.num_keys == 0), "rows without a segment");
  refuse_unless(s.num_segments == 0 || (s.cu_seqlens_q && s.cu_seqlens_k), "cu_seqlens is a null pointer");
}

// For blocks of tile_rows of the num_rows rows, for each of num_heads heads of which heads_of_key_head share a key
// head.
inline Plan plan(const AttentionShape& s, int64_t num_rows, int tile_rows, int64_t num_heads, int64_t heads_of_key_head) {
  const int64_t tiles = num_rows / tile_rows + s.num_segments;
  refuse_unless(tiles * num_heads <= std::numeric_limits<int>::max(), std::to_string(num_rows) + " rows of " + std::to_string(num_heads) + " heads are more than a grid has blocks");
  constexpr int64_t kCache = 24 << 20;
  const int64_t bytes_of_key_head = 1 + 4 * s.head_dim * (s.num_keys / (s.num_segments > 0 ? s.num_segments : 1));
  const int64_t section = (kCache / bytes_of_key_head > 1 ? kCache / bytes_of_key_head : 1) * heads_of_key_head;
  Plan p{};
  p.cu_seqlens_q = s.cu_seqlens_q, p.cu_seqlens_k = s.cu_seqlens_k;
  p.num_segments = static_cast<int>(s.num_segments), p.num_queries = static_cast<int>(s.num_queries);
  p.num_heads = static_cast<int>(s.num_heads), p.group = static_cast<int>(s.num_heads / s.num_key_heads);
  p.left = s.window < 0 || s.window > kEverything ? kEverything : static_cast<int>(s.window) - 1;
  p.right = s.causal ? 0 : kEverything;
  p.scale = s.scale > 0 ? s.scale : 1 / std::sqrt(static_cast<float>(s.head_dim));
  p.num_tiles = static_cast<int>(tiles);
  p.section_heads = static_cast<int>(section < num_heads ? section : num_heads);
  return p;
}

// f(T{}, Constant<head dim>{}).
template <typename F>
void with_type_and_dim(const AttentionShape& s, const F& f) {
  auto with_dim = [&](auto t) {
    switch (s.head_dim) {
      case 64:
        return f(t, Constant<64>{});
      case 96:
        return f(t, Constant<96>{});
      case 128:
        return f(t, Constant<128>{});
      case 256:
        return f(t, Constant<256>{});
    }
  };
  s.type == Type::kBFloat16 ? with_dim(arch::bf16{}) : with_dim(arch::fp16{});
}

}  // namespace trireme::kernels::TRIREME_ARCH::attention
