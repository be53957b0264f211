#include "data/chat_template.h"

#include <algorithm>
#include <filesystem>

#include "base/check.h"
#include "base/file.h"
#include "base/hash.h"
#include "data/chat_builtin.h"
#include "data/jinja.h"
#include "data/jinja_text.h"

namespace trireme {
namespace {

namespace fs = std::filesystem;

std::string name_list() {
  std::string names;
  for (const std::string& name : ChatTemplate::builtin_names()) names += (names.empty() ? "" : ", ") + name;
  return names;
}

Json read_object(const std::string& path) {
  Json value = read_json_file(path);
  if (!value.is_object()) throw DataError(str(path, ": a JSON object is expected, not ", value.type_name(), "."));
  return value;
}

}  // namespace

const std::vector<std::string>& ChatTemplate::builtin_names() {
  static const std::vector<std::string> kNames = [] {
    std::vector<std::string> names;
    for (const BuiltinTemplate& builtin : builtin_templates()) names.emplace_back(builtin.name);
    return names;
  }();
  return kNames;
}

ChatTemplate ChatTemplate::from_text(const std::string& text, const std::string& source) {
  ChatTemplate chat;
  chat.source_ = source;
  chat.text_ = text;
  chat.template_ = std::make_shared<const jinja::Template>(text, source);
  return chat;
}

void ChatTemplate::set_tool_text(const std::string& text, const std::string& source) {
  tool_text_ = text;
  tool_template_ = std::make_shared<const jinja::Template>(text, source);
}

// `value`: a string, or a list of {name, template}.
ChatTemplate ChatTemplate::from_json(const Json& value, const std::string& source) {
  if (value.is_string()) return from_text(value.get<std::string>(), source);
  std::optional<std::string> usual, tools;
  std::string names;
  auto refuse = [&] { throw DataError(str(source, ": a text or a list of {\"name\", \"template\"} is expected.")); };
  if (!value.is_array()) refuse();
  for (const Json& entry : value) {
    if (!entry.is_object() || !entry.contains("name") || !entry.contains("template") || !entry["name"].is_string() ||
        !entry["template"].is_string())
      refuse();
    std::string name = entry["name"];
    names += (names.empty() ? "" : ", ") + name;
    if (name == "default") usual = entry["template"];
    if (name == "tool_use") tools = entry["template"];
  }
  if (!usual) throw DataError(str(source, ": no template has the name 'default' (there are: ", names, ")."));
  ChatTemplate chat = from_text(*usual, source);
  if (tools) chat.set_tool_text(*tools, source + " (tool_use)");
  return chat;
}

std::optional<ChatTemplate> ChatTemplate::find(const std::string& setting, const std::string& folder) {
  std::optional<ChatTemplate> chat;
  auto in_folder = [&](const char* name) {
    return folder.empty() ? std::string() : (fs::path(folder) / name).string();
  };
  auto exists = [](const std::string& path) {
    std::error_code ignored;
    return !path.empty() && fs::exists(path, ignored);
  };
  if (!setting.empty()) {
    for (const BuiltinTemplate& builtin : builtin_templates())
      if (setting == builtin.name) chat = from_text(builtin.text, str("built-in ", builtin.name));
    if (!chat && !exists(setting))
      throw ConfigError(
          str("data.chat_template='", setting, "' is neither a built-in template (", name_list(), ") nor a file."));
    if (!chat) chat = from_text(read_file(setting, jinja::kMaxTemplateBytes), setting);
  } else if (std::string path = in_folder("chat_template.jinja"); exists(path)) {
    chat = from_text(read_file(path, jinja::kMaxTemplateBytes), path);
    if (std::string tools = in_folder("additional_chat_templates/tool_use.jinja"); exists(tools))
      chat->set_tool_text(read_file(tools, jinja::kMaxTemplateBytes), tools);
  } else {
    for (const char* name : {"chat_template.json", "tokenizer_config.json"}) {
      std::string path = in_folder(name);
      if (chat || !exists(path)) continue;
      Json object = read_object(path);
      if (object.contains("chat_template") && !object["chat_template"].is_null())
        chat = from_json(object["chat_template"], path + ":chat_template");
    }
  }
  if (chat && !folder.empty()) chat->read_special_tokens(folder);
  return chat;
}

ChatTemplate ChatTemplate::load(const std::string& setting, const std::string& folder) {
  std::optional<ChatTemplate> chat = find(setting, folder);
  if (!chat)
    throw ConfigError(str("'", folder,
                          "' has no chat template (chat_template.jinja, chat_template.json or chat_template in "
                          "tokenizer_config.json); set data.chat_template to a file or to one of: ",
                          name_list(), "."));
  return std::move(*chat);
}

void ChatTemplate::read_special_tokens(const std::string& folder) {
  for (const char* name : {"special_tokens_map.json", "tokenizer_config.json"}) {
    std::string path = (fs::path(folder) / name).string();
    std::error_code ignored;
    if (!fs::exists(path, ignored)) continue;
    Json object = read_object(path);
    for (const char* token :
         {"bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"}) {
      if (!object.contains(token)) continue;
      const Json& value = object[token];
      if (value.is_string())
        special_tokens_[token] = value;
      else if (value.is_object() && value.contains("content") && value["content"].is_string())
        special_tokens_[token] = value["content"];
    }
  }
}

void ChatTemplate::complete(const Tokenizer& tokenizer, int64_t bos_id, int64_t eos_id) {
  for (auto [name, id] : {std::pair{"bos_token", bos_id}, {"eos_token", eos_id}})
    if (id >= 0 && !special_tokens_.contains(name)) special_tokens_[name] = tokenizer.id_to_token(id);
  std::vector<int64_t> added = tokenizer.encode_ids("", true);
  bool begins = bos_id >= 0 && !added.empty() && added.front() == bos_id;
  if (begins && source_.starts_with("built-in ") && text_.find("bos_token") == std::string::npos) {
    text_ = "{{- bos_token }}" + text_;
    template_ = std::make_shared<const jinja::Template>(text_, source_);
  }
}

const jinja::Template& ChatTemplate::select(const Json& tools) const {
  return tool_template_ && tools.is_array() ? *tool_template_ : *template_;
}

std::string ChatTemplate::hash() const {
  return hash_bytes(text_ + '\0' + tool_text_ + '\0' + dump_json(special_tokens_));
}

// What the template sees, as transformers' apply_chat_template passes it.
Json ChatTemplate::variables_for(const Json& messages, const Json& tools, bool add_generation_prompt,
                                 const Json& variables) const {
  if (!messages.is_array()) throw DataError(str(source_, ": messages must be a list, not ", messages.type_name(), "."));
  if (!tools.is_null() && !tools.is_array())
    throw DataError(str(source_, ": tools must be a list, not ", tools.type_name(), "."));
  Json all = special_tokens_;
  Json& list = all["messages"] = Json::array();
  for (const Json& message : messages) {
    if (!message.is_object())
      throw DataError(str(source_, ": a message must be an object, not ", message.type_name(), "."));
    Json copy = message;
    // A message's reasoning has three names in the wild; templates read reasoning_content or thinking.
    for (const char* name : {"reasoning_content", "thinking", "reasoning"}) {
      if (!message.contains(name) || message[name].is_null()) continue;
      if (!copy.contains("thinking")) copy["thinking"] = message[name];
      copy["reasoning_content"] = message[name];
      break;
    }
    list.push_back(std::move(copy));
  }
  all["tools"] = tools;
  all["documents"] = nullptr;
  all["add_generation_prompt"] = add_generation_prompt;
  if (variables.is_object())
    for (const auto& [name, value] : variables.items()) all[name] = value;
  return all;
}

namespace {

uint64_t text_bytes(const Json& value) {
  if (value.is_string()) return value.get_ref<const std::string&>().size();
  uint64_t bytes = 0;
  if (value.is_structured())
    for (const Json& part : value) bytes += text_bytes(part);
  return bytes;
}

struct OutOfSteps : DataError {
  using DataError::DataError;
};

}  // namespace

// Steps for the renderings of one chat. A chat of 400 messages takes 16,000 to 43,000 in the templates of the families (tests/
// template_families.py), so that one rendering may take over twenty times as many (a tenth of a second), and one more for each
// byte of the chat. To find what is learnt, each assistant message takes up to 8 renderings of at most the whole chat: they
// may take half as much again, and no more than 200 of the longest renderings (some seconds).
struct ChatTemplate::Budget {
  Budget(const Json& messages, const Json& tools) {
    limits.max_steps += text_bytes(messages) + text_bytes(tools);
    left = limits.max_steps;
  }
  void allow_to_find(size_t num_assistants) {
    const uint64_t whole_chat = limits.max_steps - left + 10'000;
    left = std::min(200 * limits.max_steps, 12 * num_assistants * whole_chat);
  }
  jinja::Limits limits;
  uint64_t left = 0;  // of all renderings
};

jinja::Rendering ChatTemplate::render_within(Budget& budget, const Json& messages, const Json& tools,
                                             bool add_generation_prompt, const Json& variables) const {
  jinja::Limits limits = budget.limits;
  limits.max_steps = std::min(limits.max_steps, budget.left);
  uint64_t steps = 0;
  try {
    jinja::Rendering rendering =
        select(tools).render(variables_for(messages, tools, add_generation_prompt, variables), limits, &steps);
    budget.left -= steps;
    return rendering;
  } catch (const DataError& error) {
    if (steps > limits.max_steps) throw OutOfSteps(error.what());
    budget.left -= steps;
    throw;
  }
}

std::string ChatTemplate::render(const Json& messages, const Json& tools, bool add_generation_prompt,
                                 const Json& variables) const {
  Budget budget(messages, tools);
  return render_within(budget, messages, tools, add_generation_prompt, variables).text;
}

// --- what is learnt
// ---------------------------------------------------------------------------------------------------
namespace {

const char kMarker[] = "TriremeMarkerQ7f3";  // plain letters: templates trim, split and escape

size_t end_without_space(const std::string& text, size_t begin, size_t end) {
  return begin + jinja::strip(std::string_view(text).substr(begin, end - begin), jinja::Side::kRight).size();
}

Json first_messages(const Json& messages, size_t count) {
  Json part = Json::array();
  for (size_t i = 0; i < count; ++i) part.push_back(messages[i]);
  return part;
}

}  // namespace

// Finds one assistant message in `full`, the rendering of all messages.
class ChatTemplate::TurnFinder {
 public:
  TurnFinder(const ChatTemplate& chat, const Json& messages, const Json& tools, const Json& variables,
             const std::string& full, Budget& budget)
      : chat_(chat), messages_(messages), tools_(tools), variables_(variables), full_(full), budget_(budget) {}

