// Products over rows of which some are still on their way, and products that are summed piece by piece: values and gradients of
// the whole ones, and the order in which things happen. Two ranks in one process: this is rank 1, the other one's products are 0.
#include "ops/row_exchange.h"

#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>

#include "ops/ops.h"
#include "support.h"

namespace trireme {
namespace {

using test::near;

constexpr int64_t kRows = 10, kIn = 5, kOut = 3, kRank = 2;

at::Tensor random(uint64_t seed, at::IntArrayRef shape) {
  auto generator = at::make_generator<at::CPUGeneratorImpl>(seed);
  return at::randn(shape, generator, at::TensorOptions().dtype(at::kDouble));
}

// `whole`, of which rows first .. first + count are here; before wait the others are not numbers.
ArrivingRows on_its_way(const at::Tensor& whole, int64_t first, int64_t count, std::vector<std::string>* events) {
  const at::Tensor right = whole.detach().clone();
  {
    at::NoGradGuard no_grad;
    whole.detach().fill_(std::nan(""));
  }
  return ArrivingRows(whole, right.narrow(0, first, count), first, [=] {
    events->push_back("wait");
    whole.detach().copy_(right);
  });
}

TEST(ArrivingRows, ThoseThatAreHereComeFirst) {
  std::vector<std::string> events;
  const ArrivingRows rows = on_its_way(random(1, {6, 2}), 2, 2, &events);
  auto note = [&](int64_t first, const at::Tensor& x) {
    EXPECT_TRUE(near(x, random(1, {6, 2}).narrow(0, first, x.size(0))));
    events.push_back(std::to_string(first) + "+" + std::to_string(x.size(0)));
  };
  const ArrivingRows copy = rows;
  rows.in_order(note);
  EXPECT_EQ(events, (std::vector<std::string>{"2+2", "wait", "0+2", "4+2"}));
  events.clear();
  copy.in_order(note);  // they have arrived for all that share them
  copy.wait();
  EXPECT_EQ(events, (std::vector<std::string>{"0+6"}));
  events.clear();
  ArrivingRows(random(1, {6, 2})).in_order(note);
  EXPECT_EQ(events, (std::vector<std::string>{"0+6"}));
}

struct Weights {
  at::Tensor w = random(2, {kOut, kIn}), bias = random(3, {kOut}), a = random(4, {kRank, kIn}), b = random(5, {kOut, kRank});
  bool lora = false;
  DropoutKey key{0.4, 7, 1, at::arange(kRows), 0};

  std::vector<at::Tensor> leaves() const {
    std::vector<at::Tensor> out = lora ? std::vector{a, b} : std::vector{w};
    for (at::Tensor& leaf : out) leaf.requires_grad_().mutable_grad() = at::Tensor();
    return out;
  }
  at::Tensor product(const ArrivingRows& x, bool with_bias, const std::shared_ptr<const RowSum>& sum = nullptr) const {
    const at::Tensor none, added = with_bias ? bias : none;
    return lora ? lora_linear(x, w, added, a, b, 0.5, key, sum) : linear(x, w, added, sum);
  }
};

TEST(ArrivingRows, AProductOfThemIsTheProductOfAll) {
  for (const bool lora : {false, true})
    for (const int64_t first : {0, 3, 7}) {
      Weights weights;
      weights.lora = lora;
      auto result = [&](bool waits) {
        const std::vector<at::Tensor> leaves = weights.leaves();
        std::vector<std::string> events;
        at::Tensor x = random(1, {kRows, kIn}).requires_grad_();
        at::Tensor y = weights.product(waits ? on_its_way(x, first, 3, &events) : ArrivingRows(x), true);
        EXPECT_EQ(events.size(), waits ? 1u : 0u);
        torch::autograd::backward({(y * random(6, {kRows, kOut})).sum()}, {});
        std::vector<at::Tensor> out{y.detach(), x.grad()};
        for (const at::Tensor& leaf : leaves) out.push_back(leaf.grad());
        return out;
      };
      const auto got = result(true), expected = result(false);
      for (size_t i = 0; i < expected.size(); ++i) EXPECT_TRUE(near(got[i], expected[i])) << i << " lora " << lora << " first " << first;
    }
}

TEST(RowSum, AProductInPiecesIsTheWholeOne) {
  for (const bool lora : {false, true})
    for (const int64_t pieces : {1, 2, 3}) {
      SCOPED_TRACE(std::to_string(pieces) + (lora ? " lora" : ""));
      Weights weights;
      weights.lora = lora;
      std::vector<std::string> events;
      RowSum sum;
      sum.num_ranks = 2;
      sum.num_pieces = [pieces](int64_t, bool) { return pieces; };
      sum.start = [&](const at::Tensor& part, const at::Tensor& partial) -> std::function<void()> {
        events.push_back("start");
        EXPECT_EQ(partial.size(0), 2 * part.size(0));
        return [&events, part, sent = partial.clone()] {
          events.push_back("wait");
          part.copy_(sent.narrow(0, part.size(0), part.size(0)));  // the second of two ranks
        };
      };
      const at::Tensor other = random(8, {kRows / 2, kOut}), mine = random(9, {kRows / 2, kOut});
      sum.gather = [&](const at::Tensor& part) { return on_its_way(at::cat({other, part}), kRows / 2, kRows / 2, &events); };

      std::vector<at::Tensor> leaves = weights.leaves(), expected;
      at::Tensor x = random(1, {kRows, kIn}).requires_grad_();
      at::Tensor whole = weights.product(x, false);
      torch::autograd::backward({(whole * at::cat({other, mine})).sum()}, {});
      for (const at::Tensor& t : leaves) expected.push_back(t.grad().clone());
      const at::Tensor grad_x = std::exchange(x.mutable_grad(), at::Tensor());

      leaves = weights.leaves();
      at::Tensor part = weights.product(x, false, std::make_shared<RowSum>(sum));
      EXPECT_TRUE(near(part, whole.narrow(0, kRows / 2, kRows / 2)));
      std::vector<std::string> order(static_cast<size_t>(pieces), "start");
      order.resize(2 * order.size(), "wait");
      EXPECT_EQ(events, order);
      torch::autograd::backward({(part * mine).sum()}, {});
      EXPECT_EQ(events.size(), order.size() + 1);
      EXPECT_TRUE(near(x.grad(), grad_x));
      for (size_t i = 0; i < leaves.size(); ++i) EXPECT_TRUE(near(leaves[i].grad(), expected[i])) << i;
    }
}

}  // namespace
}  // namespace trireme
