// Attention forward. A block has a tile of queries of one head and goes over the tiles of keys that these see, from the
// last to the first; each warp keeps the sums of its own rows. While the scores of a tile of keys are computed its
// values arrive, and while these are added the next keys do. Hopper GPUs have their own for some: attention_forward_hopper.cu.
#include "kernels/attention_tile.h"

namespace trireme::kernels::TRIREME_ARCH {
namespace attention {
namespace {

template <int D>
struct ForwardTiles {
  static constexpr int kWarps =
      D == 256 ? 8 : 4;  // with 32 rows a warp the sums of 256 columns would not fit in its registers
  static constexpr int kQueries = 128, kKeys = 64;
};

template <typename T, int D>
struct Forward {
  struct Params {
    Plan plan;
    ConstHeads q, k, v;
    Heads o;
    float* lse;
  };
  using Tiles = ForwardTiles<D>;
  static constexpr int kThreads = Tiles::kWarps * arch::kWarp, kQueries = Tiles::kQueries, kKeys = Tiles::kKeys;
  static constexpr int kRows = kQueries / Tiles::kWarps, kM = kRows / 16, kN = kKeys / 8;
  static constexpr int kQueryBytes = kTileBytes<T, kQueries, D>, kKeyBytes = kTileBytes<T, kKeys, D>;
  static constexpr int kSharedBytes = kQueryBytes + 2 * kKeyBytes;

  float score[kM][kN][4], out[kM][D / 8][4] = {};
  float largest[kM][2], sum[kM][2] = {};

  ARCH_FN static void run(const Params& p) {
    Forward f;
    f.run_block(p);
  }

  ARCH_FN void run_block(const Params& p) {
    const Work work = block_work(p.plan, p.plan.num_heads);
    const Segment s =
        find_segment<kQueries>(p.plan, p.plan.cu_seqlens_q, p.plan.num_tiles - 1 - work.tile);  // the long ones first
    if (s.tile < 0) return;
    const int first = s.tile * kQueries, count = smaller(kQueries, s.num_queries - first),
              key_head = work.head / p.plan.group;
    const int warp_row = arch::warp_index() * kRows,
              position = first + warp_row + s.offset();  // of the warp's first row
    const auto [begin, end] = SeenKeys<kKeys>(p.plan, s, first, count);

    const auto queries = arch::shared<T>(0, kQueryBytes / 2);
    const auto keys = arch::shared<T>(kQueryBytes, kKeyBytes / 2),
               values = arch::shared<T>(kQueryBytes + kKeyBytes, kKeyBytes / 2);
    auto copy_keys = [&](const Shared<T>& to, const ConstHeads& from, int tile) {
      copy_tile<kKeys, D, kThreads>(to, from, s.k_begin + tile * kKeys, key_head, s.num_keys - tile * kKeys);
    };
    ARCH_UNROLL
    for (int m = 0; m < kM; ++m) largest[m][0] = largest[m][1] = -kInfinity;

    if (begin < end) {
      copy_tile<kQueries, D, kThreads>(queries, p.q, s.q_begin + first, work.head, count);
      copy_keys(keys, p.k, end - 1);
      arch::copy_async_commit();
    }
    for (int tile = end - 1; tile >= begin; --tile) {
      arch::copy_async_wait<0>();
      arch::sync_threads();  // the keys are there, and all are done with the values before
      copy_keys(values, p.v, tile);
      arch::copy_async_commit();
      ARCH_UNROLL
      for (int m = 0; m < kM; ++m)
        ARCH_UNROLL
        for (int n = 0; n < kN; ++n)
          ARCH_UNROLL
          for (int i = 0; i < 4; ++i) score[m][n][i] = 0;
      multiply_rows<D>(score, queries, warp_row, keys, 0);
      arch::copy_async_wait<0>();
      arch::sync_threads();  // the values are there, and all are done with the keys
      if (tile > begin) {
        copy_keys(keys, p.k, tile - 1);
        arch::copy_async_commit();
      }
      hide_scores(score, tile * kKeys, s.num_keys, position, p.plan);
      take_exponentials(score, largest, sum, p.plan.scale * kLog2E, [&](int m, int half, float correction) {
        if (arch::ballot(correction != 1) == 0) return;  // mostly, after the first tiles
        ARCH_UNROLL
        for (int n = 0; n < D / 8; ++n)
          ARCH_UNROLL
          for (int i = 2 * half; i < 2 * half + 2; ++i) out[m][n][i] *= correction;
      });
      multiply_result<D>(out, score, values, 0);
    }
    finish(p, queries, warp_row);
    if (warp_row >= count) return;
    write_rows<D, kRows, D>(queries, warp_row, 0, row_of<T>(p.o, s.q_begin + first + warp_row, work.head),
                            p.o.row_stride, count - warp_row);
    if (p.lse && arch::lane_index() % 4 == 0) {
      float* lse = p.lse + int64_t{work.head} * p.plan.num_queries + s.q_begin + first;
      ARCH_UNROLL
      for (int m = 0; m < kM; ++m)
        ARCH_UNROLL
        for (int half = 0; half < 2; ++half)
          if (const int row = warp_row + 16 * m + 8 * half + arch::lane_index() / 4; row < count)
            lse[row] = largest[m][half];
    }
  }

  // The warp's rows of the output into its rows of the queries' tile; log-sum-exp into `largest`.
  ARCH_FN void finish(const Params& p, const Shared<T>& tile, int warp_row) {
    ARCH_UNROLL
    for (int m = 0; m < kM; ++m) {
      float inverse[2];
      finish_row_sums(inverse, largest[m], sum[m], p.plan.scale);
      put_result<D>(tile, warp_row + 16 * m, 0, out[m], inverse[0], inverse[1]);
    }
    arch::sync_warp();
  }
};

}  // namespace
}  // namespace attention

void attention_forward(const AttentionForward& call, Stream stream) {
  using namespace attention;
  const AttentionShape& s = call.shape;
  check_shape(s);
  check_heads("q", call.q.data, call.q.row_stride, call.q.head_stride, s.num_queries == 0);
  check_heads("k", call.k.data, call.k.row_stride, call.k.head_stride, s.num_keys == 0);
  check_heads("v", call.v.data, call.v.row_stride, call.v.head_stride, s.num_keys == 0);
  check_heads("o", call.o.data, call.o.row_stride, call.o.head_stride, s.num_queries == 0);
  if (s.num_queries == 0) return;
  if (is_for_hopper(s, {call.q, call.k, call.v})) return attention_forward_on_hopper(call, stream);
  with_type_and_dim(s, [&](auto t, auto dim) {
    using Kernel = Forward<decltype(t), dim>;
    const Plan p = plan(s, s.num_queries, Kernel::kQueries, s.num_heads, s.num_heads / s.num_key_heads);
    arch::launch<Kernel>({p.num_tiles * static_cast<int>(s.num_heads), 1, 1}, Kernel::kSharedBytes, stream,
                         {p, call.q, call.k, call.v, call.o, call.lse});
  });
}

}  // namespace trireme::kernels::TRIREME_ARCH
