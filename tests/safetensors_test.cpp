#include "checkpoint/safetensors.h"

#include <gtest/gtest.h>
#include <sys/resource.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "base/check.h"
#include "checkpoint/load_weights.h"
#include "scratch.h"
#include "support.h"

namespace trireme {
namespace {

namespace fs = std::filesystem;

class Safetensors : public testing::Test {
 protected:
  void SetUp() override {
    folder_ = scratch_folder();
    path_ = folder_ + "/model.safetensors";
  }
  void TearDown() override { fs::remove_all(folder_); }

  static void write_text(const std::string& path, const std::string& text) {
    std::ofstream(path, std::ios::binary) << text;
  }

  // A file with this header and this many bytes of values.
  void write_raw(const std::string& header, size_t num_bytes) {
    std::string text;
    for (int i = 0; i < 8; ++i) text += static_cast<char>(header.size() >> (8 * i));
    write_text(path_, text + header + std::string(num_bytes, '\1'));
  }

  template <typename F>
  std::string error_of(F&& action) {
    try {
      action();
    } catch (const DataError& error) {
      return error.what();
    }
    return "no DataError";
  }
  std::string refusal() {
    return error_of([&] { SafetensorsFile file(path_); });
  }
  std::string refusal(const std::string& header, size_t num_bytes) {
    write_raw(header, num_bytes);
    return refusal();
  }
  static Parameter whole(const std::string& name, const at::Tensor& value) {
    return {name, value, ShardSpec::whole(value)};
  }

