// What all attention kernels share: which rows a block works on and which others these see, the softmax of scores in
// registers, and what is checked on the host.
#pragma once

#include <cmath>
#include <limits>

#include "kernels/architecture.h"
#include "kernels/attention.h"
#include "kernels/launch.h"

namespace trireme::kernels::TRIREME_ARCH::attention {

using arch::Shared;

inline constexpr float kLog2E = 1.44269504088896340736f, kLn2 = 0.69314718055994530942f;
inline constexpr float kInfinity = std::numeric_limits<float>::infinity();
inline constexpr int kEverything = 1 << 29;  // as far as any row is from another; three of them are an int

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
ARCH_FN Work block_work(const Plan& p, int num_heads, int index) {
  const int per_section = p.num_tiles * p.section_heads, first = index / per_section * p.section_heads;
  const int heads = smaller(p.section_heads, num_heads - first), rest = index % per_section;
  return {rest / heads, first + rest % heads};
}

ARCH_FN Work block_work(const Plan& p, int num_heads) { return block_work(p, num_heads, arch::block_index().x); }

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

// Tiles of keys that the queries first .. first + count - 1 of a segment see.
template <int kKeys>
struct SeenKeys {
  int begin, end;
  ARCH_FN SeenKeys(const Plan& p, const Segment& s, int first, int count)
      : begin(larger(0, first + s.offset() - p.left) / kKeys),
        end(divide_up(smaller(s.num_keys, first + count + s.offset() + smaller(p.right, s.num_keys)), kKeys)) {}
};
// Tiles of queries that see any of the keys first .. first + count - 1: queries i with i + offset + right >= first and
// i + offset - left <= first + count - 1.
template <int kQueries>
struct SeeingQueries {
  int begin, end;
  ARCH_FN SeeingQueries(const Plan& p, const Segment& s, int first, int count)
      : begin(larger(0, first - s.offset() - p.right) / kQueries),
        end(divide_up(smaller(s.num_queries, first + count - s.offset() + smaller(p.left, kEverything - first - count)), kQueries)) {}
};

// --- results of products ----------------------------------------------------------------------------------------------

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

// The same of rows that are keys from `key` on, and columns that are queries from `position` on.
template <int kN>
ARCH_FN void hide_scores_of_keys(float (&score)[1][kN][4], int key, int num_keys, int position, const Plan& plan) {
  if (key + 16 <= num_keys && key + 15 <= position + plan.right && key >= position + 8 * kN - 1 - plan.left) return;
  const int lane = arch::lane_index();
  ARCH_UNROLL
  for (int i = 0; i < 4; ++i) {
    const int j = key + lane / 4 + 8 * (i / 2);
    const int from = j < num_keys ? j - plan.right - position : kEverything, to = j + plan.left - position;
    ARCH_UNROLL
    for (int n = 0; n < kN; ++n)
      if (const int c = 8 * n + 2 * (lane % 4) + i % 2; c < from || c > to) score[0][n][i] = -kInfinity;
  }
}

// --- softmax -----------------------------------------------------------------------------------------------------------
// Rows of thread: m, half -> 16 m + 8 half + lane / 4 of its warp's.

// Scores become 2^(factor (score - largest)), `sum` their sum and that of before; rescale(m, half, c): what has been summed so far of a
// row is to be multiplied with c.
template <int kM, int kN, typename F>
ARCH_FN void take_exponentials(float (&score)[kM][kN][4], float (&largest)[kM][2], float (&sum)[kM][2], float factor, const F& rescale) {
  ARCH_UNROLL
  for (int m = 0; m < kM; ++m)
    ARCH_UNROLL
    for (int half = 0; half < 2; ++half) {
      const float before = largest[m][half];
      float now = before;
      ARCH_UNROLL
      for (int n = 0; n < kN; ++n) now = arch::max(now, arch::max(score[m][n][2 * half], score[m][n][2 * half + 1]));
      now = arch::max(now, arch::shuffle_xor(now, 1));
      now = arch::max(now, arch::shuffle_xor(now, 2));
      largest[m][half] = now;
      const float base = now == -kInfinity ? 0 : now * factor;  // a row that has seen nothing yet: all stay 0
      const float correction = arch::exp2_approx(before * factor - base);
      float total = sum[m][half] * correction;
      ARCH_UNROLL
      for (int n = 0; n < kN; ++n)
        ARCH_UNROLL
        for (int i = 2 * half; i < 2 * half + 2; ++i)
          total += score[m][n][i] = arch::exp2_approx(score[m][n][i] * factor - base);
      sum[m][half] = total;
      rescale(m, half, correction);
    }
}

// What is summed up for a row is to be multiplied with inverse[half]; log-sum-exp into `largest`.
ARCH_FN void finish_row_sums(float (&inverse)[2], float (&largest)[2], float (&sum)[2], float scale) {
  ARCH_UNROLL
  for (int half = 0; half < 2; ++half) {
    float total = sum[half];
    total += arch::shuffle_xor(total, 1);
    total += arch::shuffle_xor(total, 2);
    inverse[half] = total > 0 ? 1 / total : 0;
    if (total > 0) largest[half] = largest[half] * scale + arch::log2(total) * kLn2;
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

// Whether the kernels for Hopper GPUs serve this call: of those that read the given tensors through tensor maps, which have no
// stride of 0.
inline bool is_for_hopper(const AttentionShape& s, std::initializer_list<ConstHeads> tensors) {
  if (architecture() != 90 || (s.head_dim != 64 && s.head_dim != 128) || s.num_queries == 0 || s.num_keys == 0) return false;
  for (const ConstHeads& x : tensors)
    if (x.row_stride <= 0 || x.head_stride <= 0) return false;
  return true;
}

}  // namespace trireme::kernels::TRIREME_ARCH::attention

namespace trireme::kernels::TRIREME_ARCH {
// Of calls that were checked, and that is_for_hopper.
void attention_forward_on_hopper(const AttentionForward& call, Stream stream);
}  // namespace trireme::kernels::TRIREME_ARCH
