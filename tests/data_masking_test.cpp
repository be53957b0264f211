// Which tokens are learnt, and what is refused.
#include "data/masking.h"

#include "data/chat_template.h"
#include "tests/data_fixture.h"

namespace trireme {
namespace {

class Masking : public DataTest {
 protected:
  EncodedRecord encode(const std::string& json, const ChatTemplate* chat_template = nullptr) {
    return RecordEncoder(tokenizer_, chat_template, encode_).encode(parse_record(json, {}, "f:1"), "f:1");
  }
  std::string words(const std::string& json, const ChatTemplate* chat_template = nullptr) {
    return error_of([&] { encode(json, chat_template); });
  }
  // Learnt runs in brackets.
  std::string marked(const EncodedRecord& r) const {
    std::string text;
    for (size_t t = 0; t < r.ids.size(); ++t) {
      if (r.learnt[t] && (t == 0 || !r.learnt[t - 1])) text += "[";
      text += text_of({r.ids[t]});
      if (r.learnt[t] && (t + 1 == r.ids.size() || !r.learnt[t + 1])) text += "]";
    }
    return text;
  }
  EncodeOptions encode_{false, kTestBos, kTestEos, 0, ""};
};

const char* kChat = R"({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "Hi"},
  {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "So?"}, {"role": "assistant", "content": "No!"}]})";

TEST_F(Masking, CompletionAndEnd) {
  EXPECT_EQ(marked(encode(R"({"prompt": "Ask", "completion": " me"})")), "Ask[ me<eos>]");
  EXPECT_EQ(marked(encode(R"({"prompt": "Ask\n", "completion": "me "})")), "Ask\n[me <eos>]");
  EXPECT_EQ(marked(encode(R"({"prompt": "", "completion": "me"})")), "m[e<eos>]");  // nothing comes before the first
  EXPECT_EQ(marked(encode(R"({"prompt": "Ask", "completion": "me<eos>"})")), "Ask[me<eos>]");
  EXPECT_EQ(marked(encode(R"({"text": "Ask me"})")), "A[sk me<eos>]");
  encode_.learn_all = true;
  EXPECT_EQ(marked(encode(R"({"prompt": "Ask", "completion": " me"})")), "A[sk me<eos>]");
}

TEST_F(Masking, TokensOfThePostProcessor) {
  tokenizer_ = character_tokenizer(true);
  EXPECT_EQ(marked(encode(R"({"prompt": "Ask", "completion": " me"})")), "<bos>Ask[ me<eos>]");
  EXPECT_EQ(marked(encode(R"({"text": "Ask me"})")), "<bos>[Ask me<eos>]");
  EXPECT_EQ(words(R"({"text": "<bos>a"})"),
            "f:1: the beginning token '<bos>' comes twice; take it out of the text or the chat template");
  ChatTemplate chatml = ChatTemplate::load("chatml", "");
  EXPECT_EQ(marked(encode(R"({"prompt": "a", "completion": "b"})", &chatml)),
            "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n[b<|im_end|>]\n");
}

TEST_F(Masking, AssistantTextAndEndOfTurn) {
  ChatTemplate chatml = ChatTemplate::load("chatml", "");
  EXPECT_EQ(marked(encode(kChat, &chatml)),
            "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n[Yes.<|im_end|>]\n"
            "<|im_start|>user\nSo?<|im_end|>\n<|im_start|>assistant\n[No!<|im_end|>]\n");
  EXPECT_EQ(marked(encode(R"({"prompt": "Ask", "completion": "me"})", &chatml)),
            "<|im_start|>user\nAsk<|im_end|>\n<|im_start|>assistant\n[me<|im_end|>]\n");
  EXPECT_EQ(marked(encode(R"({"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
      {"role": "user", "content": "c"}], "completion": [{"role": "assistant", "content": "d"}]})", &chatml)),
            "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n"
            "<|im_start|>assistant\n[d<|im_end|>]\n");
  EXPECT_EQ(marked(encode(R"({"text": "Ask"})", &chatml)), "A[sk<eos>]");
  encode_.learn_all = true;
  EXPECT_EQ(marked(encode(R"({"prompt": "Ask", "completion": "me"})", &chatml)),
            "<|im_start|>[user\nAsk<|im_end|>\n<|im_start|>assistant\nme<|im_end|>\n]");
}

