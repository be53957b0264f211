#include "optim/clip.h"

#include "ops/op_support.h"
#include "optim/update_loops.h"

namespace trireme {

double squared_norm(const at::Tensor& x) {
  constexpr int64_t kChunk = 1 << 16;  // the cut does not depend on threads
  TRIREME_CHECK(x.is_contiguous(), x.sizes());
  const int64_t size = x.numel(), num_chunks = (size + kChunk - 1) / kChunk;
  std::vector<double> sums(static_cast<size_t>(num_chunks));
  dispatch_floating(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    at::parallel_for(0, num_chunks, 1, [&](int64_t first, int64_t last) {
      for (int64_t c = first; c < last; ++c)
        sums[static_cast<size_t>(c)] = update_loops<T>().sum_of_squares(std::min(size, (c + 1) * kChunk) - c * kChunk,
                                                                        x.data_ptr<T>() + c * kChunk);
    });
  });
  double sum = 0.0;
  for (double s : sums) sum += s;
  return sum;
}

double squared_norm(const std::vector<at::Tensor>& tensors) {
  double sum = 0.0;
  for (const auto& x : tensors) sum += squared_norm(x);
  return sum;
}

double clip_scale(double norm, double max_norm) {
  if (max_norm <= 0.0) return 1.0;
  const double scale = max_norm / (norm + 1e-6);
  return scale > 1.0 ? 1.0 : scale;  // NaN stays
}

}  // namespace trireme
