// Every differentiable operation of the model: the page of contracts. Values are computed in fp32 (fp64 for fp64
// tensors) and rounded once to the dtype of the output, unless said otherwise. Dtypes: float32, bfloat16, float16,
// float64; all tensors of a call have the same one, on one device: another is an InternalError that names it. Everything is a
// function of its arguments only: the number of threads never changes a bit, except inside the matrix products of ATen.
// ATen has functions of the same names: write trireme::linear, trireme::embedding where a call is ambiguous.
// Shape suffixes: T tokens (rows), C features, I/O inputs/outputs of a linear layer, F intermediate size, H query
// heads, K key heads, D head size, S keys, V vocabulary, R rank of an adapter or number of rotary dims.
#pragma once

#include <utility>

#include "base/tensor.h"
#include "ops/frozen_weight.h"
#include "ops/row_exchange.h"

namespace trireme {

// y = weight * x / sqrt(mean(x^2) + eps) over the last dim; x [..., C], any leading shape (x_THD with weight [D] is the
// q/k norm). As Hugging Face: normalised in fp32, rounded to the dtype, then multiplied by the weight.
// Zhang & Sennrich 2019.
at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight_C, double eps);

// {sum, rms_norm(sum)} of sum = x + residual in one pass.
std::pair<at::Tensor, at::Tensor> add_rms_norm(const at::Tensor& x, const at::Tensor& residual,
                                               const at::Tensor& weight_C, double eps);

// y = (x - mean) * rstd * weight + bias over the last dim, rstd = 1 / sqrt(mean((x - mean)^2) + eps), rounded once; x [..., C] as
// above. Ba et al. 2016.
at::Tensor layer_norm(const at::Tensor& x, const at::Tensor& weight_C, const at::Tensor& bias_C, double eps);

// {sum, layer_norm(sum)} of sum = x + residual, on a device in one pass.
std::pair<at::Tensor, at::Tensor> add_layer_norm(const at::Tensor& x, const at::Tensor& residual, const at::Tensor& weight_C, const at::Tensor& bias_C, double eps);

// Rotary position embedding (Su et al. 2021) in Hugging Face's half-rotation form on the first R of the D dims:
// y = x * cos + concat(-x[R/2:R], x[:R/2]) * sin. Tables are fp32 (fp64 for fp64 x), [T, R], row t for token t.
at::Tensor rope(const at::Tensor& x_THD, const at::Tensor& cos_TR, const at::Tensor& sin_TR);

// silu(gate) * up. Shazeer 2020.
at::Tensor swiglu(const at::Tensor& gate_TF, const at::Tensor& up_TF);

// gelu(gate) * up, by gelu's tanh approximation g/2 (1 + tanh(sqrt(2/pi) (g + 0.044715 g^3))) (Hendrycks & Gimpel 2016), as Gemma's.
at::Tensor geglu(const at::Tensor& gate_TF, const at::Tensor& up_TF);

// Segment s: queries cu_seqlens_q[s] .. cu_seqlens_q[s+1], keys cu_seqlens_k[s] .. cu_seqlens_k[s+1]. Its last query
// stands at its last key: query i has position i + (number of keys - number of queries).
struct AttentionSpec {
  std::vector<int64_t> cu_seqlens_q, cu_seqlens_k;  // [segments + 1]; a segment may be empty
  int64_t window = -1;  // a query at position p sees keys p - window < j (Hugging Face's sliding window); -1: all
  double scale = 0.0;   // 0: 1 / sqrt(D)
  bool causal = true;   // sees keys j <= p; a window needs it
  // The same bounds as int32 where q is, for who calls more than once with them (bounds_of); undefined: they are brought there.
  at::Tensor bounds_q{}, bounds_k{};
};
at::Tensor bounds_of(const std::vector<int64_t>& cu_seqlens, at::Device device);

// softmax(q k^T * scale) v in every segment; head h of q uses head h / (H / K) of k and v. q [T, H, D], k and v
// [S, K, D]; last dim contiguous. Never holds a full score matrix, in neither direction.
at::Tensor attention(const at::Tensor& q_THD, const at::Tensor& k_SKD, const at::Tensor& v_SKD,
                     const AttentionSpec& spec);

