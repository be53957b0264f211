// Attention backward (Dao 2023). With p = 2^(score - lse) computed again, dp = grad_o v^T, ds = p (dp - delta) and
// delta = sum over D of grad_o o:  grad_v = p^T grad_o,  grad_k = scale ds^T q,  grad_q = scale ds k.
//
//   Deltas      delta, and zeros where grad_q is to be summed up
//   KeySide     a block has a tile of keys and goes over the queries that see it, of a part of its key head's heads: grad_k and grad_v
//               stay in the registers of the warps, each with 16 keys; grad_q is added to memory in fp32, or left to QuerySide
//   QuerySide   a block has a tile of queries and goes over the keys that they see: grad_q in a fixed order
//   Rounding    grad_q from the sums in fp32
//   KeyRounding grad_k and grad_v, where there are several parts
#include "kernels/attention_backward.h"
#include "kernels/attention_tile.h"

namespace trireme::kernels::TRIREME_ARCH {
namespace attention {
namespace {

// A row of D elements is read by kLanes lanes, 8 each.
template <int D>
struct RowLanes {
  static constexpr int kLanes = D == 96 ? 16 : D / 8, kThreads = 256, kRows = kThreads / kLanes;
  bool within;
  int64_t row;
  int head, column;
  ARCH_FN RowLanes(int num_rows, int num_heads) {
    const int64_t index = int64_t{arch::block_index().x} * kRows + arch::thread_index() / kLanes;
    column = arch::thread_index() % kLanes * 8;
    row = index / num_heads, head = static_cast<int>(index % num_heads);
    within = row < num_rows && column < D;
  }
  ARCH_FN float* sums(const BackwardParams& p) const { return p.sums + (row * p.plan.num_heads + head) * D + column; }
};

template <typename T, int D>
struct Deltas {
  using Params = BackwardParams;
  using Lanes = RowLanes<D>;
  static constexpr int kThreads = Lanes::kThreads;

  ARCH_FN static void run(const Params& p) {
    const Lanes at(p.plan.num_queries, p.plan.num_heads);
    float delta = 0;
    if (at.within) {
      float o[8], grad_o[8];
      load_values<T, 8>(row_of<T>(p.o, at.row, at.head) + at.column, o);
      load_values<T, 8>(row_of<T>(p.grad_o, at.row, at.head) + at.column, grad_o);
      ARCH_UNROLL
      for (int i = 0; i < 8; ++i) delta += o[i] * grad_o[i];
      if (p.sums) {
        arch::store(at.sums(p), arch::Bytes16{});
        arch::store(at.sums(p) + 4, arch::Bytes16{});
      }
    }
    ARCH_UNROLL
    for (int mask = Lanes::kLanes / 2; mask > 0; mask /= 2) delta += arch::shuffle_xor(delta, mask);
    if (at.within && at.column == 0) p.delta[int64_t{at.head} * p.plan.num_queries + at.row] = delta;
  }
};

template <typename T, int D>
struct Rounding {
  using Params = BackwardParams;
  using Lanes = RowLanes<D>;
  static constexpr int kThreads = Lanes::kThreads;

  ARCH_FN static void run(const Params& p) {
    const Lanes at(p.plan.num_queries, p.plan.num_heads);
    if (!at.within) return;
    const float* sums = at.sums(p) - at.column;
    float x[8];
    ARCH_UNROLL
    for (int i = 0; i < 8; ++i) x[i] = sums[place_of_column(at.column + i)] * p.plan.scale;
    store_values<T, 8>(row_of<T>(p.grad_q, at.row, at.head) + at.column, x);
  }
};

template <typename T, int D>
struct KeyRounding {
  using Params = BackwardParams;
  using Lanes = RowLanes<D>;
  static constexpr int kThreads = Lanes::kThreads;

