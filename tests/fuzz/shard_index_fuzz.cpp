// libFuzzer target: any bytes as the model.safetensors.index.json of a folder with the shards a.safetensors (tensors x,
// y) and b.safetensors (z) either name every tensor rightly or are refused with a DataError.
// Corpus: tests/fuzz/corpus/shard_index, replayed by fuzz_corpus_test.
#include "base/check.h"
#include "checkpoint/load_weights.h"
#include "tests/fuzz/scratch.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace trireme;
  static const fuzz::Scratch scratch;
  static const bool written = [] {
    auto shard = [](const std::string& name, std::string header, size_t bytes) {
      header.resize((header.size() + 7) / 8 * 8, ' ');
      uint64_t length = header.size();
      std::string file(reinterpret_cast<const char*>(&length), 8);
      file += header + std::string(bytes, '\0');
      scratch.write(name, file.data(), file.size());
    };
    shard(
        "a.safetensors",
        R"({"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"y":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}})",
        2);
    shard("b.safetensors", R"({"z":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})", 1);
    return true;
  }();
  (void)written;
  scratch.write("model.safetensors.index.json", data, size);
  try {
    SafetensorsFolder folder(scratch.folder());
    for (const std::string& name : folder.names()) TRIREME_CHECK(folder.view(name).numel() == 1, name);
  } catch (const DataError&) {
  }
  return 0;
}
