// Attention backward on Hopper GPUs: KeySide and QuerySide of attention_backward.cu, of two warp groups and a loader.
#include "kernels/attention_backward.h"
#include "kernels/attention_hopper.h"

namespace trireme::kernels::TRIREME_ARCH {
namespace attention {

inline constexpr int kGroups = 2, kComputing = kGroups * kGroup, kRegisters = 240, kLoaderRegisters = 24;
static_assert(registers_suffice<kComputing, kRegisters, kLoaderRegisters>());

// A group has 64 of the keys. Its scores of a tile of queries are transposed, [keys, queries], so that p and ds are left factors as they
// lie in registers; for grad_q (kAdds) ds goes through shared memory, and a group has 64 queries or 64 columns of the products, which
// are added to memory while ds is multiplied with the queries.
template <typename T, int D, bool kAdds>
struct HopperKeySide {
  struct Params {
    BackwardParams call;
    arch::TensorMap q, k, v, grad_o;
  };
  static constexpr bool kHopper = true;
  static constexpr int kThreads = kComputing + kGroup;
  static constexpr int kKeys = 64 * kGroups, kQueries = D == 64 ? 128 : 64, kN = kQueries / 8, kStages = 2;
  static constexpr bool kEarly = D != 64;  // p is multiplied before ds is known; with 64 columns there are not registers enough
  using Keys = HopperTile<T, kKeys, D>;
  using Queries = HopperTile<T, kQueries, D>;
  using Scores = HopperTile<T, kKeys, kQueries>;
  static constexpr int kStages0 = 4 * Keys::kBytes, kScores0 = kStages0 + 2 * kStages * Queries::kBytes, kStatistics = kScores0 + (kAdds ? 2 * Scores::kBytes : 0);
  static constexpr int kStatisticBytes = 2 * kQueries * 4, kBarriers = kStatistics + kStages * kStatisticBytes, kSharedBytes = kBarriers + 8 + kPipeBytes<kStages>;
  static_assert(kSharedBytes <= 227 << 10);

  const Params& p;
  const Plan& plan;
  const Segment s;
  const KeyHeadPart part;
  const int first;  // of the keys
  const int begin, tiles, steps;
  const Keys keys{0}, values{Keys::kBytes}, results_k{2 * Keys::kBytes}, results_v{3 * Keys::kBytes};
  const Shared<uint64_t> has_keys = arch::shared<uint64_t>(kBarriers, 1);
  const Pipe<kStages> pipe = pipe_at<kStages>(kBarriers + 8);

  ARCH_FN static Queries queries(int step) { return Queries(kStages0 + step % kStages * Queries::kBytes); }
  ARCH_FN static Queries grad_outs(int step) { return Queries(kStages0 + (kStages + step % kStages) * Queries::kBytes); }
  ARCH_FN static Scores grad_scores(int step) { return Scores(kScores0 + step % 2 * Scores::kBytes); }
  ARCH_FN static Shared<float> statistics(int step) { return arch::shared<float>(kStatistics + step % kStages * kStatisticBytes, 2 * kQueries); }  // exponents, deltas
  ARCH_FN int head_of(int step) const { return part.first_head + step / tiles; }
  ARCH_FN int query_of(int step) const { return (begin + step % tiles) * kQueries; }

  ARCH_FN static void run(const Params& p) {
    const Work work = block_work(p.call.plan, p.call.num_key_heads * p.call.num_parts);
    const Segment s = find_segment<kKeys>(p.call.plan, p.call.plan.cu_seqlens_k, work.tile);
    if (s.tile < 0) return;
    const int first = s.tile * kKeys;
    HopperKeySide(p, s, work.head, SeeingQueries<kQueries>(p.call.plan, s, first, smaller(kKeys, s.num_keys - first))).run_block();
  }
  ARCH_FN HopperKeySide(const Params& p, const Segment& s, int head, const SeeingQueries<kQueries>& seeing)
      : p(p), plan(p.call.plan), s(s), part(p.call, KeyHeadPart::first_head_of(p.call, head)), first(s.tile * kKeys), begin(seeing.begin), tiles(larger(0, seeing.end - seeing.begin)), steps(tiles * part.num_heads) {}

