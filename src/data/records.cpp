#include "data/records.h"

#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <map>

#include "base/check.h"

namespace trireme {
namespace {

const char* kForms =
    "\"messages\" (a list of {role, content}), \"conversations\" (a list of {from, value}), \"prompt\" and \"completion\", "
    "\"instruction\" and \"output\", \"text\"";

const char* type_name(const Json& value) {
  switch (value.type()) {
    case Json::value_t::null: return "null";
    case Json::value_t::object: return "an object";
    case Json::value_t::array: return "a list";
    case Json::value_t::string: return "a string";
    case Json::value_t::boolean: return "true or false";
    default: return "a number";
  }
}

bool has(const Json& record, const std::string& field) {
  auto it = record.find(field);
  return it != record.end() && !it->is_null();
}

std::string string_field(const Json& record, const std::string& field, const std::string& source) {
  const Json& value = record.at(field);
  if (!value.is_string())
    throw DataError(str(source, ": field '", field, "' is ", type_name(value), "; it must be a string"));
  return value.get<std::string>();
}

std::string optional_string(const Json& record, const std::string& field, const std::string& source) {
  return has(record, field) ? string_field(record, field, source) : std::string();
}

const Json& list_field(const Json& record, const std::string& field, const std::string& source) {
  const Json& value = record.at(field);
  if (!value.is_array())
    throw DataError(str(source, ": field '", field, "' is ", type_name(value), "; it must be a list"));
  if (value.empty()) throw DataError(str(source, ": field '", field, "' is an empty list"));
  return value;
}

Json message(const char* role, std::string content) {
  Json m = Json::object();
  m["role"] = role;
  m["content"] = std::move(content);
  return m;
}

// [{"type": "text", "text": ...}, ...] as one string: what templates of text models expect.
std::string joined_parts(const Json& parts, const std::string& where) {
  std::string text;
  for (const Json& part : parts) {
    if (!part.is_object() || !part.contains("text") || !part["text"].is_string() || part.value("type", Json("text")) != "text")
      throw DataError(str(where, " has a part that is not text; only {\"type\": \"text\", \"text\": ...} is supported"));
    text += part["text"].get<std::string>();
  }
  return text;
}

const char* role_of_sharegpt(const std::string& from) {
  static const std::map<std::string, const char*> roles = {
      {"human", "user"},       {"user", "user"},   {"gpt", "assistant"},    {"assistant", "assistant"},
      {"chatgpt", "assistant"}, {"bard", "assistant"}, {"bing", "assistant"}, {"model", "assistant"},
      {"system", "system"},    {"function_call", "assistant"}, {"observation", "tool"}, {"tool", "tool"}};
  auto it = roles.find(from);
  return it == roles.end() ? nullptr : it->second;
}

void add(Record& record, Json message, bool learnt = true) {
  record.messages.push_back(std::move(message));
  record.learnt.push_back(learnt);
}

constexpr const char* kLearntFields[] = {"weight", "train", "training"};

bool says_learnt(const Json& entry, const std::string& where) {
  bool learnt = true;
  for (const char* name : kLearntFields) {
    if (!has(entry, name)) continue;
    const Json& value = entry[name];
    if (!value.is_boolean() && !(value.is_number() && (value == 0 || value == 1)))
      throw DataError(str(where, ": field '", name, "' is ", dump_json(value).substr(0, 40),
                          "; allowed are 0, 1, true and false: a message is learnt or not"));
    learnt &= value.is_boolean() ? value.get<bool>() : value == 1;
  }
  return learnt;
}

// Adds messages in {role, content} form from either spelling; `learnt` as far as they do not say otherwise.
void read_messages(const Json& record_json, const std::string& field, const std::string& source, Record& record,
                   bool learnt = true) {
  const Json& list = list_field(record_json, field, source);
  for (size_t i = 0; i < list.size(); ++i) {
    const Json& entry = list[i];
    std::string where = str(source, ": ", field, "[", i, "]");
    if (!entry.is_object()) throw DataError(str(where, " is ", type_name(entry), "; it must be an object"));
    bool this_learnt = says_learnt(entry, where) && learnt;
    if (has(entry, "from")) {
      std::string from = string_field(entry, "from", where);
      const char* role = role_of_sharegpt(from);
      if (!role)
        throw DataError(str(where, " has from '", from,
                            "'; known are human, user, gpt, assistant, chatgpt, bard, bing, model, system, function_call, "
                            "observation, tool"));
      if (!has(entry, "value")) throw DataError(str(where, " has no 'value'"));
      add(record, message(role, string_field(entry, "value", where)), this_learnt);
      continue;
    }
    if (!has(entry, "role")) throw DataError(str(where, " has no 'role' (or 'from')"));
    string_field(entry, "role", where);
    Json copy = entry;
    for (const char* name : kLearntFields) copy.erase(name);
    if (has(entry, "content")) {
      const Json& content = entry["content"];
      if (content.is_array())
        copy["content"] = joined_parts(content, str(where, ".content"));
      else
        string_field(entry, "content", where);
    } else if (!has(entry, "tool_calls")) {
      throw DataError(str(where, entry.contains("content") ? " has 'content' null and no 'tool_calls'" : " has no 'content'"));
    }
    add(record, std::move(copy), this_learnt);
  }
}

// A list, or a string that holds one (some data sets store it so).
Json read_tools(const Json& record, const std::string& source) {
  if (!has(record, "tools")) return nullptr;
  Json tools = record["tools"];
  if (tools.is_string()) {
    std::string text = tools.get<std::string>();
    if (text.empty()) return nullptr;
    tools = parse_json(text, source + ": field 'tools'");
  }
  if (!tools.is_array()) throw DataError(str(source, ": field 'tools' is ", type_name(tools), "; it must be a list"));
  return tools.empty() ? Json() : tools;
}

void add_system(const Json& value, Record& record, const std::string& source) {
  std::string system = optional_string(value, "system", source);
  if (!system.empty()) add(record, message("system", system));
}

Record read_alpaca(const Json& value, const std::string& source) {
  Record record;
  add_system(value, record, source);
  if (has(value, "history")) {
    const Json& history = value["history"];
    if (!history.is_array())
      throw DataError(str(source, ": field 'history' is ", type_name(history), "; it must be a list"));
    for (const Json& turn : history) {
      if (!turn.is_array() || turn.size() != 2 || !turn[0].is_string() || !turn[1].is_string())
        throw DataError(str(source, ": every entry of 'history' must be a list of two strings"));
      add(record, message("user", turn[0].get<std::string>()));
      add(record, message("assistant", turn[1].get<std::string>()));
    }
  }
  std::string instruction = string_field(value, "instruction", source), input = optional_string(value, "input", source);
  bool both = !instruction.empty() && !input.empty();
  Json user = message("user", instruction + (both ? "\n" : "") + input);
  if (both) user["instruction"] = instruction, user["input"] = input;
  add(record, std::move(user));
  add(record, message("assistant", string_field(value, "output", source)));
  return record;
}

Record read_prompt_completion(const Json& value, const std::string& prompt, const std::string& completion,
                              const std::string& source) {
  Record record;
  if (value.at(prompt).is_array() && value.at(completion).is_array()) {
    read_messages(value, prompt, source, record, false);
    read_messages(value, completion, source, record);
    record.tools = read_tools(value, source);
    return record;
  }
  record.prompt = string_field(value, prompt, source);
  record.completion = string_field(value, completion, source);
  return record;
}

std::string fields_of(const Json& record) {
  std::string names;
  size_t shown = 0;
  for (auto it = record.begin(); it != record.end(); ++it) {
    if (++shown > 12) return names + ", ...";
    names += (names.empty() ? "'" : ", '") + it.key().substr(0, 60) + "'";
  }
  return names.empty() ? "none" : names;
}

// The form that a record has by its fields; kAuto where it has none.
DataForm recognise(const Json& r) {
  if (has(r, "messages")) return DataForm::kMessages;
  if (has(r, "conversations")) return DataForm::kShareGpt;
  if (has(r, "instruction") && has(r, "output")) return DataForm::kAlpaca;
  if (has(r, "prompt") && has(r, "completion")) return DataForm::kPromptCompletion;
  if (has(r, "text")) return DataForm::kText;
  return DataForm::kAuto;
}

// NaN, Infinity or -Infinity where a value stands (Python's json.dumps writes them), and its field; empty where there is none.
std::pair<std::string, std::string> not_json_number(std::string_view text) {
  std::string_view string, key;
  for (size_t at = 0; at < text.size(); ++at) {
    if (text[at] == '"') {
      size_t begin = ++at;
      for (; at < text.size() && text[at] != '"'; ++at) at += text[at] == '\\';
      string = text.substr(begin, std::min(at, text.size()) - begin);
      continue;
    }
    if (text[at] == ':') key = string;
    for (const char* word : {"NaN", "-Infinity", "Infinity"})
      if (text.substr(at).starts_with(word)) return {std::string(key.substr(0, 60)), word};
  }
  return {};
}

void require(const Json& record, std::initializer_list<std::string> fields, const std::string& key,
             const std::string& source) {
  for (const std::string& field : fields)
    if (!has(record, field))
      throw DataError(str(source, ": no field '", field, "' (", key, "); fields found: ", fields_of(record)));
}

const std::pair<const char*, DataForm> kFormNames[] = {
    {"auto", DataForm::kAuto},     {"messages", DataForm::kMessages}, {"sharegpt", DataForm::kShareGpt},
    {"alpaca", DataForm::kAlpaca}, {"prompt_completion", DataForm::kPromptCompletion}, {"text", DataForm::kText}};

}  // namespace

DataForm parse_data_form(const std::string& name) {
  std::string names;
  for (auto& [text, form] : kFormNames) {
    if (name == text) return form;
    names += str(names.empty() ? "" : ", ", text);
  }
  throw ConfigError(str("data.format=", name, " is not a form of data; allowed are ", names));
}

const char* data_form_name(DataForm form) {
  if (form == DataForm::kTextFile) return "text";
  for (auto& [text, f] : kFormNames)
    if (f == form) return text;
  return "auto";
}

DataFile parse_data_file(const std::string& text, const std::string& key, size_t num_files) {
  struct stat info;
  if (num_files > 1) {
    DataFile file = parse_data_file(text, key);
    if (stat(file.path.c_str(), &info) != 0 && errno == ENOENT)
      throw DataError(str(key, " names ", num_files, " files, for a comma separates them (\"\\,\" is one within a name): '", file.path,
                          "' does not exist"));
    return file;
  }
  size_t colon = text.rfind(':');
  if (colon == std::string::npos || colon + 1 == text.size() || stat(text.c_str(), &info) == 0) return {text, -1};
  DataFile file{text.substr(0, colon), 0};
  const char* end = text.data() + text.size();
  auto [stop, error] = std::from_chars(text.data() + colon + 1, end, file.limit);
  if (stop != end || error != std::errc()) return {text, -1};
  if (file.limit <= 0)
    throw ConfigError(str(key, "=", text, " limits the file to ", file.limit, " records; at least 1 is needed"));
  if (file.path.ends_with(".txt"))
    throw ConfigError(str(key, "=", text, " limits the records of a text file, which is one document; leave the limit out, or "
                          "make it records: a .jsonl file of {\"text\": ...}"));
  return file;
}

void RecordOptions::check() const {
  if (prompt_field.empty() != completion_field.empty())
    throw ConfigError(prompt_field.empty() ? "data.completion_field is set without data.prompt_field; set both or none"
                                           : "data.prompt_field is set without data.completion_field; set both or none");
  if (!prompt_field.empty() && !text_field.empty())
    throw ConfigError("data.prompt_field and data.text_field exclude each other: a record is a prompt with its completion, "
                      "or a text");
  if (prompt_field.empty() && text_field.empty()) return;
  DataForm named = text_field.empty() ? DataForm::kPromptCompletion : DataForm::kText;
  if (form != DataForm::kAuto && form != named)
    throw ConfigError(str("data.format=", data_form_name(form), " contradicts data.",
                          text_field.empty() ? "prompt_field" : "text_field", "; leave data.format out or set it to ",
                          data_form_name(named)));
}

Record make_record(Json value, const RecordOptions& options, const std::string& source) {
  if (!value.is_object())
    throw DataError(str(source, ": a record must be an object, this is ", type_name(value)));
  std::string prompt = "prompt", completion = "completion", text = "text";
  DataForm form = options.form;
  if (!options.prompt_field.empty()) {
    form = DataForm::kPromptCompletion, prompt = options.prompt_field, completion = options.completion_field;
    require(value, {prompt}, "data.prompt_field", source);
    require(value, {completion}, "data.completion_field", source);
  } else if (!options.text_field.empty()) {
    form = DataForm::kText, text = options.text_field;
    require(value, {text}, "data.text_field", source);
  }
  bool named = form != DataForm::kAuto;
  if (!named) form = recognise(value);
  std::string key = str("data.format=", data_form_name(form));
  Record record;
  switch (form) {
    case DataForm::kAuto:
      throw DataError(str(source, ": no usable field; fields found: ", fields_of(value), "; accepted are ", kForms,
                          "; or name the fields with data.prompt_field and data.completion_field, or data.text_field"));
    case DataForm::kMessages:
      require(value, {"messages"}, key, source);
      read_messages(value, "messages", source, record);
      record.tools = read_tools(value, source);
      break;
    case DataForm::kShareGpt:
      require(value, {"conversations"}, key, source);
      add_system(value, record, source);
      read_messages(value, "conversations", source, record);
      record.tools = read_tools(value, source);
      break;
    case DataForm::kAlpaca:
      require(value, {"instruction", "output"}, key, source);
      record = read_alpaca(value, source);
      break;
    case DataForm::kPromptCompletion:
      require(value, {prompt, completion}, key, source);
      record = read_prompt_completion(value, prompt, completion, source);
      break;
    case DataForm::kTextFile:
    case DataForm::kText:
      require(value, {text}, key, source);
      record.text = string_field(value, text, source);
      break;
  }
  record.form = form;
  return record;
}

Record make_prompt(Json value, const RecordOptions& options, const std::string& source) {
  if (value.is_object()) {  // what is to be answered lacks the answer, which make_record() wants
    auto blank = [&](const std::string& prompt, const std::string& completion) {
      if (!has(value, prompt) || has(value, completion)) return;
      value[completion] = value[prompt].is_array() ? Json::array({message("assistant", "")}) : Json("");
    };
    if (!options.prompt_field.empty()) {
      blank(options.prompt_field, options.completion_field);
    } else {
      blank("prompt", "completion");
      blank("instruction", "output");
      if (recognise(value) == DataForm::kAuto && has(value, "question"))
        value = Json{{"prompt", value["question"]}, {"completion", ""}};
    }
  }
  Record record = make_record(std::move(value), options, source);
  record.completion.clear();
  if (record.is_chat()) {
    size_t keep = record.messages.size();
    while (keep > 0 && record.messages[keep - 1].value("role", Json()) == "assistant") --keep;
    record.messages.erase(record.messages.begin() + static_cast<std::ptrdiff_t>(keep), record.messages.end());
    if (keep == 0) throw DataError(str(source, ": nothing to answer: every message is of the assistant"));
  }
  record.learnt.assign(record.messages.size(), 0);
  return record;
}

Record make_text_piece(const RawRecord& piece, const std::string& path) {
  int64_t line = piece.line;
  for (size_t at = 0; at < piece.text.size(); ++line) {
    size_t end = std::min(piece.text.find('\n', at), piece.text.size() - 1) + 1;
    check_utf8(piece.text.substr(at, end - at), str(path, ":", line));
    at = end;
  }
  Record record;
  record.form = DataForm::kTextFile;
  record.text = piece.text;
  record.begins = piece.begins, record.ends = piece.ends;
  return record;
}

Record parse_record(std::string_view text, const RecordOptions& options, const std::string& source) {
  check_utf8(text, source);
  try {
    return make_record(parse_json(text, source), options, source);
  } catch (const DataError&) {
    auto [field, value] = not_json_number(text);
    if (value.empty()) throw;
    throw DataError(str(source, ": field '", field, "' is ", value, ", a number that JSON does not have; write null in its place, "
                        "or leave the field out (Python's json.dumps refuses it with allow_nan=False)"));
  }
}

void check_utf8(std::string_view text, const std::string& source) {
  auto byte = [&](size_t i) { return i < text.size() ? static_cast<unsigned char>(text[i]) : 0u; };
  for (size_t i = 0; i < text.size();) {
    unsigned c = byte(i);
    size_t n = c < 0x80 ? 1 : c >= 0xC2 && c < 0xE0 ? 2 : (c & 0xF0) == 0xE0 ? 3 : c >= 0xF0 && c < 0xF5 ? 4 : 0;
    bool good = n > 0;
    for (size_t k = 1; good && k < n; ++k) good = (byte(i + k) & 0xC0) == 0x80;
    // overlong forms, surrogates, above U+10FFFF
    if (good && n == 3) good = !(c == 0xE0 && byte(i + 1) < 0xA0) && !(c == 0xED && byte(i + 1) > 0x9F);
    if (good && n == 4) good = !(c == 0xF0 && byte(i + 1) < 0x90) && !(c == 0xF4 && byte(i + 1) > 0x8F);
    if (!good) {
      char hex[8];
      snprintf(hex, sizeof hex, "0x%02x", c);
      throw DataError(str(source, ": invalid UTF-8 (byte ", hex, " at position ", i + 1,
                          "); convert the file, for example with iconv -f LATIN1 -t UTF-8"));
    }
    i += n;
  }
}

}  // namespace trireme
