// Attention of a few queries a sequence over a cache of keys and values: bound by reading the cache, which is done
// once. The queries of all heads of a key head are the rows of one tile; the keys are split over blocks, within a block
// over warps, and what these found is put together in their order.
#include "kernels/attention_tile.h"

namespace trireme::kernels::TRIREME_ARCH {
namespace attention {
namespace {

constexpr int kRows = 16;  // of a block: pairs of query and head

struct DecodeParams {
  AttentionDecode call;
  float scale;
  int left;  // the query at position p sees keys p - left .. p
  int group, row_tiles, num_splits;
  float* outs;  // [splits, B n, H, D]: each normalised for itself
  float* lse;   // [splits, B n, H], in base 2
};

template <typename T, int D>
struct Decode {
  using Params = DecodeParams;
  static constexpr int kWarps = 4, kThreads = kWarps * arch::kWarp, kKeys = 16 * kWarps;
  static constexpr int kQueryBytes = kTileBytes<T, kRows, D>, kKeyBytes = kTileBytes<T, kKeys, D>;
  static constexpr int kSharedBytes = kQueryBytes + 4 * kKeyBytes;
  static_assert(kWarps * kRows * (D + 2) * 4 <= 4 * kKeyBytes);  // the warps' results take the place of the keys

  // Row r of a tile: query r / group and its head r % group of the key head's.
  ARCH_FN static void run(const Params& p) {
    const AttentionDecode& c = p.call;
    const int split = arch::block_index().x % p.num_splits,
              row_tile = arch::block_index().x / p.num_splits % p.row_tiles;
    const int key_head = arch::block_index().y, sequence = arch::block_index().z;
    const int warp = arch::warp_index(), lane = arch::lane_index(), thread = arch::thread_index();
    const int num_queries = static_cast<int>(c.num_queries), first_row = row_tile * kRows,
              rows = smaller(kRows, num_queries * p.group - first_row);
    const int num_keys = c.lengths[sequence], page_rows = static_cast<int>(c.page_rows),
              offset = num_keys - num_queries;  // query i stands at position i + offset
    const int first_query = first_row / p.group, last_query = (first_row + rows - 1) / p.group;
    const int first_tile = larger(0, first_query + offset - p.left) / kKeys,
              end_tile = divide_up(larger(0, smaller(num_keys, last_query + offset + 1)), kKeys);
    const int per_split = divide_up(larger(0, end_tile - first_tile), p.num_splits);
    const int begin = first_tile + split * per_split, end = smaller(end_tile, begin + per_split);

    const auto queries = arch::shared<T>(0, kQueryBytes / 2);
    auto keys = [&](int tile) { return arch::shared<T>(kQueryBytes + tile % 2 * kKeyBytes, kKeyBytes / 2); };
    auto values = [&](int tile) { return arch::shared<T>(kQueryBytes + (2 + tile % 2) * kKeyBytes, kKeyBytes / 2); };
    auto copy = [&](int tile) {
      for (int i = thread; i < kKeys * (D / 8); i += kThreads) {
        const int r = i / (D / 8), column = i % (D / 8) * 8, key = tile * kKeys + r;
        const bool valid = key < num_keys;
        const int64_t page = !valid    ? 0
                             : c.pages ? c.pages[sequence * c.pages_per_sequence + key / page_rows]
                                       : sequence;
        const int64_t row = c.pages ? key % page_rows : key;
        arch::copy_async(keys(tile).at(r * kPitch<D> + column, 8),
                         row_of<T>(c.k, row, key_head) + page * c.k_page_stride + column, valid);
        arch::copy_async(values(tile).at(r * kPitch<D> + column, 8),
                         row_of<T>(c.v, row, key_head) + page * c.v_page_stride + column, valid);
      }
      arch::copy_async_commit();
    };
    auto row_of_query = [&](int r) { return int64_t{sequence} * num_queries + (first_row + r) / p.group; };
    auto head_of_row = [&](int r) { return key_head * p.group + (first_row + r) % p.group; };

    float out[1][D / 8][4] = {}, largest[2] = {-kInfinity, -kInfinity}, sum[2] = {};
    if (begin < end) {
      for (int i = thread; i < kRows * (D / 8); i += kThreads) {
        const int r = i / (D / 8), column = i % (D / 8) * 8;
        arch::copy_async(queries.at(r * kPitch<D> + column, 8),
                         row_of<T>(c.q, row_of_query(r), head_of_row(r)) + column, r < rows);
      }
      copy(begin);
    }
    for (int tile = begin; tile < end; ++tile) {
      arch::copy_async_wait<0>();
      arch::sync_threads();  // the tile is there, and all are done with the one before
      if (tile + 1 < end) copy(tile + 1);
      float score[1][2][4] = {};
      multiply_rows<D>(score, queries, 0, keys(tile), 16 * warp);
      const int key = tile * kKeys + 16 * warp;
      ARCH_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int position = (first_row + lane / 4 + 8 * half) / p.group + offset;
        float now = largest[half];
        ARCH_UNROLL
        for (int n = 0; n < 2; ++n)
          ARCH_UNROLL
          for (int i = 2 * half; i < 2 * half + 2; ++i) {
            const int j = key + 8 * n + 2 * (lane % 4) + i % 2;
            if (j >= num_keys || j > position || j < position - p.left) score[0][n][i] = -kInfinity;
            now = arch::max(now, score[0][n][i]);
          }
        now = arch::max(now, arch::shuffle_xor(now, 1));
        now = arch::max(now, arch::shuffle_xor(now, 2));
        const float factor = p.scale * kLog2E, base = now == -kInfinity ? 0 : now * factor,
                    correction = arch::exp2_approx(largest[half] * factor - base);
        largest[half] = now;
        sum[half] *= correction;
        ARCH_UNROLL
        for (int n = 0; n < 2; ++n)
          ARCH_UNROLL
          for (int i = 2 * half; i < 2 * half + 2; ++i)
            sum[half] += score[0][n][i] = arch::exp2_approx(score[0][n][i] * factor - base);
        ARCH_UNROLL
        for (int n = 0; n < D / 8; ++n)
          ARCH_UNROLL
          for (int i = 2 * half; i < 2 * half + 2; ++i) out[0][n][i] *= correction;
      }
      uint32_t left[1][4];
      as_left<T>(left[0], score[0][0], score[0][1]);
      multiply_step<D>(out, left, values(tile), 16 * warp, 0);
    }
    arch::sync_threads();  // all are done with the keys