  ARCH_FN void run_block() const {
    if (arch::thread_index() == 0) {
      arch::barrier_init(&has_keys[0], 1);
      pipe.begin(2, 4 * kGroups);
      arch::barrier_init_done();
    }
    arch::sync_threads();
    if (arch::thread_index() >= kComputing) {
      arch::registers_down<kLoaderRegisters>();
      if (arch::thread_index() < kComputing + arch::kWarp && steps > 0) load();
    } else {
      arch::registers_up<kRegisters>();
      compute();
    }
  }

  // By a warp, whose lanes read the statistics.
  ARCH_FN void load() const {
    const int lane = arch::lane_index();
    if (lane == 0) {
      arch::barrier_arrive_expect(&has_keys[0], 2 * Keys::kBytes);
      keys.load(p.k, s.k_begin + first, part.key_head, &has_keys[0]);
      values.load(p.v, s.k_begin + first, part.key_head, &has_keys[0]);
    }
    for (int step = 0; step < steps; ++step) {
      const int query = query_of(step), head = head_of(step);
      pipe.wait_for_space(step);
      if (lane == 0) {
        arch::barrier_arrive_expect(pipe.at(step), 2 * Queries::kBytes);
        queries(step).load(p.q, s.q_begin + query, head, pipe.at(step));
        grad_outs(step).load(p.grad_o, s.q_begin + query, head, pipe.at(step));
      }
      const int64_t at = int64_t{head} * plan.num_queries + s.q_begin + query;
      const auto known = statistics(step);
      ARCH_UNROLL
      for (int i = lane; i < kQueries; i += arch::kWarp) {
        const bool within = query + i < s.num_queries;
        known[i] = within ? exponent(p.call.lse[at + i]) : kInfinity;
        known[kQueries + i] = within ? p.call.delta[at + i] : 0;
      }
      arch::sync_warp();
      if (lane == 0) arch::barrier_arrive(pipe.at(step));
    }
  }

