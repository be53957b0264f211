#include "ops/attention_bf16.h"

#include <ATen/native/CPUBlas.h>

#include "ops/op_support.h"

namespace trireme {
namespace {

struct TileLoops {
  void (*tile)(const float*, const float*, const float*, const float*, float, bool, int, int, uint16_t*, uint16_t*,
               uint32_t*);
  bool (*softmax_tile)(const float*, float, bool, int, int, float*, float*, float*, uint32_t*);
  void (*scale_columns)(int64_t, const float*, float*);
  void (*multiply_pairs)(int64_t, int64_t, const uint16_t*, int64_t, const uint32_t*, float*, int64_t, bool);
  void (*pair_rows)(int64_t, const uint16_t*, int64_t, uint32_t*);
  void (*round_column)(int64_t, const float*, c10::BFloat16*);
  float (*dot)(int64_t, const c10::BFloat16*, const c10::BFloat16*);
  void (*round_row)(int64_t, const float*, c10::BFloat16*);
};

}  // namespace
}  // namespace trireme

#define TRIREME_LOOPS "ops/attention_bf16.inc"
#include "ops/vector_targets.h"

namespace trireme {
namespace {

using Value = c10::BFloat16;
constexpr int64_t kTile = 64;

// AMX, which oneDNN has code for: it compiles the few shapes used once each.
bool has_matrix_unit() {
  static const bool has = at::native::cpublas::could_pack(at::kBFloat16);
  return has;
}

// C [rows, 64] (+)= A [rows, depth] B, B in pairs of rows.
void multiply(int64_t rows, int64_t depth, const uint16_t* a, int64_t stride_a, const uint32_t* b, float* c, int64_t stride_c, bool add) {
  if (!has_matrix_unit()) return level2::kTileLoops.multiply_pairs(rows, depth, a, stride_a, b, c, stride_c, add);
  at::native::cpublas::brgemm(rows, kTile, depth, stride_a, kTile, stride_c, add, reinterpret_cast<const Value*>(a), reinterpret_cast<const Value*>(b), c, true);
}

Value* row_of(const at::Tensor& x_LHD, int64_t row, int64_t head) {
  return x_LHD.data_ptr<Value>() + row * x_LHD.stride(0) + head * x_LHD.stride(1);
}

// Rows [begin, end) of head `head` of x [L, heads, D] to `out` [.., D].
void copy_rows(const at::Tensor& x, int64_t head, int64_t begin, int64_t end, uint16_t* out) {
  const int64_t dim = x.size(2);
  for (int64_t row = begin; row < end; ++row)
    std::memcpy(out + (row - begin) * dim, row_of(x, row, head), static_cast<size_t>(dim) * sizeof(uint16_t));
}

// A head of x [L, heads, D] in blocks of 64 rows; rows beyond the segment are zero.
struct Blocks {
  int64_t dim, count;
  std::vector<uint16_t> rows, turned;  // [count * 64, D]; [count][D, 64], where asked for

  Blocks(const at::Tensor& x, int64_t head, bool with_turned) : dim(x.size(2)), count((x.size(0) + kTile - 1) / kTile) {
    const int64_t length = x.size(0);
    rows.assign(static_cast<size_t>(count * kTile * dim), 0);
    copy_rows(x, head, 0, length, rows.data());
    if (!with_turned) return;
    turned.assign(rows.size(), 0);
    for (int64_t row = 0; row < length; ++row)
      for (int64_t c = 0; c < dim; ++c) turned[static_cast<size_t>((row / kTile * dim + c) * kTile + row % kTile)] = rows[static_cast<size_t>(row * dim + c)];
  }
};

// 64 rows of a head as right-hand sides: over rows, and transposed, over features.
struct RightHand {
  int64_t dim;
  std::vector<uint16_t> rows;   // [64, D]
  std::vector<uint32_t> pairs;  // over rows: [D / 64] of 64 x 64
  std::vector<uint32_t> turned; // over features: D x 64

  explicit RightHand(int64_t d) : dim(d), rows(static_cast<size_t>(kTile * d)), pairs(rows.size() / 2), turned(rows.size() / 2) {}

