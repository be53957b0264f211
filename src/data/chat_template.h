// Chat templates: a list of messages as the text a model was trained on. The template is the Jinja of the model's
// folder (equal to what transformers' apply_chat_template prints, data/jinja.h), a file, or one of our own by name.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/json.h"
#include "data/tokenizer.h"

namespace trireme {

namespace jinja {
class Template;
struct Rendering;
}  // namespace jinja

// A part of a rendering that is learnt: bytes [begin, end) of its text, written for messages[message].
struct LearntSpan {
  size_t begin = 0, end = 0;
  size_t message = 0;
  bool operator==(const LearntSpan&) const = default;
};

struct RenderedChat {
  std::string text;
  std::vector<LearntSpan> learnt;  // ascending, disjoint, none empty
};

// Immutable after loading; rendering is thread-safe and deterministic (but for a template that calls strftime_now).
class ChatTemplate {
 public:
  static const std::vector<std::string>& builtin_names();  // alpaca, chatml, gemma, llama3, mistral, phi3

  // `setting` (data.chat_template) is empty, a built-in name or a file with Jinja text. Empty: `folder` (may be "") is
  // searched: chat_template.jinja, chat_template.json, tokenizer_config.json:chat_template (a string, or a list of
  // {name, template}: "default", and "tool_use" where there are tools). bos_token, eos_token and the other special
  // tokens come from the folder's tokenizer_config.json and special_tokens_map.json. ConfigError: `setting` is neither;
  // DataError: a file is broken, or is not Jinja (names file and line). Nothing set and nothing found: nullopt; load()
  // instead throws a ConfigError that lists the built-in names.
  static std::optional<ChatTemplate> find(const std::string& setting, const std::string& folder);
  static ChatTemplate load(const std::string& setting, const std::string& folder);
  // Jinja text as it stands. `source` names it in messages.
  static ChatTemplate from_text(const std::string& text, const std::string& source);

  // The template's variable `name` ("bos_token", "eos_token", ...).
  void set_special_token(const std::string& name, const std::string& text) { special_tokens_[name] = text; }
  // Fits the template to a tokenizer: bos_token and eos_token are the tokens of these ids (-1: none) where the folder does not
  // say them; a built-in template that writes no beginning token gets one where the tokenizer puts it before every text.
  void complete(const Tokenizer& tokenizer, int64_t bos_id, int64_t eos_id);

  // `messages`: [{role, content, ...}, ...]. `tools`: an array or null. `variables` (data.template_args): an object or
  // null; wins over special tokens. DataError: raise_exception's message, an error of the template (names its line), a
  // limit.
  std::string render(const Json& messages, const Json& tools = nullptr, bool add_generation_prompt = false,
                     const Json& variables = nullptr) const;

  // The whole chat and the spans of the assistant messages i with learnt[i] (empty: of all): each one's text and its
  // end-of-turn token, but neither the header before nor the white space after it. From {% generation %} blocks where
  // the template has them; else from renderings of the chat's beginnings; else, where the template rewrites earlier
  // turns, by marking the message's text. DataError: none of these finds each assistant message.
  RenderedChat render_learnt(const Json& messages, const Json& tools = nullptr, const Json& variables = nullptr,
                             const std::vector<uint8_t>& learnt = {}) const;

  const std::string& text() const { return text_; }      // the Jinja, as one may write it into chat_template.jinja
  const std::string& source() const { return source_; }  // "built-in llama3", or the file
  std::string hash() const;                              // of everything that render() depends on but its arguments

 private:
  class TurnFinder;
  struct Budget;

  ChatTemplate() = default;
  static ChatTemplate from_json(const Json& value, const std::string& source);
  void set_tool_text(const std::string& text, const std::string& source);
  jinja::Rendering render_within(Budget& budget, const Json& messages, const Json& tools, bool add_generation_prompt,
                                 const Json& variables) const;
  Json variables_for(const Json& messages, const Json& tools, bool add_generation_prompt, const Json& variables) const;
  void read_special_tokens(const std::string& folder);
  const jinja::Template& select(const Json& tools) const;

  std::string source_;
  std::string text_, tool_text_;
  std::shared_ptr<const jinja::Template> template_, tool_template_;  // tool_template_ may be null
  Json special_tokens_ = Json::object();
};

}  // namespace trireme