  std::optional<LearntSpan> find(size_t i) const {
    std::optional<size_t> begin = find_begin(i);
    if (!begin) return std::nullopt;
    std::optional<size_t> end = find_end(i);
    if (!end || *end < *begin) return std::nullopt;
    return LearntSpan{*begin, end_without_space(full_, *begin, *end), i};
  }

  // The end of the generation prompt before message i, 0 where there is none: some generation blocks begin before it.
  size_t prompt_end(size_t i) const {
    std::optional<std::string> prompted = try_render(first_messages(messages_, i), true);
    return prompted && full_.starts_with(*prompted) ? prompted->size() : 0;
  }

 private:
  // nullopt where the template refuses these messages (roles that must alternate, no message at all, ...).
  std::optional<std::string> try_render(const Json& messages, bool prompt) const {
    try {
      return chat_.render_within(budget_, messages, tools_, prompt, variables_).text;
    } catch (const OutOfSteps&) {
      throw;
    } catch (const DataError&) {
      return std::nullopt;
    }
  }

  // The messages up to `count`, the text of message i replaced by the marker. `alone`: nothing else is left of it.
  std::optional<std::string> render_marked(size_t i, size_t count, bool alone = false) const {
    Json marked = first_messages(messages_, count);
    if (alone) marked[i] = Json{{"role", marked[i]["role"]}};
    marked[i]["content"] = kMarker;
    for (const char* name : {"reasoning_content", "thinking", "reasoning"}) marked[i].erase(name);
    std::optional<std::string> text = try_render(marked, false);
    // A template may print the text twice or not at all: then it says nothing.
    if (text && (text->find(kMarker) == std::string::npos || text->find(kMarker) != text->rfind(kMarker)))
      return std::nullopt;
    return text;
  }