  ARCH_FN static void run(const Params& p) {
    const Lanes at(p.num_keys, p.num_key_heads);
    if (!at.within) return;
    const int64_t part = int64_t{p.num_keys} * p.num_key_heads * D;
    const float* sums = p.part_sums + (at.row * p.num_key_heads + at.head) * D + at.column;
    ARCH_UNROLL
    for (int which = 0; which < 2; ++which) {
      float total[8] = {}, x[8];
      for (int i = 0; i < p.num_parts; ++i, sums += part) {
        load_values<float, 8>(sums, x);
        ARCH_UNROLL
        for (int c = 0; c < 8; ++c) total[c] += x[c];
      }
      ARCH_UNROLL
      for (float& c : total) c *= which == 0 ? p.plan.scale : 1;
      store_values<T, 8>(row_of<T>(which == 0 ? p.grad_k : p.grad_v, at.row, at.head) + at.column, total);
    }
  }
};

template <int D>
struct KeyTiles {
  static constexpr int kWarps = 8;
  // Warps that share 16 keys: with 256 columns of grad_k and grad_v each, one would run out of registers. They share the
  // queries of scores, and the columns of the sums; p then goes through shared memory.
  static constexpr int kSharers = D == 256 ? 2 : 1;
  static constexpr int kKeys = 16 * kWarps / kSharers, kQueries = D == 256 ? 32 : 64;
};

template <typename T, int D>
struct KeySide {
  using Params = BackwardParams;
  using Tiles = KeyTiles<D>;
  static constexpr int kThreads = Tiles::kWarps * arch::kWarp, kKeys = Tiles::kKeys, kQueries = Tiles::kQueries,
                       kSharers = Tiles::kSharers;
  static constexpr int kN = kQueries / kSharers / 8, kColumns = D / kSharers;  // a warp's share of scores and of sums
  static constexpr int kRowWarps = kQueries / 16, kSumColumns = D / (Tiles::kWarps / kRowWarps);  // and of grad_q
  static constexpr int kKeyBytes = kTileBytes<T, kKeys, D>, kQueryBytes = kTileBytes<T, kQueries, D>,
                       kScoreBytes = kTileBytes<T, kKeys, kQueries>;
  static constexpr int kStatistics = 2 * kKeyBytes + 4 * kQueryBytes + kSharers * kScoreBytes;
  static constexpr int kSharedBytes = kStatistics + 2 * 2 * kQueries * 4;
  static_assert(kThreads >= 2 * kQueries);

  float grad_k[1][kColumns / 8][4] = {}, grad_v[1][kColumns / 8][4] = {};

  ARCH_FN static void run(const Params& p) {
    KeySide k;
    k.run_block(p);
  }

