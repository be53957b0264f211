// ZeRO changes where things are, not one bit of what comes out: every stage against plain data parallelism, on 1, 2 and 4
// ranks, with what is held and what is sent counted against the formulas.
#include "parallel/sharded_weights.h"

#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <filesystem>
#include <numeric>

#include "base/check.h"
#include "checkpoint/checkpoint.h"
#include "comm/process.h"
#include "model/lora.h"
#include "optim/optimizer.h"
#include "optim/clip.h"
#include "support.h"

namespace trireme {
namespace {

const MeshComms& comms() {
  static Process process;
  static const Communicator world = Communicator::world();
  static const MeshComms comms(Mesh(world.size(), 0, 1, 1), world);
  return comms;
}

constexpr int64_t kLayers = 3;

ModelConfig config() {
  return model_config_from_json({{"model_type", "llama"}, {"vocab_size", 61}, {"hidden_size", 24}, {"intermediate_size", 40},
                                 {"num_hidden_layers", kLayers}, {"num_attention_heads", 4}, {"num_key_value_heads", 2},
                                 {"rms_norm_eps", 1e-5}, {"max_position_embeddings", 64}, {"tie_word_embeddings", false},
                                 {"initializer_range", 0.1}},
                                "config.json");
}

struct Layout {
  int zero = 0, accumulation = 1;
  int64_t bucket_bytes = 8 << 20;
  bool lora = false, overlap = true, every_backward = false;
  int num_replicas = 1;
  Recompute recompute = Recompute::kNone;
  at::ScalarType dtype = at::kFloat;

  std::string text() const {
    return str("zero ", zero, ", accumulation ", accumulation, ", bucket ", bucket_bytes, lora ? ", LoRA" : "",
               overlap ? "" : ", no overlap", ", recompute ", static_cast<int>(recompute), " ", c10::toString(dtype));
  }
};

// What the trainer does, on random rows of this rank.
struct Training {
  Layout setup;
  Transformer model;
  Holders holders;
  std::unique_ptr<GradientReducer> reducer;
  std::unique_ptr<ShardedWeights> weights;
  std::unique_ptr<Optimizer> optimizer;
  std::vector<double> norms;
  int64_t peak_weights = 0;
  bool gathers = true;  // off: the negative control

  // Between the model and the weights: what is held at most.
  struct Meter : BlockWeights {
    Training* run;
    void acquire(int64_t block, bool backward) override {
      run->weights->acquire(block, backward);
      run->peak_weights = std::max(run->peak_weights, run->weights->bytes_held());
    }
    void release(int64_t block, bool backward) override { run->weights->release(block, backward); }
  } meter;

  explicit Training(const Layout& s) : setup(s), model(config(), s.dtype, 7) {
    if (s.lora) {
      LoraConfig adapter;
      adapter.rank = 3, adapter.alpha = 6, adapter.dropout = 0.2, adapter.targets = {"all-linear"};
      attach_lora(model, adapter, 5);
    }
    model.set_training(true);
    model.set_recompute(s.recompute);
    const std::vector<Parameter> parameters = model.parameters();
    holders = find_holders(parameters, comms());
    GradientReducerOptions options;
    options.bucket_bytes = s.bucket_bytes, options.overlap = s.overlap, options.zero = s.zero;
    options.every_backward = s.every_backward, options.num_replicas = s.num_replicas;
    reducer = std::make_unique<GradientReducer>(parameters, holders, options);
    if (s.zero > 0) weights = std::make_unique<ShardedWeights>(parameters, holders, *reducer, s.zero, s.bucket_bytes);
    meter.run = this;
    if (s.zero == 3) model.set_block_weights(&meter);
    std::vector<OptimTensor> tensors;
    for (const GradientPart& part : reducer->parts()) {
      at::Tensor weight = weights ? weights->part(part.bucket).narrow(0, part.offset, part.end - part.begin)
                                  : part.weight.detach().view({-1});
      tensors.push_back({part.name, weight, part.gradient, part.weight.dim() >= 2 ? 0.1 : 0.0});
    }
    optimizer = std::make_unique<Optimizer>(std::move(tensors), OptimizerOptions{});
  }