    // Each warp's sums and statistics, then all warps' by all threads.
    const auto outs = arch::shared<float>(kQueryBytes, kWarps * kRows * D),
               statistics = arch::shared<float>(kQueryBytes + kWarps * kRows * D * 4, kWarps * kRows * 2);
    ARCH_UNROLL
    for (int half = 0; half < 2; ++half) {
      sum[half] += arch::shuffle_xor(sum[half], 1);
      sum[half] += arch::shuffle_xor(sum[half], 2);
      const int row = warp * kRows + lane / 4 + 8 * half;
      statistics[2 * row] = largest[half] == -kInfinity ? -kInfinity : largest[half] * p.scale * kLog2E;
      statistics[2 * row + 1] = sum[half];
      ARCH_UNROLL
      for (int n = 0; n < D / 8; ++n)
        ARCH_UNROLL
        for (int e = 0; e < 2; ++e) outs[row * D + 8 * n + 2 * (lane % 4) + e] = out[0][n][2 * half + e];
    }
    arch::sync_threads();
    for (int i = thread; i < rows * D; i += kThreads) {
      const int r = i / D, column = i % D;
      float all_largest = -kInfinity, all_sum = 0, x = 0;
      ARCH_UNROLL
      for (int w = 0; w < kWarps; ++w) all_largest = arch::max(all_largest, statistics[2 * (w * kRows + r)]);
      ARCH_UNROLL
      for (int w = 0; w < kWarps; ++w) {
        const float factor =
            all_largest == -kInfinity ? 0 : arch::exp2_approx(statistics[2 * (w * kRows + r)] - all_largest);
        all_sum += factor * statistics[2 * (w * kRows + r) + 1];
        x += factor * outs[(w * kRows + r) * D + column];
      }
      const int64_t at = (split * c.num_sequences * num_queries + row_of_query(r)) * c.num_heads + head_of_row(r);
      p.outs[at * D + column] = all_sum > 0 ? x / all_sum : 0;
      if (column == 0) p.lse[at] = all_sum > 0 ? all_largest + arch::log2(all_sum) : -kInfinity;
    }
  }
};

// A warp a query and head, in which each part of the keys has a lane: there are at most 32.
template <typename T, int D>
struct Combine {
  using Params = DecodeParams;
  static constexpr int kThreads = 256;

