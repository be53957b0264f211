// libFuzzer target: any bytes as a config.json are a model's shape or refused with a DataError.
// Corpus: tests/fuzz/corpus/model_config, replayed by fuzz_corpus_test.
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "base/check.h"
#include "model/hf_config.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace trireme;
  try {
    Json json = parse_json({reinterpret_cast<const char*>(data), size}, "fuzz");
    ModelConfig config = model_config_from_json(json, "fuzz");
    TRIREME_CHECK(config.num_parameters() > 0, config.num_parameters());
    model_config_from_json(model_config_from_fields(config, "float32"), "fields");  // what we write, we read
  } catch (const DataError&) {
  }
  return 0;
}
