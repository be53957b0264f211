// The plan's arithmetic: against bytes counted by hand, and against what is published for Megatron and ZeRO.
#include "base/tensor.h"

#include <gtest/gtest.h>

#include "base/check.h"
#include "tiny_model.h"
#include "train/plan.h"

namespace trireme {
namespace {

Config config_with(const std::vector<std::pair<std::string, std::string>>& keys) {
  Config config;
  config.train.steps = 1;
  for (Field& field : fields(config))
    for (const auto& [key, value] : keys)
      if (field.key == key) {
        EXPECT_EQ(field.set(value), "") << key;
      }
  return config;
}

ModelConfig tiny(const Json& more = Json::object()) {  // q 8, k and v 4, no biases
  Json json = {{"hidden_size", 8}, {"intermediate_size", 16}, {"num_attention_heads", 2}, {"num_key_value_heads", 1}, {"head_dim", 4},
               {"vocab_size", 100}, {"tie_word_embeddings", false}};
  json.update(more);
  return test::config_of(test::small_config("llama", json));
}

Plan plan_of(const Config& config, const ModelConfig& model, at::ScalarType dtype, int ranks, int64_t row = 32, at::DeviceType device = at::kCPU) {
  PlannedData data{row, static_cast<double>(row), 10, 4, 5, config.train.accumulation};
  data.device = device;
  return make_plan(config, model, dtype, mesh_of(config, ranks), data);
}

TEST(Plan, WeightsGradientsAndOptimizer) {
  const auto n = static_cast<uint64_t>(tiny().num_parameters());
  Plan plan = plan_of(config_with({}), tiny(), at::kFloat, 1);
  EXPECT_EQ(plan.largest().weights, 4 * n);
  EXPECT_EQ(plan.largest().gradients, 4 * n);
  EXPECT_EQ(plan.largest().optimizer, 8 * n);
  EXPECT_EQ(plan.stages[0].traffic, Traffic());
  EXPECT_EQ(plan.checkpoint_bytes, 12 * n);
  plan = plan_of(config_with({{"optim.offload", "true"}}), tiny(), at::kBFloat16, 1);
  EXPECT_EQ(plan.largest().optimizer, 12 * n + 2 * 800 * (2 + 4));  // and two buffers of the largest weight and its gradient
  EXPECT_EQ(plan.needed_bytes(), plan.largest().total() + plan.checkpoint_bytes + plan.base_bytes);
  plan = plan_of(config_with({{"optim.masters", "false"}}), tiny(), at::kBFloat16, 1);
  EXPECT_EQ(plan.largest().optimizer, 8 * n);
  EXPECT_EQ(plan.checkpoint_bytes, (2 + 8) * n);
  EXPECT_THROW(plan_of(config_with({{"optim.masters", "false"}}), tiny(), at::kFloat, 1), ConfigError);  // there are none to do without
  EXPECT_EQ(plan_of(config_with({{"optim.kind", "lion"}}), tiny(), at::kFloat, 1).largest().optimizer, 4 * n);
  EXPECT_EQ(plan_of(config_with({{"optim.kind", "sgd"}, {"optim.momentum", "0"}}), tiny(), at::kBFloat16, 1).largest().optimizer, 4 * n);
  // Of two tensors of 4,096 elements and more their moments have 8 bits; a scale of each block.
  const ModelConfig wide = tiny({{"vocab_size", 1000}});
  const uint64_t small = static_cast<uint64_t>(wide.num_parameters()) - 2 * 8000;
  EXPECT_EQ(plan_of(config_with({{"optim.kind", "adamw8bit"}}), wide, at::kFloat, 1).largest().optimizer, 8 * small + 2 * 2 * (8000 + 4 * 32));
  const uint64_t adapters = 2 * 2 * (8 + 8 + 8 + 4 + 8 + 4 + 8 + 8 + 8 + 16 + 8 + 16 + 16 + 8);  // rank 2, two layers
  plan = plan_of(config_with({{"lora.rank", "2"}}), tiny(), at::kBFloat16, 1);
  EXPECT_EQ(plan.trainable, static_cast<int64_t>(adapters));
  EXPECT_EQ(plan.largest().weights, 2 * (n + adapters));
  EXPECT_EQ(plan.largest().gradients, 4 * adapters);   // fp32
  EXPECT_EQ(plan.largest().optimizer, 12 * adapters);  // two moments and a master
}

// The largest layer whole, what is made of it, and its decomposition, where a step of few tokens takes less.
TEST(Plan, WhatTheMakingOfWeightsTakes) {
  const ModelConfig model = tiny({{"hidden_size", 512}, {"intermediate_size", 2048}});
  const uint64_t whole = 512 * 2048, small = 512 * 512, codes = whole / 2 + whole / 64 + whole / 64 / 256 * 4 + 1024 + 4;
  const auto of = [&](const std::vector<std::pair<std::string, std::string>>& keys, int ranks = 1, at::DeviceType device = at::kCPU) {
    std::vector<std::pair<std::string, std::string>> all = {{"lora.rank", "2"}, {"lora.targets", "down_proj"}};
    all.insert(all.end(), keys.begin(), keys.end());
    return plan_of(config_with(all), model, at::kFloat, ranks, 8, device).largest();
  };
  const Footprint plain = of({});
  for (const char* init : {"pissa", "pissa_niter_4"}) EXPECT_EQ(of({{"lora.init", init}}).total(), plain.weights + 2 * 4 * whole + 8 * (whole + 4 * small)) << init;
  EXPECT_EQ(of({{"lora.init", "pissa"}}).total() - of({{"lora.init", "pissa"}}).weights, plain.total() - plain.weights);
  EXPECT_EQ(of({{"lora.init", "pissa"}}, 1, at::kCUDA).total(), plain.weights + 2 * 4 * whole);  // decomposed in host memory
  EXPECT_EQ(of({{"lora.init", "pissa"}, {"parallel.tensor", "2"}}, 2).total(), of({{"parallel.tensor", "2"}}, 2).weights + 2 * 4 * whole + 8 * (whole + 4 * small));  // each makes the whole
  const Footprint nf4 = of({{"quant.base", "nf4"}});
  EXPECT_EQ(of({{"quant.base", "nf4"}, {"lora.init", "loftq"}}).total(), nf4.weights + (4 + 2 * 4) * whole + codes + 8 * (2 * whole + 4 * small));
  EXPECT_EQ(of({{"quant.base", "nf4"}, {"lora.dora", "true"}}).total(), nf4.weights + 2 * 512 * 4 + 2 * 4 * whole + codes);  // and two magnitudes
  EXPECT_GE(plan_of(config_with({{"lora.rank", "2"}, {"lora.init", "pissa"}}), model, at::kFloat, 1, 8192).largest().activations, 8 * (whole + 4 * small));
  EXPECT_EQ(plan_of(config_with({{"lora.rank", "2"}, {"lora.init", "pissa"}}), model, at::kFloat, 1, 8192).largest().weights,
            plan_of(config_with({{"lora.rank", "2"}}), model, at::kFloat, 1, 8192).largest().weights);  // which takes more
}

// Zero over four copies of a model without anything to pad: 64 bytes a row of everything.
TEST(Plan, WhatZeroLeavesOnARank) {
  const ModelConfig model = tiny();
  const auto n = static_cast<uint64_t>(model.num_parameters());
  auto of = [&](const char* zero) { return plan_of(config_with({{"parallel.zero", zero}}), model, at::kBFloat16, 4).largest(); };
  EXPECT_EQ(of("0").optimizer, 12 * n);
  EXPECT_EQ(of("1").weights, 2 * n);
  EXPECT_EQ(of("1").gradients, 4 * n);
  EXPECT_EQ(of("1").optimizer, 3 * n);
  EXPECT_EQ(of("2").optimizer, 3 * n);
  EXPECT_LE(of("2").gradients, 5 * n);  // buckets on their way: here nearly all
  const uint64_t outside = 2 * 800 + 8, block = (n - outside) / 2;
  EXPECT_EQ(of("3").weights, 2 * n / 4 + 2 * outside + 2 * 2 * block);  // both blocks are neighbours
}

TEST(Plan, ActivationsOfABlockByHand) {
  const ModelConfig c = tiny();
  Config config = config_with({});
  auto kept = [&](Recompute mode, int tensor) {
    const MeshModel model(config, c, at::kFloat, Mesh(tensor, 1, tensor, 1));
    return kept_by_block(model.at(0, 0).chunks[0]->blocks()[0], c, at::kFloat, 32, tensor, mode);
  };
  // Of 32 tokens in 4 bytes: input, its norm, q, k, v, attention's output, the sum, its norm, gate, up, their product;
  // and the norms' root mean squares and the softmax's sum of each head.
  EXPECT_EQ(kept(Recompute::kNone, 1), 32u * 4 * (8 + 8 + 8 + 4 + 4 + 8 + 8 + 8 + 16 + 16 + 16) + 32 * 4 * (2 + 2));
  EXPECT_EQ(kept(Recompute::kSelective, 1), 32u * 4 * (8 + 8 + 4 + 4 + 8 + 8 + 16 + 16) + 32 * 4 * (2 + 2));  // no norms and product
  EXPECT_EQ(kept(Recompute::kFull, 1), 32u * 4 * 8);
  // Over two ranks with one key head on both: half of the rows, but all of those that matrices multiply with.
  EXPECT_EQ(kept(Recompute::kNone, 2), 16u * 4 * (8 + 8) + 32u * 4 * (8 + 4 + 4 + 4 + 4 + 8 + 8 + 8 + 8) + 16 * 4 * 2 + 32 * 4);
  EXPECT_EQ(kept(Recompute::kSelective, 2), 16u * 4 * (8 + 8) + 32u * 4 * (4 + 4 + 4 + 4 + 8 + 8) + 16 * 4 * 2 + 32 * 4);
  // In pieces of the tokens: the MLP's input, and nothing of the MLP.
  const MeshModel one(config, c, at::kFloat, Mesh(1, 1, 1, 1));
  EXPECT_EQ(kept_by_block(one.at(0, 0).chunks[0]->blocks()[0], c, at::kFloat, 32, 1, Recompute::kNone, 8), 32u * 4 * (8 + 8 + 8 + 4 + 4 + 8 + 8 + 8) + 32 * 4 * (2 + 2));
  config.lora.rank = 2, config.lora.targets = {"q_proj"};  // neither the MLP's inputs nor attention's output are multiplied with a gradient
  EXPECT_EQ(kept(Recompute::kNone, 1), 32u * 4 * (8 + 8 + 8 + 4 + 4 + 8 + 8 + 16 + 16 + 2) + 32 * 4 * (2 + 2));
}

// Forwards keep nothing: of 640 tokens in 4 bytes the block's input, its norm, what attention adds, the sum and its norm; gate, up,
// their product and what comes of it; cos and sin. Of the pipeline's stages each has a receive and two outputs on their way.
TEST(Plan, AnEvaluationOfLargerBatches) {
  const ModelConfig c = tiny({{"vocab_size", 40}});
  auto of = [&](const char* rows, std::vector<std::pair<std::string, std::string>> keys, int ranks, int64_t longest) {
    keys.push_back({"eval.micro_batch_size", rows});
    const Config config = config_with(keys);
    return make_plan(config, c, at::kFloat, mesh_of(config, ranks), {32, 32, 10, 4, 5, config.train.accumulation, longest, 6400}).largest();
  };
  EXPECT_FALSE(of("1", {}, 1, 32).in_evaluation);
  EXPECT_FALSE(of("20", {}, 1, 0).in_evaluation);
  const Footprint large = of("20", {}, 1, 32);
  EXPECT_TRUE(large.in_evaluation);
  EXPECT_EQ(large.activations, 640u * 4 * (5 * 8 + 3 * 16 + 8 + 2 * 4));
  EXPECT_EQ(large.buffers, 640u * 24);
  EXPECT_EQ(large.weights, of("1", {}, 1, 32).weights);
  EXPECT_EQ(of("0", {}, 1, 32).buffers, 2048u * 24);      // as many rows as have 2,048 tokens together
  EXPECT_EQ(of("0", {}, 4, 32).buffers, 1600u * 24);      // or fewer, so that four copies have some
  EXPECT_EQ(of("1", {}, 1, 5000).buffers, 5000u * 24);
  EXPECT_EQ(of("400", {}, 1, 32).buffers, 6400u * 24);  // all that there is
  const Footprint staged = of("20", {{"parallel.pipeline", "2"}, {"train.accumulation", "2"}}, 2, 32);
  EXPECT_EQ(staged.buffers, 6400u * 24 + 3 * 640 * 8 * 4);
}

TEST(Plan, TrafficOfAPlainMeshByHand) {
  const ModelConfig c = tiny();
  const int64_t n = c.num_parameters();
  auto of = [&](const Config& config, int ranks) { return plan_of(config, c, at::kFloat, ranks).stages[0].traffic; };
  EXPECT_EQ(of(config_with({}), 2), (Traffic{4 * n, 0, 0, 0, 48}));
  EXPECT_EQ(of(config_with({{"parallel.zero", "1"}}), 2), (Traffic{4 * n, 4 * n, 0, 0, 48 + 32}));
  // Two layers of four exchanges, the embedding's and the head's rows, forward and backward; a row's maximum, place and sums.
  const int64_t norms = 5 * 8, keys = 2 * 2 * 4 * 8;  // what both tensor ranks hold: norms, k and v
  EXPECT_EQ(of(config_with({{"parallel.tensor", "2"}}), 2), (Traffic{4 * (norms + keys), 0, 20 * 32 * 8 * 4 + 32 * (4 + 8 + 16), 0, 48 + 32}));
  EXPECT_EQ(of(config_with({{"parallel.pipeline", "2"}, {"train.accumulation", "3"}}), 2), (Traffic{0, 0, 0, 3 * 32 * 8 * 4, 48 + 32}));
}

// A GPT of Megatron's as a model of ours: with an MLP of three matrices of 8/3 of the width instead of two of 4 it has the
// same parameters and multiplications.
ModelConfig gpt(int64_t heads, int64_t hidden, int64_t layers) {
  return test::config_of(test::small_config("llama", {{"hidden_size", hidden}, {"intermediate_size", 8 * hidden / 3}, {"num_attention_heads", heads},
                                                      {"num_key_value_heads", heads}, {"head_dim", hidden / heads}, {"num_hidden_layers", layers},
                                                      {"vocab_size", 51200}, {"max_position_embeddings", 2048}, {"tie_word_embeddings", true}}));
}

// Narayanan et al. 2021, table 1: billions of parameters, over tensor and pipeline ranks. Mixed precision holds 18 bytes of each
// (2 the weight, 4 its gradient, 12 Adam's moments and the master).
TEST(PlanAgainstPublished, MegatronsModelsOnTheirMeshes) {
  const struct { double billions; int64_t heads, hidden, layers; int tensor, pipeline; } rows[] = {
      {1.7, 24, 2304, 24, 1, 1},  {3.6, 32, 3072, 30, 2, 1},    {7.5, 32, 4096, 36, 4, 1},    {18.4, 48, 6144, 40, 8, 1},
      {39.1, 64, 8192, 48, 8, 2}, {76.1, 80, 10240, 60, 8, 4},  {145.6, 96, 12288, 80, 8, 8}, {310.1, 128, 16384, 96, 8, 16},
      {529.6, 128, 20480, 105, 8, 35}};
  for (const auto& row : rows) {
    const Config config = config_with({{"parallel.tensor", str(row.tensor)}, {"parallel.pipeline", str(row.pipeline)}});
    const Plan plan = plan_of(config, gpt(row.heads, row.hidden, row.layers), at::kBFloat16, row.tensor * row.pipeline, 2048);
    double held = 0;
    for (const auto& stage : plan.stages) held += static_cast<double>(stage.memory.weights + stage.memory.gradients + stage.memory.optimizer);
    const double published = 18 * row.billions * 1e9 / (row.tensor * row.pipeline);
    EXPECT_NEAR(held / row.pipeline / published, 1, 0.1) << row.billions;
  }
}

// Korthikanti et al. 2022, table 2: a layer's activations in 16 bits are s b h (34 + 5 a s / h) bytes, of which 2 are masks of
// dropout, which we have none of, and 5 a s / h the scores, which neither we nor their selective recomputation keep; s b h 34 / t
// with sequence parallelism, gathered rows not counted (they are gathered again; here under train.recompute=selective); 2 s b h
// with full recomputation. The first of p stages keeps all layers' worth of them, the interleaved one (1 + (p-1)/(p v)) of that.
TEST(PlanAgainstPublished, MegatronsActivations) {
  const ModelConfig c = gpt(96, 12288, 96);
  const double sbh = 2048.0 * 12288;
  auto kept = [&](Recompute mode, int tensor) {
    const MeshModel model(Config(), c, at::kBFloat16, Mesh(tensor, 1, tensor, 1));
    return static_cast<double>(kept_by_block(model.at(0, 0).chunks[0]->blocks()[0], c, at::kBFloat16, 2048, tensor, mode)) / sbh;
  };
  EXPECT_NEAR(kept(Recompute::kNone, 1) / 32, 1, 0.1);
  EXPECT_NEAR(kept(Recompute::kFull, 1) / 2, 1, 0.1);
  EXPECT_NEAR(kept(Recompute::kFull, 8) / (2.0 / 8), 1, 0.1);
  EXPECT_LE(kept(Recompute::kSelective, 8), 34.0 / 8);  // norms and SwiGLU, too, are computed again
  EXPECT_NEAR(kept(Recompute::kSelective, 8) / (kept(Recompute::kSelective, 1) / 8), 1, 0.1);
  auto first_stage = [&](const char* schedule, const char* chunks) {
    const Config config = config_with({{"parallel.tensor", "8"}, {"parallel.pipeline", "8"}, {"parallel.schedule", schedule}, {"train.accumulation", "64"},
                                       {"parallel.virtual_stages", chunks}, {"train.recompute", "selective"}});
    return static_cast<double>(plan_of(config, c, at::kBFloat16, 64, 2048).stages[0].memory.activations) / sbh;
  };
  const double layers = 96 * kept(Recompute::kSelective, 8);
  EXPECT_NEAR(first_stage("1f1b", "0") / layers, 1, 0.1);
  EXPECT_NEAR(first_stage("interleaved", "3") / (layers * (1 + 7.0 / (8 * 3))), 1, 0.1);
}

// Rajbhandari et al. 2020, figure 1: 7.5 billion parameters on 64 GPUs. Their gradients are 2 bytes wide, ours 4.
TEST(PlanAgainstPublished, ZerosStages) {
  const ModelConfig c = gpt(32, 4096, 36);
  const double n = static_cast<double>(c.num_parameters());
  EXPECT_NEAR(n / 7.5e9, 1, 0.1);
  auto of = [&](const char* zero, uint64_t Footprint::*part) {
    return static_cast<double>(plan_of(config_with({{"parallel.zero", zero}}), c, at::kBFloat16, 64, 2048).largest().*part);
  };
  EXPECT_NEAR((of("0", &Footprint::weights) + of("0", &Footprint::optimizer) + of("0", &Footprint::gradients) / 2) / 120e9, 1, 0.1);
  EXPECT_NEAR((of("1", &Footprint::weights) + of("1", &Footprint::optimizer) + of("1", &Footprint::gradients) / 2) / 31.4e9, 1, 0.1);
  EXPECT_NEAR(of("1", &Footprint::optimizer) / (12 * 7.5e9 / 64), 1, 0.1);
}

TEST(Plan, WhatDoesNotFitIsRefusedWithTheKeysToChange) {
  Plan plan;
  plan.base_bytes = 0;
  plan.stages.resize(1);
  plan.stages[0].memory.weights = 600ull << 20, plan.stages[0].memory.activations = 400ull << 20;
  EXPECT_NO_THROW(check_memory(plan, 2, 2000ull << 20));
  try {
    check_memory(plan, 2, (2000ull << 20) - 1);
    FAIL();
  } catch (const ConfigError& error) {
    EXPECT_STREQ(error.what(),
                 "the run needs about 1.95 GiB of memory (2 ranks of 1000.00 MiB, of which activations 400.00 MiB), but this "
                 "host has 1.95 GiB free: lower train.micro_batch_size or data.max_length, set train.recompute=full, "
                 "lora.rank or train.dtype=bfloat16, or start fewer ranks");
  }
}

TEST(Plan, AllStagesOfOneHostNeedWhatTheyNeedTogether) {
  Plan plan;
  plan.base_bytes = 10;
  plan.mesh = Mesh(4, 2, 1, 2);
  plan.stages.resize(2);
  plan.stages[0].memory.weights = 1000, plan.stages[1].memory.weights = 400;
  EXPECT_NO_THROW(check_memory(plan, 4, 2 * 1010 + 2 * 410));
  EXPECT_THROW(check_memory(plan, 4, 2 * 1010 + 2 * 410 - 1), ConfigError);
  EXPECT_THROW(check_memory(plan, 2, 2 * 1010 - 1), ConfigError);  // which of the stages are on this host?
}

// A device holds tensors and the workspace of products; the host what has left it, the copy for a checkpoint and the program.
TEST(Plan, OfADevice) {
  const ModelConfig c = gpt(8, 512, 8);
  const auto of = [&](const std::vector<std::pair<std::string, std::string>>& keys, at::DeviceType device) {
    return plan_of(config_with(keys), c, at::kBFloat16, 1, 2048, device);
  };
  const Plan plan = of({}, at::kCUDA);
  EXPECT_EQ(plan.needed_bytes(), plan.largest().total() + (32 << 20));
  EXPECT_EQ(plan.host_bytes(), plan.checkpoint_bytes + (300 << 20));
  EXPECT_THROW(check_device_memory(plan, plan.needed_bytes() - 1), ConfigError);
  EXPECT_NO_THROW(check_device_memory(plan, plan.needed_bytes()));
  EXPECT_THROW(check_memory(plan, 2, 2 * plan.host_bytes() - 1), ConfigError);
  EXPECT_NO_THROW(check_memory(plan, 2, 2 * plan.host_bytes()));
  const Plan offload = of({{"optim.offload", "true"}}, at::kCUDA);
  EXPECT_EQ(offload.needed_bytes(), plan.needed_bytes() - plan.largest().optimizer);
  EXPECT_EQ(offload.host_bytes(), plan.host_bytes() + offload.largest().optimizer);
  // Two windows of state stay.
  EXPECT_EQ(of({{"optim.paged", "true"}}, at::kCUDA).needed_bytes(), plan.needed_bytes() - plan.largest().optimizer + std::min<uint64_t>(plan.largest().optimizer, 2 * 12 << 22));
  // What lies between eight blocks leaves but for two of them, and the CPU keeps it.
  const Plan full = of({{"train.recompute", "full"}}, at::kCUDA), away = of({{"train.recompute", "full"}, {"train.offload_activations", "true"}}, at::kCUDA);
  const uint64_t row = 2048 * 512 * 2;
  EXPECT_EQ(away.largest().away, 8 * row);
  EXPECT_EQ(full.needed_bytes() - away.needed_bytes(), 6 * row);
  EXPECT_EQ(away.host_bytes() - full.host_bytes(), 8 * row);
  EXPECT_EQ(of({{"train.recompute", "full"}, {"train.offload_activations", "true"}}, at::kCPU).needed_bytes(), of({{"train.recompute", "full"}}, at::kCPU).needed_bytes());
}

// The table is on the device or in host memory; of the MLP's rows some are there at once.
TEST(Plan, MemorySettings) {
  const ModelConfig c = tiny({{"vocab_size", 500}, {"hidden_size", 64}, {"head_dim", 64}, {"num_attention_heads", 1}, {"intermediate_size", 1024}});
  const auto of = [&](std::vector<std::pair<std::string, std::string>> keys, at::DeviceType device = at::kCUDA) {
    keys.insert(keys.end(), {{"lora.rank", "2"}, {"train.recompute", "full"}});
    return plan_of(config_with(keys), c, at::kBFloat16, 1, 2048, device);
  };
  const uint64_t table = 500 * 64 * 2, rows = 2048 * 2;
  const Plan plain = of({}), host = of({{"model.embedding", "host"}}), pieces = of({{"train.mlp_tokens", "256"}});
  EXPECT_EQ(plain.needed_bytes() - host.needed_bytes(), table);
  EXPECT_EQ(host.host_bytes() - plain.host_bytes(), table);
  EXPECT_NE(host.text().find("in host memory: embedding 0.06 MiB, "), std::string::npos) << host.text();
  EXPECT_EQ(of({{"model.embedding", "host"}}, at::kCPU).needed_bytes(), of({}, at::kCPU).needed_bytes());
  // Of gate, up, their product and its gradient an eighth, beside little else.
  EXPECT_NEAR(static_cast<double>(plain.needed_bytes() - pieces.needed_bytes()), rows * 4.0 * 1024 * 7 / 8, rows * 2.0 * 64);
  EXPECT_EQ(of({{"train.mlp_tokens", "2048"}}).needed_bytes(), plain.needed_bytes());
  const Config config = config_with({{"lora.rank", "2"}, {"train.recompute", "full"}, {"model.embedding", "host"}});
  const std::string advice = fit_text(plain, config_with({{"lora.rank", "2"}, {"train.recompute", "full"}}), c, at::kBFloat16, plain.needed_bytes() - table);
  EXPECT_NE(advice.find("model.embedding=host ("), std::string::npos) << advice;
  EXPECT_NE(advice.find("train.mlp_tokens=1024 ("), std::string::npos) << advice;
  EXPECT_EQ(fit_text(host, config, c, at::kBFloat16, plain.needed_bytes() / 2).find("model.embedding=host"), std::string::npos);
}

// A device's products want more rows of logits at once: of this vocabulary up to 3,200 in 400 MB.
TEST(Plan, LogitsOfADevice) {
  const ModelConfig c = tiny({{"vocab_size", 65536}});
  const auto logits = [&](at::DeviceType device) { return plan_of(config_with({{"lora.rank", "2"}}), c, at::kBFloat16, 1, 2048, device).largest().activations; };
  EXPECT_NEAR(static_cast<double>(logits(at::kCUDA) - logits(at::kCPU)), (2048.0 - 256) * 65536 * 2, 1e6);
}

TEST(Plan, WhatWouldFitIsSaid) {
  const ModelConfig c = gpt(8, 512, 8);
  const Config config = config_with({{"train.micro_batch_size", "4"}, {"checkpoint.async", "false"}});
  const Plan plan = plan_of(config, c, at::kBFloat16, 2, 2048);
  const uint64_t needed = plan.needed_bytes();
  EXPECT_TRUE(fit_text(plan, config, c, at::kBFloat16, needed).ends_with(": it fits"));
  const std::string advice = fit_text(plan, config, c, at::kBFloat16, needed * 9 / 10);
  EXPECT_NE(advice.find("it does not fit; it would with train.recompute=selective ("), std::string::npos) << advice;
  EXPECT_NE(advice.find(", or with train.recompute=full ("), std::string::npos) << advice;
  EXPECT_EQ(advice.find("optim.offload"), std::string::npos) << advice;
  Config device = config;
  device.train.recompute = "full", device.train.micro_batch_size = 1;
  const auto on_device = [&] { return plan_of(device, c, at::kBFloat16, 2, 2048, at::kCUDA); };
  const uint64_t rest = on_device().needed_bytes() - on_device().largest().optimizer;
  const std::string offload = fit_text(on_device(), device, c, at::kBFloat16, rest);
  EXPECT_NE(offload.find(" of its device and has "), std::string::npos) << offload;
  EXPECT_NE(offload.find("it does not fit; it would with optim.offload=true ("), std::string::npos) << offload;
  device.optim.offload = true;
  EXPECT_TRUE(fit_text(on_device(), device, c, at::kBFloat16, rest).ends_with(": it fits"));
  EXPECT_NE(fit_text(on_device(), device, c, at::kBFloat16, rest - 1).find("it would with train.offload_activations=true ("), std::string::npos);
  EXPECT_NE(fit_text(on_device(), device, c, at::kBFloat16, std::nullopt).find("set plan.memory_gb"), std::string::npos);
  EXPECT_NE(fit_text(plan, config, c, at::kBFloat16, 1 << 20).find("more ranks along parallel.tensor or parallel.pipeline"), std::string::npos);
}

TEST(Plan, TheLongestRowIsTheLastThatFits) {
  ModelConfig c = gpt(4, 256, 4);
  c.max_positions = 4096;
  const Config config = config_with({{"lora.rank", "4"}, {"checkpoint.async", "false"}});
  const auto needed = [&](int64_t row) { return plan_of(config, c, at::kBFloat16, 1, row).needed_bytes(); };
  const Plan plan = plan_of(config, c, at::kBFloat16, 1, 512);
  const auto text = [&](uint64_t room) { return longest_row_text(plan, config, c, at::kBFloat16, room); };
  EXPECT_TRUE(text(needed(1024)).starts_with("plan: rows of up to 1024 tokens fit into ")) << text(needed(1024));
  EXPECT_TRUE(text(needed(1024) - 1).starts_with("plan: rows of up to 960 tokens fit into ")) << text(needed(1024) - 1);
  EXPECT_NE(text(needed(8192)).find("rows of up to 4096 tokens fit into "), std::string::npos);
  EXPECT_NE(text(needed(8192)).find("the model's max_position_embeddings"), std::string::npos);
  EXPECT_TRUE(text(1 << 20).starts_with("plan: not even rows of 64 tokens fit into 1.00 MiB"));
  const std::string advice = fit_text(plan, config, c, at::kBFloat16, plan.needed_bytes() - 2000000);
  EXPECT_NE(advice.find("quant.base=nf4 ("), std::string::npos) << advice;
}

}  // namespace
}  // namespace trireme