  ARCH_FN static void run(const Params& p) {
    const AttentionDecode& c = p.call;
    const int lane = arch::lane_index();
    const int64_t num_rows = c.num_sequences * c.num_queries * c.num_heads,
                  at = int64_t{arch::block_index().x} * (kThreads / arch::kWarp) + arch::warp_index();
    if (at >= num_rows) return;
    const float lse = lane < p.num_splits ? p.lse[lane * num_rows + at] : -kInfinity, largest = arch::warp_max(lse);
    const float share = largest == -kInfinity ? 0 : arch::exp2(lse - largest), sum = arch::warp_sum(share);
    float x[D / arch::kWarp] = {};
    for (int s = 0; s < p.num_splits; ++s) {
      const float factor = arch::shuffle(share, s);
      ARCH_UNROLL
      for (int i = 0; i < D / arch::kWarp; ++i)
        x[i] += factor * p.outs[(s * num_rows + at) * D + i * arch::kWarp + lane];
    }
    T* o = row_of<T>(c.o, at / c.num_heads, static_cast<int>(at % c.num_heads));
    ARCH_UNROLL
    for (int i = 0; i < D / arch::kWarp; ++i) o[i * arch::kWarp + lane] = arch::from_float<T>(sum > 0 ? x[i] / sum : 0);
  }
};

}  // namespace
}  // namespace attention

void decode_attention(const AttentionDecode& c, Stream stream) {
  using namespace attention;
  AttentionShape s;
  s.type = c.type, s.head_dim = c.head_dim, s.num_heads = c.num_heads, s.num_key_heads = c.num_key_heads,
  s.scale = c.scale, s.window = c.window;
  s.num_queries = s.num_keys = 0;
  check_shape(s);
  check_heads("q", c.q.data, c.q.row_stride, c.q.head_stride, c.num_sequences == 0);
  check_heads("o", c.o.data, c.o.row_stride, c.o.head_stride, c.num_sequences == 0);
  check_heads("k", c.k.data, c.k.row_stride, c.k.head_stride, c.num_sequences == 0);
  check_heads("v", c.v.data, c.v.row_stride, c.v.head_stride, c.num_sequences == 0);
  refuse_unless(c.k_page_stride % 8 == 0 && c.v_page_stride % 8 == 0, "pages are not at multiples of 16 bytes");
  refuse_unless(c.num_queries > 0 && c.num_queries * c.num_heads <= 65535,
                std::to_string(c.num_queries) + " queries a sequence of " + std::to_string(c.num_heads) + " heads");
  refuse_unless(c.num_sequences >= 0 && c.num_sequences <= 65535,
                std::to_string(c.num_sequences) + " sequences are not within 0 .. 65535");
  refuse_unless(c.max_length >= 0 && c.max_length < kEverything,
                "a length of " + std::to_string(c.max_length) + " is not within 0 .. 2^29");
  refuse_unless(!c.pages || (c.page_rows > 0 && c.page_rows < kEverything),
                "pages of " + std::to_string(c.page_rows) + " rows");
  refuse_unless(c.num_sequences == 0 || c.lengths, "lengths is a null pointer");
  const int64_t needed = decode_attention_workspace_bytes(c);
  refuse_unless(c.workspace_bytes >= needed, "a workspace of " + std::to_string(c.workspace_bytes) + " bytes, where " +
                                                 std::to_string(needed) + " are needed");
  if (c.num_sequences == 0) return;
  DecodeParams p{};
  p.call = c;
  p.scale = c.scale > 0 ? c.scale : 1 / std::sqrt(static_cast<float>(c.head_dim));
  p.left = c.window < 0 || c.window > kEverything ? kEverything : static_cast<int>(c.window) - 1;
  p.group = static_cast<int>(c.num_heads / c.num_key_heads);
  p.row_tiles = static_cast<int>((c.num_queries * p.group + kRows - 1) / kRows);
  p.num_splits = static_cast<int>(decode_attention_splits(c));
  const int64_t rows = p.num_splits * c.num_sequences * c.num_queries * c.num_heads;
  p.outs = static_cast<float*>(c.workspace);
  p.lse = p.outs + rows * c.head_dim;
  with_type_and_dim(s, [&](auto t, auto dim) {
    using Kernel = Decode<decltype(t), dim>;
    arch::launch<Kernel>(
        {p.num_splits * p.row_tiles, static_cast<int>(c.num_key_heads), static_cast<int>(c.num_sequences)},
        Kernel::kSharedBytes, stream, p);
    using Last = Combine<decltype(t), dim>;
    arch::launch<Last>(blocks_of(c.num_sequences * c.num_queries * c.num_heads, Last::kThreads / arch::kWarp), 0,
                       stream, p);
  });
}

}  // namespace trireme::kernels::TRIREME_ARCH
