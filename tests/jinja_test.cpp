#include "data/jinja.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "base/check.h"
#include "base/file.h"
#include "data/chat_template.h"
#include "scratch.h"

namespace trireme {
namespace {

namespace fs = std::filesystem;
using jinja::Limits;
using jinja::Template;

template <typename F>
std::string error_of(F&& action) {
  try {
    action();
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

std::string render(const std::string& text, const Json& variables = Json::object(), const Limits& limits = {}) {
  return Template(text, "t").render(variables, limits).text;
}

std::string render_error(const std::string& text, const Limits& limits = {}) {
  return error_of([&] { render(text, Json::object(), limits); });
}

TEST(Jinja, NamesFileLineAndReason) {
  EXPECT_EQ(render_error("a\n{% if %}"), "t line 2: Expected an expression, got 'end of statement block'");
  EXPECT_EQ(render_error("a\n\n{{ x.y }}"), "t line 3: 'x' is undefined");
  EXPECT_EQ(render_error("{{ raise_exception('Roles must alternate') }}"), "t line 1: Roles must alternate");
  EXPECT_EQ(render_error("{% for x in [] %}"),
            "t line 1: Unexpected end of template. Jinja was looking for the following tags: 'endfor' or 'else'. The "
            "innermost "
            "block that needs to be closed is 'for'.");
  EXPECT_EQ(render_error("{% include 'x' %}"),
            "t line 1: the tag 'include' reads other templates, which a chat template cannot do");
  EXPECT_EQ(render_error("{{ [].append(1) }}"), "t line 1: access to attribute 'append' of 'list' object is unsafe.");
  EXPECT_EQ(render_error("{{ 9223372036854775807 + 1 }}"), "t line 1: integers beyond 64 bits are not supported");
  EXPECT_EQ(render_error("{{ 1e19|int }}"), "t line 1: integers beyond 64 bits are not supported");
  EXPECT_EQ(render_error("\xff"), "t: the chat template is not UTF-8 text.");
  EXPECT_EQ(error_of([] {
              render("{{ x }}", Json{{"x", 18446744073709551615ull}});
            }),
            "t line 0: the messages hold the integer 18446744073709551615; integers beyond 64 bits are not supported");
}

// Each would run for ages, or eat all memory or stack, without its limit.
TEST(JinjaLimits, Steps) {
  Limits limits;
  limits.max_steps = 20'000;
  const char* stopped = "t line 1: the template ran for more than 20000 steps and was stopped";
  EXPECT_EQ(render_error("{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}", limits),
            stopped);
  EXPECT_EQ(render_error("{{ [1] * 999999999999 }}", limits), stopped);
  EXPECT_EQ(render_error(
                "{% set x = [1] %}{% for i in range(0) %}{% endfor %}" +
                    [] {
                      std::string doubled;
                      for (int i = 0; i < 40; ++i) doubled += "{% set x = [x, x] %}";
                      return doubled;
                    }() +
                    "{{ x }}",
                limits),
            stopped);
  EXPECT_EQ(render_error("{{ ('x' * 999999).replace('x', 'y') }}", limits), stopped);
}

// One that loops only on the beginnings of a chat, which are rendered to find what is learnt, is stopped at once as well, and
// one that is slow each time before long. A long chat is no reason to stop.
TEST(JinjaLimits, AllRenderingsOfAChat) {
  const std::string turns = "{% for m in messages %}{{ m.content }}<e>{% endfor %}", loop = "{% for a in range(99999) %}{% for b in range(";
  Json messages = Json::array();
  for (int i = 0; i < 400; ++i) messages.push_back({{"role", i % 2 ? "assistant" : "user"}, {"content", "text " + std::to_string(i)}});
  auto learnt_of = [&](const std::string& text) {
    return error_of([&] { EXPECT_EQ(ChatTemplate::from_text(text, "t").render_learnt(messages).learnt.size(), 200u); });
  };
  const std::string stopped = "t line 1: the template ran for more than 100";
  EXPECT_EQ(learnt_of(turns), "no error");
  EXPECT_EQ(learnt_of(loop + "99) %}{% endfor %}{% endfor %}" + turns).rfind(stopped, 0), 0u);
  EXPECT_EQ(learnt_of("{% if messages | length < 400 %}" + loop + "99) %}{% endfor %}{% endfor %}{% endif %}" + turns).rfind(stopped, 0), 0u);
  EXPECT_EQ(learnt_of("{% for a in range(90000) %}{{ a * 2 }}{% endfor %}" + turns).rfind("t line 1: the template ran for more than ", 0), 0u);
  EXPECT_EQ(ChatTemplate::from_text("{{ messages[0].content | upper | lower | trim }}", "t")  // a long text takes many
                .render(Json::array({{{"role", "user"}, {"content", std::string(20'000'000, 'x')}}})).size(), 20'000'000u);
}

TEST(JinjaLimits, Text) {
  const char* too_long = "t line 1: the template makes a text of more than 67108864 bytes";
  EXPECT_EQ(render_error("{{ 'abc' * 999999999999 }}"), too_long);
  EXPECT_EQ(render_error("{{ 'a'.ljust(999999999999) }}"), too_long);
  EXPECT_EQ(render_error("{{ '%9999999999d' % 1 }}"),
            "t line 1: a width or precision in a format is larger than 1048576");
  EXPECT_EQ(render_error("{{ '{:9999999}'.format(1) }}"),
            "t line 1: a width or precision in a format is larger than 1048576");
  Limits limits;
  limits.max_string_bytes = 1000;
  EXPECT_EQ(render_error("{% for i in range(9999) %}0123456789{% endfor %}", limits),
            "t line 1: the template makes a text of more than 1000 bytes");
  limits.max_total_bytes = 100'000;
  EXPECT_EQ(render_error("{% for i in range(9999) %}{% set x = 'a' * 900 %}{% endfor %}", limits),
            "t line 1: the template makes more than 100000 bytes of text in all");
  EXPECT_EQ(render_error("{{ range(100001) }}"),
            "t line 1: Range too big. The sandbox blocks ranges larger than MAX_RANGE (100000).");
}

TEST(JinjaLimits, Depth) {
  EXPECT_EQ(render_error("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"),
            "t line 1: the template nests or recurses deeper than 1000 levels");
  EXPECT_EQ(render_error("{{ " + std::string(5000, '(') + "1" + std::string(5000, ')') + " }}"),
            "t line 1: the template is nested deeper than 100 levels");
  EXPECT_EQ(render_error("{{ " + std::string(5000, '[') + std::string(5000, ']') + " }}"),
            "t line 1: the template is nested deeper than 100 levels");
  EXPECT_EQ(render_error("{{ " + std::string(5000, '-') + "1 }}"),
            "t line 1: the template is nested deeper than 100 levels");
  std::string sum = "1", nested;
  for (int i = 0; i < 5000; ++i) sum += "+1";
  EXPECT_EQ(render_error("{{ " + sum + " }}"), "t line 1: the template is nested deeper than 300 levels");
  for (int i = 0; i < 5000; ++i) nested += "{% if 1 %}";
  EXPECT_EQ(render_error(nested), "t line 1: the template is nested deeper than 100 levels");
  EXPECT_EQ(render_error("{% set ns = namespace(x=[]) %}{% for i in range(9999) %}{% set ns.x = [ns.x] %}{% endfor %}"),
            "t line 1: lists and dicts are nested deeper than 200 levels");
}

// Values that hold each other in a circle neither leak (the sanitizer says) nor hang.
TEST(Jinja, Circles) {
  EXPECT_EQ(render("{% set ns = namespace() %}{% set ns.me = ns %}{% macro m() %}{% endmacro %}{% set ns.m = m %}{{ "
                   "ns.me.me.me is defined }}"),
            "True");
  EXPECT_EQ(render_error("{% set ns = namespace() %}{% set ns.me = ns %}{{ ns }}"),
            "t line 1: a value is nested too deeply to be printed");
  EXPECT_EQ(
      render("{% set ns = namespace(x=1) %}{% for i in range(5000) %}{% set ns.x = namespace(x=ns.x) %}{% endfor %}ok"),
      "ok");
  EXPECT_EQ(render_error("{% set ns = namespace(f=1) %}{% for i in range(5000) %}{% for j in [ns.f] %}{% set ns.f = "
                         "loop.cycle %}{% endfor %}{% endfor %}"),
            "t line 1: lists and dicts are nested deeper than 200 levels");
}

// Reading a long text costs as much as making one: each of these would otherwise read megabytes for one step.
TEST(JinjaLimits, TextsThatAreRead) {
  Limits limits;
  limits.max_steps = 20'000;
  limits.max_total_bytes = 2'000'000;  // none of these makes a text but its first
  const char* stopped = "t line 1: the template ran for more than 20000 steps and was stopped";
  for (const char* read : {"s|length", "s == t", "s < t", "s.find('y')", "s.isdigit()", "'y' in s", "s is upper", "s|wordcount"})
    EXPECT_EQ(render_error(str("{% set s = 'x' * 400000 %}{% set t = 'x' * 400000 %}{% for i in range(5) %}{% if ", read,
                               " %}{% endif %}{% endfor %}"), limits), stopped) << read;
}

// The seeds and past finds of tests/fuzz/jinja_fuzz.cpp: rendered or refused, never a crash.
TEST(Jinja, FuzzCorpus) {
  const char* source = std::getenv("TRIREME_SOURCE");
  ASSERT_NE(source, nullptr);
  int count = 0;
  Json variables = {{"messages", {{{"role", "user"}, {"content", "h\u00e9"}}}}, {"n", 3}};
  Limits limits;
  limits.max_steps = 100'000;
  for (const auto& entry : fs::directory_iterator(fs::path(source) / "tests/fuzz/corpus/jinja")) {
    ++count;
    error_of([&] { render(read_file(entry.path().string()), variables, limits); });
  }
  EXPECT_GE(count, 20);
}

// --- chat templates
// -----------------------------------------------------------------------------------------------------
class Folder : public testing::Test {
 protected:
  void SetUp() override {
    folder_ = scratch_folder();
  }
  void TearDown() override { fs::remove_all(folder_); }
  void write(const std::string& name, const std::string& text) { std::ofstream(folder_ + "/" + name) << text; }
  std::string folder_;
};

const Json kChat = Json::parse(R"([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])");

TEST_F(Folder, OrderOfFilesAndSpecialTokens) {
  EXPECT_FALSE(ChatTemplate::find("", folder_));
  EXPECT_EQ(
      error_of([&] { ChatTemplate::load("", folder_); }),
      "'" + folder_ +
          "' has no chat template (chat_template.jinja, chat_template.json or chat_template in tokenizer_config.json); "
          "set data.chat_template to a file or to one of: alpaca, chatml, gemma, llama3, mistral, phi3.");
  EXPECT_EQ(error_of([&] { ChatTemplate::load("chatmL", folder_); }),
            "data.chat_template='chatmL' is neither a built-in template (alpaca, chatml, gemma, llama3, mistral, phi3) "
            "nor a file.");
  write("tokenizer_config.json", R"({"bos_token": "<B>", "eos_token": {"content": "<E>"}, "pad_token": null,
      "chat_template": [{"name": "default", "template": "config{{ bos_token }}{{ eos_token }}{{ pad_token is defined }}"},
                        {"name": "tool_use", "template": "tools"}]})");
  EXPECT_EQ(ChatTemplate::load("", folder_).render(kChat), "config<B><E>False");
  EXPECT_EQ(ChatTemplate::load("", folder_).render(kChat, Json::array()), "tools");
  write("chat_template.json", R"({"chat_template": "json"})");
  EXPECT_EQ(ChatTemplate::load("", folder_).render(kChat), "json");
  write("chat_template.jinja", "jinja{{ eos_token }}");
  EXPECT_EQ(ChatTemplate::load("", folder_).render(kChat), "jinja<E>");
  EXPECT_EQ(ChatTemplate::load("", folder_).render(kChat, nullptr, false, Json{{"eos_token", "mine"}}), "jinjamine");
  EXPECT_EQ(ChatTemplate::load(folder_ + "/chat_template.jinja", "").render(kChat), "jinja");
  write("chat_template.jinja", "a\n{% if");
  EXPECT_EQ(error_of([&] { ChatTemplate::load("", folder_); }).substr(folder_.size()),
            "/chat_template.jinja line 2: unexpected 'end of template'");
  EXPECT_NE(ChatTemplate::load("chatml", "").hash(), ChatTemplate::load("llama3", "").hash());
}

TEST_F(Folder, RefusesBrokenFiles) {
  write("tokenizer_config.json", R"({"chat_template": [{"name": "rag", "template": "x"}]})");
  EXPECT_EQ(error_of([&] { ChatTemplate::load("", folder_); }),
            folder_ + "/tokenizer_config.json:chat_template: no template has the name 'default' (there are: rag).");
  write("tokenizer_config.json", R"({"chat_template": 5})");
  EXPECT_EQ(
      error_of([&] { ChatTemplate::load("", folder_); }),
      folder_ + "/tokenizer_config.json:chat_template: a text or a list of {\"name\", \"template\"} is expected.");
}

std::vector<std::string> learnt(const ChatTemplate& chat, const Json& messages, const std::vector<uint8_t>& wanted = {}) {
  RenderedChat rendered = chat.render_learnt(messages, nullptr, nullptr, wanted);
  std::vector<std::string> texts;
  for (const LearntSpan& span : rendered.learnt)
    texts.push_back(rendered.text.substr(span.begin, span.end - span.begin));
  return texts;
}

const Json kLong = Json::parse(
    R"([{"role": "system", "content": "S"}, {"role": "user", "content": "yes"}, {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "B"}, {"role": "assistant", "content": "two\nlines"}])");

TEST(LearntSpans, BuiltinTemplates) {
  const std::pair<const char*, std::string> expected[] = {{"chatml", "yes<|im_end|>"}, {"llama3", "yes<|eot_id|>"},
                                                          {"phi3", "yes<|end|>"},      {"gemma", "yes<end_of_turn>"},
                                                          {"mistral", " yes</s>"},     {"alpaca", "yes</s>"}};
  for (const auto& [name, text] : expected) {
    ChatTemplate chat = ChatTemplate::load(name, "");
    chat.set_special_token("eos_token", "</s>");
    std::vector<std::string> texts = learnt(chat, kLong);
    ASSERT_EQ(texts.size(), 2u) << name;
    EXPECT_EQ(texts[0], text) << name;
    EXPECT_EQ(learnt(chat, kLong, {0, 0, 0, 0, 1}), std::vector<std::string>{texts[1]});
    EXPECT_EQ(learnt(chat, kLong, {1, 1, 1, 1, 0}), std::vector<std::string>{texts[0]});
    // A prompt for generation is the beginning of the same chat with its answer.
    Json prompt = Json::array({kLong[0], kLong[1]});
    EXPECT_TRUE(chat.render(kLong).starts_with(chat.render(prompt, nullptr, true))) << name;
  }
  EXPECT_EQ(ChatTemplate::load("chatml", "").render(kChat, nullptr, true),
            "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>assistant\n");
}

TEST(LearntSpans, ByBeginningsOfTheChat) {
  const std::string loop = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<end>\n{% endfor %}";
  std::vector<std::string> both = {"yes<end>", "two\nlines<end>"};
  EXPECT_EQ(
      learnt(ChatTemplate::from_text(loop + "{% if add_generation_prompt %}<|assistant|>\n{% endif %}", "t"), kLong),
      both);
  EXPECT_EQ(learnt(ChatTemplate::from_text(loop, "t"), kLong),
            both);  // without a generation prompt: the header is found
  EXPECT_EQ(learnt(ChatTemplate::from_text(
                       "{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}</s>{% else %}[INST] "
                       "{{ m.content }} [/INST]{% endif %}{% endfor %}",
                       "t"),
                   kLong),
            (std::vector<std::string>{" yes</s>", " two\nlines</s>"}));
}

TEST(LearntSpans, TemplateThatChangesEarlierTurns) {
  ChatTemplate chat = ChatTemplate::from_text(
      "{% for m in messages %}<|{{ m.role }}|>\n{% if m.role == 'assistant' and not loop.last %}{{ "
      "m.content.split('</think>')[-1] }}"
      "{% else %}{{ m.content }}{% endif %}<end>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
      "t");
  Json messages = kLong;
  messages[2]["content"] = "<think>x</think>yes";
  messages[4]["content"] = "<think>y</think>no";
  EXPECT_EQ(learnt(chat, messages), (std::vector<std::string>{"yes<end>", "<think>y</think>no<end>"}));
}

// As Phi-3: the end token stands once, after the last turn. As SmolLM3: the block begins before the header.
TEST(LearntSpans, TrailerAndHeaderAreNotLearnt) {
  const std::string prompt = "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}";
  ChatTemplate phi = ChatTemplate::from_text(
      "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<end>\n{% endfor %}" + prompt, "t");
  phi.set_special_token("eos_token", "</s>");
  EXPECT_EQ(learnt(phi, kLong), (std::vector<std::string>{"yes<end>", "two\nlines<end>"}));
  ChatTemplate block = ChatTemplate::from_text(
      "{% for m in messages %}{% generation %}{{ '<|' + m.role + '|>\n' + m.content + '<end>\n' }}{% endgeneration "
      "%}{% endfor %}" +
          prompt,
      "t");
  EXPECT_EQ(learnt(block, Json::array({kLong[2]})), std::vector<std::string>{"yes<end>"});
}

// A tool call whose text the template leaves out, with and without a header.
TEST(LearntSpans, ToolCalls) {
  Json messages = kLong;
  messages[2]["tool_calls"] = Json::array({1});
  for (const char* header : {" ", "<bot>"}) {
    ChatTemplate chat = ChatTemplate::from_text(
        "{% for m in messages %}{% if m.role != 'assistant' %}[{{ m.content }}]{% else %}{{ '" + std::string(header) +
            "' }}{{ m.tool_calls if m.tool_calls else m.content }}</s>{% endif %}{% endfor %}",
        "t");
    std::string kept = *header == ' ' ? " " : "";
    EXPECT_EQ(learnt(chat, messages), (std::vector<std::string>{kept + "[1]</s>", kept + "two\nlines</s>"}));
  }
}

TEST(LearntSpans, RefusesWhatItCannotFind) {
  ChatTemplate chat =
      ChatTemplate::from_text("{{ messages | length }}{% for m in messages[::-1] %}{{ m.content }}{% endfor %}", "t");
  EXPECT_EQ(error_of([&] { chat.render_learnt(kLong); }),
            "t: cannot find what the assistant says in message 3 of 5 (the template changes it when other messages "
            "follow); put "
            "{% generation %} and {% endgeneration %} around the assistant's text in the template, or set "
            "data.chat_template to "
            "one of: alpaca, chatml, gemma, llama3, mistral, phi3; data.on_error=skip leaves such records out.");
}

}  // namespace
}  // namespace trireme