TEST_F(Masking, CountsCharactersNotBytes) {
  // The tokenizer drops what it has no token for, but offsets still count it.
  EXPECT_EQ(marked(encode("{\"prompt\": \"\xC3\xA9\xE2\x82\xACp\", \"completion\": \"\xC3\xA9" "c\"}")), "p[c<eos>]");
  ChatTemplate chatml = ChatTemplate::load("chatml", "");
  EXPECT_EQ(marked(encode("{\"prompt\": \"\xF0\x9F\x98\x80p\", \"completion\": \"\xC3\xA9" "c\"}", &chatml)),
            "<|im_start|>user\np<|im_end|>\n<|im_start|>assistant\n[c<|im_end|>]\n");
}

TEST_F(Masking, TemplateVariables) {
  ChatTemplate t = ChatTemplate::from_text(
      "{% for m in messages %}{{ m.role }}{{ tag }}:{{ m.content }}<|im_end|>{% endfor %}", "test");
  encode_.template_args = R"({"tag": "#"})";
  EXPECT_EQ(marked(encode(R"({"prompt": "a", "completion": "b"})", &t)), "user#:a<|im_end|>assistant#:[b<|im_end|>]");
  encode_.template_args = "[1]";
  EXPECT_EQ(error_of<ConfigError>([&] { encode(kChat, &t); }),
            "data.template_args must be a JSON object, for example {\"enable_thinking\": false}");
}

TEST_F(Masking, Refusals) {
  EXPECT_EQ(words(kChat),
            "f:1: messages records need a chat template, and the tokenizer has none; name one with data.chat_template=: "
            "alpaca, chatml, gemma, llama3, mistral, phi3, or a file");
  EXPECT_EQ(words(R"({"instruction": "a", "output": "b"})").rfind("f:1: alpaca records need a chat template", 0), 0u);
  EXPECT_EQ(words(R"({"prompt": "a", "completion": ""})"), "f:1: nothing to learn: the completion is empty");
  EXPECT_EQ(words(R"({"text": ""})"), "f:1: nothing to learn: the text is empty");
  ChatTemplate chatml = ChatTemplate::load("chatml", "");
  EXPECT_EQ(words(R"({"messages": [{"role": "user", "content": "a"}]})", &chatml),
            "f:1: nothing to learn: no message has the role 'assistant'");
  ChatTemplate endless = ChatTemplate::from_text("{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}", "test");
  EXPECT_EQ(words(kChat, &endless),
            "f:1: no end token to learn: the chat template (test) writes nothing after the assistant's text; set eos_token in "
            "tokenizer_config.json, or choose another data.chat_template");
  EXPECT_EQ(words(R"({"prompt": "<bos><bos>a", "completion": "b"})"),
            "f:1: the beginning token '<bos>' comes twice; take it out of the text or the chat template");
  ChatTemplate raising = ChatTemplate::from_text("{{ raise_exception('roles must alternate') }}", "test");
  std::string raised = words(kChat, &raising);
  EXPECT_EQ(raised.rfind("f:1: ", 0), 0u) << raised;
  EXPECT_NE(raised.find("roles must alternate"), std::string::npos) << raised;
  encode_.embedding_rows = 50;
  EXPECT_EQ(words(R"({"prompt": "a", "completion": "b"})"),
            "f:1: token id 68 ('a') is outside the model's embedding of 50 rows; tokenizer and model do not belong together");
  encode_.eos_id = -1;
  EXPECT_EQ(words(R"({"prompt": "a", "completion": "b"})"),
            "f:1: no end token to learn: the tokenizer names none; set eos_token in tokenizer_config.json");
}

}  // namespace
}  // namespace trireme
