// What ranks read of a model's files, and what they hold meanwhile: on 1, 2 and 4 ranks.
#include "base/tensor.h"

#include "scratch.h"
#include "support.h"
#include "tensor_bytes.h"
#include "tiny_model.h"

#include "checkpoint/load_weights.h"
#include "comm/process.h"
#include "parallel/sharded_weights.h"
#include "parallel/tensor_parallel.h"
#include "train/export.h"

namespace trireme {
namespace {

namespace fs = std::filesystem;

const Communicator& world() {
  static test::TensorBytes& first = test::TensorBytes::install();
  static Process process;
  static Communicator world = Communicator::world();
  (void)first;
  return world;
}

struct Layout {
  int tensor, pipeline;
  bool tied;
};

class Load : public testing::TestWithParam<Layout> {
 protected:
  void SetUp() override {
    if (world().size() % (GetParam().tensor * GetParam().pipeline) != 0) GTEST_SKIP() << "other numbers of ranks";
    if (world().rank() == 0) {
      folder_ = scratch_folder();
      Config random;
      random.model.config = folder_ + "/config.json";
      const Json shape = {{"hidden_size", 64}, {"intermediate_size", 176}, {"head_dim", 16},
                          {"num_hidden_layers", 4}, {"vocab_size", 401}, {"tie_word_embeddings", GetParam().tied}};
      write_file_atomic(random.model.config, dump_json(test::small_config("qwen2", shape)));
      Chunks model;
      model.push_back(build_model(random, find_model(random), at::kFloat, false));
      export_model(folder_ + "/base", model, random, find_model(random));
    }
    folder_ = world().broadcast_bytes(folder_);
    config_.model.path = folder_ + "/base";
  }
  void TearDown() override {
    world().barrier();
    if (world().rank() == 0 && !folder_.empty()) fs::remove_all(folder_);
  }
  // This rank's part of the model as training begins.
  std::unique_ptr<Transformer> part(const MeshComms& comms, WeightFill* fill) const {
    const ModelSource source = find_model(config_);
    return build_model(config_, source, at::kFloat, false, at::kCPU, false, [&](Transformer& whole) {
      keep_chunk(whole, make_stages(source.config, PipelineKind::k1F1B, comms.pipeline.size(), 1), comms.pipeline.rank());
      apply_tensor_parallel(whole, comms.tensor);
    }, fill);
  }

  std::string folder_;
  Config config_;
};

uint64_t bytes_of(const std::vector<Parameter>& parameters) {
  uint64_t bytes = 0;
  for (const Parameter& p : parameters) bytes += p.value.nbytes();
  return bytes;
}

TEST_P(Load, ARankReadsTheSlicesThatItHolds) {
  const MeshComms comms(Mesh(world().size(), 0, GetParam().tensor, GetParam().pipeline), world());
  uint64_t read = weight_bytes_read();
  std::unique_ptr<Transformer> model;
  const int64_t grown = test::TensorBytes::install().grown([&] { model = part(comms, nullptr); });
  read = weight_bytes_read() - read;
  const uint64_t own = bytes_of(model->parameters());
  EXPECT_EQ(read, own);
  EXPECT_LE(grown, static_cast<int64_t>(own) + 8 * 4);  // and frequencies of positions
}

// The model is read once by all ranks together, whatever several of them compute with.
TEST_P(Load, UnderZero3EachValueIsReadByTheRankThatKeepsIt) {
  const MeshComms comms(Mesh(world().size(), 0, GetParam().tensor, GetParam().pipeline), world());
  const std::unique_ptr<Transformer> expected = part(comms, nullptr);
  uint64_t whole = 0;
  const SafetensorsFolder files(config_.model.path);
  for (const std::string& name : files.names()) whole += files.info(name).bytes;
  for (const int64_t bucket_bytes : {3000, 1 << 20}) {
    uint64_t read = weight_bytes_read();
    std::unique_ptr<Transformer> model;
    std::unique_ptr<GradientReducer> reducer;
    std::unique_ptr<ShardedWeights> weights;
    const int64_t grown = test::TensorBytes::install().grown([&] {
      WeightFill fill;
      model = part(comms, &fill);
      const std::vector<Parameter> parameters = model->parameters();
      for (const Parameter& p : parameters) p.value.set_requires_grad(p.name != "model.norm.weight");  // both kinds
      const Holders holders = find_holders(parameters, comms);
      const GradientReducerOptions options{.bucket_bytes = bucket_bytes, .zero = 3};
      reducer = std::make_unique<GradientReducer>(parameters, holders, options);
      weights = std::make_unique<ShardedWeights>(parameters, holders, *reducer, 3, bucket_bytes, fill);
    });
    read = weight_bytes_read() - read;
    EXPECT_EQ(world().sum(static_cast<int64_t>(read)), static_cast<int64_t>(whole));
    EXPECT_LE(read, 5 * whole / (4 * static_cast<uint64_t>(world().size())) + 4 * 401 * 64);  // stages are not quite alike
    int64_t largest = 0;
    for (const auto& [block, elements] : weights->elements()) largest = std::max(largest, elements * 4);
    // Parts and their gradients, and for a while a bucket; a leaf without memory has a number.
    EXPECT_LE(grown, 2 * weights->bytes_held() + largest + 4 * 60);

    weights->acquire_all();
    const auto a = model->parameters(), b = expected->parameters();
    ASSERT_EQ(a.size(), b.size());
    for (size_t i = 0; i < a.size(); ++i) EXPECT_TRUE(test::same_bits(a[i].value.detach(), b[i].value.detach())) << a[i].name;
  }
}

std::string name_of(const testing::TestParamInfo<Layout>& info) {
  return str("tensor", info.param.tensor, "_pipeline", info.param.pipeline, info.param.tied ? "_tied" : "");
}
INSTANTIATE_TEST_SUITE_P(Meshes, Load,
                         testing::Values(Layout{1, 1, false}, Layout{1, 1, true}, Layout{2, 1, false}, Layout{2, 1, true},
                                         Layout{1, 2, false}, Layout{1, 2, true}, Layout{2, 2, true}, Layout{4, 1, false}),
                         name_of);

}  // namespace
}  // namespace trireme