  std::optional<size_t> find_begin(size_t i) const {
    Json before = first_messages(messages_, i);
    std::optional<std::string> plain = try_render(before, false), prompted = try_render(before, true);
    bool has_prompt = prompted && (!plain || *plain != *prompted);
    if (has_prompt && full_.starts_with(*prompted)) return prompted->size();
    // No generation prompt, or one with more in it than the header: the header is what stands before a marked text.
    for (bool alone : {false, true}) {  // a template may leave out the text of a message with tool calls
      std::optional<std::string> marked = render_marked(i, i + 1, alone);
      if (!marked) continue;
      size_t text = marked->find(kMarker);
      // White space alone is no header: the model writes it, as in Mistral's "[/INST] text".
      if (plain && !has_prompt && full_.starts_with(*plain) && marked->starts_with(*plain) && plain->size() <= text &&
          end_without_space(*marked, plain->size(), text) == plain->size())
        return plain->size();
      if (full_.starts_with(marked->substr(0, text))) return text;
    }
    return std::nullopt;
  }

  // Where the rendering of the first `count` messages ends; without an end token that some templates (Phi-3) write
  // once, after the last message.
  std::optional<std::string> render_turns(size_t count) const {
    Json part = first_messages(messages_, count);
    std::optional<std::string> plain = try_render(part, false);
    Json all = chat_.variables_for(part, tools_, false, variables_);
    if (!plain || !all.contains("eos_token") || !all["eos_token"].is_string()) return plain;
    const std::string& end = all["eos_token"].get_ref<const std::string&>();
    std::optional<std::string> prompted = end.empty() || !plain->ends_with(end) ? std::nullopt : try_render(part, true);
    if (prompted && !prompted->starts_with(*plain) &&
        prompted->starts_with(plain->substr(0, plain->size() - end.size())))
      plain->resize(plain->size() - end.size());
    return plain;
  }