// Attention of the newest n tokens of each of B sequences over its keys and values in a static cache, without gradients. Sequence b has
// lengths_B[b] keys, the rows 0 .. lengths - 1 of k[b] and v[b]; its n queries, the rows b n .. b n + n - 1 of q, are the last of them.
// Causal; window, scale and groups of heads as above. lengths_B is int32 and where q is: a device's are read there alone, so that the same
// launches serve any lengths up to S. Rows behind them may hold anything finite. q [B n, H, D], k and v [B, S, K, D], contiguous.
at::Tensor decode_attention(const at::Tensor& q_THD, const at::Tensor& k_BSKD, const at::Tensor& v_BSKD, const at::Tensor& lengths_B,
                            int64_t window = -1, double scale = 0.0);

// x w^T (+ bias). Only the gradients that are asked for are computed; w's may wait (ops/delayed_gradients.h), one in another form
// (ops/frozen_weight.h) has none. `sum`, if not null: of the ranks' products, [T / n, O], without bias (ops/row_exchange.h).
// `is_read` false: nobody looks at y's values (recomputing()), and they are not made; gradients are as ever.
at::Tensor linear(const ArrivingRows& x_TI, const LinearWeight& w_OI, const at::Tensor& bias_O, const std::shared_ptr<const RowSum>& sum, bool is_read = true);
inline at::Tensor linear(const at::Tensor& x_TI, const at::Tensor& w_OI, const at::Tensor& bias_O = {}) {
  return linear(ArrivingRows(x_TI), w_OI, bias_O, nullptr);
}

// Keys of a dropout mask: element (t, c) is dropped as a function of (seed, module, row_ids_T[t], c) alone, so a mask
// is the same on any mesh, in any packing and when computed again. row_ids_T: int64 [T], a hash of (sample, position).
struct DropoutKey {
  double p = 0.0;  // probability of dropping; the rest is scaled by 1 / (1 - p). 0: no dropout
  uint64_t seed = 0;
  uint64_t module = 0;
  at::Tensor row_ids_T;       // may be undefined where p is 0
  int64_t first_feature = 0;  // c of x's first column, where x is a slice of the features
};

at::Tensor dropout(const at::Tensor& x_TC, const DropoutKey& key);

// x w^T + bias + scale * dropout(x) a^T b^T (Hu et al. 2021) with a frozen base: no gradient for w and bias. Keeps
// x and the [T, R] product only. `sum`, `is_read`: as above.
at::Tensor lora_linear(const ArrivingRows& x_TI, const LinearWeight& w_OI, const at::Tensor& bias_O, const at::Tensor& a_RI,
                       const at::Tensor& b_OR, double scale, const DropoutKey& key = {},
                       const std::shared_ptr<const RowSum>& sum = {}, bool is_read = true);

// What a linear layer with a `sum` does behind its product: [T, O] of every rank -> [T / n, O], the rank's rows of their sum.
at::Tensor sum_over_ranks(const at::Tensor& part_TO, const std::shared_ptr<const RowSum>& sum, bool is_read = true);

// Rows of w. Ids are int64 [T] in 0 .. V-1. The gradient adds rows in the order of t. A frozen w may be in host memory while the ids are on
// a device, whose kernel reads the rows from there: it is pinned then.
at::Tensor embedding(const at::Tensor& w_VC, const at::Tensor& ids_T);

// What a row of logits z may be charged beside -log softmax(z)[target], with L = log(sum(exp(z))):
// loss = L - (1 - s) z[target] - s mean(z) + c L^2, s label_smoothing (Szegedy et al. 2016), c z_loss (Chowdhery et al. 2022).
struct CrossEntropyTerms {
  double label_smoothing = 0, z_loss = 0;
};

struct LossSum {
  at::Tensor sum;      // scalar, fp32 (fp64 for fp64): sum of the rows' losses; differentiable
  int64_t count = 0;   // rows with a target
  at::Tensor correct;  // int64 scalar: rows whose largest logit (the first of equals) is the target's
};  // sum and correct are where `hidden` is: on a device nothing has waited for them