  ModelInput rows(int64_t step, int micro) const {
    const auto seed = static_cast<uint64_t>(1000 * step + 10 * micro + comms().world.rank());
    auto generator = at::make_generator<at::CPUGeneratorImpl>(seed);
    ModelInput input;
    input.tokens_T = at::randint(0, 61, {10}, generator, at::TensorOptions(at::kLong));
    input.targets_T = input.tokens_T.roll(-1);
    input.positions_T = at::cat({at::arange(6), at::arange(4)});
    input.cu_seqlens = {0, 6, 10};
    input.sample_ids = {static_cast<int64_t>(seed), static_cast<int64_t>(seed + 5)};
    return input;
  }

  void step() {
    reducer->begin_step();
    const int64_t number = optimizer->num_steps() + 1;
    for (int micro = 0; micro < setup.accumulation; ++micro) {
      const ModelInput input = rows(number, micro);
      LossSum loss = model.cross_entropy(model.forward(input), input.targets_T);
      reducer->before_backward(micro + 1 == setup.accumulation);
      torch::autograd::backward({loss.sum}, {});
    }
    reducer->finish();
    reducer->scale(1.0 / (10 * setup.accumulation * comms().world.size()));
    norms.push_back(std::sqrt(reducer->squared_norm()));
    optimizer->step(1e-2, clip_scale(norms.back(), 0.7 * norms[0]));  // the first is clipped
    if (weights && gathers) weights->updated();
  }

  std::vector<NamedTensor> state() const {
    std::vector<NamedTensor> out;
    for (const GradientPart& part : reducer->parts()) {
      const at::Tensor flat = weights ? weights->part(part.bucket).narrow(0, part.offset, part.end - part.begin)
                                      : part.weight.detach().view({-1});
      for (auto& piece : rectangles("model/" + part.name, flat, part.weight.sizes(), part.shard, part.begin, part.end))
        out.push_back(std::move(piece));
    }
    for (const OptimState& s : optimizer->state()) {
      const GradientPart& part = reducer->parts()[s.tensor];
      for (auto& piece : rectangles(str("optimizer/", s.kind, "/", part.name), s.value, part.weight.sizes(), part.shard,
                                    part.begin, part.end))
        out.push_back(std::move(piece));
    }
    return out;
  }

