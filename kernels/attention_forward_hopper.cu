// Attention forward on Hopper GPUs (Shah et al. 2024). A block has a tile of queries of one head, 64 for each of its warp groups, and
// goes over the tiles of keys that these see, from the last to the first. While a group's softmax of a tile runs, so do its product of
// the probabilities before with their values and the products of the other groups, which take turns.
#include "kernels/attention_hopper.h"

namespace trireme::kernels::TRIREME_ARCH {
namespace attention {

template <typename T, int D>
struct HopperForward {
  struct Params {
    Plan plan;
    arch::TensorMap q, k, v;
    Heads o;
    float* lse;
  };
  static constexpr bool kHopper = true;
  static constexpr int kGroups = D == 64 ? 3 : 2, kComputing = kGroups * kGroup, kThreads = kComputing + kGroup;
  static constexpr int kQueries = 64 * kGroups, kKeys = 128, kN = kKeys / 8, kStages = 2;
  using Queries = HopperTile<T, kQueries, D>;
  using Keys = HopperTile<T, kKeys, D>;
  static constexpr int kBarriers = 2 * Queries::kBytes + 2 * kStages * Keys::kBytes, kSharedBytes = kBarriers + 8 + 2 * kPipeBytes<kStages>;

  const Params& p;
  const Segment s;
  const int head, first, count;  // of the queries
  const SeenKeys<kKeys> seen;
  const int num_tiles;
  const Queries queries{0}, results{Queries::kBytes};
  const Shared<uint64_t> has_queries = arch::shared<uint64_t>(kBarriers, 1);
  const Pipe<kStages> keys_pipe = pipe_at<kStages>(kBarriers + 8), values_pipe = pipe_at<kStages>(kBarriers + 8 + kPipeBytes<kStages>);

  ARCH_FN static Keys keys(int i) { return Keys(2 * Queries::kBytes + i % kStages * Keys::kBytes); }
  ARCH_FN static Keys values(int i) { return Keys(2 * Queries::kBytes + (kStages + i % kStages) * Keys::kBytes); }
  ARCH_FN int key_of(int i) const { return (seen.end - 1 - i) * kKeys; }  // the first of tile number i

  ARCH_FN static void run(const Params& p) {
    const Work work = block_work(p.plan, p.plan.num_heads);
    const Segment s = find_segment<kQueries>(p.plan, p.plan.cu_seqlens_q, p.plan.num_tiles - 1 - work.tile);  // the long ones first
    if (s.tile < 0) return;
    HopperForward(p, s, work.head).run_block();
  }
  ARCH_FN HopperForward(const Params& p, const Segment& s, int head)
      : p(p), s(s), head(head), first(s.tile * kQueries), count(smaller(kQueries, s.num_queries - first)), seen(p.plan, s, first, count), num_tiles(larger(0, seen.end - seen.begin)) {}

  ARCH_FN void run_block() const {
    if (arch::thread_index() == 0) {
      arch::barrier_init(&has_queries[0], 1);
      keys_pipe.begin(1, 4 * kGroups);
      values_pipe.begin(1, 4 * kGroups);
      arch::barrier_init_done();
    }
    arch::sync_threads();
    if (arch::thread_index() >= kComputing) {
      arch::registers_down<D == 64 ? 32 : 24>();
      if (arch::thread_index() == kComputing && num_tiles > 0) load();
    } else {
      arch::registers_up<D == 64 ? 160 : 240>();
      compute();
    }
  }

  ARCH_FN void load() const {
    const int key_head = head / p.plan.group;
    arch::barrier_arrive_expect(&has_queries[0], Queries::kBytes);
    queries.load(p.q, s.q_begin + first, head, &has_queries[0]);
    for (int i = 0; i < num_tiles; ++i) {
      keys_pipe.wait_for_space(i);
      arch::barrier_arrive_expect(keys_pipe.at(i), Keys::kBytes);
      keys(i).load(p.k, s.k_begin + key_of(i), key_head, keys_pipe.at(i));
      values_pipe.wait_for_space(i);
      arch::barrier_arrive_expect(values_pipe.at(i), Keys::kBytes);
      values(i).load(p.v, s.k_begin + key_of(i), key_head, values_pipe.at(i));
    }
  }

