// Quantized folders are written and read with few tensors in memory at a time, whole or in shards, to the same bits.
#include "base/tensor.h"

#include <gtest/gtest.h>

#include "base/file.h"
#include "scratch.h"
#include "tensor_bytes.h"
#include "tiny_model.h"

#include <filesystem>

#include "checkpoint/bitsandbytes.h"
#include "train/export.h"
#include "train/merge_check.h"
#include "train/quantize.h"

namespace trireme {
namespace {

namespace fs = std::filesystem;

constexpr int64_t kHidden = 256, kIntermediate = 1024, kLargest = 4 * kHidden * kIntermediate;  // bytes of the largest matrix

struct QuantizedFolders : testing::Test {
  void SetUp() override {
    test::TensorBytes::install();
    folder_ = scratch_folder();
    const Json shape = {{"hidden_size", kHidden}, {"intermediate_size", kIntermediate}, {"head_dim", 64}, {"num_hidden_layers", 6}, {"vocab_size", 601}};
    write_file_atomic(folder_ + "/config.json", dump_json(test::small_config("llama", shape)));
    Config random;
    random.model.config = folder_ + "/config.json";
    export_stored(folder_ + "/base", random, find_model(random), {});
  }
  void TearDown() override { fs::remove_all(folder_); }

  Config of(const std::string& name, const std::string& base) const {
    Config config;
    config.model.path = folder_ + "/" + name, config.quant.base = base;
    return config;
  }
  std::unique_ptr<Transformer> built(const Config& config) const { return build_model(config, find_model(config), at::kFloat, false); }

  std::string folder_;
};

TEST_F(QuantizedFolders, HoldOneWeightAtATime) {
  const Config config = of("base", "nf4");
  const ModelSource source = find_model(config);
  for (const uint64_t shard : {kMaxShardBytes, uint64_t{4} * kLargest}) {
    const std::string out = folder_ + "/out";
    const int64_t grown = test::TensorBytes::install().grown([&] { quantize_stored(out, config, source, shard); });
    EXPECT_EQ(fs::exists(out + "/model.safetensors.index.json"), shard != kMaxShardBytes);
    // The weight in fp32, what is made of it, and what one of its rows of bytes takes on the way.
    EXPECT_LE(grown, kLargest * 3 / 2);
    EXPECT_GE(grown, kLargest) << "this measured nothing";

    std::unique_ptr<Transformer> stored, made;
    const int64_t loaded = test::TensorBytes::install().grown([&] { made = built(config); });
    int64_t bytes = 0;
    for (const Parameter& p : made->parameters()) bytes += static_cast<int64_t>(p.value.nbytes());
    EXPECT_LE(loaded, bytes + kLargest * 3 / 2) << "more than the quantized model and one weight";
    EXPECT_GE(loaded, bytes + kLargest / 2) << "this measured nothing";
    const int64_t read = test::TensorBytes::install().grown([&] { stored = built(of("out", "none")); });
    EXPECT_LE(read, bytes + kLargest / 16) << "leaves are read from the files";
    const auto a = stored->parameters(), b = made->parameters();
    ASSERT_EQ(a.size(), b.size());
    for (size_t i = 0; i < a.size(); ++i) EXPECT_TRUE(a[i].name == b[i].name && at::equal(a[i].value, b[i].value)) << a[i].name;
    fs::remove_all(out);
  }
}

TEST_F(QuantizedFolders, AreComparedWithWhatWasMergedOneBlockAtATime) {
  const Config config = of("base", "nf4");
  const ModelSource source = find_model(config);
  export_stored(folder_ + "/values", config, source, {});
  int64_t block = 0;
  const auto model = built(of("base", "none"));
  for (const Parameter& p : model->parameters())
    if (p.name.find("layers.3.") != std::string::npos) block += static_cast<int64_t>(p.value.nbytes());
  double differs = 1;
  const int64_t grown = test::TensorBytes::install().grown([&] { differs = check_merged(folder_ + "/values", config, source, at::kFloat, {}); });
  EXPECT_LE(grown, 2 * block) << "of six";
  EXPECT_GE(grown, block) << "this measured nothing";
  EXPECT_LT(differs, 1e-5);
  // Of other values it is not a rounding.
  EXPECT_THROW(check_merged(folder_ + "/base", config, source, at::kFloat, {}), DataError);
  EXPECT_THROW(check_merged(folder_ + "/base", config, source, at::kBFloat16, {}), DataError);
}

// What a merge of adapters begins with.
TEST_F(QuantizedFolders, GiveTheValuesOfAWeightOrOfASliceInAnyDtype) {
  const Config config = of("base", "fp4");
  quantize_stored(folder_ + "/out", config, find_model(config));
  const QuantizedFolder quantized(std::make_shared<SafetensorsFolder>(folder_ + "/out"));
  const std::string name = "model.layers.3.mlp.down_proj.weight";
  EXPECT_TRUE(quantized.holds(name) && !quantized.holds("model.norm.weight") && quantized.owns(name + ".quant_map"));
  const at::Tensor whole = at::empty({kHidden, kIntermediate}), values = at::empty_like(whole);
  quantized.load({name, whole, ShardSpec::whole(whole)});
  dequantize_4bit(quantize_4bit(SafetensorsFolder(folder_ + "/base").view(name), FourBit::kFp4, 64), values.view({-1}));
  EXPECT_LT(((whole - values).norm() / values.norm()).item<double>(), 0.02) << "but for the rounding of the scales";
  for (const at::ScalarType dtype : {at::kDouble, at::kBFloat16}) {
    const at::Tensor part = at::empty({5, 70}, dtype);
    quantized.load({name, part, {{kHidden, kIntermediate}, {7, 33}, true}});
    EXPECT_TRUE(at::equal(part, whole.narrow(0, 7, 5).narrow(1, 33, 70).to(dtype)));
  }
}

}  // namespace
}  // namespace trireme
