// ATen's flash attention for CPUs, segment by segment. It knows the causal mask of equal numbers of queries and keys; a
// cache (more keys than queries) and a window are cut into blocks of queries, each with the keys it can see and a mask
// of that block only.
#include <array>

#include "ops/attention_bf16.h"
#include "ops/attention_device.h"
#include "ops/op_support.h"
#include "ops/ops.h"

namespace trireme {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::Variable;
using torch::autograd::variable_list;

constexpr int64_t kBlockQueries = 128;

// Queries [q_begin, q_end) against keys [k_begin, k_end) of the flat tensors, in one call.
struct Piece {
  int64_t q_begin, q_end, k_begin, k_end;
  bool causal;       // ATen's own causal mask
  int64_t diagonal;  // else query i sees keys j <= i + diagonal (both within the piece) ...
  int64_t window;    // ... and j > i + diagonal - window
  bool masked;
  bool own_keys;     // causal over the segment's own keys: no cache before them
};

std::vector<Piece> cut(const AttentionSpec& spec) {
  std::vector<Piece> pieces;
  for (size_t s = 0; s + 1 < spec.cu_seqlens_q.size(); ++s) {
    const int64_t q0 = spec.cu_seqlens_q[s], q1 = spec.cu_seqlens_q[s + 1];
    const int64_t k0 = spec.cu_seqlens_k[s], k1 = spec.cu_seqlens_k[s + 1];
    const int64_t queries = q1 - q0, keys = k1 - k0, offset = keys - queries;
    if (queries == 0) continue;
    TRIREME_CHECK(keys > 0 && (!spec.causal || offset >= 0), queries, " queries, ", keys, " keys");
    const bool windowed = spec.window >= 0 && spec.window < keys;
    if (!spec.causal) {
      pieces.push_back({q0, q1, k0, k1, false, 0, 0, false, false});
    } else if (offset == 0 && !windowed) {
      pieces.push_back({q0, q1, k0, k1, true, 0, keys, false, true});
    } else {
      for (int64_t begin = 0; begin < queries; begin += kBlockQueries) {
        const int64_t end = std::min(queries, begin + kBlockQueries);
        const int64_t first = windowed ? std::max<int64_t>(0, begin + offset - spec.window + 1) : 0;
        const int64_t last = end + offset;
        const bool masked = end - begin > 1;
        pieces.push_back({q0 + begin, q0 + end, k0 + first, k0 + last, false, begin + offset - first,
                          windowed ? spec.window : keys, masked, offset == 0});
      }
    }
  }
  return pieces;
}

// The masks of a call's pieces. Those inside a long segment are alike: one tensor for all of them.
class Masks {
 public:
  explicit Masks(const at::TensorOptions& options) : options_(options) {}

  std::optional<at::Tensor> operator()(const Piece& piece) {
    if (!piece.masked) return std::nullopt;
    const Shape shape{piece.q_end - piece.q_begin, piece.k_end - piece.k_begin, piece.diagonal, piece.window};
    if (!mask_.defined() || shape != shape_) {
      shape_ = shape;
      mask_ = make();
    }
    return mask_;
  }

 private:
  using Shape = std::array<int64_t, 4>;

  at::Tensor make() const {
    const auto [queries, keys, diagonal, window] = std::array(shape_);
    at::Tensor mask = at::empty({queries, keys}, options_);
    dispatch_floating(mask.scalar_type(), [&](auto zero) {
      using T = decltype(zero);
      const T hidden(-std::numeric_limits<float>::infinity());
      for (int64_t i = 0; i < queries; ++i) {
        T* row = mask.data_ptr<T>() + i * keys;
        const int64_t end = i + diagonal + 1, begin = std::max<int64_t>(0, end - window);  // end is at most `keys`
        std::fill(row, row + begin, hidden);
        std::fill(row + begin, row + end, T(0));
        std::fill(row + end, row + keys, hidden);
      }
    });
    return mask;
  }

