// libFuzzer target: any bytes as the tokenizer_config.json of one folder, and as the chat_template.json and
// special_tokens_map.json of another, are a chat template, none, or refused with a DataError; a template renders a chat
// or says in a DataError why not. Corpus: tests/fuzz/corpus/chat_config, replayed by fuzz_corpus_test.
#include "base/check.h"
#include "data/chat_template.h"
#include "tests/fuzz/scratch.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace trireme;
  static const fuzz::Scratch scratch;
  static const bool made = std::filesystem::create_directories(scratch.folder() + "/b");
  TRIREME_CHECK(made, scratch.folder());
  scratch.write("tokenizer_config.json", data, size);
  scratch.write("b/chat_template.json", data, size);
  scratch.write("b/special_tokens_map.json", data, size);
  const Json messages = Json::parse(R"([{"role":"user","content":"a"},{"role":"assistant","content":"b"}])");
  for (const std::string& folder : {scratch.folder(), scratch.folder() + "/b"}) {
    try {
      if (auto chat = ChatTemplate::find("", folder)) chat->render_learnt(messages);
    } catch (const DataError&) {
    }
  }
  return 0;
}
