// libFuzzer target: any bytes as a tokenizer.json are refused with a DataError, or tokenize texts and decode ids so (a
// pattern that takes too long is a DataError too). Corpus: tests/fuzz/corpus/tokenizer, replayed by tokenizer_test.
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "base/check.h"
#include "data/tokenizer.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace trireme;
  try {
    auto tokenizer = Tokenizer::parse({reinterpret_cast<const char*>(data), size}, "fuzz");
    for (const char* text : {"", " ", "Hello  world's 12345, \n\t<s> a_b",
                             "e\u0301\u00e9 \u65e5\u672c \U0001F469\u200D\U0001F467 \u2581x"})
      for (bool special : {false, true}) {
        Encoding encoding = tokenizer.encode(text, special);
        TRIREME_CHECK(tokenizer.encode_ids(text, special) == encoding.ids, text);
        TRIREME_CHECK(encoding.offsets.size() == encoding.ids.size() && encoding.special.size() == encoding.ids.size(),
                      text);
        for (int64_t id : encoding.ids) TRIREME_CHECK(id >= 0 && id < tokenizer.vocab_size(), id);
        StreamDecoder stream(tokenizer, special);
        std::string streamed;
        for (int64_t id : encoding.ids) streamed += stream.push(id);
        streamed += stream.finish();
        TRIREME_CHECK(streamed == tokenizer.decode(encoding.ids, special), text);
      }
    const int64_t ids[] = {-1, 0, 1, 2, 3, 200, 255, 1'000'000'000};
    tokenizer.decode(ids, false);
  } catch (const DataError&) {
  }
  return 0;
}