  at::TensorOptions options_;
  Shape shape_{};
  at::Tensor mask_;
};

// [T, K*G, D] -> [K, G, T, D] without copying; keys [S, K, D] -> [K, G, S, D] with stride 0 over the group.
at::Tensor group_queries(const at::Tensor& q_THD, int64_t key_heads) {
  return q_THD.unflatten(1, {key_heads, q_THD.size(1) / key_heads}).permute({1, 2, 0, 3});
}
at::Tensor group_keys(const at::Tensor& k_SKD, int64_t group) {
  return k_SKD.permute({1, 0, 2}).unsqueeze(1).expand({k_SKD.size(1), group, k_SKD.size(0), k_SKD.size(2)});
}

// Rows of a causal piece as ATen is given them. In 16 bits it multiplies through oneDNN, which compiles, and keeps, code for
// each new length: with lengths in steps of 64 there are few. Rows beyond the piece are zero; no query before them sees them.
constexpr int64_t kLengthStep = 64;

at::Tensor filled(const at::Tensor& x_LHD, const Piece& piece) {
  const int64_t length = x_LHD.size(0), whole = (length + kLengthStep - 1) / kLengthStep * kLengthStep;
  if (!piece.causal || length == whole || x_LHD.element_size() > 2) return x_LHD;
  at::Tensor out = at::empty({whole, x_LHD.size(1), x_LHD.size(2)}, x_LHD.options());
  out.slice(0, 0, length).copy_(x_LHD);
  out.slice(0, length).zero_();
  return out;
}

// The out and log-sum-exp of a piece are views of one buffer in ATen's own layout.
at::Tensor run_attention(const at::Tensor& q_THD, const at::Tensor& k_SKD, const at::Tensor& v_SKD,
                         const std::vector<Piece>& pieces, double scale, std::vector<at::Tensor>& lse) {
  const int64_t key_heads = k_SKD.size(1), group = q_THD.size(1) / key_heads;
  at::Tensor out_THD = at::empty(q_THD.sizes(), q_THD.options());
  Masks mask_of(q_THD.options());
  for (const Piece& piece : pieces) {
    at::Tensor q = group_queries(filled(q_THD.slice(0, piece.q_begin, piece.q_end), piece), key_heads);
    at::Tensor k = group_keys(filled(k_SKD.slice(0, piece.k_begin, piece.k_end), piece), group);
    at::Tensor v = group_keys(filled(v_SKD.slice(0, piece.k_begin, piece.k_end), piece), group);
    auto [out, log_sum] = at::_scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, piece.causal,
                                                                          mask_of(piece), scale);
    group_queries(out_THD.slice(0, piece.q_begin, piece.q_end), key_heads).copy_(out.slice(2, 0, piece.q_end - piece.q_begin));
    lse.push_back(log_sum);
  }
  return out_THD;
}

struct KeptPieces : torch::CustomClassHolder {
  std::vector<Piece> pieces;
  std::vector<at::Tensor> lse;
  bool on_tiles = false;
};

// For ops/attention_bf16.h, all of them, each segment in one piece.
bool on_tiles(const at::Tensor& q_THD, const at::Tensor& k_SKD, const at::Tensor& v_SKD, const std::vector<Piece>& pieces) {
  const bool lies = q_THD.stride(2) == 1 && k_SKD.stride(2) == 1 && v_SKD.stride(2) == 1;
  return lies && k_SKD.scalar_type() == at::kBFloat16 && has_attention_bf16(k_SKD.size(2)) && std::all_of(pieces.begin(), pieces.end(), [](const Piece& p) { return p.own_keys; });
}
std::vector<Piece> whole_segments(const std::vector<Piece>& pieces) {
  std::vector<Piece> segments;
  for (const Piece& piece : pieces) {
    if (segments.empty() || piece.k_begin >= segments.back().k_end) segments.push_back(piece);
    else segments.back().q_end = piece.q_end, segments.back().k_end = piece.k_end;
  }
  return segments;
}

at::Tensor run_on_tiles(const at::Tensor& q_THD, const at::Tensor& k_SKD, const at::Tensor& v_SKD, const std::vector<Piece>& segments, double scale, std::vector<at::Tensor>& lse) {
  const int64_t key_heads = k_SKD.size(1);
  at::Tensor out_THD = at::empty(q_THD.sizes(), q_THD.options());
  std::vector<AttentionForward> all;
  for (const Piece& s : segments) {
    lse.push_back(at::empty({key_heads, q_THD.size(1) / key_heads, s.q_end - s.q_begin}, q_THD.options().dtype(at::kFloat)));
    const auto rows = [&](const at::Tensor& x) { return x.slice(0, s.q_begin, s.q_end); };
    all.push_back({rows(q_THD), k_SKD.slice(0, s.k_begin, s.k_end), v_SKD.slice(0, s.k_begin, s.k_end), rows(out_THD), lse.back(), s.window});
  }
  attention_bf16_forward(all, scale);
  return out_THD;
}

