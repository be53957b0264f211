// Plain loops in fp64 that define the operations of kernels.h, for tests: inputs are the values that the kernels read, outputs
// are not rounded but where the contract rounds on the way (`type`).
#pragma once

#include <vector>

#include "kernels/kernels.h"

namespace trireme::kernels::reference {

using Values = std::vector<double>;

// To the nearest value of the type, ties to even; beyond the largest: infinity, of float8 the largest.
double round_to(Type type, double x);
Values round_to(Type type, Values x);

struct RmsNorm {
  Values s, rstd, y;
};
RmsNorm rms_norm(Type type, const Values& x, const Values& residual, const Values& weight, double eps);  // residual may be empty

struct RmsNormGradient {
  Values x, weight;
};
RmsNormGradient rms_norm_gradient(Type type, const Values& grad_y, const Values& grad_sum, const Values& s, const Values& weight, const Values& rstd);

struct LayerNorm {
  Values s, mean, rstd, y;
};
LayerNorm layer_norm(Type type, const Values& x, const Values& residual, const Values& weight, const Values& bias, double eps);  // residual, bias: may be empty

struct LayerNormGradient {
  Values x, weight, bias;
};
LayerNormGradient layer_norm_gradient(const Values& grad_y, const Values& grad_sum, const Values& s, const Values& weight, const Values& mean, const Values& rstd);

// Low-rank products; w [width, rank], `kept` [rows, width]: what dropout multiplies with. y += scale * kept * (x w^T); x [rows, rank] of
// the second.
Values lora_down(const Values& x, const Values& w, const Values& kept, int64_t rank);
Values lora_up(Values y, const Values& x, const Values& w, const Values& kept, int64_t rank, double scale);
Values lora_gradient(const Values& wide, const Values& narrow, const Values& kept, int64_t rank);  // [width, rank]

// x and y: tokens of num_heads heads; tables of rotary_dims values a token.
Values rope(const Values& x, int64_t num_heads, int64_t head_dim, const Values& cos, const Values& sin, bool inverse);

double activate(Gate gate, double g);
double activate_slope(Gate gate, double g);

struct CrossEntropy {
  Values loss, gradient;
  std::vector<bool> correct;
};
CrossEntropy cross_entropy(const Values& logits, int64_t width, const std::vector<int64_t>& targets, double label_smoothing, double z_loss, double gradient_scale);

struct UpdateNumbers {
  double lr, weight_decay, beta1, beta2, epsilon, correction1, correction2, grad_scale;
};
struct UpdateState {
  Values weight, m, v;
};
UpdateState update(UpdateRule rule, const UpdateNumbers& numbers, UpdateState state, const Values& grad);

struct AdafactorState {
  Values weight, rows, columns, squares;  // of a matrix rows and columns, else squares
};
// num_rows 0: a vector.
AdafactorState adafactor(int64_t num_rows, AdafactorState state, const Values& grad, double mix, double lr, double largest_rate, double weight_decay);

double sum_of_squares(const Values& x);

// op(a) op(b), [m, n]; the matrices lie without gaps.
Values matmul(int64_t m, int64_t n, int64_t k, const Values& a, bool transpose_a, const Values& b, bool transpose_b);

}  // namespace trireme::kernels::reference
