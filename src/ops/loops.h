// The vector loops under the operations: serial functions over contiguous rows, one set per dtype and instruction set.
// Callers split rows over threads. Shape suffixes as in ops.h; `rows` rows of `size` values unless said otherwise.
// Pointers never overlap unless they are equal, which is allowed for inputs and outputs of one element-wise loop.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

namespace trireme {

template <typename T>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};

struct DropoutBits {
  uint64_t seed, module;
  uint32_t threshold;  // dropped where the element's 32 bits are below
  double keep_scale;   // 1 / (1 - p)
  int64_t first_feature;
};

template <typename T>
struct Loops {
  using A = typename ComputeType<T>::type;

  // x + residual (null: x alone) goes to `sum` (null: not kept), rounded; y = round(round(sum * rstd) * weight).
  void (*rms_norm)(int64_t rows, int64_t size, const T* x, const T* residual, T* sum, const T* weight, double eps, T* y,
                   A* rstd);
  // Gradient of rms_norm of x for grad_y, plus grad_sum (null: none), into grad_x (null: not wanted); adds to
  // grad_weight (null: not wanted).
  void (*rms_norm_backward)(int64_t rows, int64_t size, const T* grad_y, const T* grad_sum, const T* x, const T* weight,
                            const A* rstd, T* grad_x, A* grad_weight);
  // One token: heads x dim, tables of `rotary` values. `inverse` applies the transposed rotation (the gradient).
  void (*rope)(int64_t tokens, int64_t heads, int64_t dim, int64_t rotary, const T* x, const A* cos, const A* sin, T* y,
               bool inverse);
  void (*swiglu)(int64_t count, const T* gate, const T* up, T* y);
  void (*swiglu_backward)(int64_t count, const T* grad_y, const T* gate, const T* up, T* grad_gate, T* grad_up);
  void (*geglu)(int64_t count, const T* gate, const T* up, T* y);
  void (*geglu_backward)(int64_t count, const T* grad_y, const T* gate, const T* up, T* grad_gate, T* grad_up);
  // y = mask(x) (add: y += mask(x)).
  void (*dropout)(int64_t rows, int64_t size, const T* x, const int64_t* row_ids, const DropoutBits& bits, bool add,
                  T* y);
  // loss[r] = -log softmax(logits[r])[target[r]], with the terms of CrossEntropyTerms, correct[r] = 1 where the target is the first
  // largest; `gradient`: logits become the loss's gradient, without terms softmax - onehot.
  void (*cross_entropy)(int64_t rows, int64_t size, T* logits, const int64_t* targets, double label_smoothing, double z_loss,
                        double* loss, uint8_t* correct, bool gradient);
  // sum[c] += x[r][c], rows in order.
  void (*add_rows)(int64_t rows, int64_t size, const T* x, A* sum);
  // y[i] = x[i] * scale
  void (*scale_from)(int64_t count, const A* x, double scale, T* y);
  // y[r][o] = scale * sum_i x[r][i] w[o][i] + plus[r][o] (null: 0), rounded once, for x [rows, size] and w [features,
  // size]: reads w once. Rows of y and of `plus` (may be y) stand `stride_y` and `stride_plus` apart.
  void (*product)(int64_t rows, int64_t features, int64_t size, const T* x, const T* w, double scale, const T* plus,
                  int64_t stride_plus, T* y, int64_t stride_y);
};

// level: -1 the best of this processor, else 0 .. vector_level().
template <typename T>
const Loops<T>& loops(int level = -1);

}  // namespace trireme