struct Attention : Function<Attention> {
  static Variable forward(AutogradContext* ctx, const Variable& q_THD, const Variable& k_SKD, const Variable& v_SKD,
                          const std::vector<Piece>& pieces, double scale) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto kept = c10::make_intrusive<KeptPieces>();
    kept->on_tiles = on_tiles(q_THD, k_SKD, v_SKD, pieces);
    kept->pieces = kept->on_tiles ? whole_segments(pieces) : pieces;
    at::Tensor out = kept->on_tiles ? run_on_tiles(q_THD, k_SKD, v_SKD, kept->pieces, scale, kept->lse)
                                    : run_attention(q_THD, k_SKD, v_SKD, pieces, scale, kept->lse);
    keep(ctx, "q", q_THD);
    keep(ctx, "k", k_SKD);
    keep(ctx, "v", v_SKD);
    ctx->saved_data["pieces"] = c10::IValue::make_capsule(kept);
    ctx->saved_data["scale"] = scale;
    ctx->save_for_backward({out});
    return out;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    auto kept = c10::static_intrusive_pointer_cast<KeptPieces>(ctx->saved_data.at("pieces").toCapsule());
    const double scale = ctx->saved_data.at("scale").toDouble();
    at::Tensor q = take(ctx, "q"), k = take(ctx, "k"), v = take(ctx, "v"), out = ctx->get_saved_variables()[0];
    ctx->saved_data.clear();
    const int64_t key_heads = k.size(1), group = q.size(1) / key_heads;
    at::Tensor grad_out = grads[0].contiguous(), grad_q = at::empty(q.sizes(), q.options());
    // Blocks of one segment overlap in the keys they see: their gradients add up, in fp32.
    bool overlap = false;
    int64_t covered = 0, last_key = 0;
    for (const Piece& piece : kept->pieces) {
      overlap = overlap || (!kept->on_tiles && piece.k_begin < last_key);
      covered += std::max<int64_t>(0, piece.k_end - std::max(last_key, piece.k_begin));
      last_key = piece.k_end;
    }
    auto key_options = k.options().dtype(overlap ? compute_dtype(k.scalar_type()) : k.scalar_type());
    const bool zero = overlap || covered < k.size(0);
    at::Tensor grad_k = zero ? at::zeros(k.sizes(), key_options) : at::empty(k.sizes(), key_options);
    at::Tensor grad_v = zero ? at::zeros(k.sizes(), key_options) : at::empty(k.sizes(), key_options);
    if (kept->on_tiles) {
      std::vector<AttentionBackward> all;
      for (size_t i = 0; i < kept->pieces.size(); ++i) {
        const Piece& s = kept->pieces[i];
        const auto queries = [&](const at::Tensor& x) { return x.slice(0, s.q_begin, s.q_end); };
        const auto keys = [&](const at::Tensor& x) { return x.slice(0, s.k_begin, s.k_end); };
        all.push_back({queries(grad_out), queries(q), keys(k), keys(v), queries(out), kept->lse[i], queries(grad_q), keys(grad_k), keys(grad_v), s.window});
      }
      attention_bf16_backward(all, scale);
      return {grad_q, grad_k, grad_v, {}, {}};
    }
    Masks mask_of(q.options());
    for (size_t i = 0; i < kept->pieces.size(); ++i) {
      const Piece& piece = kept->pieces[i];
      auto queries = [&](const at::Tensor& t) {
        return group_queries(filled(t.slice(0, piece.q_begin, piece.q_end), piece), key_heads);
      };
      auto keys = [&](const at::Tensor& t) { return group_keys(filled(t.slice(0, piece.k_begin, piece.k_end), piece), group); };
      auto [gq, gk, gv] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
          queries(grad_out), queries(q), keys(k), keys(v), queries(out), kept->lse[i], 0.0, piece.causal,
          mask_of(piece), scale);
      kept->lse[i].reset();
      group_queries(grad_q.slice(0, piece.q_begin, piece.q_end), key_heads).copy_(gq.slice(2, 0, piece.q_end - piece.q_begin));
      for (auto& [whole, part] : {std::pair{grad_k, gk}, std::pair{grad_v, gv}}) {
        at::Tensor target = whole.slice(0, piece.k_begin, piece.k_end).permute({1, 0, 2});
        at::Tensor own = part.slice(2, 0, piece.k_end - piece.k_begin);
        at::Tensor sum = group == 1 ? own.squeeze(1) : own.sum(1);
        overlap ? target.add_(sum) : target.copy_(sum);
      }
    }
    return {grad_q, grad_k.to(k.scalar_type()), grad_v.to(k.scalar_type()), {}, {}};
  }
};

}  // namespace

