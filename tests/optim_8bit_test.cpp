// AdamW with moments of 8 bits: against AdamW in fp32 between the codes of each step, in every way of cutting, on the host's way too.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Parallel.h>

#include "base/check.h"
#include "optim/optimizer.h"
#include "parallel/buckets.h"
#include "quant/dynamic_map.h"
#include "support.h"

namespace trireme {
namespace {

using test::same_bits;

constexpr int64_t kBlock = kernels::k8BitBlock;
constexpr OptimizerOptions k8Bit{.kind = OptimizerKind::kAdamW8Bit};

at::Tensor random(at::IntArrayRef sizes) {
  static auto generator = at::make_generator<at::CPUGeneratorImpl>(12);
  return at::randn(sizes, generator, at::kFloat);
}

std::map<std::string, at::Tensor> state_of(const Optimizer& optimizer) {
  std::map<std::string, at::Tensor> state;
  for (const OptimState& s : optimizer.state()) state[s.kind] = s.value;
  return state;
}

at::Tensor decoded(bool is_signed, const at::Tensor& codes, const at::Tensor& scales) {
  at::Tensor values = at::empty(codes.sizes(), at::kFloat);
  dequantize_blockwise({codes, scales}, dynamic_map(is_signed), kBlock, values);
  return values;
}

// Each step from the moments that the codes stand for: the weights of AdamW, and the codes of its moments.
TEST(AdamW8Bit, IsAdamWBetweenCodes) {
  for (auto dtype : {at::kFloat, at::kBFloat16, at::kHalf})
    for (int64_t size : {4096, 5000, 30001}) {
      at::Tensor weight = random({size}).to(dtype), grad = at::empty({size}, at::kFloat);
      Optimizer optimizer({{"w", weight, grad, 0.1}}, k8Bit);
      for (int t = 0; t < 3; ++t) {
        grad.copy_(random({size}) * std::pow(10.0, t - 1));
        if (t == 1) grad.slice(0, kBlock, 2 * kBlock).fill_(0), grad.slice(0, 0, 1).fill_(1e30);
        auto state = state_of(optimizer);
        at::Tensor plain_weight = weight.clone();
        Optimizer plain({{"w", plain_weight, grad, 0.1}}, {});
        auto exact = state_of(plain);
        exact["exp_avg"].copy_(decoded(true, state["exp_avg"], state["exp_avg_scale"]));
        exact["exp_avg_sq"].copy_(decoded(false, state["exp_avg_sq"], state["exp_avg_sq_scale"]));
        if (dtype != at::kFloat) exact["master"].copy_(state["master"]);
        plain.set_num_steps(t);
        plain.step(1e-2, 0.5);
        optimizer.step(1e-2, 0.5);
        EXPECT_TRUE(same_bits(weight, plain_weight)) << dtype << size;
        EXPECT_TRUE(dtype == at::kFloat || same_bits(state["master"], exact["master"]));
        const BlockCodes m = quantize_blockwise(exact["exp_avg"], dynamic_map(true), kBlock), v = quantize_blockwise(exact["exp_avg_sq"], dynamic_map(false), kBlock);
        const at::Tensor lost = (exact["exp_avg"] < 0).logical_and(m.codes == 127);
        EXPECT_TRUE(same_bits(state["exp_avg"], at::where(lost, m.codes - 1, m.codes)));
        EXPECT_TRUE(same_bits(state["exp_avg_sq"], v.codes) && same_bits(state["exp_avg_scale"], m.absmax) && same_bits(state["exp_avg_sq_scale"], v.absmax));
        EXPECT_TRUE(t != 1 || lost.sum().item<int64_t>() > 10);  // beside 1e30
      }
    }
}

TEST(AdamW8Bit, SmallParametersKeepThirtyTwo) {
  auto kinds = [](int64_t size, std::vector<int64_t> whole) {
    const Optimizer optimizer({{"w", at::ones({size}), at::ones({size}), 0.0, {}, whole}}, k8Bit);
    uint64_t bytes = 0;
    for (const OptimState& s : optimizer.state()) bytes += s.value.nbytes();
    EXPECT_EQ(bytes, Optimizer::state_bytes(at::kFloat, k8Bit, size, whole.empty() ? at::IntArrayRef(size) : whole)) << size << whole;
    return state_of(optimizer)["exp_avg"].scalar_type();
  };
  EXPECT_EQ(kinds(4095, {}), at::kFloat);
  EXPECT_EQ(kinds(4096, {}), at::kByte);
  EXPECT_EQ(kinds(300, {4096}), at::kByte);  // a part of a larger one
  EXPECT_EQ(kinds(300, {4000}), at::kFloat);
}

// By rows, by columns, by flat parts, by threads, by way of the host's buffers: what the whole tensor gives.
TEST(AdamW8Bit, ShardsOfWholeBlocksChangeNothing) {
  constexpr int64_t kRows = 37, kWidth = 3 * kBlock;
  const at::Tensor start = random({kRows, kWidth}), g = random({kRows, kWidth});
  struct Cut {
    std::vector<int64_t> rows, columns;
    int64_t piece;
    bool offload;
    int threads;
  };
  auto train = [&](const Cut& cut, at::ScalarType dtype) {
    const int before = at::get_num_threads();
    at::set_num_threads(cut.threads);
    std::vector<at::Tensor> slices;
    std::vector<OptimTensor> tensors;
    std::vector<Parameter> saved;
    std::vector<std::pair<int64_t, int64_t>> ranges;
    for (size_t r = 0; r + 1 < cut.rows.size(); ++r)
      for (size_t c = 0; c + 1 < cut.columns.size(); ++c) {
        const auto part = [&](const at::Tensor& x) { return x.slice(0, cut.rows[r], cut.rows[r + 1]).slice(1, cut.columns[c], cut.columns[c + 1]).clone(at::MemoryFormat::Contiguous); };
        slices.push_back(part(start).to(dtype));
        const at::Tensor weight = slices.back().view({-1}), grad = part(g).view({-1});
        const ShardSpec shard{{kRows, kWidth}, {cut.rows[r], cut.columns[c]}, false};
        for (int64_t i = 0; i < weight.numel(); i += cut.piece) {
          tensors.push_back({"w", weight.slice(0, i, i + cut.piece), grad.slice(0, i, i + cut.piece), 0.1, places_of(slices.back().sizes(), shard, i), {kRows, kWidth}});
          saved.push_back({"w", slices.back(), shard});
          ranges.emplace_back(i, std::min(i + cut.piece, weight.numel()));
        }
      }
    Optimizer optimizer(tensors, {.kind = OptimizerKind::kAdamW8Bit, .offload = cut.offload, .masters = false, .seed = 3});
    for (int t = 0; t < 3; ++t) optimizer.step(1e-2);
    at::set_num_threads(before);
    // As a checkpoint has it: each piece where it stands in the whole.
    std::map<std::string, at::Tensor> whole;
    const auto put = [&](const std::string& name, const std::vector<Parameter>& pieces) {
      for (const Parameter& p : pieces) {
        if (!whole[name].defined()) whole[name] = at::zeros(p.shard.global_shape, p.value.options());
        at::Tensor to = whole[name];
        for (int64_t d = 0; d < to.dim(); ++d) to = to.narrow(d, p.shard.offset[static_cast<size_t>(d)], p.value.size(d));
        to.copy_(p.value);
      }
    };
    for (size_t i = 0; i < tensors.size(); ++i)
      put("weight", rectangles("w", tensors[i].weight, saved[i].value.sizes(), saved[i].shard, ranges[i].first, ranges[i].second));
    for (const OptimState& s : optimizer.state())
      put(s.kind, rectangles("w", s.value, saved[s.tensor].value.sizes(), saved[s.tensor].shard, ranges[s.tensor].first, ranges[s.tensor].second, s.block));
    return whole;
  };
  for (auto dtype : {at::kFloat, at::kBFloat16}) {
    const auto whole = train({{0, kRows}, {0, kWidth}, kRows * kWidth, false, 1}, dtype);
    EXPECT_EQ(whole.size(), 5u);
    EXPECT_EQ(whole.at("exp_avg_scale").sizes(), (std::vector<int64_t>{kRows, 3}));
    for (const Cut& cut : {Cut{{0, kRows}, {0, kWidth}, 5 * kBlock, false, 3}, {{0, 11, kRows}, {0, kWidth}, kRows * kWidth, true, 2}, {{0, kRows}, {0, kBlock, kWidth}, 7 * kBlock, false, 2}}) {
      const auto found = train(cut, dtype);
      for (const auto& [name, value] : whole) EXPECT_TRUE(same_bits(found.at(name), value)) << name << " " << dtype;
    }
  }
}

// Rows that are no whole blocks: the scales of a flat tensor.
TEST(AdamW8Bit, ScalesOfOtherRowsAreFlat) {
  const at::Tensor scales = at::arange(10, at::kFloat);
  const auto pieces = rectangles("w", scales.slice(0, 3, 10), {40, 64}, {{40, 64}, {0, 0}, false}, 3 * kBlock, 40 * 64, kBlock);
  ASSERT_EQ(pieces.size(), 1u);
  EXPECT_EQ(pieces[0].shard.global_shape, std::vector<int64_t>{10});
  EXPECT_EQ(pieces[0].shard.offset, std::vector<int64_t>{3});
  EXPECT_TRUE(same_bits(pieces[0].value, scales.slice(0, 3, 10)));
  const auto later = rectangles("w", scales.slice(0, 5, 10), {20, 64}, {{40, 64}, {20, 0}, false}, 0, 20 * 64, kBlock);
  EXPECT_EQ(later[0].shard.offset, std::vector<int64_t>{5});
}

TEST(AdamW8Bit, WhatCutsABlockIsKnown) {
  const auto cuts = [](std::vector<int64_t> whole, std::vector<int64_t> offset, std::vector<int64_t> sizes, OptimizerKind rule = OptimizerKind::kAdamW8Bit) {
    return cuts_blocks(rule, sizes, {whole, offset, false});
  };
  EXPECT_FALSE(cuts({100, 512}, {0, 256}, {100, 256}));
  EXPECT_FALSE(cuts({100, 64}, {48, 0}, {52, 64}));
  EXPECT_FALSE(cuts({101, 64}, {48, 0}, {53, 64}));  // to the end of it
  EXPECT_TRUE(cuts({100, 64}, {50, 0}, {50, 64}));
  EXPECT_TRUE(cuts({100, 64}, {48, 0}, {50, 64}));
  EXPECT_TRUE(cuts({100, 512}, {0, 128}, {100, 256}));
  EXPECT_TRUE(cuts({100, 500}, {0, 0}, {100, 256}));
  EXPECT_TRUE(cuts({100, 64}, {0, 0}, {100, 32}));
  EXPECT_FALSE(cuts({60, 64}, {0, 0}, {60, 32}));  // 3,840 elements stay in fp32
  EXPECT_FALSE(cuts({100, 64}, {0, 0}, {100, 32}, OptimizerKind::kAdamW));
  EXPECT_THROW(Optimizer({{"w", at::ones({512}), at::ones({512}), 0.0, {.first = 100}, {5000}}}, k8Bit), InternalError);
  EXPECT_THROW(Optimizer({{"w", at::ones({5000}, at::kDouble), at::ones({5000}, at::kDouble), 0.0}}, k8Bit), InternalError);
}

TEST(AdamW8Bit, GoesOnFromItsState) {
  at::Tensor weight = random({9000}).to(at::kBFloat16), grad = random({9000});
  Optimizer first({{"w", weight, grad, 0.1}}, k8Bit);
  first.step(1e-2);
  at::Tensor copy = weight.clone();
  Optimizer second({{"w", copy, grad, 0.1}}, k8Bit);
  auto from = first.state(), to = second.state();
  for (size_t i = 0; i < from.size(); ++i) to[i].value.copy_(from[i].value);
  second.set_num_steps(1);
  first.step(1e-2);
  second.step(1e-2);
  EXPECT_TRUE(same_bits(copy, weight));
}

}  // namespace
}  // namespace trireme
