// Exports of what files hold: the same bits as the whole model has, with few of its tensors in memory at a time, from
// checkpoints of any mesh.
#include "base/tensor.h"

#include "scratch.h"
#include "support.h"
#include "tensor_bytes.h"
#include "tiny_model.h"

#include "checkpoint/load_weights.h"
#include "comm/process.h"
#include "model/initialize.h"
#include "parallel/tensor_parallel.h"
#include "train/export.h"

namespace trireme {
namespace {

namespace fs = std::filesystem;
using test::same_bits;

const Communicator& world() {
  static test::TensorBytes& first = test::TensorBytes::install();
  static Process process;
  static Communicator world = Communicator::world();
  (void)first;
  return world;
}

// The largest matrix, of fp32, which is what adapters are merged in.
constexpr int64_t kHidden = 256, kIntermediate = 1024, kLargest = 4 * kHidden * kIntermediate;

class Export : public testing::TestWithParam<bool> {
 protected:
  void SetUp() override {
    if (world().rank() == 0) {
      folder_ = scratch_folder();
      const Json shape = {{"hidden_size", kHidden}, {"intermediate_size", kIntermediate}, {"head_dim", 64},
                          {"num_hidden_layers", 6}, {"vocab_size", 601}, {"tie_word_embeddings", GetParam()}};
      write_file_atomic(folder_ + "/config.json", dump_json(test::small_config("llama", shape)));
      Chunks model;
      model.push_back(whole(random(1), at::kFloat));
      export_model(folder_ + "/base", model, random(1), find_model(random(1)));
    }
    folder_ = world().broadcast_bytes(folder_);
  }
  void TearDown() override {
    world().barrier();
    if (world().rank() == 0) fs::remove_all(folder_);
  }

  Config random(int64_t seed) const {
    Config config;
    config.model.config = folder_ + "/config.json";
    config.run.seed = seed;
    return config;
  }
  Config base(int64_t rank = 0) const {
    Config config;
    config.model.path = folder_ + "/base";
    config.lora.rank = rank;
    return config;
  }
  // What a rank holds of a model, its new adapters with a B that changes something.
  std::unique_ptr<Transformer> part(const Config& config, at::ScalarType dtype, const ModelCut& cut) const {
    auto model = build_model(config, find_model(config), dtype, true, at::kCPU, false, cut);
    if (config.lora.rank > 0)
      for (const Parameter& p : model->parameters())
        if (p.name.ends_with("lora_B.weight")) fill_normal(p, 9, 1.0);
    return model;
  }
  std::unique_ptr<Transformer> whole(const Config& config, at::ScalarType dtype) const { return part(config, dtype, {}); }
  // A checkpoint of what is trained, on a mesh of all ranks.
  std::string save(const std::string& name, const Config& config, at::ScalarType dtype) const {
    const int tensor = std::min(2, world().size()), pipeline = world().size() / tensor;
    const auto model = part(config, dtype, [&](Transformer& cut) {
      keep_chunk(cut, make_stages(cut.config(), PipelineKind::k1F1B, pipeline, 1), world().rank() / tensor);
      keep_tensor_part(cut, world().rank() % tensor, tensor);
    });
    std::vector<NamedTensor> trained;
    for (const Parameter& p : model->parameters())
      if (p.value.requires_grad()) trained.push_back({"model/" + p.name, p.value.detach(), p.shard});
    CheckpointStore store(folder_ + "/" + name, world(), 0);
    store.prepare();
    store.save(1, trained, Json::object());
    return folder_ + "/" + name + "/step-1";
  }
  // Exports (rank 0 alone), which must hold few tensors at a time, and compares with the whole model.
  void expect(const std::string& name, const Config& config, const std::string& checkpoint, Transformer& model,
              uint64_t max_shard_bytes = kMaxShardBytes) const {
    SCOPED_TRACE(name);
    const std::string out = folder_ + "/out-" + name;
    const bool adapters = has_lora(model) && !config.lora.merge;
    const ModelSource source = find_model(config);
    std::optional<Checkpoint> opened;
    if (!checkpoint.empty()) opened = open_checkpoint(checkpoint);
    const int64_t grown = test::TensorBytes::install().grown([&] { export_stored(out, config, source, opened, max_shard_bytes); });
    int64_t all = 0;
    std::map<std::string, at::Tensor> expected;
    for (const Parameter& p : model.parameters())
      if (is_adapter(p) == adapters) expected[p.name] = p.value.detach(), all += static_cast<int64_t>(p.value.nbytes());
    for (Linear* l : model.linears())
      if (l->lora && !adapters) merge_lora(l->weight_OI, *l->lora);
    const SafetensorsFolder written(out, adapters ? "adapter_model" : "model");
    EXPECT_EQ(written.names().size(), expected.size());
    EXPECT_EQ(fs::exists(out + "/model.safetensors.index.json"), max_shard_bytes < kMaxShardBytes);
    for (const auto& [tensor, value] : expected) EXPECT_TRUE(same_bits(written.view(tensor), value)) << tensor;
    // A merge: the weight, its update and, in 16 bit, the weight in fp32.
    EXPECT_LE(grown, config.lora.merge ? 3 * kLargest : 2 * kLargest);
    if (!adapters) {
      EXPECT_GE(grown, kLargest / 2) << "this measured nothing";
      EXPECT_GE(all, 10 * kLargest) << "the bound is not one";
    }
    fs::remove_all(out);
  }

  std::string folder_;
};

TEST_P(Export, OfAFolderHoldsFewTensors) {
  if (world().size() > 1) GTEST_SKIP() << "one rank reads and writes";
  expect("copy", base(), "", *whole(base(), at::kFloat));
  expect("shards", base(), "", *whole(base(), at::kFloat), 3 * kLargest);
  Config config = base();
  config.model.dtype = "bfloat16";
  expect("bf16", config, "", *whole(config, at::kBFloat16));
  expect("random", random(2), "", *whole(random(2), at::kFloat));

  Chunks adapted;
  adapted.push_back(whole(base(4), at::kFloat));
  config = base(4);
  export_adapter(folder_ + "/adapter", adapted, config, find_model(config));
  config = base();
  config.lora.path = folder_ + "/adapter", config.lora.merge = true;
  expect("merged", config, "", *whole(config, at::kFloat));
  config.model.dtype = "bfloat16";
  expect("merged-bf16", config, "", *whole(config, at::kBFloat16));
}

TEST_P(Export, OfACheckpointOfAnyMeshHoldsFewTensors) {
  const std::string full = save("full", random(5), at::kBFloat16), lora = save("lora", base(4), at::kFloat);
  if (world().rank() != 0) return;
  expect("full", base(), full, *whole(random(5), at::kBFloat16));
  expect("adapter", base(4), lora, *whole(base(4), at::kFloat));
  Config config = base(4);
  config.lora.merge = true;
  expect("merged", config, lora, *whole(config, at::kFloat));
}

std::string name_of(const testing::TestParamInfo<bool>& info) { return info.param ? "Tied" : "Untied"; }
INSTANTIATE_TEST_SUITE_P(Heads, Export, testing::Bool(), name_of);

}  // namespace
}  // namespace trireme