  std::optional<size_t> find_end(size_t i) const {
    std::optional<std::string> until = render_turns(i + 1);
    if (until && full_.starts_with(*until)) return until->size();
    // The template changes this turn once others follow. What follows it does not depend on its text: find that.
    std::optional<std::string> alone = render_marked(i, i + 1), marked = render_marked(i, messages_.size());
    if (!alone || !marked) return std::nullopt;
    size_t mark_size = sizeof kMarker - 1;
    std::string rest = marked->substr(marked->find(kMarker) + mark_size);
    std::string end_of_turn = alone->substr(alone->find(kMarker) + mark_size);
    end_of_turn.resize(end_without_space(end_of_turn, 0, end_of_turn.size()));
    if (!full_.ends_with(rest) || !rest.starts_with(end_of_turn)) return std::nullopt;
    return full_.size() - rest.size() + end_of_turn.size();
  }

  const ChatTemplate& chat_;
  const Json &messages_, &tools_, &variables_;
  const std::string& full_;
  Budget& budget_;
};

RenderedChat ChatTemplate::render_learnt(const Json& messages, const Json& tools, const Json& variables,
                                         const std::vector<uint8_t>& learnt) const {
  const jinja::Template& used = select(tools);
  Budget budget(messages, tools);
  jinja::Rendering rendering = render_within(budget, messages, tools, false, variables);
  std::vector<size_t> assistants;
  for (size_t i = 0; i < messages.size(); ++i)
    if (messages[i].contains("role") && messages[i]["role"] == "assistant") assistants.push_back(i);
  budget.allow_to_find(assistants.size());

  std::vector<LearntSpan> spans;
  bool blocks =
      used.has_generation() && !rendering.nested_generation && rendering.generations.size() == assistants.size();
  TurnFinder finder(*this, messages, tools, variables, rendering.text, budget);
  for (size_t n = 0; n < assistants.size(); ++n) {
    size_t i = assistants[n];
    if (!learnt.empty() && !learnt[i]) continue;
    std::optional<LearntSpan> span;
    if (blocks) {
      auto [begin, end] = rendering.generations[n];
      if (size_t header = finder.prompt_end(i); header > begin && header <= end) begin = header;
      span = LearntSpan{begin, end_without_space(rendering.text, begin, end), i};
    } else {
      span = finder.find(i);
    }
    if (!span || (!spans.empty() && span->begin < spans.back().end))
      throw DataError(
          str(source_, ": cannot find what the assistant says in message ", i + 1, " of ", messages.size(),
              " (the template changes it when other messages follow); put {% generation %} and "
              "{% endgeneration %} around the assistant's text in the template, or set data.chat_template to "
              "one of: ",
              name_list(), "; data.on_error=skip leaves such records out."));
    if (span->begin < span->end) spans.push_back(*span);
  }
  return {std::move(rendering.text), std::move(spans)};
}

}  // namespace trireme