  ARCH_FN void compute() const {
    const int group = arch::shuffle(arch::warp_index() / 4, 0), row = arch::warp_index() * 16, lane = arch::lane_index();
    const int count = smaller(kKeys, s.num_keys - first);
    const float factor = plan.scale * kLog2E;
    float score[1][kN][4], grad[kN][4], grad_k[D / 8][4], grad_v[D / 8][4], grad_q[8][4];
    uint32_t p_left[kN / 2][4], grad_left[kN / 2][4];

    const auto multiply_p = [&](int step) {
      as_left<T, kN>(p_left, score[0]);
      arch::group_fence(grad_v, p_left);
      ARCH_UNROLL
      for (int k = 0; k < kQueries; k += 16) arch::group_mma<T>(grad_v, p_left[k / 16], grad_outs(step).columns(k, 0), step > 0 || k > 0);
      arch::group_commit();
    };

    if (steps > 0) {
      arch::barrier_wait(&has_keys[0], 0);
      if (count < kKeys) {
        keys.template clear<kComputing>(count);
        values.template clear<kComputing>(count);
        arch::async_fence();
        arch::sync_named(kAllGroups, kComputing);
      }
    }
    int head = part.first_head, query = begin * kQueries;
    for (int step = 0; step < steps; ++step) {
      const auto known = statistics(step);
      pipe.wait_for_tile(step);
      if (const int left = s.num_queries - query; left < kQueries) {
        queries(step).template clear<kComputing>(left);
        grad_outs(step).template clear<kComputing>(left);
        arch::async_fence();
        arch::sync_named(kAllGroups, kComputing);
      }
      arch::group_fence(score[0]);
      ARCH_UNROLL
      for (int k = 0; k < D; k += 16) arch::group_mma<T>(score[0], keys.rows(group * 64, k), queries(step).rows(0, k), k > 0);
      arch::group_commit();
      arch::group_fence(grad);
      ARCH_UNROLL
      for (int k = 0; k < D; k += 16) arch::group_mma<T>(grad, values.rows(group * 64, k), grad_outs(step).rows(0, k), k > 0);
      arch::group_commit();
      arch::group_wait<1>(score[0]);
      hide_scores_of_keys(score, first + row, s.num_keys, query + s.offset(), plan);
      ARCH_UNROLL
      for (int n = 0; n < kN; ++n)
        ARCH_UNROLL
        for (int i = 0; i < 4; ++i) score[0][n][i] = arch::exp2_approx(score[0][n][i] * factor - known[8 * n + 2 * (lane % 4) + i % 2]);
      if constexpr (kEarly) multiply_p(step);
      arch::group_wait<kEarly ? 1 : 0>(grad);
      ARCH_UNROLL
      for (int n = 0; n < kN; ++n)
        ARCH_UNROLL
        for (int i = 0; i < 4; ++i) grad[n][i] = score[0][n][i] * (grad[n][i] - known[kQueries + 8 * n + 2 * (lane % 4) + i % 2]);
      as_left<T, kN>(grad_left, grad);
      if constexpr (kAdds) {
        grad_scores(step).put_left(row, grad_left);
        arch::async_fence();
      }
      if constexpr (!kEarly) multiply_p(step);
      if constexpr (kAdds) {
        arch::sync_named(kAllGroups, kComputing);  // all of grad_scores is there, and all are done with those of two steps before
        arch::group_fence(grad_q);
        ARCH_UNROLL
        for (int k = 0; k < kKeys; k += 16)
          arch::group_mma<T>(grad_q, grad_scores(step).columns(k, D == 64 ? 64 * group : 0), keys.columns(k, D == 64 ? 0 : 64 * group), k > 0);
        arch::group_commit();
      }
      arch::group_fence(grad_k, grad_left);
      ARCH_UNROLL
      for (int k = 0; k < kQueries; k += 16) arch::group_mma<T>(grad_k, grad_left[k / 16], queries(step).columns(k, 0), step > 0 || k > 0);
      arch::group_commit();
      if constexpr (kAdds) {
        arch::group_wait<1>(grad_q, grad_v);
        add_grad_q(grad_q, query + (D == 64 ? row : row % 64), head, D == 64 ? 0 : 64 * group);
      }
      arch::group_wait<0>(grad_v, grad_k);
      pipe.release(step);
      query += kQueries;
      if (query >= (begin + tiles) * kQueries) ++head, query = begin * kQueries;
    }
    if (steps == 0) set_zero(grad_k), set_zero(grad_v);
    if (p.call.part_sums) {
      part.template write_sums<D>(p.call, 0, s.k_begin + first + row, count - row, 0, grad_k);
      part.template write_sums<D>(p.call, 1, s.k_begin + first + row, count - row, 0, grad_v);
      return;
    }
    results_k.put_result(row, grad_k, plan.scale, plan.scale);
    results_v.put_result(row, grad_v, 1, 1);
    arch::sync_warp();
    results_k.write_rows(row, row_of<T>(p.call.grad_k, s.k_begin + first + row, part.key_head), p.call.grad_k.row_stride, count - row);
    results_v.write_rows(row, row_of<T>(p.call.grad_v, s.k_begin + first + row, part.key_head), p.call.grad_v.row_stride, count - row);
  }

  // A warp's 16 queries from `query` on, 64 columns from `column` on.
  ARCH_FN void add_grad_q(const float (&grad_q)[8][4], int query, int head, int column) const {
    ARCH_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int i = query + 8 * half + arch::lane_index() / 4;
      if (i >= s.num_queries) continue;
      float* to = p.call.sums + ((int64_t{s.q_begin} + i) * plan.num_heads + head) * D + column + 4 * (arch::lane_index() % 4);
      ARCH_UNROLL
      for (int n = 0; n < 8; n += 2) arch::atomic_add4(to + 8 * n, {grad_q[n][2 * half], grad_q[n][2 * half + 1], grad_q[n + 1][2 * half], grad_q[n + 1][2 * half + 1]});
    }
  }
};

// A group has 64 of the queries.
template <typename T, int D>
struct HopperQuerySide {
  struct Params {
    BackwardParams call;
    arch::TensorMap q, k, v, grad_o;
  };
  static constexpr bool kHopper = true;
  static constexpr int kThreads = kComputing + kGroup;
  static constexpr int kQueries = 64 * kGroups, kKeys = D == 64 ? 128 : 64, kN = kKeys / 8, kStages = 2;
  using Queries = HopperTile<T, kQueries, D>;
  using Keys = HopperTile<T, kKeys, D>;
  static constexpr int kBarriers = 3 * Queries::kBytes + 2 * kStages * Keys::kBytes, kSharedBytes = kBarriers + 8 + kPipeBytes<kStages>;

