// What surrounds checkpoints on one rank: hub names, adapters, exported folders, the lock of a run folder.
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "base/check.h"
#include "checkpoint/export_folder.h"
#include "checkpoint/hf_hub.h"
#include "checkpoint/peft.h"
#include "checkpoint/run_lock.h"
#include "scratch.h"

namespace trireme {
namespace {

namespace fs = std::filesystem;

class CheckpointFiles : public testing::Test {
 protected:
  void SetUp() override {
    folder_ = scratch_folder();
  }
  void TearDown() override { fs::remove_all(folder_); }
  static void write_text(const std::string& path, const std::string& text) {
    fs::create_directories(fs::path(path).parent_path());
    std::ofstream(path) << text;
  }
  template <typename ErrorType, typename F>
  std::string error_of(F&& action) {
    try {
      action();
    } catch (const ErrorType& error) {
      return error.what();
    }
    return "no such error";
  }
  std::string folder_;
};

TEST_F(CheckpointFiles, HubNamesAreFoundInTheCache) {
  setenv("HF_HUB_CACHE", (folder_ + "/hub").c_str(), 1);
  auto refusal = [&](const std::string& name) { return error_of<ConfigError>([&] { resolve_model_folder(name); }); };
  std::string advice =
      " is neither a folder nor in the Hugging Face cache (" + folder_ + "/hub). Download it with: hf download ";
  EXPECT_EQ(refusal("org/name"), "model org/name" + advice + "org/name");
  std::string model = folder_ + "/hub/models--org--name";
  write_text(model + "/refs/main", "abc123\n");
  EXPECT_EQ(refusal("org/name"), "model org/name" + advice + "org/name");  // snapshot missing
  write_text(model + "/snapshots/abc123/config.json", "{}");
  EXPECT_EQ(resolve_model_folder("org/name"), model + "/snapshots/abc123");
  EXPECT_EQ(resolve_model_folder("org/name", "abc123"), model + "/snapshots/abc123");
  EXPECT_EQ(resolve_model_folder(model), model);
  const std::string snapshot = model + "/snapshots/abc123/";
  auto incomplete = [&](const std::string& file, NeededFiles needed) {
    EXPECT_EQ(error_of<ConfigError>([&] { resolve_model_folder("org/name", "main", needed); }),
              "model org/name has no " + file + " in the Hugging Face cache (" + model + "/snapshots/abc123): not all of it was "
              "downloaded. Complete it with: hf download org/name");
  };
  incomplete("tokenizer.json", {false, true});
  incomplete("model.safetensors", {true, false});
  write_text(snapshot + "model.safetensors.index.json", R"({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})");
  write_text(snapshot + "model-1.safetensors", "");
  incomplete("model-2.safetensors", {true, false});
  write_text(snapshot + "model-2.safetensors", "");
  EXPECT_EQ(resolve_model_folder("org/name", "main", {true, false}), model + "/snapshots/abc123");
  write_text(model + "/refs/main", "../../../etc");
  EXPECT_EQ(error_of<DataError>([&] { resolve_model_folder("org/name"); }),
            model + "/refs/main does not hold the name of a commit.");
  for (std::string path : {"./nowhere", "/nowhere/at/all", "a/b/c", "../x", "org/..", ""})
    EXPECT_EQ(error_of<DataError>([&] { resolve_model_folder(path, "main", {true, true}); }),
              "model.path=" + path + " does not exist: name a Hugging Face model folder, or a hub name (org/name) that is in its cache");
  unsetenv("HF_HUB_CACHE");
  setenv("HF_HOME", folder_.c_str(), 1);
  write_text(model + "/refs/main", "abc123");
  EXPECT_EQ(resolve_model_folder("org/name"), model + "/snapshots/abc123");
  unsetenv("HF_HOME");
}

TEST_F(CheckpointFiles, PeftConfigRoundTripAndRefusals) {
  PeftConfig config{32, 64.5, 0.05, true, {"q_proj", "v_proj"}, false, "org/base", "v2"};
  Json json = peft_config_to_json(config);
  PeftConfig again = peft_config_from_json(json, "f");
  EXPECT_EQ(peft_config_to_json(again), json);
  EXPECT_EQ(again.rank, 32);
  EXPECT_TRUE(again.use_rslora);
  EXPECT_EQ(again.base_model, "org/base");
  PeftConfig least = peft_config_from_json({{"peft_type", "LORA"}, {"target_modules", "all-linear"}}, "f");
  EXPECT_EQ(least.alpha, 8);
  EXPECT_EQ(least.target_modules, std::vector<std::string>{"all-linear"});

  auto refusal = [&](const char* key, Json value) {
    Json changed = json;
    changed[key] = value;
    return error_of<DataError>([&] { peft_config_from_json(changed, "f.json"); });
  };
  std::string advice =
      ", which is not supported. Retrain the adapter without it, or merge it into its base model with PEFT "
      "(merge_and_unload).";
  EXPECT_EQ(refusal("peft_type", "IA3"), "f.json: 'peft_type' is \"IA3\"; only \"LORA\" is supported.");
  EXPECT_EQ(refusal("use_qalora", true), "f.json: 'use_qalora' is true" + advice);
  EXPECT_EQ(refusal("rank_pattern", {{"q_proj", 4}}), "f.json: 'rank_pattern' is {\"q_proj\":4}" + advice);
  EXPECT_EQ(refusal("bias", "all"), "f.json: 'bias' is \"all\"" + advice);
  EXPECT_EQ(refusal("modules_to_save", {"lm_head"}), "f.json: 'modules_to_save' is [\"lm_head\"]" + advice);
  EXPECT_EQ(refusal("some_new_method", true), "f.json: 'some_new_method' is true" + advice);
  EXPECT_EQ(refusal("init_lora_weights", "pissa"),
            "f.json: 'init_lora_weights' is \"pissa\", which changed the base model too. "
            "Convert the adapter with PEFT (save_pretrained with path_initial_model_for_weight_conversion).");
  EXPECT_EQ(refusal("r", 0), "f.json: 'r' is 0; a whole number from 1 to 65536 is needed.");
  EXPECT_EQ(refusal("r", "8"), "f.json: 'r' is \"8\", which is not a number.");
  EXPECT_EQ(refusal("lora_dropout", 1), "f.json: 'lora_dropout' is 1; from 0 to below 1 is allowed.");
  EXPECT_EQ(refusal("target_modules", nullptr),
            "f.json: 'target_modules' is null; a text or a list of names is needed.");
  EXPECT_EQ(error_of<DataError>([&] { peft_config_from_json(Json::array(), "f.json"); }), "f.json is not an object.");
}

// Reads an adapter and writes it again. The Python test hands in one that PEFT wrote and lets PEFT load what comes out.
TEST_F(CheckpointFiles, AdapterRoundTrip) {
  const char *given = std::getenv("TRIREME_INTEROP"), *output = std::getenv("TRIREME_INTEROP_OUT");
  std::string in = given ? given : folder_ + "/in", out = output ? output : folder_ + "/out";
  if (!given)
    write_adapter(
        in, peft_config_to_json({2, 4, 0, false, {"q_proj"}, false, "", ""}),
        {TensorSource::of("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", at::randn({2, 8})),
         TensorSource::of("base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight", at::randn({8, 2}))});
  SafetensorsFolder read(in, "adapter_model");
  std::vector<Parameter> targets;
  std::vector<TensorSource> sources;
  for (const std::string& name : read.names()) {
    at::Tensor value = at::zeros(read.info(name).shape, read.info(name).dtype);
    targets.push_back({name, value, ShardSpec::whole(value)});
    sources.push_back(TensorSource::of(name, value));
  }
  EXPECT_GE(targets.size(), 2u);
  load_weights(in, targets, adapter_options());
  write_adapter(out, peft_config_to_json(read_peft_config(in)), sources);
  for (const Parameter& target : targets)
    EXPECT_TRUE(at::equal(SafetensorsFolder(out, "adapter_model").view(target.name), target.value)) << target.name;
}

TEST_F(CheckpointFiles, ExportCopiesTheTokenizerAndRefusesItsSource) {
  std::string source = folder_ + "/source", target = folder_ + "/target";
  write_text(source + "/tokenizer.json", "{\"x\": 1}");
  write_text(source + "/chat_template.jinja", "{{ messages }}");
  write_text(source + "/generation_config.json", "{}");
  write_text(source + "/model.safetensors", "old");
  write_text(source + "/secret.txt", "no");
  export_model_folder(target, source, source, {{"model_type", "llama"}}, {TensorSource::of("a", at::ones({3}))});
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(target)) names.push_back(entry.path().filename().string());
  std::sort(names.begin(), names.end());
  EXPECT_EQ(names, (std::vector<std::string>{"chat_template.jinja", "config.json", "generation_config.json",
                                             "model.safetensors", "tokenizer.json"}));
  EXPECT_EQ(read_file(target + "/tokenizer.json"), "{\"x\": 1}");
  EXPECT_EQ(error_of<ConfigError>([&] { export_model_folder(source, source, source, {}, {}); }),
            "the export folder " + source + " is the folder of the model itself. Name another one.");
  EXPECT_EQ(read_file(source + "/model.safetensors"), "old");
}

TEST_F(CheckpointFiles, RunFolderOfALivingRunIsRefused) {
  char host[256] = "";
  gethostname(host, sizeof host - 1);
  {
    RunLock lock(folder_);
    EXPECT_EQ(error_of<ConfigError>([&] { RunLock second(folder_); }),
              str("run folder ", folder_, " is in use by process ", getpid(), " on ", host,
                  ". Wait for it or end it, or name another folder with run.dir."));
  }
  RunLock again(folder_);
  EXPECT_EQ(error_of<SystemError>([&] { RunLock lock(folder_ + "/none"); }),
            "cannot write into run folder " + folder_ + "/none: No such file or directory.");
}

}  // namespace
}  // namespace trireme
