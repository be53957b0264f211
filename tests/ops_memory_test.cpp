// What attention and the loss never hold: a score matrix, the logits of all tokens.
#include "support.h"
#include "tensor_bytes.h"

#include <torch/csrc/autograd/autograd.h>

#include "ops/ops.h"

namespace trireme {
namespace {

constexpr int64_t kTokens = 4096;

struct OpsMemory : testing::TestWithParam<at::ScalarType> {
  void SetUp() override {
#ifdef __SANITIZE_ADDRESS__
    GTEST_SKIP() << "the sanitizer keeps freed memory";
#endif
  }
  at::Tensor random(at::IntArrayRef shape) { return at::randn(shape).to(GetParam()).requires_grad_(); }
  // Forward and backward; once before over few tokens, which loads and compiles what they need.
  template <typename F>
  int64_t grown(const F& loss_of) {
    torch::autograd::backward({loss_of(128)}, {});
    return test::memory_grown([&] { torch::autograd::backward({loss_of(kTokens)}, {}); });
  }
  int64_t bytes() const { return static_cast<int64_t>(c10::elementSize(GetParam())); }
};

TEST_P(OpsMemory, AttentionHoldsNoScoreMatrix) {
  for (int64_t window : {int64_t{-1}, int64_t{1000}}) {
    const int64_t size = grown([&](int64_t tokens) {
      at::Tensor q = random({tokens, 2, 16}), k = random({tokens, 1, 16}), v = random({tokens, 1, 16});
      return attention(q, k, v, {{0, tokens}, {0, tokens}, window}).sum();
    });
    EXPECT_GE(size, 4 * kTokens * 16 * bytes()) << window;  // q, k, v and the output, or this measured nothing
    EXPECT_LE(size, kTokens * kTokens * bytes()) << window;  // the scores of one of two heads
  }
}

TEST_P(OpsMemory, TheLossHoldsNotAllLogits) {
  constexpr int64_t kVocabulary = 16384;
  at::Tensor head = random({kVocabulary, 16});
  for (bool trains : {false, true}) {
    head.requires_grad_(trains);
    const int64_t size = grown([&](int64_t tokens) {
      return linear_cross_entropy(random({tokens, 16}), head, at::randint(kVocabulary, {tokens}, at::kLong)).sum;
    });
    EXPECT_GE(size, 64 * kVocabulary * bytes()) << trains;  // the smallest chunk
    EXPECT_LE(size, 3 * kTokens * kVocabulary * bytes() / 4) << trains;
  }
}

// An MLP of 16 times the width: forward and backward hold the wide side of a piece, not of all tokens.
TEST_P(OpsMemory, RowsInPiecesHoldOnePieceWide) {
  constexpr int64_t kWidth = 64, kWide = 1024, kPiece = 256;
  const at::Tensor up = random({kWide, kWidth}), gate = random({kWide, kWidth}), down = random({kWidth, kWide});
  const auto mlp = [&](int64_t, const at::Tensor& x) { return trireme::linear(swiglu(trireme::linear(x, gate), trireme::linear(x, up)), down); };
  const auto most = [&](bool in_pieces) {
    for (const at::Tensor& leaf : {up, gate, down}) leaf.mutable_grad().reset();
    return test::TensorBytes::install().grown([&] {
      const at::Tensor x = random({kTokens, kWidth});
      torch::autograd::backward({(in_pieces ? in_row_pieces(mlp, x, kPiece, kWidth, {up, gate, down}) : mlp(0, x)).sum()}, {});
    });
  };
  // Gate, up, their product and its gradient, which becomes that of up; beside them what is narrow, and gradients of the weights.
  const int64_t wide = kTokens * kWide * bytes(), narrow = 6 * kTokens * kWidth * 4 + 3 * kWide * kWidth * (4 + 2 * bytes());
  EXPECT_GE(most(false), 4 * wide);
  EXPECT_LE(most(false), 4 * wide + narrow);
  EXPECT_LE(most(true), 4 * wide * kPiece / kTokens + narrow);
}

std::string name_of(const testing::TestParamInfo<at::ScalarType>& dtype) { return c10::toString(dtype.param); }
INSTANTIATE_TEST_SUITE_P(Dtypes, OpsMemory, testing::Values(at::kFloat, at::kBFloat16), name_of);

}  // namespace
}  // namespace trireme