at::Tensor attention(const at::Tensor& q_THD, const at::Tensor& k_SKD, const at::Tensor& v_SKD,
                     const AttentionSpec& spec) {
  check_alike("attention", {"q", q_THD}, {{"k", k_SKD}, {"v", v_SKD}});
  check_alike("attention", {"q", q_THD}, {{"bounds_q", spec.bounds_q}, {"bounds_k", spec.bounds_k}}, at::kInt);
  TRIREME_CHECK(q_THD.dim() == 3 && k_SKD.dim() == 3 && v_SKD.sizes() == k_SKD.sizes() &&
                    q_THD.size(2) == k_SKD.size(2) && k_SKD.size(1) > 0 && q_THD.size(1) % k_SKD.size(1) == 0,
                q_THD.sizes(), k_SKD.sizes(), v_SKD.sizes());
  TRIREME_CHECK(spec.cu_seqlens_q.size() == spec.cu_seqlens_k.size() && !spec.cu_seqlens_q.empty() &&
                    spec.cu_seqlens_q.back() == q_THD.size(0) && spec.cu_seqlens_k.back() == k_SKD.size(0),
                spec.cu_seqlens_q.size(), " and ", spec.cu_seqlens_k.size(), " bounds");
  for (const at::Tensor& bounds : {spec.bounds_q, spec.bounds_k})
    TRIREME_CHECK(!bounds.defined() || (bounds.is_contiguous() && bounds.numel() == static_cast<int64_t>(spec.cu_seqlens_q.size())), bounds.sizes(), " of bounds");
  TRIREME_CHECK(spec.window < 0 || (spec.causal && spec.window > 0), "window ", spec.window);
  const double scale = spec.scale != 0.0 ? spec.scale : 1.0 / std::sqrt(static_cast<double>(q_THD.size(2)));
  if (has_device_attention(q_THD)) return device_attention(q_THD, k_SKD, v_SKD, spec, scale);
  if (!q_THD.is_cpu()) return plain_attention(q_THD, k_SKD, v_SKD, spec, scale);
  return Attention::apply(q_THD, k_SKD, v_SKD, cut(spec), scale);
}

at::Tensor decode_attention(const at::Tensor& q_THD, const at::Tensor& k_BSKD, const at::Tensor& v_BSKD, const at::Tensor& lengths_B, int64_t window, double scale) {
  check_alike("decode_attention", {"q", q_THD}, {{"k", k_BSKD}, {"v", v_BSKD}});
  check_alike("decode_attention", {"q", q_THD}, {{"lengths", lengths_B}}, at::kInt);
  const int64_t num_sequences = k_BSKD.size(0);
  TRIREME_CHECK(q_THD.dim() == 3 && k_BSKD.dim() == 4 && v_BSKD.sizes() == k_BSKD.sizes() && q_THD.size(2) == k_BSKD.size(3) && k_BSKD.size(2) > 0 &&
                    q_THD.size(1) % k_BSKD.size(2) == 0 && num_sequences > 0 && q_THD.size(0) % num_sequences == 0 && k_BSKD.is_contiguous() && v_BSKD.is_contiguous(),
                q_THD.sizes(), k_BSKD.sizes(), v_BSKD.sizes());
  TRIREME_CHECK(lengths_B.is_contiguous() && lengths_B.numel() == num_sequences, lengths_B.sizes(), " of lengths");
  TRIREME_CHECK(window != 0, "window ", window);
  if (scale == 0.0) scale = 1.0 / std::sqrt(static_cast<double>(q_THD.size(2)));
  if (has_device_attention(q_THD)) return device_decode_attention(q_THD, k_BSKD, v_BSKD, lengths_B, window, scale);
  if (!q_THD.is_cpu()) return plain_decode_attention(q_THD, k_BSKD, v_BSKD, lengths_B, window, scale);
  const int64_t queries = q_THD.size(0) / num_sequences;
  std::vector<at::Tensor> outputs;
  for (int64_t b = 0; b < num_sequences; ++b) {
    const int64_t length = lengths_B.data_ptr<int32_t>()[b];
    AttentionSpec spec{{0, queries}, {0, length}, window, scale};
    outputs.push_back(length == 0 ? at::zeros({queries, q_THD.size(1), q_THD.size(2)}, q_THD.options())
                                  : attention(q_THD.narrow(0, b * queries, queries), k_BSKD[b].narrow(0, 0, length), v_BSKD[b].narrow(0, 0, length), spec));
  }
  return outputs.size() == 1 ? outputs[0] : at::cat(outputs);
}

}  // namespace trireme