  std::string folder_, path_;
};

bool same_bits(const at::Tensor& a, const at::Tensor& b) {
  return a.scalar_type() == b.scalar_type() && a.sizes() == b.sizes() &&
         (a.nbytes() == 0 || std::memcmp(a.contiguous().data_ptr(), b.contiguous().data_ptr(), a.nbytes()) == 0);
}

TEST_F(Safetensors, RoundTripOfEveryDtype) {
  std::vector<TensorSource> sources;
  std::vector<at::Tensor> values;
  for (at::ScalarType dtype : {at::kByte, at::kBool, at::kChar, at::kBFloat16, at::kHalf, at::kShort, at::kInt,
                               at::kFloat, at::kDouble, at::kLong, at::kFloat8_e4m3fn}) {
    values.push_back((at::arange(15, at::kFloat) - 3).clamp(dtype == at::kByte ? 0 : -9).to(dtype).view({3, 5}));
    sources.push_back(TensorSource::of(c10::toString(dtype), values.back()));
  }
  values.push_back(at::scalar_tensor(2.5));
  sources.push_back(TensorSource::of("scalar", values.back()));
  values.push_back(at::empty({0, 4}));
  sources.push_back(TensorSource::of("empty", values.back()));
  values.push_back(at::arange(6.0).view({2, 3}).t());
  sources.push_back(TensorSource::of("strided \"name\" \n ü", values.back()));
  write_safetensors(path_, sources, {{"who", "me"}});

  SafetensorsFile file(path_);
  EXPECT_EQ(file.names().size(), sources.size());
  EXPECT_EQ(file.metadata(), (std::map<std::string, std::string>{{"format", "pt"}, {"who", "me"}}));
  for (size_t i = 0; i < sources.size(); ++i) {
    EXPECT_TRUE(same_bits(file.view(sources[i].name), values[i])) << sources[i].name;
    EXPECT_EQ(file.info(sources[i].name).offset % c10::elementSize(sources[i].dtype), 0u) << sources[i].name;
  }
  EXPECT_FALSE(fs::exists(path_ + ".tmp"));
  EXPECT_EQ(error_of([&] { file.info("x"); }), path_ + " has no tensor 'x'.");
}

TEST_F(Safetensors, ViewKeepsTheFileAlive) {
  write_safetensors(path_, {TensorSource::of("a", at::arange(1000))});
  at::Tensor view = SafetensorsFile(path_).view("a");
  fs::remove(path_);
  EXPECT_EQ(view.sum().item<int64_t>(), 999 * 500);
}

TEST_F(Safetensors, RefusesBrokenFilesWithTheRightWords) {
  write_text(path_, "abc");
  EXPECT_EQ(refusal(),
            path_ + ": too short for a safetensors file: 3 bytes, but the first 8 give the header's length.");
  write_text(path_, "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n");
  EXPECT_EQ(refusal(), path_ + ": a pointer of git-lfs, the file itself was not downloaded; run git lfs pull in its folder.");
  write_text(path_, std::string("\1\xe1\xf5\5\0\0\0\0{}", 10));
  EXPECT_EQ(refusal(),
            path_ + ": not a safetensors file: its header would have 100000001 bytes; 100000000 are allowed.");
  write_text(path_, std::string("\100\0\0\0\0\0\0\0{}", 10));
  EXPECT_EQ(
      refusal(),
      path_ + ": cut short: the header has 64 bytes, but the file ends after 2 of them. Download or copy it again.");
  EXPECT_EQ(refusal(" {}", 0), path_ + ": not a safetensors file: its header does not begin with '{'.");
  EXPECT_NE(refusal("{\"a\":", 0).find(path_ + ": header"), std::string::npos);
  EXPECT_NE(refusal("{\"\xff\":1}", 0).find(path_ + ": header"), std::string::npos);

  std::string a = R"("a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]})", at_a = path_ + ": tensor 'a'";
  EXPECT_NE(refusal("{" + a + "," + a + "}", 16).find("the key \"a\" stands twice in one object"), std::string::npos);
  EXPECT_EQ(
      refusal("{" + a + "}", 15),
      path_ + ": cut short: tensor 'a' ends at 16, but only 15 bytes of values are there. Download or copy it again.");
  EXPECT_EQ(refusal("{" + a + "}", 17), path_ + ": the tensors end at 16, but 17 bytes of values are there.");
  EXPECT_EQ(refusal("{" + a + R"(,"b":{"dtype":"U8","shape":[2],"data_offsets":[15,17]}})", 17),
            path_ + ": tensor 'b' begins at 15, but the tensor before it ends at 16: they overlap.");
  EXPECT_EQ(refusal("{" + a + R"(,"b":{"dtype":"U8","shape":[2],"data_offsets":[17,19]}})", 19),
            path_ + ": tensor 'b' begins at 17, but the tensor before it ends at 16: there is a hole.");
  EXPECT_EQ(refusal(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}})", 4),
            at_a + ": data_offsets [0, 4] do not hold the 8 bytes of shape [2] in F32.");
  EXPECT_EQ(refusal(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}})", 4),
            at_a + ": data_offsets [4, 0] do not hold the 4 bytes of shape [1] in F32.");
  EXPECT_EQ(refusal(R"({"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,0]}})", 0),
            at_a + ": shape [4611686018427387904,4] is larger than any file.");
  EXPECT_EQ(refusal(R"({"a":{"dtype":"F32","shape":[4611686018427387904,4,0],"data_offsets":[0,0]}})", 0),
            at_a + ": shape [4611686018427387904,4,0] is larger than any file.");
  EXPECT_EQ(refusal(R"({"a":{"dtype":"U8","shape":[9223372036854775808,0],"data_offsets":[0,0]}})", 0),
            at_a + ": shape [9223372036854775808,0] is larger than any file.");
  EXPECT_EQ(refusal(R"({"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}})", 4),
            at_a + ": 'shape' holds -1, which is not a whole number from 0 to 2^64 - 1.");
  EXPECT_EQ(refusal(R"({"a":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}})", 1),
            at_a +
                ": dtype \"F4\" is not supported; supported are F64 F32 F16 BF16 I64 I32 I16 I8 U64 U32 U16 U8 BOOL "
                "F8_E4M3 F8_E5M2.");
  EXPECT_EQ(refusal(R"({"a":5})", 0), at_a + ": the entry is not an object with dtype, shape and data_offsets.");
  EXPECT_EQ(refusal(R"({"a":{"dtype":"U8","data_offsets":[0,1]}})", 1), at_a + ": 'shape' is missing.");
  EXPECT_EQ(refusal(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"x":1}})", 1), at_a + ": unknown key 'x'.");
  EXPECT_EQ(refusal(R"({"__metadata__":{"n":1}})", 0), path_ + ": '__metadata__' key 'n' is not a string.");
}

TEST_F(Safetensors, CorpusOfTheFuzzerIsReadOrRefused) {
  const char* source = std::getenv("TRIREME_SOURCE");
  ASSERT_TRUE(source) << "TRIREME_SOURCE names the repository";
  int num_good = 0, num_refused = 0;
  for (const auto& entry : fs::directory_iterator(std::string(source) + "/tests/fuzz/corpus/safetensors")) {
    bool good = entry.path().filename().string().rfind("good", 0) == 0;
    try {
      SafetensorsFile file(entry.path().string());
      for (const std::string& name : file.names()) file.view(name).clone();
      EXPECT_TRUE(good) << entry.path();
      ++num_good;
    } catch (const DataError& error) {
      EXPECT_FALSE(good) << entry.path() << ": " << error.what();
      ++num_refused;
    }
  }
  EXPECT_GE(num_good, 4);
  EXPECT_GE(num_refused, 25);
}

