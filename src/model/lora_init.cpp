#include "base/tensor.h"

#include "model/lora_init.h"

#include <ATen/Functions.h>

#include "base/check.h"

namespace trireme {
namespace {

struct Factors {
  at::Tensor a_RI, b_OR;
};

// Of a matrix of float64 on the CPU; rounded to `dtype`.
Factors largest_directions(const at::Tensor& x_OI, int64_t rank, double scale, at::ScalarType dtype) {
  TRIREME_CHECK(rank >= 1 && rank <= std::min(x_OI.size(0), x_OI.size(1)) && scale > 0, rank, " ", scale, " ", x_OI.sizes());
  const auto [u, s, vt] = at::linalg_svd(x_OI, /*full_matrices=*/false);
  at::Tensor b_OR = u.narrow(1, 0, rank), a_RI = vt.narrow(0, 0, rank);
  const at::Tensor largest_1R = b_OR.gather(0, b_OR.abs().argmax(0, /*keepdim=*/true));
  const at::Tensor factor_1R = (s.narrow(0, 0, rank).unsqueeze(0) / scale).sqrt();
  const at::Tensor sign_1R = at::where(largest_1R < 0, -1.0, 1.0).to(at::kDouble);
  b_OR = b_OR * (factor_1R * sign_1R);
  a_RI = a_RI * (factor_1R * sign_1R).t();
  return {a_RI.to(dtype).contiguous(), b_OR.to(dtype).contiguous()};
}

// W - scale B A of the factors as they are rounded, so that base and adapter make up for each other.
at::Tensor rest_of(const at::Tensor& x_OI, const Factors& f, double scale) {
  return x_OI - at::matmul(f.b_OR.to(at::kDouble), f.a_RI.to(at::kDouble)) * scale;
}

at::Tensor wide(const at::Tensor& x) { return x.detach().to(at::kCPU).to(at::kDouble); }

LoraStart started(const at::Tensor& weight_OI, const at::Tensor& base_OI, at::ScalarType base_dtype, const Factors& f) {
  const at::Device device = weight_OI.device();
  return {base_OI.to(base_dtype).to(device), f.a_RI.to(device), f.b_OR.to(device)};
}

}  // namespace

LoraStart pissa_start(const at::Tensor& weight_OI, int64_t rank, double scale) {
  at::NoGradGuard no_grad;
  const at::Tensor w_OI = wide(weight_OI);
  const Factors f = largest_directions(w_OI, rank, scale, weight_OI.scalar_type());
  return started(weight_OI, rest_of(w_OI, f, scale), weight_OI.scalar_type(), f);
}

LoraStart loftq_start(const at::Tensor& weight_OI, int64_t rank, double scale, int64_t iterations,
                      const std::function<at::Tensor(const at::Tensor&)>& quantized) {
  at::NoGradGuard no_grad;
  TRIREME_CHECK(iterations >= 1, iterations);
  const at::Tensor w_OI = wide(weight_OI);
  at::Tensor base_OI = w_OI.to(at::kFloat);
  for (int64_t i = 1;; ++i) {
    const Factors f = largest_directions(w_OI - wide(quantized(base_OI.to(weight_OI.device()))), rank, scale, weight_OI.scalar_type());
    if (i == iterations) return started(weight_OI, base_OI, at::kFloat, f);
    base_OI = rest_of(w_OI, f, scale).to(at::kFloat);
  }
}

}  // namespace trireme
