// libFuzzer target: any bytes as a chat template are rendered or refused with a DataError, in bounded time and memory.
// Corpus: tests/fuzz/corpus/jinja, replayed by the ordinary tests; how to build: tests/fuzz/CMakeLists.txt.
#include <cstddef>
#include <cstdint>
#include <string>

#include "base/check.h"
#include "data/jinja.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const trireme::Json kVariables = trireme::Json::parse(
      R"({"messages": [{"role": "user", "content": "h\u00e9 <b>"}, {"role": "assistant", "content": "x\ny", "tool_calls": [{"a": [1, null]}]}],
          "tools": [{"name": "f", "v": 1.5}], "n": 3, "add_generation_prompt": true, "bos_token": "<s>", "eos_token": "</s>"})");
  trireme::jinja::Limits limits;
  limits.max_steps = 50'000;
  limits.max_string_bytes = 1 << 20;
  limits.max_total_bytes = 16 << 20;
  try {
    trireme::jinja::Template parsed(std::string(reinterpret_cast<const char*>(data), size), "fuzz");
    parsed.render(kVariables, limits);
  } catch (const trireme::DataError&) {
  }
  return 0;
}
