// The CUDA code of Trireme, as the rest of the program sees it: raw pointers, sizes and streams, no torch and no CUDA
// header, so that every room compiles without a CUDA compiler. Built where TRIREME_CUDA is ON.
#pragma once

#include <algorithm>
#include <cstddef>
#include <string>

#include "kernels/attention.h"
#include "kernels/quantize.h"
#include "kernels/types.h"

namespace trireme::kernels {

// Devices that the driver shows (CUDA_VISIBLE_DEVICES applies); 0 where there is none, or no driver.
int num_devices();

// CUDA's numbers: 13020 is 13.2. `driver`: the newest that the driver supports; 0 without a driver.
struct Versions {
  int driver = 0, runtime = 0;
};
Versions versions();

struct DeviceReport {
  std::string name;
  int compute_major = 0, compute_minor = 0;
  int num_multiprocessors = 0;
  size_t free_bytes = 0, total_bytes = 0;
  std::string failure;  // empty: the device ran a kernel of this build and gave the right numbers
};

// Facts of device `index` (0 .. num_devices() - 1), and a kernel run on it whose 64 Ki results are compared with the
// host's: proves that driver, device and this build's machine code fit together. Leaves nothing allocated.
DeviceReport probe_device(int index);

// --- operations --------------------------------------------------------------------------------------------------------
// Tensors are row-major and contiguous, of `type` unless said otherwise, and may be at any address of their elements'
// alignment: rows whose bytes are a multiple of 16 are read 16 bytes at a time where they begin at such an address. Values are
// computed in fp32 and rounded once to the dtype of the output, to the nearest even, unless said otherwise. Calls return when
// the work is in the stream; sums have a fixed order, so that the same call gives the same bits. Refused: what a contract does
// not cover, in a sentence that names it.

// y = round(round(s * rstd) * weight), rstd = 1 / sqrt(mean(s^2) + eps) over a row, s = x, or with a residual x + residual,
// rounded (Zhang & Sennrich 2019; rounded as Hugging Face's Llama). A row has at most 16384
// values, or 8192 where it is not in whole 16 bytes.
struct RmsNormForward {
  Type type;
  int64_t num_rows, width;
  const void *x, *residual;  // [rows, width]; residual: null for none
  const void* weight;        // [width]
  float eps;
  void *y, *sum;             // [rows, width]; sum: s, with a residual only
  float* rstd;               // [rows]
};

constexpr int64_t rms_norm_widest(int64_t row_bytes) { return row_bytes % 16 == 0 ? 16384 : 8192; }

// With g = grad_y * weight: grad_x = rstd * (g - s * rstd^2 * mean(g * s)) + grad_sum;
// grad_weight = sum over the rows of grad_y * round(s * rstd).
struct RmsNormBackward {
  Type type;
  int64_t num_rows, width;
  const void *grad_y, *grad_sum;  // [rows, width]; grad_sum: null for none
  const void *s, *weight;
  const float* rstd;
  void* grad_x;                   // [rows, width]; null: not wanted
  float* grad_weight;             // [width], fp32; null: not wanted
  float* workspace;               // rms_norm_workspace(num_rows, width) elements, where grad_weight is wanted
};
constexpr int64_t kRmsNormPartials = 512;  // sums of the weights' gradient: a few for each multiprocessor
constexpr int64_t rms_norm_workspace(int64_t num_rows, int64_t width) { return std::min(num_rows, kRmsNormPartials) * width; }

// y = (s - mean) * rstd * weight + bias, rounded once, mean over a row, rstd = 1 / sqrt(mean((s - mean)^2) + eps), s as above (Ba et
// al. 2016; rounded as torch's). Rows as above.
struct LayerNormForward {
  Type type;
  int64_t num_rows, width;
  const void *x, *residual;      // [rows, width]; residual: null for none
  const void *weight, *bias;     // [width]; bias: null for none
  float eps;
  void *y, *sum;                 // [rows, width]; sum: s, with a residual only
  float *mean, *rstd;            // [rows]
};

// With g = grad_y * weight, n = (s - mean) * rstd: grad_x = rstd * (g - mean(g) - n * mean(g * n)) + grad_sum;
// grad_weight and grad_bias = sums over the rows of grad_y * n and of grad_y.
struct LayerNormBackward {
  Type type;
  int64_t num_rows, width;
  const void *grad_y, *grad_sum;     // [rows, width]; grad_sum: null for none
  const void *s, *weight;
  const float *mean, *rstd;
  void* grad_x;                      // [rows, width]; null: not wanted
  float *grad_weight, *grad_bias;    // [width], fp32; null: not wanted
  float* workspace;                  // layer_norm_workspace(num_rows, width) elements, where one of these is wanted
};
constexpr int64_t layer_norm_workspace(int64_t num_rows, int64_t width) { return 2 * rms_norm_workspace(num_rows, width); }

// y = x * (0, or 1 / (1 - p)), or with `add` y + that, rounded once; x may be y. An element's 32 bits, below floor(2^32 p) dropped, are
// word c / 16 % 4 of the Philox block with stream kDropout (base/random.h), high counter row_ids[row] and low counter
// module * 2^32 + c / 64 * 16 + c % 16, where c = first_feature + its column: the CPU's, and the same on any mesh and when computed
// again. Forward and gradient are the same operation.
struct Dropout {
  Type type;
  int64_t num_rows, width;
  const void* x;           // [rows, width]
  const int64_t* row_ids;  // [rows]
  uint64_t seed, module;   // module < 2^32
  int64_t first_feature;
  double p;                // 0 <= p < 1
  bool add;
  void* y;                 // [rows, width]
};

// Low-rank products of adapters (Hu et al. 2021) with dropout of what is wide, as Dropout has it, but not rounded on the way. bf16
// and fp16; ranks 1 .. 256; wide tensors in rows of whole 16 bytes at multiples of 16 bytes. A wide tensor is read once for each 64
// ranks begun, and y of lora_up read and written once: with dropout that is 2.5 times less memory than with products of a dropped
// copy, forward and backward together. Without dropout a library's products move as much.
struct LoraDropout {
  const int64_t* row_ids;  // [rows]
  uint64_t seed, module;
  int64_t first_feature;   // a multiple of 8
  double p;                // 0: none, and none of the others is used
};

// y = dropout(x) w^T, rounded once
struct LoraDown {
  Type type;
  int64_t num_rows, width, rank;
  const void* x;           // [rows, width]
  const void* w;           // [rank, width]
  LoraDropout dropout;
  void* y;                 // [rows, rank]
};

// y = y + scale * dropout(x w^T), rounded once
struct LoraUp {
  Type type;
  int64_t num_rows, width, rank;
  const void* x;           // [rows, rank]
  const void* w;           // [width, rank], or [rank, width]
  bool by_rank;            // the latter
  float scale;
  LoraDropout dropout;
  void* y;                 // [rows, width]
};

// gradient = scale * dropout(wide)^T narrow, or with `add` gradient + that, rounded once: sums over the rows, some slices of them
// one after the other.
struct LoraGradient {
  Type type, gradient_type;  // gradient_type: fp32, or the type
  int64_t num_rows, width, rank;
  const void* wide;          // [rows, width]
  const void* narrow;        // [rows, rank]
  LoraDropout dropout;
  float scale;
  bool by_rank, add;
  void* gradient;            // [width, rank]; by_rank: [rank, width]
  float* workspace;          // lora_gradient_workspace(num_rows, width, rank) elements, at a multiple of 16 bytes
};
constexpr int64_t lora_gradient_slices(int64_t num_rows, int64_t width, int64_t rank) {
  return std::max<int64_t>(1, std::min(num_rows / 128, 256 / std::max<int64_t>(1, (width + 255) / 256 * ((rank + 63) / 64))));
}
constexpr int64_t lora_gradient_workspace(int64_t num_rows, int64_t width, int64_t rank) { return lora_gradient_slices(num_rows, width, rank) * width * rank; }

// Rotary position embedding of the first `rotary_dims` of each head's values (Su et al. 2021, by halves as Hugging Face's):
// y = x * cos + concat(-x[R/2:R], x[:R/2]) * sin; `inverse`: the transposed rotation, its gradient. The others are copied.
struct Rope {
  Type type;
  int64_t num_tokens, num_heads, head_dim, rotary_dims;
  const void* x;            // a token's heads stand together, tokens x_stride values apart
  int64_t x_stride;
  const float *cos, *sin;   // [num_tokens, rotary_dims]
  void* y;                  // may be x, with its stride
  int64_t y_stride;
  bool inverse;
};

// y = act(gate) * up (Shazeer 2020), act(g) = g * sigmoid(g), or gelu(g) = g/2 * (1 + erf(g / sqrt(2))), or its
// approximation g/2 * (1 + tanh(sqrt(2/pi) * (g + 0.044715 g^3))) (Hendrycks & Gimpel 2016).
enum class Gate { kSilu, kGelu, kGeluTanh };
struct GluForward {
  Type type;
  Gate activation;
  int64_t num_rows, width, stride;
  const void *gate, *up;  // rows stand `stride` values apart: both may be slices of one tensor
  void* y;                // [num_rows, width]
};
struct GluBackward {
  Type type;
  Gate activation;
  int64_t num_rows, width, stride;
  const void* grad_y;            // [num_rows, width]
  const void *gate, *up;         // rows `stride` values apart
  void *grad_gate, *grad_up;     // the same; may be gate and up, and grad_up grad_y where stride is width
};

// Of logits z with L = log(sum(exp(z))) over a row, V in number: loss = L - (1 - s) z[target] - s mean(z) + c L^2 (Szegedy et
// al. 2016; z-loss: Chowdhery et al. 2022); correct: the target is the first of the largest. With `gradient` the logits become
// gradient_scale * (softmax(z) (1 + 2 c L) - s / V - (1 - s) [target]).
struct CrossEntropy {
  Type type;
  int64_t num_rows, width, stride;
  void* logits;             // [num_rows, width], rows `stride` values apart, at any address
  const int64_t* targets;   // [num_rows]; below 0: the row is ignored, all its results are 0; beyond the last: the loss is NaN
  float label_smoothing, z_loss, gradient_scale;  // s and c, 0: none
  bool gradient;
  float* loss;              // [num_rows], as is
  uint8_t* correct;         // 0 or 1
};

// The same over several devices, which hold columns first_id .. first_id + rows.width - 1 of a vocabulary each.
// cross_entropy_part gives what a row's columns here say; then maximum becomes the largest of all devices, sum the sum of
// sum * exp(maximum here - maximum of all), target_logit and logit_sum their sums, largest the least of those devices that
// have the maximum; with which cross_entropy_finish gives loss and correct of the whole, and the gradient of the columns here.
struct CrossEntropyPart {
  CrossEntropy rows;
  int64_t first_id, vocabulary;
  float *maximum, *sum;             // [num_rows]; sum of exp(z - maximum)
  float *target_logit, *logit_sum;  // 0 where the target is not here, and without label smoothing
  int64_t* largest;                 // the first id that has the maximum
};

// One step of an optimizer on tensors with weights of `type`, in one launch (some 300 tensors each), in fp32 and in this order, with
// g = grad * grad_scale:
//   kAdamW (Loshchilov & Hutter 2019), states m and v:  m += (g - m) (1 - beta1);  v = v beta2 + g^2 (1 - beta2)
//     w = w (1 - lr weight_decay) - m / (sqrt(v) / sqrt(correction2) + epsilon) * lr / correction1
//   kSgd (torch.optim.SGD), state m:  m = m beta1 + (g + w weight_decay);  w = w - m lr; without m as if it were 0
//   kAdamW8Bit: AdamW whose m and v are codes of 8 bits between steps (Dettmers et al. 2022), in blocks of k8BitBlock elements from the
//     first of the part on: x = number[code] * scale, and back as quantize_blocks() does it, by the signed map for m, by the unsigned for
//     v; but an m below 0 never becomes 0: it takes the number before (bitsandbytes)
//   kLion (Chen et al. 2023), state m:  w = w (1 - lr weight_decay) - sign(m beta1 + g (1 - beta1)) lr;  m = m beta2 + g (1 - beta2)
// w is the master, which the weights are rounded from. Without one, weights are fp32, or bf16 that are rounded
// to one of their two neighbours at random, so that the mean over many steps is kept: by 16 bits, half `i % 2` of word i % 8 / 2 of
// the Philox block with stream kRounding (base/random.h), high counter step * 2^32 + id and low counter i / 8, where i is the
// element's place in the whole tensor: the same on any mesh. Where grad_scale is not finite nothing is written: no step is taken,
// which the host need not know.
enum class UpdateRule { kAdamW, kSgd, kLion, kAdamW8Bit };
constexpr int kUpdateRules = 3;         // element by element
constexpr int64_t k8BitBlock = 256;
// Element i of a part stands at offset + j / run * stride + j % run of the whole tensor, row by row, where j = first + i is its
// place in the slice that the part is of: a slice of columns has a run in each row, any other is one run.
struct Places {
  int64_t first = 0;
  int64_t offset = 0;                           // of the slice's first element
  int64_t run = int64_t{1} << 62, stride = 0;   // elements that stand together, and from one such run to the next
};
struct UpdateTensor {
  int64_t size;
  void* weight;
  float* master;                  // null: none
  const float* grad;
  void *m, *v;                    // fp32, of kAdamW8Bit uint8; null where the rule has none
  Places places;
  uint32_t id;                    // of the whole tensor
  float *m_scale = nullptr, *v_scale = nullptr;  // [blocks] of kAdamW8Bit
};
struct Update {
  UpdateRule rule;
  Type type;
  const UpdateTensor* tensors;    // on the host
  int64_t num_tensors;
  double lr, weight_decay, beta1, beta2, epsilon;
  double correction1, correction2;  // 1 - beta^t
  const float* grad_scale;          // on the device; null: 1
  uint64_t seed, step;              // of the random rounding; step < 2^32
  const float* maps = nullptr;      // of kAdamW8Bit, [512] on the device: the signed map, then the unsigned
};

// One step of Adafactor (Shazeer & Stern 2018; src/optim/adafactor.h has the formulas) on a part of a tensor, as UpdateTensor has parts, in
// fp32 with sums in fp64. A step over all parts of all devices is
//   adafactor_sums    adds to `sums`, which devices then add up
//   adafactor_means   of the sums: rows, columns and mean_of_rows; of a vector: squares
//   adafactor_norm    adds to `norm`, which devices then add up
//   adafactor_update  the weights, rounded as Update does
// Where grad_scale is not finite nothing but sums, norm and workspace is written.
struct Adafactor {
  Type type;                      // of the weights; fp16 with a master
  int64_t size;                   // of the part
  int64_t num_rows, num_columns;  // of the whole tensor; num_rows 0: a vector
  Places places;
  void* weight;
  float* master;                  // null: none
  const float* grad;
  float *rows, *columns;          // of a matrix, whole: [num_rows], [num_columns]
  float* squares;                 // of a vector: [size]
  double* sums;                   // of the whole tensor: of g^2 over its rows and columns, [num_rows + num_columns] of a matrix, and of w^2
  double *mean_of_rows, *norm;    // norm: sum of u^2
  double mix, lr, largest_rate, weight_decay;  // t^-0.8; largest_rate: min(lr, 1 / sqrt(t))
  const float* grad_scale;        // on the device; null: 1
  uint64_t seed, step;
  uint32_t id;
  double* workspace;              // adafactor_workspace(*this) elements
};
// Its elements as lines of what it has of a row each; tiles of kAdafactorLines x kAdafactorColumns are summed up first.
struct AdafactorLines {
  int64_t width, skipped, count;  // skipped: what the first line has before the part
  int64_t row, column;            // of the whole tensor, of the first line
  int64_t num_tiles;              // beside one another
};
constexpr int64_t kAdafactorLines = 64, kAdafactorColumns = 512;
constexpr AdafactorLines adafactor_lines(const Adafactor& p) {
  if (p.num_rows == 0) return {p.size, 0, 1, 0, 0, (p.size + kAdafactorColumns - 1) / kAdafactorColumns};
  const int64_t width = std::max<int64_t>(1, std::min(p.num_columns, p.places.run)), skipped = p.places.first % width, columns = std::max<int64_t>(1, p.num_columns);
  return {width, skipped, (skipped + p.size + width - 1) / width, p.places.offset / columns + p.places.first / width, p.places.offset % columns,
          (width + kAdafactorColumns - 1) / kAdafactorColumns};
}
constexpr int64_t adafactor_workspace(const Adafactor& p) {
  const AdafactorLines lines = adafactor_lines(p);
  const int64_t tiles = (lines.count + kAdafactorLines - 1) / kAdafactorLines;
  return lines.count * lines.num_tiles + tiles * lines.width + tiles * lines.num_tiles;
}

// norm = scale * sqrt(squares), factor = scale * min(1, max_norm / (norm + 1e-6)), or scale where max_norm is not positive: of gradients
// that are yet to be multiplied by `scale`. factor is NaN where squares are not finite. With `hold` a factor that is NaN stays NaN: steps
// after one that was not taken are not taken either until the host, which learns of it late, writes another number there.
struct Clip {
  double max_norm, scale;
  float *norm, *factor;           // null: not wanted
  bool hold;
  const double* loss = nullptr;   // on the device; where it is not finite, neither are the squares
};

// squares = the sum of the squares of all values, in fp64; in two launches (some 1,500 tensors each). The order of the sum depends on
// the sizes alone. NaN and infinities stay.
struct GradientTensor {
  int64_t size;
  const void* data;
};
struct GradientNorm {
  Type type;
  const GradientTensor* tensors;  // on the host
  int64_t num_tensors;
  double* workspace;              // gradient_norm_workspace(tensors, num_tensors) elements
  double* squares;
  Clip clip;
};
constexpr int64_t kGradientChunk = 16384;
constexpr int64_t gradient_norm_workspace(const GradientTensor* tensors, int64_t num_tensors) {
  int64_t chunks = 0;
  for (int64_t i = 0; i < num_tensors; ++i) chunks += (tensors[i].size + kGradientChunk - 1) / kGradientChunk;
  return chunks;
}

// For squares that were added up over ranks.
struct ClipFactor {
  const double* squares;
  Clip clip;
};

// y[t] = row ids[t] - first_id of the weight; zeros where it has none: ids of other devices.
struct Embedding {
  Type type;
  int64_t num_tokens, width;
  const int64_t* ids;              // [num_tokens]
  const void* weight;              // [num_ids, width]
  int64_t first_id, num_ids;
  void* y;                         // [num_tokens, width]
};

// Adds to the rows of the ids, in fp32, the sums of their tokens' rows in the order of the tokens; other rows are not touched.
// The tokens are sorted by their ids first.
struct EmbeddingGradient {
  Type type, weight_type;          // weight_type: fp32, or the type
  int64_t num_tokens, width;
  const int64_t* ids;
  const void* grad_y;              // [num_tokens, width]
  int64_t first_id, num_ids;
  void* grad_weight;               // [num_ids, width] of weight_type
  int64_t* workspace;              // embedding_gradient_workspace(num_tokens) elements
};
constexpr int64_t embedding_gradient_blocks(int64_t num_tokens) { return std::clamp<int64_t>(num_tokens / 2048, 1, 256); }
constexpr int64_t embedding_gradient_workspace(int64_t num_tokens) { return 2 * num_tokens + 128 * embedding_gradient_blocks(num_tokens); }

// y = scale * x, or with `add` y + scale * x, rounded to y's type; y may be x, of the same type, which with a product of 1 is left alone.
struct Convert {
  Type from, to;
  int64_t count;
  const void* x;
  void* y;
  float scale;
  bool add;
  const float* factor;  // of scale, on the device; null: 1
};

// y[b][c][r] = x[b][r][c], the same bits.
struct Transpose {
  Type type;
  int64_t num_batches, num_rows, num_columns;
  const void* x;  // [num_batches, num_rows, num_columns]
  void* y;        // [num_batches, num_columns, num_rows], elsewhere
};

// sum[c] = sum over the rows of x[r][c]
struct SumRows {
  Type type;
  int64_t num_rows, width;
  const void* x;     // [num_rows, width]
  float* sum;        // [width]
  float* workspace;  // sum_rows_workspace(num_rows, width) elements
};
constexpr int64_t sum_rows_slices(int64_t num_rows) { return std::clamp<int64_t>(num_rows / 64, 1, 128); }
constexpr int64_t sum_rows_workspace(int64_t num_rows, int64_t width) { return sum_rows_slices(num_rows) > 1 ? sum_rows_slices(num_rows) * width : 0; }

// d = alpha * op(a) op(b) + beta * d (+ bias in each row), op(x) = x or x transposed: by cuBLASLt on a device. Products are summed up in fp32
// (of fp32: as they are, or rounded to TF32 first) and all of it is rounded once, to d's type. Long sums may be cut into parts,
// kept in fp32 in the workspace and added in order. The algorithm, and with it the order of sums, depends on all but the values, alpha
// and beta: of addresses, on what power of two up to 256 they are a multiple of. Result: of the type of a and b, or fp32.
// Float8 (a card of compute capability 8.9 or later): x stands for x * scale; a is not transposed and b is; one of them is e4m3; sizes
// but m and all strides are multiples of 16, addresses of 16 bytes.
struct MatMul {
  Type a_type, b_type, d_type;
  int64_t m, n, k;               // op(a) [m, k], op(b) [k, n], d [m, n]; each below 2^31, k not 0
  bool transpose_a, transpose_b; // the matrix lies in memory as [k, m], [n, k]
  const void *a, *b;             // row by row, rows `stride` values apart
  int64_t a_stride, b_stride;
  void* d;                       // elsewhere
  int64_t d_stride;
  const void* bias;              // [n], of d's type; null: none
  float alpha, beta;             // beta 0: d is not read
  bool tf32;
  const float *a_scale, *b_scale;  // of float8, on the device; otherwise null
  void* workspace;               // at a multiple of 256 bytes, for this call's stream alone; with less than kMatMulWorkspace it may be slower
  int64_t workspace_bytes;
};
constexpr int64_t kMatMulWorkspace = int64_t{32} << 20;

// scale = the largest magnitude in x / the largest number of the type (448, 57344), at least 2^-126; y = x / scale, to the nearest.
// NaNs stay; where x has an infinity no result is a number.
struct ToFloat8 {
  Type from, to;     // to: float8
  int64_t count;
  const void* x;
  void* y;
  float* scale;
  float* workspace;  // kFloat8Partials elements
};
constexpr int64_t kFloat8Partials = 1024;

// Every operation, for one kind of device.
struct Kernels {
  void (*attention_forward)(const AttentionForward&, Stream);
  void (*attention_backward)(const AttentionBackward&, Stream);
  void (*decode_attention)(const AttentionDecode&, Stream);
  void (*rms_norm_forward)(const RmsNormForward&, Stream);
  void (*rms_norm_backward)(const RmsNormBackward&, Stream);
  void (*layer_norm_forward)(const LayerNormForward&, Stream);
  void (*layer_norm_backward)(const LayerNormBackward&, Stream);
  void (*dropout)(const Dropout&, Stream);
  void (*lora_down)(const LoraDown&, Stream);
  void (*lora_up)(const LoraUp&, Stream);
  void (*lora_gradient)(const LoraGradient&, Stream);
  void (*rope)(const Rope&, Stream);
  void (*glu_forward)(const GluForward&, Stream);
  void (*glu_backward)(const GluBackward&, Stream);
  void (*cross_entropy)(const CrossEntropy&, Stream);
  void (*cross_entropy_part)(const CrossEntropyPart&, Stream);
  void (*cross_entropy_finish)(const CrossEntropyPart&, Stream);
  void (*update)(const Update&, Stream);
  void (*gradient_norm)(const GradientNorm&, Stream);
  void (*clip_factor)(const ClipFactor&, Stream);
  void (*adafactor_sums)(const Adafactor&, Stream);
  void (*adafactor_means)(const Adafactor&, Stream);
  void (*adafactor_norm)(const Adafactor&, Stream);
  void (*adafactor_update)(const Adafactor&, Stream);
  void (*embedding)(const Embedding&, Stream);
  void (*embedding_gradient)(const EmbeddingGradient&, Stream);
  void (*convert)(const Convert&, Stream);
  void (*transpose)(const Transpose&, Stream);
  void (*sum_rows)(const SumRows&, Stream);
  void (*matmul)(const MatMul&, Stream);
  void (*to_float8)(const ToFloat8&, Stream);
  void (*quantize_4)(const Quantize4&, Stream);
  void (*dequantize_4)(const Dequantize4&, Stream);
  void (*quantize_blocks)(const QuantizeBlocks&, Stream);
  void (*dequantize_blocks)(const DequantizeBlocks&, Stream);
  void (*largest_of_rows)(const QuantizeRows&, Stream);  // absmax and outlier
  void (*quantize_rows)(const QuantizeRows&, Stream);    // codes, of these
  void (*dequantize_rows)(const DequantizeRows&, Stream);
  void (*scale_products)(const ScaleProducts&, Stream);
  void (*quantize_groups)(const QuantizeGroups&, Stream);
  void (*dequantize_groups)(const DequantizeGroups&, Stream);
};
const Kernels& cuda_kernels();
const Kernels& emulated_kernels();  // on the host, for tests: kernels/emu

}  // namespace trireme::kernels