  ARCH_FN void run_block(const Params& p) {
    const Work work = block_work(p.plan, p.num_key_heads * p.num_parts);
    const int first_head = KeyHeadPart::first_head_of(p, work.head), key_head = KeyHeadPart(p, first_head).key_head;
    const Segment s = find_segment<kKeys>(p.plan, p.plan.cu_seqlens_k, work.tile);
    if (s.tile < 0) return;
    const int first = s.tile * kKeys, count = smaller(kKeys, s.num_keys - first);
    const SeeingQueries<kQueries> seeing(p.plan, s, first, count);
    const int begin = seeing.begin, tiles = larger(0, seeing.end - begin), steps = tiles * KeyHeadPart(p, first_head).num_heads;
    const int warp = arch::warp_index(), lane = arch::lane_index(), row = warp / kSharers * 16, share = warp % kSharers;

    const auto keys = arch::shared<T>(0, kKeyBytes / 2), values = arch::shared<T>(kKeyBytes, kKeyBytes / 2);
    const auto grad_scores = arch::shared<T>(2 * kKeyBytes + 4 * kQueryBytes, kScoreBytes / 2);
    auto queries = [&](int step) { return arch::shared<T>(2 * kKeyBytes + step % 2 * kQueryBytes, kQueryBytes / 2); };
    auto grad_outs = [&](int step) {
      return arch::shared<T>(2 * kKeyBytes + (2 + step % 2) * kQueryBytes, kQueryBytes / 2);
    };
    auto statistics = [&](int step) {
      return arch::shared<float>(kStatistics + step % 2 * 2 * kQueries * 4, 2 * kQueries);
    };  // exponents, deltas
    auto head_of = [&](int step) { return first_head + step / tiles; };
    auto query_of = [&](int step) { return (begin + step % tiles) * kQueries; };
    auto copy = [&](int step) {
      const int query = query_of(step), left = s.num_queries - query;
      copy_tile<kQueries, D, kThreads>(queries(step), p.q, s.q_begin + query, head_of(step), left);
      copy_tile<kQueries, D, kThreads>(grad_outs(step), p.grad_o, s.q_begin + query, head_of(step), left);
      arch::copy_async_commit();
    };
    auto statistic = [&](int step) -> float {  // a thread's of a step's
      const int thread = arch::thread_index(), query = query_of(step) + thread % kQueries;
      const int64_t at = int64_t{head_of(step)} * p.plan.num_queries + s.q_begin + query;
      if (thread < kQueries) return query < s.num_queries ? exponent(p.lse[at]) : kInfinity;
      return thread < 2 * kQueries && query < s.num_queries ? p.delta[at] : 0;
    };

    if (steps > 0) {
      copy_tile<kKeys, D, kThreads>(keys, p.k, s.k_begin + first, key_head, count);
      copy_tile<kKeys, D, kThreads>(values, p.v, s.k_begin + first, key_head, count);
      copy(0);
      if (arch::thread_index() < 2 * kQueries) statistics(0)[arch::thread_index()] = statistic(0);
    }
    for (int step = 0; step < steps; ++step) {
      arch::copy_async_wait<0>();
      arch::sync_threads();  // this step's queries are there, and all are done with the step before
      float next_statistic = 0;
      if (step + 1 < steps) {
        copy(step + 1);
        next_statistic = statistic(step + 1);
      }
      // Scores of the warp's 16 keys (rows) and its share of the queries (columns).
      float score[1][kN][4] = {}, grad[1][kN][4] = {};
      const int column = share * (kQueries / kSharers), query = query_of(step) + column;
      multiply_rows<D>(score, keys, row, queries(step), column);
      hide_scores_of_keys(score, first + row, s.num_keys, query + s.offset(), p.plan);
      const auto known = statistics(step);
      const float factor = p.plan.scale * kLog2E;
      ARCH_UNROLL
      for (int n = 0; n < kN; ++n)
        ARCH_UNROLL
        for (int i = 0; i < 4; ++i)
          score[0][n][i] = arch::exp2_approx(score[0][n][i] * factor - known[column + 8 * n + 2 * (lane % 4) + i % 2]);
      if constexpr (kSharers == 1) multiply_result<D>(grad_v, score, grad_outs(step), 0);
      multiply_rows<D>(grad, values, row, grad_outs(step), column);
      ARCH_UNROLL
      for (int n = 0; n < kN; ++n)
        ARCH_UNROLL
        for (int i = 0; i < 4; ++i)
          grad[0][n][i] = score[0][n][i] * (grad[0][n][i] - known[kQueries + column + 8 * n + 2 * (lane % 4) + i % 2]);
      if (kSharers > 1 || p.sums) put_result<kQueries>(grad_scores, row, column, grad[0], 1, 1);
      if constexpr (kSharers == 1) {
        multiply_result<D>(grad_k, grad, queries(step), 0);
        if (p.sums) arch::sync_threads();  // all of grad_scores is there
      } else {
        const auto scores = arch::shared<T>(2 * kKeyBytes + 4 * kQueryBytes + kScoreBytes, kScoreBytes / 2);
        put_result<kQueries>(scores, row, column, score[0], 1, 1);
        arch::sync_threads();  // all of both is there
        ARCH_UNROLL
        for (int i = 0; i < kQueries; i += 16) {
          uint32_t left[1][4];
          arch::load_matrix(left[0], corner<kQueries>(scores, row, i));
          multiply_step<D>(grad_v, left, grad_outs(step), i, share * kColumns);
          arch::load_matrix(left[0], corner<kQueries>(grad_scores, row, i));
          multiply_step<D>(grad_k, left, queries(step), i, share * kColumns);
        }
      }
      if (p.sums) add_grad_q(p, grad_scores, keys, s, query_of(step), head_of(step));
      if (step + 1 < steps && arch::thread_index() < 2 * kQueries)
        statistics(step + 1)[arch::thread_index()] = next_statistic;
    }
    const KeyHeadPart part(p, arch::recomputed(first_head));  // not kept in registers until here
    if (p.part_sums) {
      part.write_sums<D>(p, 0, s.k_begin + first + row, count - row, share * kColumns, grad_k[0]);
      part.write_sums<D>(p, 1, s.k_begin + first + row, count - row, share * kColumns, grad_v[0]);
      return;
    }
    if (p.sums) arch::sync_threads();  // all are done with the keys
    put_result<D>(keys, row, share * kColumns, grad_k[0], p.plan.scale, p.plan.scale);
    put_result<D>(values, row, share * kColumns, grad_v[0], 1, 1);
    arch::sync_warp();
    write_rows<D, 16, kColumns>(keys, row, share * kColumns, row_of<T>(p.grad_k, s.k_begin + first + row, part.key_head),
                                p.grad_k.row_stride, count - row);
    write_rows<D, 16, kColumns>(values, row, share * kColumns, row_of<T>(p.grad_v, s.k_begin + first + row, part.key_head),
                                p.grad_v.row_stride, count - row);
  }