  const Params& p;
  const Plan& plan;
  const Segment s;
  const int head, first, count;  // of the queries
  const SeenKeys<kKeys> seen;
  const int num_tiles;
  const Queries queries{0}, grad_outs{Queries::kBytes}, results{2 * Queries::kBytes};
  const Shared<uint64_t> has_queries = arch::shared<uint64_t>(kBarriers, 1);
  const Pipe<kStages> pipe = pipe_at<kStages>(kBarriers + 8);

  ARCH_FN static Keys keys(int i) { return Keys(3 * Queries::kBytes + i % kStages * Keys::kBytes); }
  ARCH_FN static Keys values(int i) { return Keys(3 * Queries::kBytes + (kStages + i % kStages) * Keys::kBytes); }
  ARCH_FN int key_of(int i) const { return (seen.end - 1 - i) * kKeys; }

  ARCH_FN static void run(const Params& p) {
    const Plan& plan = p.call.plan;
    const Work work = block_work(plan, plan.num_heads);
    const Segment s = find_segment<kQueries>(plan, plan.cu_seqlens_q, plan.num_tiles - 1 - work.tile);  // the long ones first
    if (s.tile < 0) return;
    HopperQuerySide(p, s, work.head).run_block();
  }
  ARCH_FN HopperQuerySide(const Params& p, const Segment& s, int head)
      : p(p), plan(p.call.plan), s(s), head(head), first(s.tile * kQueries), count(smaller(kQueries, s.num_queries - first)), seen(plan, s, first, count), num_tiles(larger(0, seen.end - seen.begin)) {}

  ARCH_FN void run_block() const {
    if (arch::thread_index() == 0) {
      arch::barrier_init(&has_queries[0], 1);
      pipe.begin(1, 4 * kGroups);
      arch::barrier_init_done();
    }
    arch::sync_threads();
    if (arch::thread_index() >= kComputing) {
      arch::registers_down<kLoaderRegisters>();
      if (arch::thread_index() == kComputing && num_tiles > 0) load();
    } else {
      arch::registers_up<kRegisters>();
      compute();
    }
  }

  ARCH_FN void load() const {
    const int key_head = head / plan.group;
    arch::barrier_arrive_expect(&has_queries[0], 2 * Queries::kBytes);
    queries.load(p.q, s.q_begin + first, head, &has_queries[0]);
    grad_outs.load(p.grad_o, s.q_begin + first, head, &has_queries[0]);
    for (int i = 0; i < num_tiles; ++i) {
      pipe.wait_for_space(i);
      arch::barrier_arrive_expect(pipe.at(i), 2 * Keys::kBytes);
      keys(i).load(p.k, s.k_begin + key_of(i), key_head, pipe.at(i));
      values(i).load(p.v, s.k_begin + key_of(i), key_head, pipe.at(i));
    }
  }