  ARCH_FN void compute() const {
    const int group = arch::shuffle(arch::warp_index() / 4, 0),  // known to be the same in all lanes
        warp_row = arch::warp_index() * 16;
    float score[1][kN][4], out[D / 8][4];
    float largest[1][2] = {{-kInfinity, -kInfinity}}, sum[1][2] = {}, correction[2] = {1, 1};
    uint32_t probability[kN / 2][4];

    const auto take_softmax = [&](int i) {
      hide_scores(score, key_of(i), s.num_keys, first + warp_row + s.offset(), p.plan);
      take_exponentials(score, largest, sum, p.plan.scale * kLog2E, [&](int, int half, float c) { correction[half] = c; });
    };
    const auto multiply_keys = [&](int i) {
      ARCH_UNROLL
      for (int k = 0; k < D; k += 16) arch::group_mma<T>(score[0], queries.rows(group * 64, k), keys(i).rows(0, k), k > 0);
      arch::group_commit();
    };
    const auto multiply_values = [&](int i) {
      ARCH_UNROLL
      for (int k = 0; k < kKeys; k += 16) arch::group_mma<T>(out, probability[k / 16], values(i).columns(k, 0), i > 0 || k > 0);
      arch::group_commit();
    };

    if (num_tiles > 0) {
      arch::barrier_wait(&has_queries[0], 0);
      keys_pipe.wait_for_tile(0);
      arch::group_fence(score[0]);
      multiply_keys(0);
      arch::group_wait<0>(score[0]);
      keys_pipe.release(0);
      take_softmax(0);
      as_left<T, kN>(probability, score[0]);
      if (const int left = s.num_keys - key_of(0); left < kKeys) {
        values_pipe.wait_for_tile(0);
        values(0).template clear<kComputing>(left);
        arch::async_fence();
        arch::sync_named(kAllGroups, kComputing);
      }
    }
    for (int i = 1; i < num_tiles; ++i) {
      keys_pipe.wait_for_tile(i);
      if (i > 1 || group > 0) arch::wait_for_turn(kTurn + group, 2 * kGroup);
      arch::group_fence(score[0]);
      multiply_keys(i);
      values_pipe.wait_for_tile(i - 1);
      arch::group_fence(out, probability);
      multiply_values(i - 1);
      if (i + 1 < num_tiles || group + 1 < kGroups) arch::give_turn(kTurn + (group + 1) % kGroups, 2 * kGroup);
      arch::group_wait<1>(score[0]);
      keys_pipe.release(i);
      take_softmax(i);
      arch::settle(sum[0][0]), arch::settle(sum[0][1]);
      arch::group_wait<0>(out, probability);
      values_pipe.release(i - 1);
      rescale(out, correction);
      as_left<T, kN>(probability, score[0]);
    }
    if (num_tiles > 0) {
      values_pipe.wait_for_tile(num_tiles - 1);
      arch::group_fence(out, probability);
      multiply_values(num_tiles - 1);
      arch::group_wait<0>(out, probability);
    } else {
      set_zero(out);
    }

    float inverse[2];
    finish_row_sums(inverse, largest[0], sum[0], p.plan.scale);
    results.put_result(warp_row, out, inverse[0], inverse[1]);
    arch::sync_warp();
    results.write_rows(warp_row, row_of<T>(p.o, s.q_begin + first + warp_row, head), p.o.row_stride, count - warp_row);
    if (!p.lse || arch::lane_index() % 4 != 0) return;
    float* lse = p.lse + int64_t{head} * p.plan.num_queries + s.q_begin + first;
    ARCH_UNROLL
    for (int half = 0; half < 2; ++half)
      if (const int row = warp_row + 8 * half + arch::lane_index() / 4; row < count) lse[row] = largest[0][half];
  }

  ARCH_FN static void rescale(float (&out)[D / 8][4], const float (&correction)[2]) {
    ARCH_UNROLL
    for (int half = 0; half < 2; ++half) {
      if (arch::ballot(correction[half] != 1) == 0) continue;  // mostly, after the first tiles
      ARCH_UNROLL
      for (int n = 0; n < D / 8; ++n)
        ARCH_UNROLL
        for (int i = 2 * half; i < 2 * half + 2; ++i) out[n][i] *= correction[half];
    }
  }
};

}  // namespace attention

void attention_forward_on_hopper(const AttentionForward& call, Stream stream) {
  using namespace attention;
  const AttentionShape& s = call.shape;
  with_type_and_hopper_dim(s, [&](auto t, auto dim) {
    using T = decltype(t);
    using Kernel = HopperForward<T, dim>;
    const Plan p = plan(s, s.num_queries, Kernel::kQueries, s.num_heads, s.num_heads / s.num_key_heads);
    const auto map = [&](const ConstHeads& x, int64_t rows, int64_t heads, int tile_rows) { return map_of<T>(x, rows, heads, dim, tile_rows); };
    arch::launch<Kernel>({p.num_tiles * static_cast<int>(s.num_heads), 1, 1}, Kernel::kSharedBytes, stream,
                         {p, map(call.q, s.num_queries, s.num_heads, Kernel::kQueries), map(call.k, s.num_keys, s.num_key_heads, Kernel::kKeys),
                          map(call.v, s.num_keys, s.num_key_heads, Kernel::kKeys), call.o, call.lse});
  });
}

}  // namespace trireme::kernels::TRIREME_ARCH