  // sums += ds k of a tile of queries; a warp has 16 rows and kSumColumns columns.
  ARCH_FN static void add_grad_q(const Params& p, const Shared<T>& grad_scores, const Shared<T>& keys, const Segment& s,
                                 int query, int head) {
    const int warp = arch::warp_index(), lane = arch::lane_index(), row = warp % kRowWarps * 16,
              column = warp / kRowWarps * kSumColumns;
    float grad_q[1][kSumColumns / 8][4] = {};
    ARCH_UNROLL
    for (int key = 0; key < kKeys; key += 16) {
      uint32_t left[1][4];
      arch::load_matrix_transposed(left[0], exchanged_corner<kQueries>(grad_scores, key, row));
      multiply_step<D>(grad_q, left, keys, key, column);
    }
    ARCH_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int i = query + row + 8 * half + lane / 4;
      if (i >= s.num_queries) continue;
      float* to = p.sums + ((int64_t{s.q_begin} + i) * p.plan.num_heads + head) * D + column + 4 * (lane % 4);
      ARCH_UNROLL
      for (int n = 0; n < kSumColumns / 8; n += 2)
        arch::atomic_add4(to + 8 * n, {grad_q[0][n][2 * half], grad_q[0][n][2 * half + 1], grad_q[0][n + 1][2 * half],
                                       grad_q[0][n + 1][2 * half + 1]});
    }
  }
};

template <typename T, int D>
struct QuerySide {
  using Params = BackwardParams;
  static constexpr int kWarps = D == 256 ? 4 : 8, kThreads = kWarps * arch::kWarp;
  static constexpr int kQueries = 16 * kWarps, kKeys = D == 256 ? 32 : 64, kN = kKeys / 8;
  static constexpr int kQueryBytes = kTileBytes<T, kQueries, D>, kKeyBytes = kTileBytes<T, kKeys, D>;
  static constexpr int kSharedBytes = 2 * kQueryBytes + 4 * kKeyBytes;

  ARCH_FN static void run(const Params& p) {
    const Work work = block_work(p.plan, p.plan.num_heads);
    const Segment s =
        find_segment<kQueries>(p.plan, p.plan.cu_seqlens_q, p.plan.num_tiles - 1 - work.tile);  // the long ones first
    if (s.tile < 0) return;
    const int first = s.tile * kQueries, count = smaller(kQueries, s.num_queries - first),
              key_head = work.head / p.plan.group;
    const int lane = arch::lane_index(), row = arch::warp_index() * 16, position = first + row + s.offset();
    const SeenKeys<kKeys> seen(p.plan, s, first, count);
    const int begin = seen.begin, end = seen.end;

    const auto queries = arch::shared<T>(0, kQueryBytes / 2), grad_outs = arch::shared<T>(kQueryBytes, kQueryBytes / 2);
    auto keys = [&](int tile) { return arch::shared<T>(2 * kQueryBytes + tile % 2 * kKeyBytes, kKeyBytes / 2); };
    auto values = [&](int tile) {
      return arch::shared<T>(2 * kQueryBytes + (2 + tile % 2) * kKeyBytes, kKeyBytes / 2);
    };
    auto copy = [&](int tile) {
      const int key = tile * kKeys;
      copy_tile<kKeys, D, kThreads>(keys(tile), p.k, s.k_begin + key, key_head, s.num_keys - key);
      copy_tile<kKeys, D, kThreads>(values(tile), p.v, s.k_begin + key, key_head, s.num_keys - key);
      arch::copy_async_commit();
    };
    if (begin < end) {
      copy_tile<kQueries, D, kThreads>(queries, p.q, s.q_begin + first, work.head, count);
      copy_tile<kQueries, D, kThreads>(grad_outs, p.grad_o, s.q_begin + first, work.head, count);
      copy(begin);
    }
    float subtract[2], delta[2];
    ARCH_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int i = row + 8 * half + lane / 4;
      const int64_t at = int64_t{work.head} * p.plan.num_queries + s.q_begin + first + i;
      subtract[half] = i < count ? exponent(p.lse[at]) : kInfinity;
      delta[half] = i < count ? p.delta[at] : 0;
    }
    float grad_q[1][D / 8][4] = {};
    for (int tile = begin; tile < end; ++tile) {
      arch::copy_async_wait<0>();
      arch::sync_threads();  // the tile is there, and all are done with the one before
      if (tile + 1 < end) copy(tile + 1);
      float score[1][kN][4] = {}, grad[1][kN][4] = {};
      multiply_rows<D>(score, queries, row, keys(tile), 0);
      multiply_rows<D>(grad, grad_outs, row, values(tile), 0);
      hide_scores(score, tile * kKeys, s.num_keys, position, p.plan);
      const float factor = p.plan.scale * kLog2E;
      ARCH_UNROLL
      for (int n = 0; n < kN; ++n)
        ARCH_UNROLL
        for (int i = 0; i < 4; ++i)
          grad[0][n][i] = arch::exp2_approx(score[0][n][i] * factor - subtract[i / 2]) * (grad[0][n][i] - delta[i / 2]);
      multiply_result<D>(grad_q, grad, keys(tile), 0);
    }
    arch::sync_warp();  // it alone has read these rows
    put_result<D>(queries, row, 0, grad_q[0], p.plan.scale, p.plan.scale);
    arch::sync_warp();
    write_rows<D, 16, D>(queries, row, 0, row_of<T>(p.grad_q, s.q_begin + first + row, work.head), p.grad_q.row_stride,
                         count - row);
  }
};

}  // namespace
}  // namespace attention