TEST_F(Safetensors, FolderIsShardedAboveTheLimitAndOldFilesGo) {
  std::vector<TensorSource> sources;
  for (int i = 0; i < 5; ++i) sources.push_back(TensorSource::of(str("t", i), at::full({100}, i, at::kFloat)));
  write_safetensors_folder(folder_, sources, 1000);
  EXPECT_TRUE(fs::exists(folder_ + "/model-00001-of-00003.safetensors"));
  EXPECT_TRUE(fs::exists(folder_ + "/model.safetensors.index.json"));
  SafetensorsFolder sharded(folder_);
  EXPECT_EQ(sharded.names().size(), 5u);
  EXPECT_EQ(sharded.view("t4")[99].item<float>(), 4);

  write_text(folder_ + "/model-notes.txt", "stays");
  write_safetensors_folder(folder_, sources, 10000);
  EXPECT_FALSE(fs::exists(folder_ + "/model-00001-of-00003.safetensors"));
  EXPECT_FALSE(fs::exists(folder_ + "/model.safetensors.index.json"));
  EXPECT_TRUE(fs::exists(folder_ + "/model-notes.txt"));
  EXPECT_EQ(SafetensorsFolder(folder_).view("t3")[0].item<float>(), 3);
}

// A rank that does not write, and one whose disk fails, still take part in every gather.
TEST_F(Safetensors, EveryTensorIsGatheredWhateverHappens) {
  int num_gathered = 0;
  std::vector<TensorSource> sources;
  for (int i = 0; i < 4; ++i)
    sources.push_back({str("t", i), at::kFloat, {3}, [&] { return ++num_gathered, at::zeros({3}); }});
  write_safetensors_folder(folder_, sources, 20, false);
  EXPECT_EQ(num_gathered, 4);
  EXPECT_TRUE(fs::is_empty(folder_));
  write_text(folder_ + "/file", "in the way");
  EXPECT_THROW(write_safetensors_folder(folder_ + "/file/model", sources, 20), SystemError);
  EXPECT_EQ(num_gathered, 8);
}

TEST_F(Safetensors, LoadsConvertsAndSlices) {
  at::Tensor weight = at::randn({700, 300}).to(at::kBFloat16), bias = at::randn({700});
  write_safetensors(path_,
                    {TensorSource::of("model.w", weight), TensorSource::of("model.b", bias),
                     TensorSource::of("lm_head.weight", bias), TensorSource::of("model.rotary_emb.inv_freq", bias)});
  at::Tensor same = at::zeros({700, 300}, at::kBFloat16), b = at::zeros({700});
  load_weights(folder_, {whole("model.w", same), whole("model.b", b.requires_grad_())});
  EXPECT_TRUE(same_bits(same, weight));
  EXPECT_TRUE(same_bits(b.detach(), bias));

  at::Tensor wide = at::zeros({700, 300}), rows = at::zeros({350, 300}), columns = at::zeros({700, 100}, at::kDouble);
  at::Tensor transposed = at::zeros({300, 700}).t();
  auto load_w = [&](const at::Tensor& target, std::vector<int64_t> offset) {
    at::Tensor b2 = at::zeros({350});
    load_weights(folder_, {{"model.w", target, {{700, 300}, offset, false}}, {"model.b", b2, {{700}, {350}, false}}});
    EXPECT_TRUE(same_bits(b2, bias.narrow(0, 350, 350)));
  };
  load_w(wide, {0, 0});
  EXPECT_TRUE(same_bits(wide, weight.to(at::kFloat)));
  load_w(rows, {350, 0});
  EXPECT_TRUE(same_bits(rows, weight.narrow(0, 350, 350).to(at::kFloat)));
  load_w(columns, {0, 200});
  EXPECT_TRUE(same_bits(columns, weight.narrow(1, 200, 100).to(at::kDouble)));
  load_w(transposed, {0, 0});
  EXPECT_TRUE(same_bits(transposed, weight.to(at::kFloat)));
}

// Reads a folder and writes it again in shards. The Python test hands in one that transformers wrote and lets
// transformers load what comes out.
TEST_F(Safetensors, FolderRoundTrip) {
  const char *given = std::getenv("TRIREME_INTEROP"), *output = std::getenv("TRIREME_INTEROP_OUT");
  std::string in = given ? given : folder_ + "/in", out = output ? output : folder_ + "/out";
  if (!given)
    write_safetensors_folder(in, {TensorSource::of("a", at::randn({9, 9})), TensorSource::of("b", at::randn({9}))});
  SafetensorsFolder read(in);
  std::vector<Parameter> targets;
  std::vector<TensorSource> sources;
  uint64_t bytes = 0;
  for (const std::string& name : read.names()) {
    at::Tensor value = at::empty(read.info(name).shape, read.info(name).dtype);
    targets.push_back(whole(name, value));
    sources.push_back(TensorSource::of(name, value));
    bytes += value.nbytes();
  }
  ASSERT_GE(targets.size(), 2u);
  load_weights(in, targets);
  write_safetensors_folder(out, sources, bytes / 2);
  SafetensorsFolder again(out);
  for (const Parameter& target : targets) EXPECT_TRUE(same_bits(again.view(target.name), target.value)) << target.name;
}

