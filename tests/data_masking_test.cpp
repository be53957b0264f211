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
  EncodeOptions encode_{false, kTestBos, kTestEos, 0, "", ""};
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

// An end that is several tokens is no end: the model would have to spell it, and generation could not see it.
TEST_F(Masking, EndOfTurnIsOneToken) {
  auto ends_in = [&](const std::string& end, const std::string& answer) {
    ChatTemplate t = ChatTemplate::from_text("{% for m in messages %}{{ m.role }}:{{ m.content }}" + end + "\n{% endfor %}", "test");
    try {
      return marked(encode(dump_json({{"prompt", "a"}, {"completion", answer}}), &t));
    } catch (const DataError& error) {
      return std::string(error.what());
    }
  };
  EXPECT_EQ(ends_in("<|end|>", "b"),
            "f:1: no end token to learn: '<|end|>', which the chat template (test) writes at the end of the assistant's turn, is "
            "not a token of the tokenizer, so that an answer could never end; choose a data.chat_template that ends in one (alpaca "
            "ends in the tokenizer's eos_token), or a tokenizer that has it");
  EXPECT_EQ(ends_in("<|im_end|>", "b"), "user:a<|im_end|>\nassistant:[b<|im_end|>]\n");
  EXPECT_EQ(ends_in("<|im_end|>", ">"), "user:a<|im_end|>\nassistant:[><|im_end|>]\n");  // an answer like its end
  EXPECT_EQ(ends_in("", "b").rfind("f:1: no end token to learn: the chat template (test) writes nothing", 0), 0u);
  EXPECT_EQ(ends_in("", "<eos>").rfind("f:1: no end token to learn: the chat template (test) writes nothing", 0), 0u);
}

TEST_F(Masking, MessagesThatAreNotLearnt) {
  ChatTemplate chatml = ChatTemplate::load("chatml", "");
  const std::string first = R"({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0})";
  EXPECT_EQ(marked(encode(first + R"(, {"role": "user", "content": "c"}, {"role": "assistant", "content": "d", "weight": 1}]})", &chatml)),
            "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n"
            "<|im_start|>assistant\n[d<|im_end|>]\n");
  EXPECT_EQ(words(first + "]}", &chatml), "f:1: nothing to learn: every message of the assistant says that it is not learnt");
}

// Stanford's two preambles and its input section; the beginning token where the tokenizer itself puts one; the end token where
// only the model's configuration knows it.
TEST_F(Masking, Alpaca) {
  auto alpaca = [&](int64_t eos_id) {
    ChatTemplate t = ChatTemplate::load("alpaca", "");
    t.complete(tokenizer_, kTestBos, eos_id);
    return t;
  };
  const std::string task = "Below is an instruction that describes a task", write = "Write a response that appropriately completes the "
                    "request.\n\n### Instruction:\nAdd.\n\n", record = R"({"instruction": "Add.", "input": "1 2", "output": "3"})";
  ChatTemplate plain = alpaca(kTestEos);
  EXPECT_EQ(marked(encode(record, &plain)),
            task + ", paired with an input that provides further context. " + write + "### Input:\n1 2\n\n### Response:\n[3<eos>]");
  EXPECT_EQ(marked(encode(R"({"instruction": "Add.", "input": "", "output": "3"})", &plain)),
            task + ". " + write + "### Response:\n[3<eos>]");
  ChatTemplate chatml = ChatTemplate::load("chatml", "");  // no input section: both in one text
  EXPECT_EQ(marked(encode(record, &chatml)),
            "<|im_start|>user\nAdd.\n1 2<|im_end|>\n<|im_start|>assistant\n[3<|im_end|>]\n");
  ChatTemplate without_end = alpaca(-1);
  EXPECT_EQ(words(record, &without_end).rfind("f:1: no end token to learn: the chat template (built-in alpaca) writes nothing", 0), 0u);

  tokenizer_ = character_tokenizer(true);
  ChatTemplate with_bos = alpaca(kTestEos), llama3 = ChatTemplate::load("llama3", "");
  EXPECT_EQ(marked(encode(record, &with_bos)).rfind("<bos>Below", 0), 0u);
  EXPECT_NE(with_bos.hash(), plain.hash());
  llama3.complete(tokenizer_, kTestBos, kTestEos);  // writes its beginning token itself
  EXPECT_EQ(llama3.render(Json::array()), "<bos>");
}

TEST_F(Masking, SeparatorOffsetsAndNoSpecialTokens) {
  tokenizer_ = character_tokenizer(true);
  encode_.separator = "\n";
  encode_.offsets = true;
  using Offsets = std::vector<std::pair<int64_t, int64_t>>;
  EncodedRecord r = encode(R"({"prompt": "As", "completion": "me"})");
  EXPECT_EQ(marked(r), "<bos>As\n[me<eos>]");
  EXPECT_EQ(r.text, "As\nme");
  EXPECT_EQ(r.offsets, (Offsets{{0, 0}, {0, 1}, {1, 2}, {2, 3}, {3, 4}, {4, 5}, {0, 0}}));
  EXPECT_EQ(encode(R"({"text": "As"})").offsets, (Offsets{{0, 0}, {0, 1}, {1, 2}, {0, 0}}));
  EXPECT_EQ(text_of(RecordEncoder(tokenizer_, nullptr, encode_).encode_prompt(
                make_prompt({{"prompt", "As"}}, {}, "f:1"), "f:1").ids), "<bos>As\n");
  encode_.special = false;
  EXPECT_EQ(marked(encode(R"({"prompt": "As", "completion": "me"})")), "As\n[me]");
  EXPECT_EQ(encode(R"({"text": "As"})").ids.size(), 2u);
  tokenizer_ = character_tokenizer();
  encode_.special = true;
  EXPECT_EQ(encode(R"({"text": "As"})").offsets, (Offsets{{0, 1}, {1, 2}, {2, 2}}));  // the end token after the text
  ChatTemplate chatml = ChatTemplate::load("chatml", "");
  Record chat = make_prompt(Json::parse(kChat), {}, "f:1");
  EXPECT_EQ(text_of(RecordEncoder(tokenizer_, &chatml, encode_).encode_prompt(chat, "f:1").ids),
            "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
            "<|im_start|>user\nSo?<|im_end|>\n<|im_start|>assistant\n");
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
            "f:1: nothing to learn: no message has the role 'assistant'; found: 'user'");
  EXPECT_EQ(words(R"({"messages": [{"role": "human", "content": "a"}, {"role": "bot", "content": "b"}, {"role": "bot", "content": "c"}]})", &chatml),
            "f:1: nothing to learn: no message has the role 'assistant'; found: 'bot', 'human'");
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
  encode_.special = false;  // and so no end token, which would be learnt
  EXPECT_EQ(words("{\"prompt\": \"a\", \"completion\": \"\xC3\xA9\"}"), "f:1: nothing to learn: no token of the record is marked");
  encode_.special = true;
  encode_.embedding_rows = 50;
  EXPECT_EQ(words(R"({"prompt": "a", "completion": "b"})"),
            "f:1: token id 68 ('a') is outside the model's embedding of 50 rows; tokenizer and model do not belong together");
  encode_.eos_id = -1;
  EXPECT_EQ(words(R"({"prompt": "a", "completion": "b"})"),
            "f:1: no end token to learn: the tokenizer names none; set eos_token in tokenizer_config.json");
}

}  // namespace
}  // namespace trireme
