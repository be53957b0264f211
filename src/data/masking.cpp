#include "data/masking.h"

#include <algorithm>

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
void mark(const Encoding& encoding, int64_t begin, int64_t end, std::vector<uint8_t>& learnt) {
  int64_t last_end = 0;
  for (size_t t = 0; t < encoding.ids.size(); ++t) {
    auto [from, to] = encoding.offsets[t];
    if (encoding.special[t]) continue;
    bool empty = from == to;
    if (empty) from = std::min(last_end, from);
    if (from == to ? begin <= from && from < end : from < end && to > begin) learnt[t] = 1;
    last_end = to;
  }
}

Json user_and_assistant(const Record& record) {
  Json messages = Json::array();
  messages.push_back({{"role", "user"}, {"content", record.prompt}});
  messages.push_back({{"role", "assistant"}, {"content", record.completion}});
  return messages;
}

std::string joined(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

}  // namespace

RecordEncoder::RecordEncoder(const Tokenizer& tokenizer, const ChatTemplate* chat_template, EncodeOptions options)
    : tokenizer_(tokenizer), template_(chat_template), options_(std::move(options)) {
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
    bool chat = record.is_chat() || (template_ && record.form == DataForm::kPromptCompletion);
    encoded = chat ? encode_chat(record, source) : encode_plain(record, source);
  } catch (const DataError& error) {
    std::string words = error.what();
    throw DataError(words.starts_with(source) ? words : source + ": " + words);
  }
  check(encoded, source);
  return encoded;
}

EncodedRecord RecordEncoder::encode_chat(const Record& record, const std::string& source) const {
  if (!template_)
    throw DataError(str(source, ": ", data_form_name(record.form), " records need a chat template, and the tokenizer has none; "
                        "name one with data.chat_template=: ", joined(ChatTemplate::builtin_names()), ", or a file"));
  Json messages = record.is_chat() ? record.messages : user_and_assistant(record);
  size_t first = record.is_chat() ? record.first_learnt_message : 1;
  bool answered = std::any_of(messages.begin() + static_cast<std::ptrdiff_t>(first), messages.end(),
                              [](const Json& m) { return m.value("role", Json()) == "assistant"; });
  if (!answered) throw DataError(str(source, ": nothing to learn: no message has the role 'assistant'"));

  RenderedChat chat = template_->render_learnt(messages, record.tools, template_args_, first);
  Encoding encoding = tokenizer_.encode(chat.text, false);
  EncodedRecord encoded;
  encoded.learnt.assign(encoding.ids.size(), 0);
  size_t at = 0;
  int64_t characters = 0;
  for (const LearntSpan& span : chat.learnt) {
    std::string_view text = std::string_view(chat.text).substr(span.begin, span.end - span.begin);
    int64_t begin = characters + num_characters(std::string_view(chat.text).substr(at, span.begin - at));
    characters = begin + num_characters(text);
    at = span.end;
    mark(encoding, begin, characters, encoded.learnt);
    // Every turn but a tool call ends in something that its author did not write.
    const Json& content = messages[span.message].contains("content") ? messages[span.message]["content"] : Json();
    if (content.is_string() && trimmed(text).ends_with(trimmed(content.get_ref<const std::string&>())) &&
        !trimmed(content.get_ref<const std::string&>()).empty())
      throw DataError(str(source, ": no end token to learn: the chat template (", template_->source(),
                          ") writes nothing after the assistant's text; set eos_token in tokenizer_config.json, or choose "
                          "another data.chat_template"));
  }
  encoded.ids = std::move(encoding.ids);
  encoded.text = std::move(chat.text);
  return encoded;
}

EncodedRecord RecordEncoder::encode_plain(const Record& record, const std::string& source) const {
  EncodedRecord encoded;
  bool all = record.form == DataForm::kText;
  const std::string& learnt_part = all ? record.text : record.completion;
  if (learnt_part.empty())
    throw DataError(str(source, ": nothing to learn: the ", all ? "text" : "completion", " is empty"));
  if (options_.eos_id < 0)
    throw DataError(str(source, ": no end token to learn: the tokenizer names none; set eos_token in tokenizer_config.json"));
  encoded.text = all ? record.text : record.prompt + record.completion;
  bool ended;  // by the post-processor or by the text itself
  if (all) {
    encoded.ids = tokenizer_.encode_ids(encoded.text, true);
    encoded.learnt.assign(encoded.ids.size(), 1);
    ended = !encoded.ids.empty() && encoded.ids.back() == options_.eos_id;
  } else {
    Encoding encoding = tokenizer_.encode(encoded.text, true);
    encoded.learnt.assign(encoding.ids.size(), 0);
    int64_t begin = num_characters(record.prompt);
    mark(encoding, begin, begin + num_characters(record.completion), encoded.learnt);
    encoded.ids = std::move(encoding.ids);
    ended = !encoded.ids.empty() && encoded.ids.back() == options_.eos_id;
    if (ended) encoded.learnt.back() = 1;
  }
  if (!ended) {
    encoded.ids.push_back(options_.eos_id);
    encoded.learnt.push_back(1);
  }
  return encoded;
}

void RecordEncoder::check(EncodedRecord& encoded, const std::string& source) const {
  const auto& ids = encoded.ids;
  if (options_.learn_all) std::fill(encoded.learnt.begin(), encoded.learnt.end(), uint8_t{1});
  if (!encoded.learnt.empty()) encoded.learnt[0] = 0;  // nothing comes before it
  if (ids.size() > 1 && options_.bos_id >= 0 && ids[0] == options_.bos_id && ids[1] == options_.bos_id)
    throw DataError(str(source, ": the beginning token '", tokenizer_.id_to_token(ids[0]),
                        "' comes twice; take it out of the text or the chat template"));
  for (int64_t id : ids)
    if (options_.embedding_rows > 0 && id >= options_.embedding_rows)
      throw DataError(str(source, ": token id ", id, " ('", tokenizer_.id_to_token(id), "') is outside the model's embedding of ",
                          options_.embedding_rows, " rows; tokenizer and model do not belong together"));
  if (std::find(encoded.learnt.begin(), encoded.learnt.end(), uint8_t{1}) == encoded.learnt.end())
    throw DataError(str(source, ": nothing to learn: no token of the record is marked"));
}

}  // namespace trireme
