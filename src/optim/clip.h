// Clipping by the global norm of the gradients, as torch.nn.utils.clip_grad_norm_.
#pragma once

#include <array>

#include "base/tensor.h"

namespace trireme {

// The largest magnitude of a contiguous tensor; NaN or infinity where one is.
double largest_magnitude(const at::Tensor& x);

// A sum of squares that has the same bits however the values are cut into tensors, parts, ranks and threads, and in
// whatever order these are added: every square is cut into multiples of three fixed steps (after Demmel & Nguyen 2013,
// "Fast reproducible floating-point summation"), whose sums are exact integers. The steps follow from the largest
// magnitude of all values, which everybody must know first; what is below 2^-78 of its square is dropped.
// For at most 2^37 values in all. Adds to others by adding `sums`.
struct SquareSum {
  explicit SquareSum(double largest);  // of all values, not only of those that are added here
  void add(const at::Tensor& x);       // contiguous
  double total() const;                // NaN or infinity where `largest` is

  double largest;
  std::array<int64_t, 3> sums{};
};

// Of all tensors together.
double squared_norm(const std::vector<at::Tensor>& tensors);
inline double squared_norm(const at::Tensor& x) { return squared_norm(std::vector<at::Tensor>{x}); }

// What gradients are multiplied by so that their norm is at most max_norm: min(1, max_norm / (norm + 1e-6)).
// max_norm <= 0: 1, no clipping. NaN where the norm is.
double clip_scale(double norm, double max_norm);

// Of gradients that are yet to be multiplied by `scale`: norm = scale * sqrt(squares), factor = scale * clip_scale(norm, max_norm).
struct ClipBy {
  double max_norm = 0, scale = 1;
  at::Tensor loss = {};  // scalar, fp64, on the device: one that is not finite holds the update as a gradient does
};

// The same on a device, which nothing waits for:
//   norm.measure(gradients, by);    // squares, norm and factor, in two launches
//   optimizer.step(lr, norm.factor);
// or, where ranks have parts of the gradients:
//   norm.measure(gradients);        // squares, which the caller adds up over the ranks
//   norm.clip(by);                  // norm and factor
// A step whose gradients are not finite is not taken, nor is any behind it: the host, which reads norms late, calls resume()
// when it has seen to it.
struct DeviceNorm {
  explicit DeviceNorm(at::Device device);
  // Of contiguous tensors of one dtype; 0 of none. The order of the sum depends on their sizes.
  void measure(const std::vector<at::Tensor>& gradients) { measure(gradients, nullptr); }
  void measure(const std::vector<at::Tensor>& gradients, const ClipBy& by) { measure(gradients, &by); }
  void clip(const ClipBy& by);
  void resume() { factor.fill_(1); }

  at::Tensor squares;       // scalar, fp64
  at::Tensor norm, factor;  // scalars, fp32

 private:
  void measure(const std::vector<at::Tensor>& gradients, const ClipBy* by);
};

}  // namespace trireme