  std::vector<at::Tensor> whole_weights() {
    if (weights) weights->acquire_all();
    std::vector<at::Tensor> out;
    for (const Parameter& p : model.parameters()) out.push_back(p.value.detach().clone());
    if (weights) weights->release_all();
    return out;
  }
};

bool same_bits(const std::vector<at::Tensor>& a, const std::vector<at::Tensor>& b) {
  for (size_t i = 0; i < a.size(); ++i)
    if (!at::equal(a[i], b[i])) return false;
  return a.size() == b.size();
}

void expect_same(Training& run, Training& plain) {
  for (int i = 0; i < 5; ++i) run.step();
  EXPECT_EQ(run.norms, plain.norms);
  EXPECT_TRUE(same_bits(run.whole_weights(), plain.whole_weights()));
}

TEST(Zero, ChangesNoBit) {
  for (bool lora : {false, true})
    for (int accumulation : {1, 3})
      for (at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
        Layout setup{.accumulation = accumulation, .lora = lora, .dtype = dtype};
        Training plain(setup);
        for (int i = 0; i < 5; ++i) plain.step();
        EXPECT_LT(clip_scale(plain.norms[0], 0.7 * plain.norms[0]), 1.0);
        for (int zero : {0, 1, 2, 3})
          for (int64_t bucket_bytes : {int64_t{3000}, int64_t{8} << 20}) {
            setup.zero = zero, setup.bucket_bytes = bucket_bytes;
            setup.recompute = zero == 3 && accumulation == 3 ? Recompute::kFull
                              : zero == 3 && lora             ? Recompute::kSelective
                                                              : Recompute::kNone;
            setup.overlap = !(zero == 2 && lora);
            SCOPED_TRACE(setup.text());
            Training run(setup);
            expect_same(run, plain);
            setup.recompute = Recompute::kNone, setup.overlap = true;
          }
      }
}

// A block at a time, into leaves whose memory was never written.
TEST(Zero, EachRankFillsThePartsThatItKeeps) {
  Training plain({.lora = true}), run({.zero = 3, .lora = true});
  std::map<std::string, at::Tensor> values;
  for (const Parameter& p : plain.model.parameters()) values[p.name] = p.value.detach();
  Transformer model(config(), at::kFloat, 8);
  LoraConfig adapter;
  adapter.rank = 3, adapter.targets = {"all-linear"};
  attach_lora(model, adapter, 5);
  const std::vector<Parameter> parameters = model.parameters();
  const Holders holders = find_holders(parameters, comms());
  GradientReducer reducer(parameters, holders, {.zero = 3});
  int64_t all = 0, filled = 0, num_calls = 0;
  for (const Parameter& p : parameters) all += p.value.numel();
  ShardedWeights weights(parameters, holders, reducer, 3, 3000, [&](const std::vector<Parameter>& members) {
    ++num_calls;
    for (const Parameter& p : members) {
      at::Tensor value = values.at(p.name);
      for (int64_t d = 0; d < value.dim(); ++d) value = value.narrow(d, p.shard.offset[static_cast<size_t>(d)], p.value.size(d));
      at::Tensor(p.value).copy_(value);
      filled += value.numel();
    }
  });
  EXPECT_EQ(num_calls, 1);
  EXPECT_EQ(comms().world.sum(filled), all);  // each value on one rank
  weights.acquire_all();
  for (const Parameter& p : parameters) EXPECT_TRUE(at::equal(p.value, values.at(p.name))) << p.name;
}

// As an export does: never more than what is outside of the blocks and one of them.
TEST(Zero, WeightsAreReadABlockAtATime) {
  const int64_t n = comms().world.size();
  Training plain({}), run({.zero = 3});
  int64_t all = 0, outside = 0, block = 0;
  for (const auto& [unit, elements] : run.weights->elements()) all += elements, (unit < 0 ? outside : block) = elements;
  ASSERT_GT(block, 0);
  const auto expected = plain.model.parameters(), parameters = run.model.parameters();
  for (size_t i = 0; i < parameters.size(); ++i) {
    run.weights->hold(parameters[i].name);
    EXPECT_TRUE(at::equal(parameters[i].value, expected[i].value)) << parameters[i].name;
    EXPECT_LE(run.weights->bytes_held(), 4 * (all / n + outside + block));
  }
  EXPECT_EQ(run.weights->bytes_held(), 4 * (all / n + outside + block));
  run.step();  // nothing is left of it
  EXPECT_EQ(run.weights->bytes_held(), 4 * all / n);
}

// Reduced after every micro-batch: rounded in another order, and no other difference.
TEST(Zero, ReducingEveryBackwardIsTheSameSumToRounding) {
  Training plain({.accumulation = 3, .dtype = at::kDouble});
  for (int i = 0; i < 3; ++i) plain.step();
  for (int zero : {2, 3}) {
    Training run({.zero = zero, .accumulation = 3, .bucket_bytes = 3000, .every_backward = true, .dtype = at::kDouble});
    for (int i = 0; i < 3; ++i) run.step();
    for (size_t i = 0; i < 3; ++i) EXPECT_NEAR(run.norms[i], plain.norms[i], test::kSumFp64 * plain.norms[i]);
    EXPECT_EQ(run.reducer->bytes_reduced() % 3, 0);
  }
}

// Parts are shared out among neighbours and summed over the groups of these: alone, every rank has all of them, and the
// sum's order is the plain one.
TEST(Zero, ReplicasOfWhatNeighboursShareOut) {
  const int n = comms().world.size();
  for (int zero : {1, 2, 3})
    for (int num_replicas = 1; num_replicas <= n; num_replicas *= 2)
      for (int accumulation : {1, 3}) {
        Layout layout{.accumulation = accumulation, .bucket_bytes = 3000, .dtype = at::kDouble};
        Training plain(layout);
        layout.zero = zero, layout.num_replicas = num_replicas, layout.every_backward = zero == 3 && accumulation == 3;
        SCOPED_TRACE(str(layout.text(), ", replicas ", num_replicas));
        Training run(layout);
        for (int i = 0; i < 3; ++i) plain.step(), run.step();
        int64_t own = 0, all = 0;
        for (const GradientPart& part : run.reducer->parts()) own += part.end - part.begin;
        for (const GradientSlice& slice : run.reducer->slices()) all += slice.weight.numel();
        EXPECT_EQ(comms().world.sum(own), all * num_replicas);
        for (size_t i = 0; i < 3; ++i) EXPECT_NEAR(run.norms[i], plain.norms[i], test::kSumFp64 * plain.norms[i]);
        const auto weights = run.whole_weights(), right = plain.whole_weights();
        for (size_t i = 0; i < right.size(); ++i) EXPECT_TRUE(test::near(weights[i], right[i])) << i;
        if (!layout.every_backward && (num_replicas == 1 || num_replicas == n)) {
          EXPECT_EQ(run.norms, plain.norms);
          EXPECT_TRUE(same_bits(weights, right));
        }
      }
}

TEST(Zero, RanksThatKeepTheirPartsToThemselvesDiffer) {
  if (comms().world.size() == 1) GTEST_SKIP() << "nothing to gather";
  Training plain({.dtype = at::kDouble}), run({.zero = 1, .dtype = at::kDouble});
  run.gathers = false;
  for (int i = 0; i < 2; ++i) plain.step(), run.step();
  EXPECT_FALSE(same_bits(run.whole_weights(), plain.whole_weights()));
}

TEST(Zero, StateOfOneStageGoesOnInAnother) {
  std::string root;
  if (comms().world.rank() == 0) {
    char pattern[] = "/tmp/trireme-zero-XXXXXX";
    root = mkdtemp(pattern);
  }
  root = comms().world.broadcast_bytes(root);
  for (bool lora : {false, true}) {
    Layout setup{.bucket_bytes = 3000, .lora = lora, .dtype = at::kBFloat16};
    Training plain(setup);
    for (int i = 0; i < 4; ++i) plain.step();
    for (auto [from, to] : {std::pair{0, 3}, {3, 1}, {1, 2}, {2, 0}}) {
      SCOPED_TRACE(str(from, " to ", to));
      setup.zero = from;
      Training before(setup);
      for (int i = 0; i < 2; ++i) before.step();
      CheckpointStore store(root + "/checkpoints", comms().world, 1);
      store.prepare();
      store.save(2, before.state(), {});
      setup.zero = to;
      setup.bucket_bytes = 5000 - setup.bucket_bytes / 2;  // other parts
      Training after(setup);
      const auto state = after.state();
      store.newest()->load(state, false, names_of_all(state, comms().world));
      after.optimizer->set_num_steps(2);
      after.norms = before.norms;
      if (after.weights) after.weights->updated();
      for (int i = 0; i < 2; ++i) after.step();
      EXPECT_EQ(after.norms, plain.norms);
      EXPECT_TRUE(same_bits(after.whole_weights(), plain.whole_weights()));
      comms().world.barrier();
    }
  }
  comms().world.barrier();
  if (comms().world.rank() == 0) std::filesystem::remove_all(root);
}

// Bytes of this rank's gathers in a step.
int64_t gathered(Training& run) {
  const int64_t before = run.weights->bytes_gathered();
  run.step();
  return run.weights->bytes_gathered() - before;
}

TEST(Zero, HoldsAndSendsWhatTheFormulasSay) {
  const int64_t n = comms().world.size();
  for (bool lora : {false, true})
    for (int accumulation : {1, 3})
      for (int zero : {0, 1, 2, 3}) {
        Training run({.zero = zero, .accumulation = accumulation, .bucket_bytes = 4000, .lora = lora, .dtype = at::kBFloat16});
        SCOPED_TRACE(run.setup.text());
        run.step();
        run.step();  // overlapped
        int64_t trained = 0, largest = 0, all = 0, blocks = 0, block = 0;  // elements, padded
        for (const Bucket& b : run.reducer->layout()) {
          trained += b.num_elements;
          largest = std::max(largest, b.num_elements);
          EXPECT_EQ(b.num_elements % n, 0);
        }
        run.peak_weights = 0;
        const int64_t sent = zero > 0 ? gathered(run) : (run.step(), 0);
        EXPECT_EQ(run.reducer->bytes_reduced(), 4 * trained);
        const int64_t held = run.reducer->bytes_held();
        if (zero < 2) {
          EXPECT_EQ(held, 4 * trained);
        } else {
          EXPECT_LE(held, 4 * (trained / n + 2 * largest)) << "parts, and two buffers that are kept";
        }
        int64_t optimizer = 0;
        for (const OptimState& s : run.optimizer->state()) optimizer += static_cast<int64_t>(s.value.nbytes());
        EXPECT_LE(optimizer, 12 * trained / (zero == 0 ? 1 : n));  // what is padded has no state
        EXPECT_EQ(comms().world.sum(optimizer), 12 * comms().world.sum([&] {
          int64_t own = 0;
          for (const GradientPart& part : run.reducer->parts()) own += part.end - part.begin;
          return own;
        }()));
        if (zero < 3) {
          EXPECT_EQ(sent, zero == 0 || n == 1 ? 0 : 2 * trained);
          continue;
        }
        for (const auto& [unit, elements] : run.weights->elements()) {
          all += elements;
          if (unit >= 0) blocks += elements, block = std::max(block, elements);
        }
        EXPECT_EQ(blocks, kLayers * block);
        // Forward gathers every block, backward all but the last. Under LoRA nobody asks for the gradient of the first
        // block's input, so that it stays for the next micro-batch.
        const int64_t first = 2 * kLayers - 1, further = lora ? first - 2 : first;
        EXPECT_EQ(sent, n == 1 ? 0 : 2 * (all - blocks + block * (first + (accumulation - 1) * further)));
        EXPECT_EQ(run.weights->bytes_held(), 2 * all / n);
        // Two blocks, and under LoRA the first one after a micro-batch.
        EXPECT_EQ(run.peak_weights, 2 * (all / n + all - blocks + block * (lora && accumulation > 1 ? 3 : 2)));
      }
}

TEST(Rectangles, CoverAFlatRangeOfASlice) {
  const ShardSpec slice{{9, 4, 10}, {2, 1, 3}, false};
  const std::vector<int64_t> shape{3, 2, 5};
  at::Tensor values = at::arange(30, at::kFloat);
  for (int64_t begin = 0; begin < 30; ++begin)
    for (int64_t end = begin + 1; end <= 30; ++end) {
      at::Tensor global = at::full({9, 4, 10}, -1.0);
      int64_t count = 0;
      const auto pieces = rectangles("w", values.slice(0, begin, end), shape, slice, begin, end);
      EXPECT_LE(pieces.size(), 5u);
      for (const Parameter& piece : pieces) {
        at::Tensor place = global;
        for (int64_t d = 0; d < 3; ++d) place = place.narrow(d, piece.shard.offset[static_cast<size_t>(d)], piece.value.size(d));
        EXPECT_TRUE((place == -1).all().item<bool>());
        place.copy_(piece.value);
        count += piece.value.numel();
      }
      EXPECT_EQ(count, end - begin);
      at::Tensor local = global.narrow(0, 2, 3).narrow(1, 1, 2).narrow(2, 3, 5).reshape({-1});
      EXPECT_TRUE(at::equal(local.slice(0, begin, end), values.slice(0, begin, end))) << begin << " " << end;
    }
  EXPECT_EQ(rectangles("v", values.slice(0, 2, 9), {30}, {{30}, {0}, true}, 2, 9).size(), 1u);
  EXPECT_EQ(rectangles("m", values.slice(0, 2, 29), {6, 5}, {{6, 5}, {0, 0}, true}, 2, 29).size(), 3u);
}

TEST(Buckets, OfOneBlockAndOneGroup) {
  EXPECT_EQ(block_of("base_model.model.model.layers.12.self_attn.q_proj.lora_A.weight"), 12);
  EXPECT_EQ(block_of("model.norm.weight"), -1);
  Training run({.zero = 3, .bucket_bytes = 4000});
  for (const Bucket& bucket : run.reducer->layout())
    for (size_t i : bucket.parameters) EXPECT_EQ(block_of(run.reducer->slices()[i].name), bucket.unit);
}

// As the codes and scales of a block's layers do.
TEST(Buckets, DtypesThatTakeTurnsAreInOneBucketEach) {
  std::vector<Parameter> parameters;
  for (int block = 0; block < 2; ++block)
    for (int i = 0; i < 3; ++i)
      for (const at::ScalarType type : {at::kByte, at::kFloat}) {
        const at::Tensor value = at::zeros({type == at::kByte ? 1000 : 10}, type);
        parameters.push_back({str("model.layers.", block, ".w", i, type == at::kByte ? "" : ".scale"), value, ShardSpec::whole(value)});
      }
  std::vector<size_t> all(parameters.size());
  std::iota(all.begin(), all.end(), 0);
  const auto buckets = cut_buckets(parameters, all, std::vector<size_t>(all.size(), 0), {2}, 1 << 20, true);
  ASSERT_EQ(buckets.size(), 4u);
  EXPECT_EQ(buckets[0].parameters, (std::vector<size_t>{11, 9, 7}));
  EXPECT_EQ(buckets[0].offsets, (std::vector<int64_t>{0, 10, 20}));
  EXPECT_EQ(buckets[1].parameters, (std::vector<size_t>{10, 8, 6}));
  EXPECT_EQ(buckets[1].num_elements, 3000);
  for (const Bucket& bucket : buckets) EXPECT_LT(bucket.unit, 2);
  EXPECT_EQ(cut_buckets(parameters, all, std::vector<size_t>(all.size(), 0), {2}, 2500, true).size(), 6u);  // two codes' parameters in a bucket
}

}  // namespace
}  // namespace trireme
