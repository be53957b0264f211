#include "ops/attention_bf16.h"

#include <ATen/native/CPUBlas.h>

#include "ops/op_support.h"

namespace trireme {
namespace {

struct TileLoops {
  void (*tile)(const float*, const float*, const float*, const float*, float, bool, int, int, uint16_t*, uint16_t*,
               uint32_t*);
  void (*pair_rows)(int64_t, const uint16_t*, int64_t, uint32_t*);
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

// C [rows, 64] (+)= A [rows, depth] B, B in pairs of rows. The few shapes used are compiled once each by oneDNN.
void multiply(int64_t rows, int64_t depth, const void* a, int64_t stride_a, const void* b, float* c, int64_t stride_c,
              bool add) {
  at::native::cpublas::brgemm(rows, kTile, depth, stride_a, kTile, stride_c, add, static_cast<const Value*>(a),
                              static_cast<const Value*>(b), c, true);
}

// What one thread needs for one key head of one segment; rows beyond the segment are zero.
struct Scratch {
  int64_t dim, blocks;
  std::vector<uint16_t> k, v;         // [blocks * 64, D]
  std::vector<uint16_t> k_turned;     // [blocks][D, 64]
  std::vector<float> grad_k, grad_v;  // [blocks * 64, D]
  // Of one block of queries: rows, their pairs over queries ([D / 64] of 64 x 64) and over features (D x 64).
  std::vector<uint16_t> rows;
  std::vector<uint32_t> q_pairs, q_turned, grad_pairs, grad_turned;
  std::vector<float> grad_q;  // [D, 64]
  alignas(64) float scores[kTile * kTile], grad_p[kTile * kTile], lse[kTile], delta[kTile];
  alignas(64) uint16_t p[kTile * kTile], ds[kTile * kTile];
  alignas(64) uint32_t ds_pairs[kTile * kTile / 2];

