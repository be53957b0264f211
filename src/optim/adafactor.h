// Adafactor (Shazeer & Stern 2018, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost"), the arithmetic of
// torch.optim.Adafactor with its defaults: of a matrix's squared gradients the means of rows and of columns are kept instead of all.
// With g the gradient [R, C], t the step and e the dtype's epsilon:
//   mix = t^-0.8;  row += (mean of g^2 over columns - row) * mix;  col += (mean of g^2 over rows - col) * mix
//   u = g / sqrt(max(row col / max(mean of row, e), e^2));  u /= max(1, rms(u))
//   w = w (1 - lr weight_decay) - u * min(lr, 1 / sqrt(t)) * max(1e-3, rms(w))
// A vector keeps the means of its squares themselves. Sums are of whole tensors: ranks add up what each has, in fp64, in two
// reductions a step, so another layout has other last bits. On a device kernels do all of it (kernels/adafactor.cu), with sums in another
// order: weights are those of the CPU but for some units of the last place.
#pragma once

#include "optim/optimizer.h"

namespace trireme {

class Adafactor {
 public:
  // Tensors of at most two dimensions, all on one device.
  Adafactor(const std::vector<OptimTensor>& tensors, const AcrossRanks& ranks);

  // Takes the gradients, times grad_scale, of step `step` (from 1) into the means, and finds the rates. `weights`: of each tensor, in
  // full precision where there is a master. Collective.
  void measure(const std::vector<at::Tensor>& weights, double lr, double grad_scale, int64_t step);
  // Of that step: w goes by -rate * direction. Flat [N], fp32 (fp64 for fp64 weights).
  double rate(size_t tensor) const { return parts_[tensor].rate; }
  at::Tensor direction(size_t tensor) const;

  // All of a step by kernels, which nothing waits for. `calls`: of each tensor what kernels::Adafactor has of the tensor alone and of the
  // update; in_pieces(f) calls f with the pieces of all tensors as their masters are there. Collective.
  void step(std::vector<kernels::Adafactor> calls, const std::function<void(const std::function<void(const StatePiece&)>&)>& in_pieces);
  bool by_kernels() const;

  std::vector<OptimState> state() const;  // row_var [R] and col_var [C], whole on every rank; variance of a vector
  // Of the state of so many elements of a parameter, and of what measure() and direction() take for a while.
  static uint64_t state_bytes(at::ScalarType dtype, int64_t elements, at::IntArrayRef whole);
  static uint64_t sums_bytes(at::IntArrayRef whole);
  static uint64_t workspace_bytes(int64_t elements, at::IntArrayRef whole);  // of kernels

 private:
  struct Part {
    OptimTensor of;
    bool is_matrix = false;
    int64_t num_rows = 1, num_columns = 1;        // of the whole
    int64_t row = 0, column = 0, width = 1;       // where the slice begins, and what it has of a row
    size_t sums = 0, number = 0;                  // its place in sums_ and norms_
    at::Tensor rows, columns, squares;            // the state
    double mean = 0, rate = 0;                    // mean: of rows
  };
  template <typename F>
  double over_rows(const Part& part, const F& f) const;
  template <typename A>
  double directions(const Part& part, A* to) const;

  std::vector<Part> parts_;
  AcrossRanks ranks_;
  at::Device device_;
  at::Tensor sums_, norms_;  // fp64, of all tensors of all ranks: rows, columns and w^2; u^2
  at::Tensor means_;         // fp64, of each tensor's rows, for kernels
  double grad_scale_ = 1;
};

}  // namespace trireme