  ARCH_FN void compute() const {
    const int group = arch::shuffle(arch::warp_index() / 4, 0), row = arch::warp_index() * 16;
    const float factor = plan.scale * kLog2E;
    float score[1][kN][4], grad[kN][4], grad_q[D / 8][4], subtract[2], delta[2];
    uint32_t grad_left[kN / 2][4];
    ARCH_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int i = row + 8 * half + arch::lane_index() / 4;
      const int64_t at = int64_t{head} * plan.num_queries + s.q_begin + first + i;
      subtract[half] = i < count ? exponent(p.call.lse[at]) : kInfinity;
      delta[half] = i < count ? p.call.delta[at] : 0;
    }
    if (num_tiles > 0) {
      arch::barrier_wait(&has_queries[0], 0);
      if (const int left = s.num_keys - key_of(0); left < kKeys) {
        pipe.wait_for_tile(0);
        keys(0).template clear<kComputing>(left);
        values(0).template clear<kComputing>(left);
        arch::async_fence();
        arch::sync_named(kAllGroups, kComputing);
      }
    }
    for (int i = 0; i < num_tiles; ++i) {
      pipe.wait_for_tile(i);
      arch::group_fence(score[0]);
      ARCH_UNROLL
      for (int k = 0; k < D; k += 16) arch::group_mma<T>(score[0], queries.rows(group * 64, k), keys(i).rows(0, k), k > 0);
      arch::group_commit();
      arch::group_fence(grad);
      ARCH_UNROLL
      for (int k = 0; k < D; k += 16) arch::group_mma<T>(grad, grad_outs.rows(group * 64, k), values(i).rows(0, k), k > 0);
      arch::group_commit();
      arch::group_wait<1>(score[0]);
      hide_scores(score, key_of(i), s.num_keys, first + row + s.offset(), plan);
      ARCH_UNROLL
      for (int n = 0; n < kN; ++n)
        ARCH_UNROLL
        for (int e = 0; e < 4; ++e) score[0][n][e] = arch::exp2_approx(score[0][n][e] * factor - subtract[e / 2]);
      arch::group_wait<0>(grad);
      ARCH_UNROLL
      for (int n = 0; n < kN; ++n)
        ARCH_UNROLL
        for (int e = 0; e < 4; ++e) grad[n][e] = score[0][n][e] * (grad[n][e] - delta[e / 2]);
      as_left<T, kN>(grad_left, grad);
      arch::group_fence(grad_q, grad_left);
      ARCH_UNROLL
      for (int k = 0; k < kKeys; k += 16) arch::group_mma<T>(grad_q, grad_left[k / 16], keys(i).columns(k, 0), i > 0 || k > 0);
      arch::group_commit();
      arch::group_wait<0>(grad_q);
      pipe.release(i);
    }
    if (num_tiles == 0) set_zero(grad_q);
    results.put_result(row, grad_q, plan.scale, plan.scale);
    arch::sync_warp();
    results.write_rows(row, row_of<T>(p.call.grad_q, s.q_begin + first + row, head), p.call.grad_q.row_stride, count - row);
  }
};

void add_gradients_on_hopper(const AttentionShape& s, const BackwardParams& params, Stream stream) {
  with_type_and_hopper_dim(s, [&](auto t, auto dim) {
    using T = decltype(t);
    const auto launch = [&]<typename Kernel>(Kernel*, int64_t num_rows, int tile_rows, int64_t num_heads, int64_t of_key_head) {
      BackwardParams p = params;
      p.plan = plan(s, num_rows, tile_rows, num_heads, of_key_head);
      const auto queries = [&](const ConstHeads& x) { return map_of<T>(x, s.num_queries, s.num_heads, dim, Kernel::kQueries); };
      const auto keys = [&](const ConstHeads& x) { return map_of<T>(x, s.num_keys, s.num_key_heads, dim, Kernel::kKeys); };
      arch::launch<Kernel>({p.plan.num_tiles * static_cast<int>(num_heads), 1, 1}, Kernel::kSharedBytes, stream, {p, queries(p.q), keys(p.k), keys(p.v), queries(p.grad_o)});
    };
    using Query = HopperQuerySide<T, dim>;
    const auto launch_key_side = [&](auto adds) {
      using Key = HopperKeySide<T, dim, adds>;
      launch(static_cast<Key*>(nullptr), s.num_keys, Key::kKeys, s.num_key_heads * params.num_parts, params.num_parts);
    };
    if (params.sums) return launch_key_side(std::true_type());
    launch_key_side(std::false_type());
    launch(static_cast<Query*>(nullptr), s.num_queries, Query::kQueries, s.num_heads, s.num_heads / s.num_key_heads);
  });
}

}  // namespace attention
}  // namespace trireme::kernels::TRIREME_ARCH