  // Rows [begin, end) of x [L, heads, D]; those that lack are zero.
  void turn(const at::Tensor& x, int64_t head, int64_t begin, int64_t end) {
    std::fill(rows.begin() + (end - begin) * dim, rows.end(), uint16_t{0});
    copy_rows(x, head, begin, end, rows.data());
    for (int64_t row = 0; row < kTile; ++row)
      for (int64_t c = 0; c < dim / 2; ++c) std::memcpy(&turned[static_cast<size_t>(c * kTile + row)], rows.data() + row * dim + 2 * c, sizeof(uint32_t));
  }
  void pair() {
    for (int64_t part = 0; part < dim / kTile; ++part) level2::kTileLoops.pair_rows(kTile, rows.data() + part * kTile, dim, pairs.data() + part * kTile * kTile / 2);
  }
};

// The blocks of keys that queries [begin, begin + 64) see some of, up to their own.
int64_t first_block(int64_t begin, int64_t window) { return std::max<int64_t>(0, begin - window + 1) / kTile; }
// Whether some query does not see some key of a block that stands so far before its own: of the own, or where the last query does not see the first key.
bool is_masked(int64_t ahead, int64_t window) { return ahead == 0 || ahead + kTile > window; }

void forward_of_head(const AttentionForward& t, int64_t head, double scale) {
  const int64_t length = t.q.size(0), dim = t.q.size(2), group = t.q.size(1) / t.k.size(1);
  const TileLoops& loops = level2::kTileLoops;
  const Blocks k(t.k, head, false), v(t.v, head, true);
  RightHand q(dim);
  std::vector<float> out(static_cast<size_t>(dim * kTile));  // [D, 64]
  struct Tiles {
    alignas(64) float scores[kTile * kTile], largest[kTile], sum[kTile], factor[kTile];
    alignas(64) uint32_t p_pairs[kTile * kTile / 2];
  };
  const auto tiles = std::make_unique<Tiles>();
  Tiles& s = *tiles;
  for (int64_t member = 0; member < group; ++member) {
    const int64_t q_head = head * group + member;
    float* log_sums = t.lse.data_ptr<float>() + head * t.lse.stride(0) + member * t.lse.stride(1);
    for (int64_t block = 0; block < k.count; ++block) {
      const int64_t begin = block * kTile, end = std::min(length, begin + kTile);
      q.turn(t.q, q_head, begin, end);
      std::fill(out.begin(), out.end(), 0.0f);
      std::fill_n(s.largest, kTile, -1e30f);
      std::fill_n(s.sum, kTile, 0.0f);
      for (int64_t j = first_block(begin, t.window); j <= block; ++j) {
        const int64_t at = j * kTile * dim, ahead = (block - j) * kTile;
        multiply(kTile, dim, k.rows.data() + at, dim, q.turned.data(), s.scores, kTile, false);
        const bool changed = loops.softmax_tile(s.scores, static_cast<float>(scale), is_masked(ahead, t.window), static_cast<int>(ahead), static_cast<int>(t.window), s.largest, s.sum,
                                                s.factor, s.p_pairs);
        if (changed) loops.scale_columns(dim, s.factor, out.data());
        multiply(dim, kTile, v.turned.data() + at, kTile, s.p_pairs, out.data(), kTile, true);
      }
      for (int64_t i = 0; i < kTile; ++i) s.factor[i] = 1 / s.sum[i];
      loops.scale_columns(dim, s.factor, out.data());
      for (int64_t i = begin; i < end; ++i) {
        loops.round_column(dim, out.data() + (i - begin), row_of(t.out, i, q_head));
        log_sums[i * t.lse.stride(2)] = s.largest[i - begin] + std::log(s.sum[i - begin]);
      }
    }
  }
}

// What one thread needs beside the keys.
struct Scratch {
  RightHand q, grad_out;
  std::vector<float> grad_k, grad_v;  // [blocks * 64, D]
  std::vector<float> grad_q;          // of one block of queries: [D, 64]
  alignas(64) float scores[kTile * kTile], grad_p[kTile * kTile], lse[kTile], delta[kTile];
  alignas(64) uint16_t p[kTile * kTile], ds[kTile * kTile];
  alignas(64) uint32_t ds_pairs[kTile * kTile / 2];

