// One LoRA training step of the benchmark shape (576 wide, 6 layers, 9/3 heads, 49,152 tokens, rank 16, 4 x 256), from
// the operations alone: what each costs and what a whole forward and backward takes. Prints a table; not a test.
#include <torch/csrc/autograd/autograd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>

#include "ops/ops.h"

namespace {

using namespace trireme;
using Clock = std::chrono::steady_clock;
constexpr int64_t kTokens = 1024, kWidth = 576, kInner = 1536, kHeads = 9, kKeyHeads = 3, kDim = 64,
                  kVocabulary = 49152;
constexpr int64_t kLayers = 6, kRank = 16;

struct Projection {
  at::Tensor w, a, b;
  Projection(int64_t out, int64_t in, at::ScalarType dtype)
      : w((at::randn({out, in}) * 0.02).to(dtype)),
        a((at::randn({kRank, in}) * 0.02).to(dtype)),
        b((at::randn({out, kRank}) * 0.02).to(dtype)) {
    a.requires_grad_();
    b.requires_grad_();
  }
  at::Tensor operator()(const at::Tensor& x) const { return lora_linear(x, w, {}, a, b, 1.0); }
};

template <typename F>
double milliseconds(const F& f, int repeats = 5) {
  f();
  double best = 1e30;
  for (int i = 0; i < repeats; ++i) {
    auto begin = Clock::now();
    f();
    best = std::min(best, std::chrono::duration<double, std::milli>(Clock::now() - begin).count());
  }
  return best;
}

// Forward, and backward with gradients of ones.
void row(const char* name, const std::function<at::Tensor()>& f, double times) {
  double forward = milliseconds([&] { f(); });
  double both = milliseconds([&] {
    at::Tensor y = f();
    torch::autograd::backward({y}, {at::ones_like(y)});
  });
  std::printf("%-28s %8.3f %8.3f ms   x %4.0f = %8.1f ms\n", name, forward, both - forward, times, both * times);
}

}  // namespace

int main(int argc, char** argv) {
  const at::ScalarType dtype = argc > 1 && std::string(argv[1]) == "fp32" ? at::kFloat : at::kBFloat16;
  auto leaf = [&](std::vector<int64_t> shape) { return at::randn(shape).to(dtype).requires_grad_(); };
  at::Tensor x = leaf({kTokens, kWidth}), inner = leaf({kTokens, kInner}), norm = at::ones({kWidth}).to(dtype);
  at::Tensor q = leaf({kTokens, kHeads, kDim}), k = leaf({kTokens, kKeyHeads, kDim});
  at::Tensor cos = at::ones({kTokens, kDim}), sin = at::zeros({kTokens, kDim});
  at::Tensor head = (at::randn({kVocabulary, kWidth}) * 0.02).to(dtype),
             targets = at::randint(kVocabulary, {kTokens}, at::kLong);
  AttentionSpec spec{{0, 256, 512, 768, 1024}, {0, 256, 512, 768, 1024}};
  Projection square(kWidth, kWidth, dtype), narrow(192, kWidth, dtype), wide(kInner, kWidth, dtype),
      down(kWidth, kInner, dtype);

  std::printf("%-28s %8s %8s\n", "", "forward", "backward");
  row(
      "rms_norm", [&] { return rms_norm(x, norm, 1e-5); }, 2 * kLayers + 1);
  row(
      "add_rms_norm", [&] { return add_rms_norm(x, x, norm, 1e-5).second; }, 2 * kLayers);
  row(
      "rope q", [&] { return rope(q, cos, sin); }, kLayers);
  row(
      "swiglu", [&] { return swiglu(inner, inner); }, kLayers);
  row(
      "attention", [&] { return attention(q, k, k, spec); }, kLayers);
  at::Tensor long_q = leaf({4096, kHeads, kDim}), long_k = leaf({4096, kKeyHeads, kDim});
  for (int64_t window : {-1, 2048, 1024, 256})
    row(("attention 4096, window " + std::to_string(window)).c_str(),
        [&] { return attention(long_q, long_k, long_k, {{0, 4096}, {0, 4096}, window}); }, 0);
  row(
      "lora_linear 576 -> 576", [&] { return square(x); }, 2 * kLayers);
  row(
      "lora_linear 576 -> 192", [&] { return narrow(x); }, 2 * kLayers);
  row(
      "lora_linear 576 -> 1536", [&] { return wide(x); }, 2 * kLayers);
  row(
      "lora_linear 1536 -> 576", [&] { return down(inner); }, kLayers);
  row(
      "plain product 576 -> 576", [&] { return at::mm(x, square.w.t()); }, 2 * kLayers);
  row(
      "plain product 576 -> 1536", [&] { return at::mm(x, wide.w.t()); }, 2 * kLayers);
  for (int64_t chunk : {0, 64, 128, 256, 512, 1024})
    row(("cross-entropy, chunk " + std::to_string(chunk)).c_str(),
        [&] { return linear_cross_entropy(x, head, targets, chunk).sum; }, 1);
  at::Tensor logits = at::empty({256, kVocabulary}, dtype);
  std::printf("head product of 256 rows: %.2f ms, back: %.2f ms\n",
              milliseconds([&] { at::mm_out(logits, x.detach().slice(0, 0, 256), head.t()); }),
              milliseconds([&] { at::mm(logits, head); }));

  struct Layer {
    Projection q, k, v, o, gate, up, down;
  };
  std::vector<Layer> layers;
  for (int64_t i = 0; i < kLayers; ++i)
    layers.push_back({{kWidth, kWidth, dtype},
                      {192, kWidth, dtype},
                      {192, kWidth, dtype},
                      {kWidth, kWidth, dtype},
                      {kInner, kWidth, dtype},
                      {kInner, kWidth, dtype},
                      {kWidth, kInner, dtype}});
  at::Tensor start = x.detach();
  auto step = [&] {
    at::Tensor sum = start, h = rms_norm(sum, norm, 1e-5);
    for (auto& layer : layers) {
      at::Tensor qr = rope(layer.q(h).view({kTokens, kHeads, kDim}), cos, sin);
      at::Tensor kr = rope(layer.k(h).view({kTokens, kKeyHeads, kDim}), cos, sin);
      at::Tensor a = attention(qr, kr, layer.v(h).view({kTokens, kKeyHeads, kDim}), spec);
      std::tie(sum, h) = add_rms_norm(sum, layer.o(a.view({kTokens, kWidth})), norm, 1e-5);
      std::tie(sum, h) = add_rms_norm(sum, layer.down(swiglu(layer.gate(h), layer.up(h))), norm, 1e-5);
    }
    torch::autograd::backward({linear_cross_entropy(h, head, targets).sum * 1e-3}, {});
  };
  const double whole = milliseconds(step);
  std::printf("a whole step: %.1f ms, %.0f tokens/s\n", whole, 1000.0 * kTokens / whole);
}