  Scratch(int64_t d, int64_t length) : dim(d), blocks((length + kTile - 1) / kTile) {
    const auto all = static_cast<size_t>(blocks * kTile * d), one = static_cast<size_t>(kTile * d);
    k.assign(all, 0), v.assign(all, 0), k_turned.assign(all, 0);
    grad_k.assign(all, 0.0f), grad_v.assign(all, 0.0f);
    rows.assign(one, 0);
    q_pairs.resize(one / 2), q_turned.resize(one / 2), grad_pairs.resize(one / 2), grad_turned.resize(one / 2);
    grad_q.resize(one);
  }
};

Value* row_of(const at::Tensor& x_LHD, int64_t row, int64_t head) {
  return x_LHD.data_ptr<Value>() + row * x_LHD.stride(0) + head * x_LHD.stride(1);
}

// Rows [begin, end) of head `head` of x [L, heads, D] to `out` [.., D].
void copy_rows(const at::Tensor& x, int64_t head, int64_t begin, int64_t end, uint16_t* out) {
  const int64_t dim = x.size(2);
  for (int64_t row = begin; row < end; ++row)
    std::memcpy(out + (row - begin) * dim, row_of(x, row, head), static_cast<size_t>(dim) * sizeof(uint16_t));
}

// A block of 64 rows, as right-hand side over rows (pairs) and, transposed, over features (turned).
void arrange_queries(Scratch& s, const TileLoops& loops, const at::Tensor& x, int64_t head, int64_t begin, int64_t end,
                     std::vector<uint32_t>& pairs, std::vector<uint32_t>& turned) {
  std::fill(s.rows.begin() + (end - begin) * s.dim, s.rows.end(), uint16_t{0});
  copy_rows(x, head, begin, end, s.rows.data());
  for (int64_t part = 0; part < s.dim / kTile; ++part)
    loops.pair_rows(kTile, s.rows.data() + part * kTile, s.dim, pairs.data() + part * kTile * kTile / 2);
  for (int64_t row = 0; row < kTile; ++row)
    for (int64_t c = 0; c < s.dim / 2; ++c)
      std::memcpy(&turned[static_cast<size_t>(c * kTile + row)], s.rows.data() + row * s.dim + 2 * c, sizeof(uint32_t));
}

void backward_of_head(const AttentionSegment& t, int64_t head, double scale) {
  const int64_t length = t.q.size(0), dim = t.q.size(2), group = t.q.size(1) / t.k.size(1);
  const TileLoops& loops = level2::kTileLoops;
  auto scratch = std::make_unique<Scratch>(dim, length);
  Scratch& s = *scratch;
  copy_rows(t.k, head, 0, length, s.k.data());
  copy_rows(t.v, head, 0, length, s.v.data());
  for (int64_t row = 0; row < length; ++row)
    for (int64_t c = 0; c < dim; ++c)
      s.k_turned[static_cast<size_t>((row / kTile * dim + c) * kTile + row % kTile)] =
          s.k[static_cast<size_t>(row * dim + c)];
  for (int64_t member = 0; member < group; ++member) {
    const int64_t q_head = head * group + member;
    const float* log_sums = t.lse.data_ptr<float>() + head * t.lse.stride(0) + member * t.lse.stride(1);
    for (int64_t block = 0; block < s.blocks; ++block) {
      const int64_t begin = block * kTile, end = std::min(length, begin + kTile);
      arrange_queries(s, loops, t.q, q_head, begin, end, s.q_pairs, s.q_turned);
      arrange_queries(s, loops, t.grad_out, q_head, begin, end, s.grad_pairs, s.grad_turned);
      for (int64_t i = 0; i < kTile; ++i) {
        const bool real = begin + i < end;
        s.lse[i] = real ? log_sums[(begin + i) * t.lse.stride(2)] : 1e30f;  // no query: exp gives 0
        s.delta[i] =
            real ? loops.dot(dim, row_of(t.out, begin + i, q_head), row_of(t.grad_out, begin + i, q_head)) : 0.0f;
      }
      std::fill(s.grad_q.begin(), s.grad_q.end(), 0.0f);
      const int64_t first_key = std::max<int64_t>(0, begin - t.window + 1);
      for (int64_t j = first_key / kTile; j <= block; ++j) {
        const int64_t at = j * kTile * dim, ahead = (block - j) * kTile;
        const bool masked = j == block || ahead + kTile > t.window;  // the tile's last query does not see its first key
        multiply(kTile, dim, s.k.data() + at, dim, s.q_turned.data(), s.scores, kTile, false);
        multiply(kTile, dim, s.v.data() + at, dim, s.grad_turned.data(), s.grad_p, kTile, false);
        loops.tile(s.scores, s.grad_p, s.lse, s.delta, static_cast<float>(scale), masked, static_cast<int>(ahead),
                   static_cast<int>(t.window), s.p, s.ds, s.ds_pairs);
        for (int64_t part = 0; part < dim / kTile; ++part) {
          const int64_t pairs = part * kTile * kTile / 2;
          multiply(kTile, kTile, s.p, kTile, s.grad_pairs.data() + pairs, s.grad_v.data() + at + part * kTile, dim,
                   true);
          multiply(kTile, kTile, s.ds, kTile, s.q_pairs.data() + pairs, s.grad_k.data() + at + part * kTile, dim, true);
        }
        multiply(dim, kTile, s.k_turned.data() + at, kTile, s.ds_pairs, s.grad_q.data(), kTile, true);
      }
      for (int64_t i = begin; i < end; ++i) {
        Value* target = row_of(t.grad_q, i, q_head);
        for (int64_t c = 0; c < dim; ++c) target[c] = s.grad_q[static_cast<size_t>(c * kTile + i - begin)];
      }
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
      vector_level() == 2 && __builtin_cpu_supports("avx512bf16") && at::native::cpublas::could_pack(at::kBFloat16);
  return supported && dim % kTile == 0 && dim <= 256;
#else
  (void)dim;
  return false;
#endif
}

void attention_bf16_backward(const std::vector<AttentionSegment>& segments, double scale) {
  if (segments.empty()) return;
  const int64_t key_heads = segments[0].k.size(1), count = static_cast<int64_t>(segments.size()) * key_heads;
  at::parallel_for(0, count, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i)
      backward_of_head(segments[static_cast<size_t>(i / key_heads)], i % key_heads, scale);
    at::native::cpublas::brgemm_release();
  });
}

}  // namespace trireme