  Scratch(int64_t dim, int64_t blocks)
      : q(dim), grad_out(dim), grad_k(static_cast<size_t>(blocks * kTile * dim)), grad_v(grad_k.size()), grad_q(static_cast<size_t>(dim * kTile)) {}
};

void backward_of_head(const AttentionBackward& t, int64_t head, double scale) {
  const int64_t length = t.q.size(0), dim = t.q.size(2), group = t.q.size(1) / t.k.size(1);
  const TileLoops& loops = level2::kTileLoops;
  const Blocks k(t.k, head, true), v(t.v, head, false);
  auto scratch = std::make_unique<Scratch>(dim, k.count);
  Scratch& s = *scratch;
  for (int64_t member = 0; member < group; ++member) {
    const int64_t q_head = head * group + member;
    const float* log_sums = t.lse.data_ptr<float>() + head * t.lse.stride(0) + member * t.lse.stride(1);
    for (int64_t block = 0; block < k.count; ++block) {
      const int64_t begin = block * kTile, end = std::min(length, begin + kTile);
      for (auto& [side, x] : {std::pair<RightHand*, const at::Tensor&>{&s.q, t.q}, {&s.grad_out, t.grad_out}}) side->turn(x, q_head, begin, end), side->pair();
      for (int64_t i = 0; i < kTile; ++i) {
        const bool real = begin + i < end;
        s.lse[i] = real ? log_sums[(begin + i) * t.lse.stride(2)] : 1e30f;  // no query: exp gives 0
        s.delta[i] =
            real ? loops.dot(dim, row_of(t.out, begin + i, q_head), row_of(t.grad_out, begin + i, q_head)) : 0.0f;
      }
      std::fill(s.grad_q.begin(), s.grad_q.end(), 0.0f);
      for (int64_t j = first_block(begin, t.window); j <= block; ++j) {
        const int64_t at = j * kTile * dim, ahead = (block - j) * kTile;
        multiply(kTile, dim, k.rows.data() + at, dim, s.q.turned.data(), s.scores, kTile, false);
        multiply(kTile, dim, v.rows.data() + at, dim, s.grad_out.turned.data(), s.grad_p, kTile, false);
        loops.tile(s.scores, s.grad_p, s.lse, s.delta, static_cast<float>(scale), is_masked(ahead, t.window), static_cast<int>(ahead),
                   static_cast<int>(t.window), s.p, s.ds, s.ds_pairs);
        for (int64_t part = 0; part < dim / kTile; ++part) {
          const int64_t pairs = part * kTile * kTile / 2;
          multiply(kTile, kTile, s.p, kTile, s.grad_out.pairs.data() + pairs, s.grad_v.data() + at + part * kTile, dim,
                   true);
          multiply(kTile, kTile, s.ds, kTile, s.q.pairs.data() + pairs, s.grad_k.data() + at + part * kTile, dim, true);
        }
        multiply(dim, kTile, k.turned.data() + at, kTile, s.ds_pairs, s.grad_q.data(), kTile, true);
      }
      for (int64_t i = begin; i < end; ++i) loops.round_column(dim, s.grad_q.data() + (i - begin), row_of(t.grad_q, i, q_head));
    }
  }
  for (int64_t i = 0; i < length; ++i) {
    loops.round_row(dim, s.grad_k.data() + i * dim, row_of(t.grad_k, i, head));
    loops.round_row(dim, s.grad_v.data() + i * dim, row_of(t.grad_v, i, head));
  }
}

}  // namespace

bool has_attention_bf16(int64_t dim) {
#if defined(__x86_64__)
  static const bool supported =
      vector_level() == 2 && __builtin_cpu_supports("avx512bf16");
  return supported && dim % kTile == 0 && dim <= 256;
#else
  (void)dim;
  return false;
#endif
}

namespace {

// f(segment, key head) of all, by all threads.
template <typename Segment>
void for_heads(const std::vector<Segment>& segments, void (*f)(const Segment&, int64_t head, double scale), double scale) {
  if (segments.empty()) return;
  const int64_t key_heads = segments[0].k.size(1), count = static_cast<int64_t>(segments.size()) * key_heads;
  at::parallel_for(0, count, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) f(segments[static_cast<size_t>(i / key_heads)], i % key_heads, scale);
    if (has_matrix_unit()) at::native::cpublas::brgemm_release();
  });
}

}  // namespace

void attention_bf16_forward(const std::vector<AttentionForward>& segments, double scale) { for_heads(segments, forward_of_head, scale); }
void attention_bf16_backward(const std::vector<AttentionBackward>& segments, double scale) { for_heads(segments, backward_of_head, scale); }

}  // namespace trireme
