#include "base/tensor.h"

#include "model/lora_init.h"

#include <ATen/Functions.h>
#include <ATen/Parallel.h>

#include <cmath>

#include "base/check.h"
#include "base/random.h"

namespace trireme {
namespace {

// LAPACK's sums depend on how many threads share them.
class OneThread {
 public:
  OneThread() : before_(at::get_num_threads()) { at::set_num_threads(1); }
  ~OneThread() { at::set_num_threads(before_); }
  OneThread(const OneThread&) = delete;

 private:
  int before_;
};

constexpr int64_t kSurplus = 8;  // vectors beside those that are asked for (Halko et al. 2011, 4.2)

at::Tensor orthonormal(const at::Tensor& x) { return std::get<0>(at::linalg_qr(x)); }

// An orthonormal basis [N, K] of about the space of the K largest directions of x [N, M].
at::Tensor about_the_largest(const at::Tensor& x_NM, int64_t k, int64_t iterations) {
  const int64_t m = x_NM.size(1);
  at::Tensor random_MK = at::empty({m, k}, x_NM.options());
  double* const values = random_MK.data_ptr<double>();
  for (int64_t i = 0; i < m * k; ++i) values[i] = 2 * random_uniform(0, RandomStream::kInit, static_cast<uint64_t>(m), static_cast<uint64_t>(i)) - 1;
  at::Tensor q_NK = orthonormal(at::matmul(x_NM, random_MK));
  for (int64_t i = 0; i < iterations; ++i) q_NK = orthonormal(at::matmul(x_NM, orthonormal(at::matmul(x_NM.t(), q_NK))));
  return q_NK;
}

// The left singular vectors [N, R] of the largest singular values of x [N, M], N <= M, in falling order: the eigenvectors of x x^T, in a
// fifth of an SVD's time. What they lose is the precision of singular values below 1e-8 of the largest, which are nothing beside it.
at::Tensor largest_left(const at::Tensor& x_NM, int64_t rank) {
  const at::Tensor vectors_NN = std::get<1>(at::linalg_eigh(at::matmul(x_NM, x_NM.t())));
  return vectors_NN.narrow(1, x_NM.size(0) - rank, rank).flip({1});
}

struct Factors {
  at::Tensor a_RI, b_OR;
};

// Of a matrix of float64 on the CPU; rounded to `dtype`.
Factors largest_directions(const at::Tensor& x_OI, int64_t rank, double scale, at::ScalarType dtype, int64_t iterations) {
  TRIREME_CHECK(rank >= 1 && rank <= std::min(x_OI.size(0), x_OI.size(1)) && scale > 0, rank, " ", scale, " ", x_OI.sizes());
  const bool is_tall = x_OI.size(0) > x_OI.size(1);
  const at::Tensor x_NM = is_tall ? x_OI.t() : x_OI;
  at::Tensor left_NR;
  if (iterations > 0 && rank + kSurplus < x_NM.size(0)) {
    const at::Tensor q_NK = about_the_largest(x_NM, rank + kSurplus, iterations);
    left_NR = at::matmul(q_NK, largest_left(at::matmul(q_NK.t(), x_NM), rank));
  } else {
    left_NR = largest_left(x_NM, rank);
  }
  const at::Tensor product_RM = at::matmul(left_NR.t(), x_NM), s_R = at::linalg_vector_norm(product_RM, 2, at::IntArrayRef{1});
  const at::Tensor b_NR = left_NR * (s_R / scale).sqrt();
  const at::Tensor a_RM = product_RM * at::where(s_R > 0, (s_R * scale).rsqrt(), 0).unsqueeze(1);
  at::Tensor a_RI = is_tall ? b_NR.t() : a_RM, b_OR = is_tall ? a_RM.t() : b_NR;
  const at::Tensor largest_1R = b_OR.gather(0, b_OR.abs().argmax(0, /*keepdim=*/true));
  const at::Tensor sign_1R = at::where(largest_1R < 0, -1.0, 1.0).to(at::kDouble);
  return {(a_RI * sign_1R.t()).to(dtype).contiguous(), (b_OR * sign_1R).to(dtype).contiguous()};
}

// W - scale B A of the factors as they are rounded, so that base and adapter make up for each other; in the place of W.
at::Tensor& take_out(at::Tensor& w_OI, const Factors& f, double scale) {
  return w_OI.addmm_(f.b_OR.to(at::kDouble), f.a_RI.to(at::kDouble), 1, -scale);
}

// Another tensor in any case.
at::Tensor wide(const at::Tensor& x) { return x.detach().to(at::kCPU).to(at::kDouble, /*non_blocking=*/false, /*copy=*/true); }

LoraStart started(const at::Tensor& weight_OI, const at::Tensor& base_OI, at::ScalarType base_dtype, const Factors& f) {
  const at::Device device = weight_OI.device();
  return {base_OI.to(base_dtype).to(device), f.a_RI.to(device), f.b_OR.to(device)};
}

}  // namespace

LoraStart pissa_start(const at::Tensor& weight_OI, int64_t rank, double scale, int64_t iterations) {
  at::NoGradGuard no_grad;
  const OneThread one;
  at::Tensor w_OI = wide(weight_OI);
  const Factors f = largest_directions(w_OI, rank, scale, weight_OI.scalar_type(), iterations);
  return started(weight_OI, take_out(w_OI, f, scale), weight_OI.scalar_type(), f);
}

LoraStart loftq_start(const at::Tensor& weight_OI, int64_t rank, double scale, int64_t iterations,
                      const std::function<at::Tensor(const at::Tensor&)>& quantized) {
  at::NoGradGuard no_grad;
  TRIREME_CHECK(iterations >= 1, iterations);
  const OneThread one;
  at::Tensor base_OI = weight_OI.detach().to(at::kFloat);
  for (int64_t i = 1;; ++i) {
    at::Tensor w_OI = wide(weight_OI);
    const Factors f = largest_directions(w_OI - quantized(base_OI).to(at::kCPU), rank, scale, weight_OI.scalar_type(), 0);
    if (i == iterations) return started(weight_OI, base_OI, at::kFloat, f);
    base_OI = take_out(w_OI, f, scale).to(at::kFloat).to(weight_OI.device());
  }
}

int64_t lora_start_bytes(int64_t out_features, int64_t in_features, bool is_loftq) {
  const int64_t n = std::min(out_features, in_features);
  return 8 * ((is_loftq ? 2 : 1) * out_features * in_features + 4 * n * n);  // W, and W - Q; x x^T, its vectors, and twice that of LAPACK
}

std::string StartProgress::line(int64_t done, double seconds) {
  if (seconds < next_ || done >= num_layers_) return "";
  const auto left = static_cast<int64_t>(std::ceil(seconds / static_cast<double>(done) * static_cast<double>(num_layers_ - done)));
  const bool first = next_ <= 10;
  next_ = seconds + 30;
  return str("lora.init=", name_, ": ", done, " of ", num_layers_, " layers, about ", left < 120 ? str(left, " s") : str((left + 59) / 60, " minutes"), " left",
             first && left >= 300 && name_ == "pissa" ? "; lora.init=pissa_niter_16 takes a fraction of that" : "");
}

}  // namespace trireme
