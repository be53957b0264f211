// libFuzzer target: any bytes as the file of eval.token_ids are rows of ids of a vocabulary of 300, or refused with a
// DataError of bounded length. Corpus: tests/fuzz/corpus/token_ids, replayed by fuzz_corpus_test.
#include "base/check.h"
#include "eval/token_ids.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace trireme;
  constexpr int64_t kVocabulary = 300;
  try {
    Json json = parse_json({reinterpret_cast<const char*>(data), size}, "fuzz");
    for (const SequenceBatch& row : token_ids_from_json(json, kVocabulary, "fuzz")) {
      TRIREME_CHECK(row.num_tokens() > 0 && row.targets.size() == row.tokens.size(), row.targets.size());
      for (int64_t id : row.tokens) TRIREME_CHECK(id >= 0 && id < kVocabulary, id);
    }
  } catch (const DataError& error) {
    TRIREME_CHECK(std::string_view(error.what()).size() < 500, error.what());
  }
  return 0;
}