TEST_F(Safetensors, LoadsBareModelsAndOtherNames) {
  write_safetensors(path_, {TensorSource::of("norm.weight", at::ones({3})), TensorSource::of("x.head", at::ones({2}))});
  at::Tensor a = at::zeros({3}), b = at::zeros({2});
  LoadOptions options;
  options.name_in_file = [](const std::string& name) { return name == "lm_head.weight" ? "x.head" : name; };
  load_weights(folder_, {whole("model.norm.weight", a), whole("lm_head.weight", b)}, options);
  EXPECT_EQ(a.sum().item<float>() + b.sum().item<float>(), 5);
}

TEST_F(Safetensors, RefusesFoldersWithTheRightWords) {
  auto load = [&] {
    at::Tensor a = at::zeros({2, 3}), b = at::zeros({4});
    load_weights(folder_, {whole("a", a), whole("b", b)});
  };
  EXPECT_EQ(error_of(load), "model folder " + folder_ + " is empty.");
  write_text(folder_ + "/config.json", "{}");
  EXPECT_EQ(error_of(load), folder_ + " has neither model.safetensors nor model.safetensors.index.json.");
  write_text(folder_ + "/pytorch_model.bin", "x");
  EXPECT_EQ(error_of(load),
            folder_ +
                " has no model.safetensors, only pytorch_model.bin, a pickle, which can run code and is "
                "not read: convert it to safetensors (transformers: from_pretrained, then save_pretrained).");
  write_safetensors(path_, {TensorSource::of("a", at::ones({3, 2})), TensorSource::of("c", at::ones({1}))});
  EXPECT_EQ(
      error_of(load),
      folder_ +
          ": the tensors are not those of the model that config.json describes. Missing (1): b. "
          "Not part of the model (1): c. Of another shape (1): a is [3, 2] in the file, but the model's is [2, 3].");
  EXPECT_EQ(error_of([&] { SafetensorsFolder none(folder_ + "/none"); }),
            "model folder " + folder_ + "/none does not exist.");
  EXPECT_EQ(error_of([&] { SafetensorsFolder file(path_); }), "model folder " + path_ + " is not a folder.");
  fs::remove(path_);

  std::string index = folder_ + "/model.safetensors.index.json";
  write_text(index, R"({"weight_map":[]})");
  EXPECT_EQ(error_of(load), index + ": 'weight_map' is missing or not an object.");
  for (std::string file : {"../x.safetensors", "/etc/x.safetensors", "..", "x.bin", ""}) {
    write_text(index, R"({"weight_map":{"a":")" + file + R"("}})");
    EXPECT_EQ(error_of(load), index + ": tensor 'a' is said to be in \"" + file +
              "\", which is not the name of a .safetensors file in this folder.");
  }
  write_text(index, R"({"weight_map":{"a":"x.safetensors"}})");
  EXPECT_EQ(error_of(load), index + " lists x.safetensors, which is not in the folder: the download is incomplete.");
  write_safetensors(folder_ + "/x.safetensors", {TensorSource::of("b", at::ones({4}))});
  EXPECT_EQ(error_of(load), index + ": tensor 'a' is not in x.safetensors.");
  write_text(index, R"({"weight_map":{"a":"x.safetensors","b":"y.safetensors"}})");
  write_safetensors(folder_ + "/x.safetensors",
                    {TensorSource::of("a", at::ones({4})), TensorSource::of("b", at::ones({4}))});
  write_safetensors(folder_ + "/y.safetensors", {TensorSource::of("b", at::ones({4}))});
  EXPECT_EQ(error_of(load), folder_ + ": tensor 'b' is in both " + folder_ + "/x.safetensors and y.safetensors.");
}

// Peak memory while loading: the model, and no more than its largest tensor beside it.
TEST_F(Safetensors, LoadingNeedsNoMemoryBesideTheModel) {
  constexpr int64_t kRows = 4 << 20, kTensors = 8;  // 16 MiB each in fp32
  {
    std::vector<TensorSource> sources;
    for (int i = 0; i < kTensors; ++i)
      sources.push_back({str("t", i), at::kFloat, {kRows}, [] { return at::ones({kRows}); }});
    write_safetensors(path_, sources);
  }
  std::vector<Parameter> targets;
  for (int i = 0; i < kTensors; ++i) targets.push_back(whole(str("t", i), at::empty({kRows})));
  const int64_t grown = test::memory_grown([&] { load_weights(folder_, targets); }), model = kTensors * kRows * 4;
  EXPECT_GE(grown, model / 2);  // else this measured nothing
  EXPECT_LE(grown, model + kRows * 4);
}

}  // namespace
}  // namespace trireme
