#include "data/tok_components.h"

#include "base/check.h"

namespace trireme::tok {

std::string type_of(const Json& json, const std::string& source, const char* stage) {
  if (!json.is_object()) throw DataError(str(source, ": ", stage, " must be an object"));
  return json_get<std::string>(json, "type", str(source, ": ", stage));
}

void refuse_type(const std::string& source, const char* stage, const std::string& type) {
  throw DataError(str(source, ": the ", stage, " \"", type, "\" is not supported"));
}

const Json& list_of(const Json& json, const char* key, const std::string& place) {
  if (!json.contains(key) || !json[key].is_array()) throw DataError(str(place, ": \"", key, "\" must be a list"));
  return json[key];
}

std::string one_character(const Json& json, const char* key, const char* fallback, const std::string& place) {
  auto text = fallback ? json_get_or<std::string>(json, key, fallback, place) : json_get<std::string>(json, key, place);
  if (text.empty() || char_length(text, 0) != text.size())
    throw DataError(str(place, ": \"", key, "\" must be one character, found \"", text, "\""));
  return text;
}

std::string metaspace_scheme(const Json& json, const std::string& place) {
  auto scheme = json_get_or<std::string>(json, "prepend_scheme", "always", place);
  if (scheme != "always" && scheme != "first" && scheme != "never")
    throw DataError(str(place, ": prepend_scheme \"", scheme, "\" is not known; known are always, first, never"));
  if (json_get_or<bool>(json, "add_prefix_space", true, place)) return scheme;
  if (json.contains("prepend_scheme") && scheme != "never")
    throw DataError(str(place, ": \"add_prefix_space\" is false, but prepend_scheme is \"", scheme, "\""));
  return "never";
}

Finder find_string(std::string needle) {
  return [needle = std::move(needle)](std::string_view text, uint32_t shift, std::vector<Span>& out) {
    if (needle.empty()) return;
    for (size_t at = text.find(needle); at != std::string_view::npos; at = text.find(needle, at + needle.size()))
      out.push_back({shift + static_cast<uint32_t>(at), shift + static_cast<uint32_t>(at + needle.size())});
  };
}

Finder read_finder(const Json& json, const std::string& place) {
  const Json pattern = json.contains("pattern") ? json["pattern"] : Json();
  if (pattern.is_object() && pattern.contains("Regex") && pattern["Regex"].is_string())
    return [regex = Regex(pattern["Regex"].get<std::string>(), place)](
               std::string_view text, uint32_t shift, std::vector<Span>& out) { regex.matches(text, shift, out); };
  if (pattern.is_object() && pattern.contains("String") && pattern["String"].is_string())
    return find_string(pattern["String"].get<std::string>());
  throw DataError(str(place, ": \"pattern\" must be {\"String\": ...} or {\"Regex\": ...}"));
}

std::vector<PostStep> read_post_processor(const Json& json, const std::string& source) {
  if (json.is_null()) return {};
  std::string type = type_of(json, source, "post_processor"), place = str(source, ": post_processor ", type);
  PostStep step;
  auto read_trim = [&] {
    step.trims = json_get_or<bool>(json, "trim_offsets", true, place);
    step.adds_prefix_space = json_get_or<bool>(json, "add_prefix_space", true, place);
  };
  auto id_of = [&](const char* key) {  // ["[SEP]", 102]
    if (!json.contains(key) || !json[key].is_array() || json[key].size() != 2 || !json[key][1].is_number_integer())
      throw DataError(str(place, ": \"", key, "\" must be a token and its id"));
    return json[key][1].get<int64_t>();
  };
  if (type == "Sequence") {
    std::vector<PostStep> out;
    for (const Json& part : list_of(json, "processors", place))
      for (PostStep& inner : read_post_processor(part, source)) out.push_back(std::move(inner));
    return out;
  }
  if (type == "ByteLevel") {
    read_trim();
  } else if (type == "BertProcessing" || type == "RobertaProcessing") {
    if (type == "RobertaProcessing") read_trim();
    step.before = {id_of("cls")};
    step.after = {id_of("sep")};
  } else if (type == "TemplateProcessing") {
    bool seen = false;
    for (const Json& part : list_of(json, "single", place)) {
      if (part.is_object() && part.contains("Sequence")) {
        if (seen || json_get<std::string>(part["Sequence"], "id", place) != "A")
          throw DataError(str(place, ": \"single\" must hold the sequence A once"));
        seen = true;
        continue;
      }
      if (!part.is_object() || !part.contains("SpecialToken"))
        throw DataError(str(place, ": a part of \"single\" is neither Sequence nor SpecialToken"));
      auto name = json_get<std::string>(part["SpecialToken"], "id", place);
      const Json tokens = json.contains("special_tokens") ? json["special_tokens"] : Json();
      if (!tokens.is_object() || !tokens.contains(name) || !tokens[name].is_object() || !tokens[name].contains("ids") ||
          !tokens[name]["ids"].is_array())
        throw DataError(str(place, ": the special token \"", name, "\" has no ids"));
      for (const Json& id : tokens[name]["ids"]) {
        if (!id.is_number_integer()) throw DataError(str(place, ": the ids of \"", name, "\" must be integers"));
        (seen ? step.after : step.before).push_back(id.get<int64_t>());
      }
    }
    if (!seen) throw DataError(str(place, ": \"single\" must hold the sequence A once"));
  } else {
    refuse_type(source, "post_processor", type);
  }
  return {step};
}

}  // namespace trireme::tok