void attention_backward(const AttentionBackward& call, Stream stream) {
  using namespace attention;
  const AttentionShape& s = call.shape;
  check_shape(s);
  for (auto& [name, x] :
       {std::pair("q", call.q), {"o", call.o}, {"grad_o", call.grad_o}, {"grad_q", readable(call.grad_q)}})
    check_heads(name, x.data, x.row_stride, x.head_stride, s.num_queries == 0);
  for (auto& [name, x] :
       {std::pair("k", call.k), {"v", call.v}, {"grad_k", readable(call.grad_k)}, {"grad_v", readable(call.grad_v)}})
    check_heads(name, x.data, x.row_stride, x.head_stride, s.num_keys == 0);
  const int64_t needed = attention_backward_workspace_bytes(s, call.deterministic);
  refuse_unless(call.workspace_bytes >= needed, "a workspace of " + std::to_string(call.workspace_bytes) +
                                                    " bytes, where " + std::to_string(needed) + " are needed");
  refuse_unless(reinterpret_cast<uintptr_t>(call.workspace) % 16 == 0,
                "the workspace is not at a multiple of 16 bytes");
  refuse_unless(s.num_queries == 0 || call.lse, "lse is a null pointer");
  if (s.num_segments == 0) return;

  const int64_t parts = attention_backward_parts(s);
  auto* delta = static_cast<float*>(call.workspace);
  float* const sums = delta + (s.num_queries * s.num_heads + 3) / 4 * 4;
  float* const part_sums = sums + (call.deterministic ? 0 : s.num_queries * s.num_heads * s.head_dim);
  with_type_and_dim(s, [&](auto t, auto dim) {
    using T = decltype(t);
    BackwardParams p{
        {},          call.q,
        call.k,      call.v,
        call.o,      call.grad_o,
        call.grad_q, call.grad_k,
        call.grad_v, call.lse,
        delta,       call.deterministic ? nullptr : sums,
        static_cast<int>(s.num_keys), static_cast<int>(s.num_key_heads),
        static_cast<int>(parts), parts > 1 ? part_sums : nullptr};
    auto launch = [&]<typename Kernel>(Kernel, int64_t num_rows, int tile_rows, int64_t num_heads,
                                       int64_t of_key_head) {
      if (num_rows == 0) return;
      p.plan = plan(s, num_rows, tile_rows, num_heads, of_key_head);
      arch::launch<Kernel>({p.plan.num_tiles * static_cast<int>(num_heads), 1, 1}, Kernel::kSharedBytes, stream, p);
    };
    using Key = KeySide<T, dim>;
    using Query = QuerySide<T, dim>;
    const int64_t group = s.num_heads / s.num_key_heads;
    p.plan = plan(s, s.num_queries, Query::kQueries, s.num_heads, group);
    const arch::Index3 row_blocks = blocks_of(s.num_queries * s.num_heads, RowLanes<dim>::kRows);
    if (s.num_queries > 0) arch::launch<Deltas<T, dim>>(row_blocks, 0, stream, p);
    if (is_for_hopper(s, {call.q, call.k, call.v, call.grad_o})) {
      add_gradients_on_hopper(s, p, stream);
    } else {
      launch(Key{}, s.num_keys, Key::kKeys, s.num_key_heads * parts, parts);
      if (call.deterministic) launch(Query{}, s.num_queries, Query::kQueries, s.num_heads, group);
    }
    if (p.part_sums && s.num_keys > 0) arch::launch<KeyRounding<T, dim>>(blocks_of(s.num_keys * s.num_key_heads, RowLanes<dim>::kRows), 0, stream, p);
    if (!call.deterministic && s.num_queries > 0) arch::launch<Rounding<T, dim>>(row_blocks, 0, stream, p);
  });
}

}  // namespace trireme::kernels::TRIREME_ARCH
