// libFuzzer target: any bytes as an adapter_config.json are LoRA as we compute it, or refused with a DataError.
// Corpus: tests/fuzz/corpus/adapter_config, replayed by fuzz_corpus_test.
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "base/check.h"
#include "checkpoint/peft.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace trireme;
  try {
    Json json = parse_json({reinterpret_cast<const char*>(data), size}, "fuzz");
    PeftConfig config = peft_config_from_json(json, "fuzz");
    TRIREME_CHECK(config.rank > 0, config.rank);
    peft_config_from_json(peft_config_to_json(config), "written");  // what we write, we read
  } catch (const DataError&) {
  }
  return 0;
}
