#include <utf8proc.h>

#include <algorithm>
#include <map>

#include "base/check.h"
#include "data/tok_pipeline.h"

namespace trireme::tok {
namespace {

std::string type_of(const Json& json, const std::string& source, const char* stage) {
  if (!json.is_object()) throw DataError(str(source, ": ", stage, " must be an object"));
  return json_get<std::string>(json, "type", str(source, ": ", stage));
}

[[noreturn]] void unsupported(const std::string& source, const char* stage, const std::string& type) {
  throw DataError(str(source, ": the ", stage, " \"", type, "\" is not supported"));
}

std::string string_or_regex(const Json& pattern, const std::string& source, bool* is_regex) {
  *is_regex = pattern.is_object() && pattern.contains("Regex");
  const Json* text = *is_regex ? &pattern["Regex"] : pattern.is_object() && pattern.contains("String") ? &pattern["String"] : nullptr;
  if (!text || !text->is_string()) throw DataError(str(source, ": \"pattern\" must be {\"String\": ...} or {\"Regex\": ...}"));
  return text->get<std::string>();
}

std::vector<std::pair<size_t, size_t>> find_all(const std::string& text, const std::string& needle) {
  std::vector<std::pair<size_t, size_t>> out;
  if (needle.empty()) return out;
  for (size_t at = text.find(needle); at != std::string::npos; at = text.find(needle, at + needle.size())) out.emplace_back(at, at + needle.size());
  return out;
}

using Finder = std::function<std::vector<std::pair<size_t, size_t>>(const std::string&)>;

Finder read_finder(const Json& json, const std::string& source) {
  if (!json.contains("pattern")) throw DataError(str(source, ": the key \"pattern\" is missing"));
  bool is_regex = false;
  std::string pattern = string_or_regex(json["pattern"], source, &is_regex);
  if (is_regex) return [regex = Regex(pattern, source)](const std::string& text) { return regex.matches(text); };
  return [pattern](const std::string& text) { return find_all(text, pattern); };
}

// Unicode normal forms act on a base character with the marks that follow it; the result stands for all of them.
Text normal_form(const Text& in, int options) {
  Text out;
  for (size_t i = 0; i < in.size();) {
    size_t j = i;
    bool ascii = true;
    do {
      ascii &= static_cast<unsigned char>(in.bytes[j]) < 0x80;
      j += char_length(static_cast<unsigned char>(in.bytes[j]));
      if (j >= in.size()) break;
      auto next = static_cast<utf8proc_int32_t>(code_point(in.bytes, j));
      const auto* property = utf8proc_get_property(next);
      bool joins = property->combining_class != 0 || (next >= 0x1160 && next <= 0x11FF) ||
                   property->category == UTF8PROC_CATEGORY_MN || property->category == UTF8PROC_CATEGORY_MC;
      if (!joins) break;
    } while (true);
    if (ascii) {
      out.append(in, i, j);
    } else {
      utf8proc_uint8_t* result = nullptr;
      auto n = utf8proc_map(reinterpret_cast<const utf8proc_uint8_t*>(in.bytes.data() + i), static_cast<utf8proc_ssize_t>(j - i),
                            &result, static_cast<utf8proc_option_t>(options));
      if (n < 0) throw DataError("a text is not valid UTF-8");
      std::string_view piece(reinterpret_cast<char*>(result), static_cast<size_t>(n));
      if (piece == std::string_view(in.bytes).substr(i, j - i)) out.append(in, i, j);
      else out.append(piece, in.begin[i], in.end[j - 1]);
      std::free(result);
    }
    i = j;
  }
  return out;
}

Text replace(const Text& in, const Finder& find, const std::string& content) {
  Text out;
  size_t from = 0;
  for (auto [a, b] : find(in.bytes)) {
    out.append(in, from, a);
    out.append(content, in.begin[a], in.end[b - 1]);
    from = b;
  }
  out.append(in, from, in.size());
  return out;
}

Text strip(const Text& in, bool left, bool right) {
  size_t a = 0, b = in.size();
  auto space = [&](size_t at) {
    auto c = static_cast<utf8proc_int32_t>(code_point(in.bytes, at));
    auto category = utf8proc_category(c);
    return (c >= 9 && c <= 13) || c == 0x85 || category == UTF8PROC_CATEGORY_ZS || category == UTF8PROC_CATEGORY_ZL || category == UTF8PROC_CATEGORY_ZP;
  };
  while (left && a < b && space(a)) a += char_length(static_cast<unsigned char>(in.bytes[a]));
  while (right && b > a) {
    size_t c = b - 1;
    while (c > a && (static_cast<unsigned char>(in.bytes[c]) & 0xC0) == 0x80) --c;
    if (!space(c)) break;
    b = c;
  }
  return in.slice(a, b);
}

// How a split treats what its pattern matched.
enum class Behavior { kRemoved, kIsolated, kMergedWithPrevious, kMergedWithNext, kContiguous };

std::vector<Text> split(const Text& in, const std::vector<std::pair<size_t, size_t>>& found, bool invert, Behavior behavior) {
  struct Part {
    size_t first, last;
    bool match;
  };
  std::vector<Part> parts;
  size_t from = 0;
  for (auto [a, b] : found) {
    if (a > from) parts.push_back({from, a, invert});
    parts.push_back({a, b, !invert});
    from = b;
  }
  if (from < in.size()) parts.push_back({from, in.size(), invert});
  std::vector<Part> joined;
  for (size_t i = 0; i < parts.size(); ++i) {
    Part p = parts[i];
    bool glue = !joined.empty() && ((behavior == Behavior::kMergedWithPrevious && p.match && !joined.back().match) ||
                                    (behavior == Behavior::kContiguous && p.match == joined.back().match));
    if (behavior == Behavior::kMergedWithPrevious && glue) joined.back().last = p.last, joined.back().match = true;
    else if (glue) joined.back().last = p.last;
    else if (behavior == Behavior::kMergedWithNext && !joined.empty() && joined.back().match && !p.match) joined.back().last = p.last, joined.back().match = false;
    else if (behavior != Behavior::kRemoved || !p.match) joined.push_back(p);
  }
  std::vector<Text> out;
  for (const Part& p : joined)
    if (p.last > p.first) out.push_back(in.slice(p.first, p.last));
  return out;
}

Behavior read_behavior(const Json& json, const std::string& source) {
  static const std::map<std::string, Behavior> names = {{"Removed", Behavior::kRemoved}, {"Isolated", Behavior::kIsolated},
      {"MergedWithPrevious", Behavior::kMergedWithPrevious}, {"MergedWithNext", Behavior::kMergedWithNext}, {"Contiguous", Behavior::kContiguous}};
  auto name = json_get<std::string>(json, "behavior", source);
  auto it = names.find(name);
  if (it == names.end()) throw DataError(str(source, ": behavior \"", name, "\" is not known"));
  return it->second;
}

PreTokenizer splitter(Finder find, bool invert, Behavior behavior) {
  return [=](std::vector<Text> pieces) {
    std::vector<Text> out;
    for (const Text& piece : pieces)
      for (Text& part : split(piece, find(piece.bytes), invert, behavior)) out.push_back(std::move(part));
    return out;
  };
}

// GPT-2's pattern, as ByteLevel uses it.
constexpr const char* kGpt2 = R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

Text to_byte_chars(const Text& in) {
  Text out;
  for (size_t i = 0; i < in.size(); ++i) out.append(byte_char(static_cast<unsigned char>(in.bytes[i])), in.begin[i], in.end[i]);
  return out;
}

PreTokenizer byte_level(const Json& json, const std::string& source) {
  bool prefix = json_get_or<bool>(json, "add_prefix_space", true, source), use_regex = json_get_or<bool>(json, "use_regex", true, source);
  auto cut = splitter([regex = Regex(kGpt2, source)](const std::string& text) { return regex.matches(text); }, false, Behavior::kIsolated);
  return [=](std::vector<Text> pieces) {
    if (prefix)
      for (Text& piece : pieces)
        if (!piece.bytes.empty() && piece.bytes[0] != ' ') {
          Text with;
          with.append(" ", piece.begin[0], piece.end[0]);
          with.append(piece, 0, piece.size());
          piece = std::move(with);
        }
    if (use_regex) pieces = cut(std::move(pieces));
    for (Text& piece : pieces) piece = to_byte_chars(piece);
    return pieces;
  };
}

std::string metaspace_scheme(const Json& json, const std::string& source) {
  if (json.contains("prepend_scheme")) return json_get<std::string>(json, "prepend_scheme", source);
  return json_get_or<bool>(json, "add_prefix_space", true, source) ? "always" : "never";
}

PreTokenizer metaspace(const Json& json, const std::string& source) {
  auto mark = json_get_or<std::string>(json, "replacement", "\xE2\x96\x81", source);
  auto scheme = metaspace_scheme(json, source);
  bool cuts = json_get_or<bool>(json, "split", true, source);
  if (scheme != "always" && scheme != "first" && scheme != "never") throw DataError(str(source, ": prepend_scheme \"", scheme, "\" is not known"));
  return [=](std::vector<Text> pieces) {
    std::vector<Text> out;
    for (Text& piece : pieces) {
      Text t = replace(piece, [](const std::string& s) { return find_all(s, " "); }, mark);
      bool wants = scheme == "always" || (scheme == "first" && !t.begin.empty() && t.begin[0] == 0);
      if (wants && !t.bytes.empty() && !t.bytes.starts_with(mark)) {
        Text with;
        with.append(mark, t.begin[0], t.end[0]);
        with.append(t, 0, t.size());
        t = std::move(with);
      }
      if (!cuts) out.push_back(std::move(t));
      else
        for (Text& part : split(t, find_all(t.bytes, mark), false, Behavior::kMergedWithNext)) out.push_back(std::move(part));
    }
    return out;
  };
}

}  // namespace

const std::string& byte_char(unsigned char byte) {
  static const auto table = [] {
    std::vector<std::string> out(256);
    uint32_t next = 256;
    for (uint32_t b = 0; b < 256; ++b) {
      bool printable = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
      uint32_t c = printable ? b : next++;
      if (c < 0x80) out[b] = static_cast<char>(c);
      else out[b] = {static_cast<char>(0xC0 | (c >> 6)), static_cast<char>(0x80 | (c & 0x3F))};
    }
    return out;
  }();
  return table[byte];
}

std::optional<unsigned char> char_byte(uint32_t character) {
  static const auto table = [] {
    std::unordered_map<uint32_t, unsigned char> out;
    for (int b = 0; b < 256; ++b) out[code_point(byte_char(static_cast<unsigned char>(b)), 0)] = static_cast<unsigned char>(b);
    return out;
  }();
  auto it = table.find(character);
  return it == table.end() ? std::nullopt : std::optional(it->second);
}

Normalizer read_normalizer(const Json& json, const std::string& source) {
  if (json.is_null()) return {};
  std::string type = type_of(json, source, "normalizer"), place = str(source, ": normalizer ", type);
  if (type == "Sequence") {
    std::vector<Normalizer> parts;
    if (!json.contains("normalizers") || !json["normalizers"].is_array()) throw DataError(str(place, ": \"normalizers\" must be a list"));
    for (const Json& part : json["normalizers"]) parts.push_back(read_normalizer(part, source));
    return [parts](Text text) {
      for (const auto& part : parts) text = part(std::move(text));
      return text;
    };
  }
  static const std::map<std::string, int> forms = {
      {"NFC", UTF8PROC_STABLE | UTF8PROC_COMPOSE}, {"NFD", UTF8PROC_STABLE | UTF8PROC_DECOMPOSE},
      {"NFKC", UTF8PROC_STABLE | UTF8PROC_COMPOSE | UTF8PROC_COMPAT}, {"NFKD", UTF8PROC_STABLE | UTF8PROC_DECOMPOSE | UTF8PROC_COMPAT}};
  if (auto it = forms.find(type); it != forms.end()) return [options = it->second](Text text) { return normal_form(text, options); };
  if (type == "Prepend") {
    auto content = json_get<std::string>(json, "prepend", place);
    return [content](Text text) {
      if (text.bytes.empty()) return text;
      Text out;
      out.append(content, text.begin[0], text.end[0]);
      out.append(text, 0, text.size());
      return out;
    };
  }
  if (type == "Replace")
    return [find = read_finder(json, place), content = json_get<std::string>(json, "content", place)](Text text) { return replace(text, find, content); };
  if (type == "Strip")
    return [l = json_get_or<bool>(json, "strip_left", true, place), r = json_get_or<bool>(json, "strip_right", true, place)](Text text) { return strip(text, l, r); };
  if (type == "ByteLevel") return [](Text text) { return to_byte_chars(text); };
  unsupported(source, "normalizer", type);
}

PreTokenizer read_pre_tokenizer(const Json& json, const std::string& source) {
  if (json.is_null()) return {};
  std::string type = type_of(json, source, "pre_tokenizer"), place = str(source, ": pre_tokenizer ", type);
  if (type == "Sequence") {
    std::vector<PreTokenizer> parts;
    if (!json.contains("pretokenizers") || !json["pretokenizers"].is_array()) throw DataError(str(place, ": \"pretokenizers\" must be a list"));
    for (const Json& part : json["pretokenizers"]) parts.push_back(read_pre_tokenizer(part, source));
    return [parts](std::vector<Text> pieces) {
      for (const auto& part : parts) pieces = part(std::move(pieces));
      return pieces;
    };
  }
  auto regex = [&](const char* pattern) { return [r = Regex(pattern, place)](const std::string& text) { return r.matches(text); }; };
  if (type == "ByteLevel") return byte_level(json, place);
  if (type == "Metaspace") return metaspace(json, place);
  if (type == "Split") return splitter(read_finder(json, place), json_get_or<bool>(json, "invert", false, place), read_behavior(json, place));
  if (type == "Digits") {
    bool single = json_get_or<bool>(json, "individual_digits", false, place);
    return splitter(regex("\\p{N}"), false, single ? Behavior::kIsolated : Behavior::kContiguous);
  }
  if (type == "Whitespace") return splitter(regex("\\w+|[^\\w\\s]+"), true, Behavior::kRemoved);
  if (type == "WhitespaceSplit") return splitter(regex("\\s"), false, Behavior::kRemoved);
  if (type == "Punctuation") return splitter(regex("[!-/:-@\\[-`{-~\\p{P}]"), false, json.contains("behavior") ? read_behavior(json, place) : Behavior::kIsolated);
  unsupported(source, "pre_tokenizer", type);
}

PostProcessor read_post_processor(const Json& json, const std::string& source) {
  PostProcessor post;
  if (json.is_null()) return post;
  std::string type = type_of(json, source, "post_processor"), place = str(source, ": post_processor ", type);
  if (type == "ByteLevel") {
    post.trims_offsets = json_get_or<bool>(json, "trim_offsets", true, place);
    post.add_prefix_space = json_get_or<bool>(json, "add_prefix_space", true, place);
  } else if (type == "Sequence") {
    if (!json.contains("processors") || !json["processors"].is_array()) throw DataError(str(place, ": \"processors\" must be a list"));
    for (const Json& part : json["processors"]) {
      PostProcessor p = read_post_processor(part, source);
      post.before.insert(post.before.begin(), p.before.begin(), p.before.end());
      post.after.insert(post.after.end(), p.after.begin(), p.after.end());
      if (p.trims_offsets) post.trims_offsets = true, post.add_prefix_space = p.add_prefix_space;
    }
  } else if (type == "TemplateProcessing") {
    if (!json.contains("single") || !json["single"].is_array()) throw DataError(str(place, ": \"single\" must be a list"));
    bool seen = false;
    for (const Json& part : json["single"]) {
      if (part.is_object() && part.contains("Sequence")) {
        seen = true;
        continue;
      }
      if (!part.is_object() || !part.contains("SpecialToken")) throw DataError(str(place, ": a part of \"single\" is neither Sequence nor SpecialToken"));
      auto name = json_get<std::string>(part["SpecialToken"], "id", place);
      if (!json.contains("special_tokens") || !json["special_tokens"].contains(name) || !json["special_tokens"][name].contains("ids"))
        throw DataError(str(place, ": the special token \"", name, "\" has no ids"));
      for (const Json& id : json["special_tokens"][name]["ids"]) {
        if (!id.is_number_integer()) throw DataError(str(place, ": the ids of \"", name, "\" must be integers"));
        (seen ? post.after : post.before).push_back(id.get<int64_t>());
      }
    }
  } else {
    unsupported(source, "post_processor", type);
  }
  return post;
}

namespace {

using Strings = std::vector<std::string>;

std::string concatenated(const Strings& tokens) {
  std::string out;
  for (const auto& t : tokens) out += t;
  return out;
}

Strings decode_byte_level(Strings tokens) {
  std::string bytes;
  for (const auto& token : tokens) {
    std::string mapped;
    bool all = true;
    for (size_t i = 0; i < token.size() && all; i += char_length(static_cast<unsigned char>(token[i]))) {
      auto b = char_byte(code_point(token, i));
      all = b.has_value();
      if (b) mapped += static_cast<char>(*b);
    }
    bytes += all ? mapped : token;
  }
  return {lossy_utf8(bytes)};
}

// Runs of <0x..> tokens become their bytes; a run that is no UTF-8 gives one U+FFFD for each token.
Strings decode_byte_fallback(Strings tokens) {
  Strings out;
  std::string run;
  auto end_run = [&] {
    if (run.empty()) return;
    if (valid_utf8(run)) out.push_back(run);
    else
      for (size_t i = 0; i < run.size(); ++i) out.push_back("\xEF\xBF\xBD");
    run.clear();
  };
  for (const auto& token : tokens) {
    unsigned byte = 0;
    if (token.size() == 6 && token.starts_with("<0x") && token[5] == '>' && std::isxdigit(static_cast<unsigned char>(token[3])) &&
        std::isxdigit(static_cast<unsigned char>(token[4])) && std::sscanf(token.c_str(), "<0x%2X>", &byte) == 1) {
      run += static_cast<char>(byte);
      continue;
    }
    end_run();
    out.push_back(token);
  }
  end_run();
  return out;
}

}  // namespace

Decoder read_decoder(const Json& json, const std::string& source) {
  if (json.is_null()) return {};
  std::string type = type_of(json, source, "decoder"), place = str(source, ": decoder ", type);
  if (type == "Sequence") {
    std::vector<Decoder> parts;
    if (!json.contains("decoders") || !json["decoders"].is_array()) throw DataError(str(place, ": \"decoders\" must be a list"));
    for (const Json& part : json["decoders"]) parts.push_back(read_decoder(part, source));
    return [parts](Strings tokens) {
      for (const auto& part : parts) tokens = part(std::move(tokens));
      return tokens;
    };
  }
  if (type == "ByteLevel") return decode_byte_level;
  if (type == "ByteFallback") return decode_byte_fallback;
  if (type == "Fuse") return [](Strings tokens) { return Strings{concatenated(tokens)}; };
  if (type == "Replace")
    return [find = read_finder(json, place), content = json_get<std::string>(json, "content", place)](Strings tokens) {
      for (auto& t : tokens) t = replace(text_of(t), find, content).bytes;
      return tokens;
    };
  if (type == "Strip") {
    auto content = json_get<std::string>(json, "content", place);
    auto start = json_get<int64_t>(json, "start", place), stop = json_get<int64_t>(json, "stop", place);
    return [=](Strings tokens) {
      for (auto& t : tokens) {
        for (int64_t i = 0; i < start && t.starts_with(content) && !content.empty(); ++i) t.erase(0, content.size());
        for (int64_t i = 0; i < stop && t.ends_with(content) && !content.empty(); ++i) t.erase(t.size() - content.size());
      }
      return tokens;
    };
  }
  if (type == "Metaspace") {
    auto mark = json_get_or<std::string>(json, "replacement", "\xE2\x96\x81", place);
    bool drops = metaspace_scheme(json, place) != "never";
    return [=](Strings tokens) {
      for (size_t i = 0; i < tokens.size(); ++i) {
        std::string out;
        for (size_t k = 0; k < tokens[i].size();) {
          if (tokens[i].compare(k, mark.size(), mark) == 0) {
            if (!(i == 0 && k == 0 && drops)) out += ' ';
            k += mark.size();
          } else {
            out += tokens[i][k++];
          }
        }
        tokens[i] = out;
      }
      return tokens;
    };
  }
  unsupported(source, "decoder", type);
}

}  // namespace trireme::tok
