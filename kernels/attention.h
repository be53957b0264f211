// Attention over packed sequences, on tensor cores, without ever holding a matrix of scores (Dao et al. 2022, Dao
// 2023).
//
//   o[i, h] = sum_j p[i, j] v[j, g],   p[i, .] = softmax_j(scale * q[i, h] . k[j, g]),   g = h / (H / K)
//
// q, o [T, H, D]; k, v [S, K, D]: bf16 or fp16, all of one type; D one of 64, 96, 128, 256; H a multiple of K (grouped
// and single key heads are read in place). Segment s has the queries cu_seqlens_q[s] .. cu_seqlens_q[s+1] and the keys
// cu_seqlens_k[s] .. cu_seqlens_k[s+1], and nothing is seen outside of it; a segment may be empty on either side. Its
// last query stands at its last key: query i is at position i + keys - queries. Causal: it sees keys j <= position;
// with a window besides only j > position - window. Tiles of keys that no query of a tile sees cost nothing. A query
// that sees no key gets o = 0, lse = -inf and no gradient; a key that nobody sees gets gradients of 0.
//
// Arithmetic: scores, softmax (in base 2) and sums in fp32; p, and in backward dS, are rounded to the type for the
// second product. Forward and the deterministic backward give the same bits whenever they get the same bits, whatever
// else is in the pack before or behind a segment. Backward otherwise adds dq in fp32 in an order that varies: its last
// bits do too.
//
// Strides are in elements, the last dimension is contiguous; addresses and strides are multiples of 16 bytes. All
// pointers are the device's, cu_seqlens too: int32, rising, ending at T and S; they are not read before the launch, so
// nobody waits. Refused: a type or head dim not above, heads that are no multiple of the key heads, an address or
// stride that is none of 16 bytes, a window without causal, a scale that is not positive, more than 2^29 rows, a grid
// of more than 2^31 blocks, a workspace that is too small. A failure of the launch is a std::runtime_error.
#pragma once

#include <cstdint>

#include "kernels/types.h"

namespace trireme::kernels {

struct AttentionShape {
  Type type = Type::kBFloat16;
  int head_dim = 0;
  int64_t num_heads = 0, num_key_heads = 0;
  int64_t num_queries = 0, num_keys = 0;  // T, S: of all segments together
  int64_t num_segments = 0;
  const int32_t* cu_seqlens_q = nullptr;  // [num_segments + 1]
  const int32_t* cu_seqlens_k = nullptr;
  float scale = 0;      // 0: 1 / sqrt(D)
  int64_t window = -1;  // -1: all keys
  bool causal = true;
};

// [rows, heads, D].
struct ConstHeads {
  const void* data = nullptr;
  int64_t row_stride = 0, head_stride = 0;
};
struct Heads {
  void* data = nullptr;
  int64_t row_stride = 0, head_stride = 0;
};

struct AttentionForward {
  AttentionShape shape;
  ConstHeads q, k, v;
  Heads o;
  float* lse = nullptr;  // out [H, T]: log of the sum of the exponentials of the scaled scores. Null: not wanted
};

struct AttentionBackward {
  AttentionShape shape;
  ConstHeads q, k, v, o, grad_o;
  const float* lse = nullptr;  // of forward
  Heads grad_q, grad_k, grad_v;  // out
  bool deterministic = false;    // dq by a kernel of its own: 7 products where the atomic additions need 5
  void* workspace = nullptr;     // at a multiple of 16 bytes; holds anything before and after
  int64_t workspace_bytes = 0;
};
// grad_k and grad_v are sums over the query heads of a key head, of which a block takes 8 at most; so many parts of a key
// head's then are added up, in fp32 and in their order. (One block for all would leave most of a card idle where there is
// a single key head.)
constexpr int64_t kAttentionHeadsOfPart = 8;
constexpr int64_t attention_backward_parts(const AttentionShape& s) {
  return s.num_key_heads > 0 ? (s.num_heads / s.num_key_heads + kAttentionHeadsOfPart - 1) / kAttentionHeadsOfPart : 1;
}
constexpr int64_t attention_backward_workspace_bytes(const AttentionShape& s, bool deterministic) {
  const int64_t deltas = (s.num_queries * s.num_heads + 3) / 4 * 16, parts = attention_backward_parts(s);
  return deltas + (deterministic ? 0 : s.num_queries * s.num_heads * s.head_dim * 4) +
         (parts > 1 ? 2 * parts * s.num_keys * s.num_key_heads * s.head_dim * 4 : 0);
}

// Causal attention of the newest n queries of each of B sequences over its keys and values in a cache. q, o [B n, H,
// D]. Sequence s has lengths[s] keys, those of its n queries the last; a sequence of length 0 has o = 0. Key j lies in
// page pages[s * pages_per_sequence + j / page_rows] at row j % page_rows, or without pages in page s at row j: there a
// static cache [B, rows, K, D] has the page stride rows * K * D. Else as above; the same bits on every call of the same
// sizes.
struct AttentionDecode {
  Type type = Type::kBFloat16;
  int head_dim = 0;
  int64_t num_heads = 0, num_key_heads = 0;
  int64_t num_sequences = 0, num_queries = 1;  // B, n
  float scale = 0;
  int64_t window = -1;
  ConstHeads q, k, v;
  Heads o;
  int64_t k_page_stride = 0, v_page_stride = 0;
  const int32_t* pages = nullptr;  // of the device, as lengths; null: none
  int64_t page_rows = 0, pages_per_sequence = 0;
  const int32_t* lengths = nullptr;  // [B]
  int64_t max_length = 0;            // the longest that lengths may hold; the work is divided by it
  void* workspace = nullptr;
  int64_t workspace_bytes = 0;
};
// Parts of the keys, so that a few sequences keep every multiprocessor of a large card busy twice.
constexpr int64_t decode_attention_splits(const AttentionDecode& c) {
  const int64_t rows = c.num_queries * (c.num_heads / c.num_key_heads), blocks = c.num_sequences * c.num_key_heads * ((rows + 15) / 16);
  const int64_t wanted = (264 + blocks - 1) / (blocks > 0 ? blocks : 1), useful = (c.max_length + 255) / 256;
  const int64_t splits = wanted < useful ? wanted : useful;
  return splits < 1 ? 1 : splits > 32 ? 32 : splits;
}
constexpr int64_t decode_attention_workspace_bytes(const AttentionDecode& c) {
  return decode_attention_splits(c) * c.num_sequences * c.num_queries * c.num_heads * (c.head_dim + 1) * 4;
}

namespace cuda {
void attention_forward(const AttentionForward& call, Stream stream);
void attention_backward(const AttentionBackward& call, Stream stream);
void decode_attention(const AttentionDecode& call, Stream stream);
}  // namespace cuda
namespace emulated {
void attention_forward(const AttentionForward& call, Stream stream);
void attention_backward(const AttentionBackward& call, Stream stream);
void decode_attention(const AttentionDecode& call, Stream stream);
}  // namespace emulated

}  // namespace trireme::kernels