// Where the head's rows are sliced over ranks: the rank holds ids first .. first + V - 1 of num_ids. `combine` leaves the
// sum or the maximum over the ranks in the tensor (contiguous; fp32, fp64 or int64). All of them call it in the same order.
struct VocabularyPart {
  int64_t first = 0, num_ids = 0;
  std::function<void(at::Tensor x, bool maximum)> combine;
};

// Cross-entropy of the logits hidden head^T over the rows whose target is not kIgnoreTarget (-100); other rows are not
// computed. targets_T is in host memory, wherever hidden is: the rows are chosen there. Logits exist chunk_rows rows at a time (0: chosen by size), rounded to the dtype as Hugging Face's, never
// all at once: gradients of hidden and head (where it is trained) are computed in forward and scaled in backward by the
// incoming scalar. Without gradients (nothing requires them, or under NoGradGuard) only the sums are computed.
// Gradients come out times gradient_scale, multiplied before they are first rounded to the products' dtype (float16: small
// ones would vanish there). count == 0 gives a zero sum with zero gradients. A target outside 0 .. V-1 is an InternalError.
// With a `part` no rank ever holds a whole row of logits: maximum, sum and the target's logit of each row are combined. The
// results are those of the whole on every rank, the gradient of hidden is this rank's part of the sum over the ranks.
LossSum linear_cross_entropy(const at::Tensor& hidden_TC, const at::Tensor& head_VC, const at::Tensor& targets_T,
                             int64_t chunk_rows = 0, double gradient_scale = 1, const VocabularyPart* part = nullptr, const CrossEntropyTerms& terms = {});
// The number of rows that chunk_rows = 0 stands for; `trains`: the head has a gradient.
int64_t cross_entropy_chunk_rows(int64_t vocabulary, at::ScalarType dtype, bool trains, at::DeviceType device = at::kCPU);

// Runs fn(inputs) without keeping anything but the inputs, and runs it again with gradients when backward comes (Chen
// et al. 2016). Gradients are the same bits as without it (of a tensor captured by several fns: up to the order of the
// sum), fn being a function of its inputs and of what it captures; parameters that fn captures get their gradients (and
// fire their hooks) in the nested backward. `trains` says whether fn captures a tensor that requires gradients: then
// the result does too, even where no input does.
// `to_host`: inputs on a device wait in host memory; backward brings those of the call before while it computes this one.
at::Tensor recompute(const std::function<at::Tensor(const std::vector<at::Tensor>&)>& fn,
                     const std::vector<at::Tensor>& inputs, bool trains = true, bool to_host = false);
// Whether recompute() runs its fn on this thread for the second time: what fn returns is read by nobody then.
bool recomputing();

// Rows fn(first, rows first .. first + t - 1 of x), [t, O], of pieces of at most `rows` rows, one after another: [T, O] in x's dtype. What fn
// makes is there for one piece at a time, in forward and in backward, which computes it again. `trained`: the leaves that require
// gradients among what fn captures; the sum of a leaf's over the pieces is made in fp32 (fp64) and rounded once. `is_read`: as of linear().
at::Tensor in_row_pieces(const std::function<at::Tensor(int64_t first, const at::Tensor& x_tI)>& fn, const at::Tensor& x_TI, int64_t rows, int64_t out_features,
                         const std::vector<at::Tensor>& trained, bool is_read = true);

// While one lives on this thread (and is on), later ops do not keep the outputs of norms, rope, swiglu, geglu and
// dropout for backward: these are computed again, once for all who need them, from what is kept anyway. The same
// bits. It needs nothing else from the code in its scope: matrix products and attention outputs are kept as always.
class SelectiveRecompute {
 public:
  explicit SelectiveRecompute(bool on = true);
  ~SelectiveRecompute();
  SelectiveRecompute(const SelectiveRecompute&) = delete;
  SelectiveRecompute& operator=(const SelectiveRecompute&) = delete;

 private:
  bool before_;
};

}  // namespace trireme
