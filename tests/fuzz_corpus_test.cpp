// The seeds and past finds of the fuzz targets, replayed with any compiler. (Those of jinja, jsonl, safetensors and
// tokenizer are replayed by the tests of their modules.)
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>

#include "base/file.h"
#include "base/tensor.h"

#define LLVMFuzzerTestOneInput model_config_fuzz
#include "tests/fuzz/model_config_fuzz.cpp"
#undef LLVMFuzzerTestOneInput
#define LLVMFuzzerTestOneInput adapter_config_fuzz
#include "tests/fuzz/adapter_config_fuzz.cpp"
#undef LLVMFuzzerTestOneInput
#define LLVMFuzzerTestOneInput shard_index_fuzz
#include "tests/fuzz/shard_index_fuzz.cpp"
#undef LLVMFuzzerTestOneInput
#define LLVMFuzzerTestOneInput token_manifest_fuzz
#include "tests/fuzz/token_manifest_fuzz.cpp"
#undef LLVMFuzzerTestOneInput
#define LLVMFuzzerTestOneInput ini_fuzz
#include "tests/fuzz/ini_fuzz.cpp"
#undef LLVMFuzzerTestOneInput
#define LLVMFuzzerTestOneInput chat_config_fuzz
#include "tests/fuzz/chat_config_fuzz.cpp"
#undef LLVMFuzzerTestOneInput
#define LLVMFuzzerTestOneInput checkpoint_manifest_fuzz
#include "tests/fuzz/checkpoint_manifest_fuzz.cpp"
#undef LLVMFuzzerTestOneInput
#define LLVMFuzzerTestOneInput generation_config_fuzz
#include "tests/fuzz/generation_config_fuzz.cpp"
#undef LLVMFuzzerTestOneInput
#define LLVMFuzzerTestOneInput token_ids_fuzz
#include "tests/fuzz/token_ids_fuzz.cpp"
#undef LLVMFuzzerTestOneInput
#define LLVMFuzzerTestOneInput quantized_state_fuzz
#include "tests/fuzz/quantized_state_fuzz.cpp"
#undef LLVMFuzzerTestOneInput

namespace {

void replay(const std::string& corpus, int (*target)(const uint8_t*, size_t)) {
  const char* source = std::getenv("TRIREME_SOURCE");
  ASSERT_TRUE(source) << "TRIREME_SOURCE names the repository";
  int count = 0;
  for (const auto& entry : std::filesystem::directory_iterator(std::string(source) + "/tests/fuzz/corpus/" + corpus)) {
    std::string bytes = trireme::read_file(entry.path().string());
    EXPECT_NO_THROW(target(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size())) << entry.path();
    ++count;
  }
  EXPECT_GE(count, 4) << corpus;
}

TEST(FuzzCorpus, ModelConfig) { replay("model_config", model_config_fuzz); }
TEST(FuzzCorpus, AdapterConfig) { replay("adapter_config", adapter_config_fuzz); }
TEST(FuzzCorpus, ShardIndex) { replay("shard_index", shard_index_fuzz); }
TEST(FuzzCorpus, TokenManifest) { replay("token_manifest", token_manifest_fuzz); }
TEST(FuzzCorpus, ChatConfig) { replay("chat_config", chat_config_fuzz); }
TEST(FuzzCorpus, CheckpointManifest) { replay("checkpoint_manifest", checkpoint_manifest_fuzz); }
TEST(FuzzCorpus, GenerationConfig) { replay("generation_config", generation_config_fuzz); }
TEST(FuzzCorpus, TokenIds) { replay("token_ids", token_ids_fuzz); }
TEST(FuzzCorpus, QuantizedState) { replay("quantized_state", quantized_state_fuzz); }
TEST(FuzzCorpus, Ini) { replay("ini", ini_fuzz); }

}  // namespace
