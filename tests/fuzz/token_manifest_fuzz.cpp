// libFuzzer target: any bytes as the NAME.json that vouches for a token file NAME.h5: accepted only with its true size
// and hash. The HDF5 file is never opened before. Corpus: tests/fuzz/corpus/token_manifest, replayed by
// fuzz_corpus_test.
#include "base/check.h"
#include "base/hash.h"
#include "base/json.h"
#include "data/token_file.h"
#include "tests/fuzz/scratch.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace trireme;
  static const fuzz::Scratch scratch;
  static const std::string kContent = "tokens", path = scratch.write("t.h5", kContent.data(), kContent.size());
  scratch.write("t.json", data, size);
  std::string why;
  if (token_file_intact(path, &why)) {
    Json json = parse_json({reinterpret_cast<const char*>(data), size}, "fuzz");
    TRIREME_CHECK(json["bytes"] == kContent.size() && json["hash"] == hash_bytes(kContent), dump_json(json));
  } else {
    TRIREME_CHECK(!why.empty(), size);
  }
  return 0;
}
