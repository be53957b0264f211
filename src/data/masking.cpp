#include "data/masking.h"

#include <algorithm>
#include <set>

#include "base/check.h"
#include "data/chat_template.h"

namespace trireme {
namespace {

std::string_view trimmed(std::string_view text) {
  size_t begin = text.find_first_not_of(" \t\r\n"), end = text.find_last_not_of(" \t\r\n");
  return begin == std::string_view::npos ? std::string_view() : text.substr(begin, end - begin + 1);
}

int64_t num_characters(std::string_view text) {
  return std::count_if(text.begin(), text.end(), [](char c) { return (c & 0xC0) != 0x80; });
}

// Marks the tokens that hold a character of [begin, end), in Unicode characters. White space that a post-processor took
// off a token's offsets lies between it and the token before.
// Returns the id of the last one, -1 where there is none.
int64_t mark(EncodedRecord& encoded, int64_t begin, int64_t end) {
  int64_t last_end = 0, last_id = -1;
  for (size_t t = 0; t < encoded.ids.size(); ++t) {
    auto [from, to] = encoded.offsets[t];
    bool empty = from == to;
    if (empty) from = std::min(last_end, from);
    if (from == to ? begin <= from && from < end : from < end && to > begin) encoded.learnt[t] = 1, last_id = encoded.ids[t];
    last_end = to;
  }
  return last_id;
}

Json message(const char* role, const std::string& content) { return Json{{"role", role}, {"content", content}}; }

// Where a template fails, a message without text is named: many templates join texts and do not say of which message.
template <typename Render>
auto rendered(const Json& messages, const Render& render) {
  try {
    return render();
  } catch (const DataError& error) {
    for (size_t i = 0; i < messages.size(); ++i)
      if (messages[i].value("content", Json()).is_null())
        throw DataError(str(error.what(), "; messages[", i, "] has 'content' null: write \"content\": \"\" where the template wants a text"));
    throw;
  }
}

std::string joined(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

}  // namespace

RecordEncoder::RecordEncoder(const Tokenizer& tokenizer, const ChatTemplate* chat_template, EncodeOptions options)
    : tokenizer_(tokenizer), template_(chat_template), options_(std::move(options)) {
  if (options_.special) {
    Encoding letter = tokenizer_.encode("a", true);
    auto text = std::find(letter.special.begin(), letter.special.end(), uint8_t{0});
    auto at = letter.ids.begin() + (text - letter.special.begin());
    before_.assign(letter.ids.begin(), at);
    while (at != letter.ids.end() && !letter.special[static_cast<size_t>(at - letter.ids.begin())]) ++at;
    after_.assign(at, letter.ids.end());
  }
  if (options_.template_args.empty()) return;
  try {
    template_args_ = parse_json(options_.template_args, "data.template_args");
  } catch (const DataError& error) {
    throw ConfigError(error.what());
  }
  if (!template_args_.is_object())
    throw ConfigError("data.template_args must be a JSON object, for example {\"enable_thinking\": false}");
}

EncodedRecord RecordEncoder::encode(const Record& record, const std::string& source) const {
  EncodedRecord encoded;
  try {
    encoded = is_chat(record, source) ? encode_chat(record, source) : encode_plain(record, source);
  } catch (const DataError& error) {
    std::string words = error.what();
    throw DataError(words.starts_with(source) ? words : source + ": " + words);
  }
  check(encoded, record, source);
  return encoded;
}

EncodedRecord RecordEncoder::encode_prompt(const Record& record, const std::string& source) const {
  if (is_chat(record, source)) {
    Json messages = record.is_chat() ? record.messages : Json::array({message("user", record.prompt)});
    try {
      return tokenized(rendered(messages, [&] { return template_->render(messages, record.tools, true, template_args_); }), options_.offsets);
    } catch (const DataError& error) {
      throw DataError(source + ": " + error.what());
    }
  }
  bool text = record.form == DataForm::kText;
  EncodedRecord encoded = tokenized(text ? record.text : record.prompt + options_.separator, options_.offsets);
  encoded.ids.insert(encoded.ids.begin(), before_.begin(), before_.end());
  encoded.learnt.assign(encoded.ids.size(), 0);
  if (options_.offsets) encoded.offsets.insert(encoded.offsets.begin(), before_.size(), {0, 0});
  return encoded;
}

bool RecordEncoder::is_chat(const Record& record, const std::string& source) const {
  if (record.is_chat() && !template_)
    throw DataError(str(source, ": ", data_form_name(record.form), " records need a chat template, and the tokenizer has none; "
                        "name one with data.chat_template=: ", joined(ChatTemplate::builtin_names()), ", or a file"));
  return record.is_chat() || (template_ && record.form == DataForm::kPromptCompletion);
}

EncodedRecord RecordEncoder::tokenized(std::string text, bool needs_offsets) const {
  EncodedRecord encoded;
  if (needs_offsets) {
    Encoding encoding = tokenizer_.encode(text, false);
    encoded.ids = std::move(encoding.ids);
    encoded.offsets = std::move(encoding.offsets);
  } else {
    encoded.ids = tokenizer_.encode_ids(text, false);
  }
  encoded.learnt.assign(encoded.ids.size(), 0);
  encoded.text = std::move(text);
  return encoded;
}

// Every turn ends in something that its author did not write, and that is one token.
void RecordEncoder::end_turn(const Json& message, std::string_view span, int64_t last_id, const std::string& source) const {
  const Json content = message.value("content", Json());
  std::string_view said = content.is_string() ? trimmed(content.get_ref<const std::string&>()) : std::string_view();
  std::string_view text = trimmed(span);
  size_t at = said.empty() ? std::string_view::npos : text.rfind(said);
  std::string_view end = at == std::string_view::npos ? text : text.substr(at + said.size());
  bool one_token = last_id == options_.eos_id || tokenizer_.is_special(last_id) || tokenizer_.is_added(last_id);
  if (one_token && text != said) return;
  if (end.empty())
    throw DataError(str(source, ": no end token to learn: the chat template (", template_->source(),
                        ") writes nothing after the assistant's text; set eos_token in tokenizer_config.json, or choose "
                        "another data.chat_template"));
  end = end.substr(end.size() - std::min<size_t>(end.size(), 40));
  throw DataError(str(source, ": no end token to learn: '", trimmed(end), "', which the chat template (", template_->source(),
                      ") writes at the end of the assistant's turn, is not a token of the tokenizer, so that an answer could "
                      "never end; choose a data.chat_template that ends in one (alpaca ends in the tokenizer's eos_token), or a "
                      "tokenizer that has it"));
}

EncodedRecord RecordEncoder::encode_chat(const Record& record, const std::string& source) const {
  Json messages = record.is_chat() ? record.messages
                                   : Json::array({message("user", record.prompt), message("assistant", record.completion)});
  std::vector<uint8_t> wanted = record.is_chat() ? record.learnt : std::vector<uint8_t>{0, 1};
  bool any = false, any_assistant = false;
  for (size_t i = 0; i < messages.size(); ++i)
    if (messages[i].value("role", Json()) == "assistant") any_assistant = true, any |= wanted[i] != 0;
  if (!any && !options_.learn_all) {
    if (any_assistant) throw DataError(str(source, ": nothing to learn: every message of the assistant says that it is not learnt"));
    std::set<std::string> roles;
    for (const Json& m : messages)
      if (roles.size() < 8) roles.insert(m.value("role", std::string()).substr(0, 40));
    std::string found;
    for (const std::string& role : roles) found += str(found.empty() ? "'" : ", '", role, "'");
    throw DataError(str(source, ": nothing to learn: no message has the role 'assistant'; found: ", found));
  }

  RenderedChat chat = rendered(messages, [&] { return template_->render_learnt(messages, record.tools, template_args_, wanted); });
  EncodedRecord encoded = tokenized(std::move(chat.text), true);
  size_t at = 0;
  int64_t characters = 0;
  for (const LearntSpan& span : chat.learnt) {
    std::string_view text = std::string_view(encoded.text).substr(span.begin, span.end - span.begin);
    int64_t begin = characters + num_characters(std::string_view(encoded.text).substr(at, span.begin - at));
    characters = begin + num_characters(text);
    at = span.end;
    int64_t last_id = mark(encoded, begin, characters);
    end_turn(messages[span.message], text, last_id, source);
  }
  return encoded;
}

EncodedRecord RecordEncoder::encode_plain(const Record& record, const std::string& source) const {
  bool all = record.form == DataForm::kText || record.form == DataForm::kTextFile;
  const std::string& learnt_part = all ? record.text : record.completion;
  if (learnt_part.empty())
    throw DataError(str(source, ": nothing to learn: the ", all ? "text" : "completion", " is empty"));
  if (options_.special && options_.eos_id < 0)
    throw DataError(str(source, ": no end token to learn: the tokenizer names none; set eos_token in tokenizer_config.json"));
  EncodedRecord encoded = tokenized(all ? record.text : record.prompt + options_.separator + record.completion,
                                    options_.offsets || !all);
  if (all) {
    encoded.learnt.assign(encoded.ids.size(), 1);
  } else {
    int64_t begin = num_characters(record.prompt) + num_characters(options_.separator);
    mark(encoded, begin, begin + num_characters(record.completion));
  }
  auto put = [&](size_t place, int64_t id, bool learnt, int64_t offset) {
    auto step = static_cast<std::ptrdiff_t>(place);
    encoded.ids.insert(encoded.ids.begin() + step, id);
    encoded.learnt.insert(encoded.learnt.begin() + step, learnt);
    if (options_.offsets) encoded.offsets.insert(encoded.offsets.begin() + step, {offset, offset});
  };
  if (record.begins)
    for (size_t i = 0; i < before_.size(); ++i) put(i, before_[i], all, 0);
  if (!record.ends || !options_.special) return encoded;
  for (int64_t id : after_) put(encoded.ids.size(), id, all || id == options_.eos_id, 0);
  if (encoded.ids.empty() || encoded.ids.back() != options_.eos_id)
    put(encoded.ids.size(), options_.eos_id, true, options_.offsets ? num_characters(encoded.text) : 0);
  return encoded;
}

void RecordEncoder::check(EncodedRecord& encoded, const Record& record, const std::string& source) const {
  const auto& ids = encoded.ids;
  if (options_.learn_all) std::fill(encoded.learnt.begin(), encoded.learnt.end(), uint8_t{1});
  if (!encoded.learnt.empty() && record.begins) encoded.learnt[0] = 0;  // nothing comes before it
  if (record.begins && ids.size() > 1 && options_.bos_id >= 0 && ids[0] == options_.bos_id && ids[1] == options_.bos_id)
    throw DataError(str(source, ": the beginning token '", tokenizer_.id_to_token(ids[0]),
                        "' comes twice; take it out of the text or the chat template"));
  for (int64_t id : ids)
    if (options_.embedding_rows > 0 && id >= options_.embedding_rows)
      throw DataError(str(source, ": token id ", id, " ('", tokenizer_.id_to_token(id), "') is outside the model's embedding of ",
                          options_.embedding_rows, " rows; tokenizer and model do not belong together"));
  if (record.begins && record.ends && std::find(encoded.learnt.begin(), encoded.learnt.end(), uint8_t{1}) == encoded.learnt.end())
    throw DataError(str(source, ": nothing to learn: no token of the record is marked"));
}

}  // namespace trireme
