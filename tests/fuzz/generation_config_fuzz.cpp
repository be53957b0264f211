// libFuzzer target: any bytes as a generation_config.json give the ids that end an answer, or are refused with a DataError.
// Corpus: tests/fuzz/corpus/generation_config, replayed by fuzz_corpus_test.
#include "base/check.h"
#include "model/hf_config.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace trireme;
  try {
    Json json = parse_json({reinterpret_cast<const char*>(data), size}, "fuzz");
    const auto ids = end_ids_from_json(json, "fuzz");
    TRIREME_CHECK(ids.empty() || !json["eos_token_id"].is_null(), ids.size());
  } catch (const DataError&) {
  }
  return 0;
}
