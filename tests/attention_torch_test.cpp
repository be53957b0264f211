// The attention kernels are as exact as torch's flash attention in bf16, measured against fp64: emulated, beside torch's on the CPU, and
// on a device, where there is one, beside torch's there. (Torch's plain attention keeps probabilities in fp32: no fair judge.)
#include "attention_beside_torch.h"

#include <gtest/gtest.h>

#include "kernels/architecture.h"

namespace trireme {
namespace {

using test::AttentionInput;

// o, grad_q, grad_k, grad_v in fp64, of segments of one length.
std::vector<at::Tensor> exact(const AttentionInput& in) {
  const auto batch = [&](const at::Tensor& x) { return in.as_batch(x.to(at::kDouble)); };
  const at::Tensor q = batch(in.q), k = batch(in.k), v = batch(in.v), grad_o = batch(in.grad_o);
  const double scale = 1 / std::sqrt(static_cast<double>(q.size(3)));
  at::Tensor scores = at::matmul(q, k.transpose(2, 3)) * scale;
  if (in.causal) scores.masked_fill_(at::ones({in.longest, in.longest}, scores.options().dtype(at::kBool)).triu(1), -INFINITY);
  const at::Tensor p = scores.softmax(-1), grad_p = at::matmul(grad_o, v.transpose(2, 3));
  const at::Tensor grad_s = p * (grad_p - (p * grad_p).sum(-1, true)) * scale;
  std::vector<at::Tensor> all{at::matmul(p, v), at::matmul(grad_s, k), at::matmul(grad_s.transpose(2, 3), q), at::matmul(p.transpose(2, 3), grad_o)};
  for (at::Tensor& x : all) x = x.transpose(1, 2).reshape({-1, x.size(1), x.size(3)});
  return all;
}

void expect_as_exact_as_torch(const kernels::Kernels& kernels, at::Device device, int architecture, int64_t length, int64_t heads) {
  constexpr int kSeeds = 4;
  const char* const names[] = {"o", "grad_q", "grad_k", "grad_v"};
  for (int64_t head_dim : architecture == 80 ? std::vector<int64_t>{64, 96, 128, 256} : std::vector<int64_t>{64, 128})
    for (bool causal : {true, false})
      for (bool deterministic : {true, false}) {
        if (head_dim != 64 && head_dim != 128 && causal == deterministic) continue;  // half of the time
        double rms[2][4] = {}, largest[2][4] = {};
        for (int seed = 0; seed < kSeeds; ++seed) {
          at::manual_seed(static_cast<uint64_t>(seed));
          const AttentionInput in({length}, heads, heads, head_dim, causal, at::TensorOptions(at::kBFloat16).device(device));
          const std::vector<at::Tensor> right = exact(in);
          test::KernelAttention ours(kernels, in, deterministic);
          test::TorchAttention theirs(test::TorchBackend::kFlash, in);
          ours.forward(), ours.backward(), theirs.forward(), theirs.backward();
          const std::vector<at::Tensor> results[] = {{ours.o, ours.grad_q, ours.grad_k, ours.grad_v}, theirs.results()};
          for (int side : {0, 1})
            for (size_t i = 0; i < 4; ++i) {
              const at::Tensor error = (results[side][i].to(at::kDouble) - right[i]).abs();
              rms[side][i] += error.pow(2).mean().sqrt().item<double>() / kSeeds;
              largest[side][i] = std::max(largest[side][i], error.max().item<double>());
            }
        }
        for (size_t i = 0; i < 4; ++i) {
          SCOPED_TRACE(testing::Message() << names[i] << " of head dim " << head_dim << (causal ? ", causal" : ", full") << (deterministic ? ", deterministic" : ""));
          EXPECT_GT(rms[0][i], 0);
          EXPECT_LE(rms[0][i], 1.1 * rms[1][i]);
          EXPECT_LE(largest[0][i], 2 * largest[1][i]);
        }
      }
}

TEST(AttentionBesideTorch, IsAsExactInTheEmulation) {
  for (int architecture : {80, 90}) {
    SCOPED_TRACE(architecture);
    kernels::emulated::set_architecture(architecture);
    expect_as_exact_as_torch(kernels::emulated_kernels(), at::kCPU, architecture, 130, 1);
  }
  kernels::emulated::set_architecture(0);
}

#ifdef TRIREME_CUDA
// Before any test: what ATen asks about CUDA before its CUDA half is there, as manual_seed does, it never asks again.
struct LoadsDevice : testing::Environment {
  void SetUp() override { has_device = test::loads_device(); }
  static inline bool has_device = false;
};
[[maybe_unused]] const auto* const loads_device = testing::AddGlobalTestEnvironment(new LoadsDevice);

TEST(AttentionBesideTorch, IsAsExactOnADevice) {
  if (!LoadsDevice::has_device) GTEST_SKIP() << "no CUDA device";
  for (int architecture : {80, 90}) {
    if (architecture == 90 && kernels::probe_device(0).compute_major != 9) continue;
    SCOPED_TRACE(architecture);
    kernels::cuda::set_architecture(architecture);
    for (int64_t length : {150, 1000, 4096}) expect_as_exact_as_torch(kernels::cuda_kernels(), at::Device(at::kCUDA, 0), architecture, length, 4);
  }
  kernels::cuda::set_architecture(0);
}
#endif

}  // namespace
}  // namespace trireme
