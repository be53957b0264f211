// Attention forward on Hopper GPUs (Shah et al. 2024). A block stays on its multiprocessor and takes one tile of queries of one head
// after the other, 64 for each of its warp groups, and goes over the tiles of keys that these see, from the last to the first. While a
// group's softmax of a tile runs, so do its product of the probabilities before with their values and the products of the other groups,
// which take turns; while results go out, what the next queries need comes in.
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
  static constexpr int kQueries = 64 * kGroups, kKeys = 128, kN = kKeys / 8, kStages = D == 64 ? 4 : 2, kQueryStages = 2;
  static constexpr int kRegisters = D == 64 ? 160 : 232, kLoaderRegisters = D == 64 ? 32 : 40;
  static_assert(registers_suffice<kComputing, kRegisters, kLoaderRegisters>());
  using Queries = HopperTile<T, kQueries, D>;
  using Keys = HopperTile<T, kKeys, D>;

  // What a block works on at a time; the loader finds it.
  struct Part {
    Segment s;
    int head;
    int first, count;  // of the queries
    SeenKeys<kKeys> seen;
    int num_tiles;
    ARCH_FN Part(const Plan& p, const Segment& s, int head)
        : s(s), head(head), first(s.tile * kQueries), count(smaller(kQueries, s.num_queries - first)), seen(p, s, first, count), num_tiles(s.tile < 0 ? 0 : larger(0, seen.end - seen.begin)) {}
    ARCH_FN int key_of(int i) const { return (seen.end - 1 - i) * kKeys; }  // the first of its tile number i
  };
  struct Facts {
    Segment s;
    int head;
  };

  static constexpr int kKeys0 = (kQueryStages + 1) * Queries::kBytes, kBarriers = kKeys0 + 2 * kStages * Keys::kBytes;
  static constexpr int kFacts = kBarriers + kPipeBytes<kQueryStages> + 2 * kPipeBytes<kStages>, kSharedBytes = kFacts + kQueryStages * static_cast<int>(sizeof(Facts));
  static_assert(kSharedBytes <= 227 << 10);

  const Params& p;
  const Pipe<kQueryStages> queries_pipe = pipe_at<kQueryStages>(kBarriers);
  const Pipe<kStages> keys_pipe = pipe_at<kStages>(kBarriers + kPipeBytes<kQueryStages>), values_pipe = pipe_at<kStages>(kBarriers + kPipeBytes<kQueryStages> + kPipeBytes<kStages>);
  const Queries results{kQueryStages * Queries::kBytes};

  ARCH_FN static Queries queries(int i) { return Queries(i % kQueryStages * Queries::kBytes); }
  ARCH_FN static Keys keys(int i) { return Keys(kKeys0 + i % kStages * Keys::kBytes); }
  ARCH_FN static Keys values(int i) { return Keys(kKeys0 + (kStages + i % kStages) * Keys::kBytes); }
  ARCH_FN static Facts& facts(int i) { return arch::shared<Facts>(kFacts, kQueryStages)[i % kQueryStages]; }

  ARCH_FN static void run(const Params& p) { HopperForward{p}.run_block(); }

  ARCH_FN void run_block() const {
    if (arch::thread_index() == 0) {
      queries_pipe.begin(1, 4 * kGroups);
      keys_pipe.begin(1, 4 * kGroups);
      values_pipe.begin(1, 4 * kGroups);
      arch::barrier_init_done();
    }
    arch::sync_threads();
    if (arch::thread_index() >= kComputing) {
      arch::registers_down<kLoaderRegisters>();
      if (arch::thread_index() < kComputing + arch::kWarp) each_part([this](int part, int index, int first_tile) { return load(part, index, first_tile); });
    } else {
      arch::registers_up<kRegisters>();
      const int group = arch::shuffle(arch::warp_index() / 4, 0);  // known to be the same in all lanes
      bool had_turn = false;
      each_part([&](int part, int, int first_tile) { return compute(part, first_tile, group, had_turn); });
      if (group == 0 && had_turn) arch::wait_for_turn(kTurn, 2 * kGroup);  // that was given to it last
    }
  }

  // f(number of the part in this block, in the grid, number of its first tile of keys in this block), which returns how many these are.
  template <typename F>
  ARCH_FN void each_part(const F& f) const {
    const auto index_of = [](int part) { return arch::block_index().x + part * arch::grid_size().x; };
    for (int part = 0, first_tile = 0; index_of(part) < p.plan.num_tiles * p.plan.num_heads; ++part) first_tile += f(part, index_of(part), first_tile);
  }

  // By a warp.
  ARCH_FN int load(int part, int index, int first_tile) const {
    const Work work = block_work(p.plan, p.plan.num_heads, index);
    const Segment s = find_segment<kQueries>(p.plan, p.plan.cu_seqlens_q, p.plan.num_tiles - 1 - work.tile);  // the long ones first
    const Part at(p.plan, s, work.head);
    if (arch::lane_index() > 0) return at.num_tiles;
    const int key_head = at.head / p.plan.group;
    queries_pipe.wait_for_space(part);
    facts(part) = {s, work.head};
    arch::barrier_arrive_expect(queries_pipe.at(part), at.num_tiles > 0 ? Queries::kBytes : 0);
    if (at.num_tiles > 0) queries(part).load(p.q, s.q_begin + at.first, at.head, queries_pipe.at(part));
    for (int i = 0; i < at.num_tiles; ++i) {
      const int tile = first_tile + i;
      keys_pipe.wait_for_space(tile);
      arch::barrier_arrive_expect(keys_pipe.at(tile), Keys::kBytes);
      keys(tile).load(p.k, s.k_begin + at.key_of(i), key_head, keys_pipe.at(tile));
      values_pipe.wait_for_space(tile);
      arch::barrier_arrive_expect(values_pipe.at(tile), Keys::kBytes);
      values(tile).load(p.v, s.k_begin + at.key_of(i), key_head, values_pipe.at(tile));
    }
    return at.num_tiles;
  }

  ARCH_FN int compute(int part, int first_tile, int group, bool& had_turn) const {
    queries_pipe.wait_for_tile(part);
    const Part at(p.plan, facts(part).s, facts(part).head);
    if (at.s.tile < 0) {
      arch::sync_warp();  // all have read the facts
      queries_pipe.release(part);
      return 0;
    }
    const int warp_row = arch::warp_index() * 16, num_tiles = at.num_tiles;
    float score[1][kN][4], out[D / 8][4];
    float largest[1][2] = {{-kInfinity, -kInfinity}}, sum[1][2] = {}, correction[2] = {1, 1};
    uint32_t probability[kN / 2][4];

    const auto take_softmax = [&](int i) {
      hide_scores(score, at.key_of(i), at.s.num_keys, at.first + warp_row + at.s.offset(), p.plan);
      take_exponentials(score, largest, sum, p.plan.scale * kLog2E, [&](int, int half, float c) { correction[half] = c; });
    };
    const auto multiply_keys = [&](int tile) {
      ARCH_UNROLL
      for (int k = 0; k < D; k += 16) arch::group_mma<T>(score[0], queries(part).rows(group * 64, k), keys(tile).rows(0, k), k > 0);
      arch::group_commit();
    };
    const auto multiply_values = [&](int tile) {
      ARCH_UNROLL
      for (int k = 0; k < kKeys; k += 16) arch::group_mma<T>(out, probability[k / 16], values(tile).columns(k, 0), tile > first_tile || k > 0);
      arch::group_commit();
    };

    if (num_tiles > 0) {
      keys_pipe.wait_for_tile(first_tile);
      arch::group_fence(score[0]);
      multiply_keys(first_tile);
      arch::group_wait<0>(score[0]);
      keys_pipe.release(first_tile);
      take_softmax(0);
      as_left<T, kN>(probability, score[0]);
      if (const int left = at.s.num_keys - at.key_of(0); left < kKeys) {
        values_pipe.wait_for_tile(first_tile);
        values(first_tile).template clear<kComputing>(left);
        arch::async_fence();
        arch::sync_named(kAllGroups, kComputing);
      }
    }
    for (int i = 1; i < num_tiles; ++i) {
      const int tile = first_tile + i;
      keys_pipe.wait_for_tile(tile);
      if (had_turn || group > 0) arch::wait_for_turn(kTurn + group, 2 * kGroup);
      had_turn = true;
      arch::group_fence(score[0]);
      multiply_keys(tile);
      values_pipe.wait_for_tile(tile - 1);
      arch::group_fence(out, probability);
      multiply_values(tile - 1);
      arch::give_turn(kTurn + (group + 1) % kGroups, 2 * kGroup);
      arch::group_wait<1>(score[0]);
      keys_pipe.release(tile);
      take_softmax(i);
      arch::settle(sum[0][0]), arch::settle(sum[0][1]);
      arch::group_wait<0>(out, probability);
      values_pipe.release(tile - 1);
      rescale(out, correction);
      as_left<T, kN>(probability, score[0]);
    }
    const Part again(p.plan, facts(part).s, facts(part).head);  // rather than in registers all the time
    arch::sync_warp();                                          // all have read the facts
    queries_pipe.release(part);
    if (num_tiles > 0) {
      const int tile = first_tile + num_tiles - 1;
      values_pipe.wait_for_tile(tile);
      arch::group_fence(out, probability);
      multiply_values(tile);
      arch::group_wait<0>(out, probability);
      values_pipe.release(tile);
    } else {
      set_zero(out);
    }
    write(again, warp_row, out, largest[0], sum[0]);
    return num_tiles;
  }

  ARCH_FN void write(const Part& at, int warp_row, const float (&out)[D / 8][4], float (&largest)[2], float (&sum)[2]) const {
    float inverse[2];
    finish_row_sums(inverse, largest, sum, p.plan.scale);
    results.put_result(warp_row, out, inverse[0], inverse[1]);
    arch::sync_warp();
    results.write_rows(warp_row, row_of<T>(p.o, at.s.q_begin + at.first + warp_row, at.head), p.o.row_stride, at.count - warp_row);
    arch::sync_warp();  // the rows of the next part may come
    if (!p.lse || arch::lane_index() % 4 != 0) return;
    float* lse = p.lse + int64_t{at.head} * p.plan.num_queries + at.s.q_begin + at.first;
    ARCH_UNROLL
    for (int half = 0; half < 2; ++half)
      if (const int row = warp_row + 8 * half + arch::lane_index() / 4; row < at.count) lse[row] = largest[half];
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
    arch::launch<Kernel>({smaller(p.num_tiles * static_cast<int>(s.num_heads), arch::num_multiprocessors()), 1, 1}, Kernel::kSharedBytes, stream,
                         {p, map(call.q, s.num_queries, s.num_heads, Kernel::kQueries), map(call.k, s.num_keys, s.num_key_heads, Kernel::kKeys),
                          map(call.v, s.num_keys, s.num_key_heads, Kernel::kKeys), call.o, call.lse});
  });
}

}  // namespace trireme::kernels::TRIREME_ARCH
