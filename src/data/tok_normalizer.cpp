#include <map>

#include "base/check.h"
#include "data/tok_components.h"
#include "data/tok_normal_form.h"
#include "data/tok_unicode.h"

namespace trireme::tok {
namespace {

// Keeps the characters for which `keep` is true.
template <typename Keep>
void filter(Text& text, Keep keep) {
  Text out = text.like();
  size_t from = 0;
  for (size_t i = 0, n; i < text.size(); i += n) {
    n = char_length(text.bytes, i);
    if (keep(code_point(text.bytes, i))) continue;
    out.append(text, from, i);
    from = i + n;
  }
  if (from == 0) return;
  out.append(text, from, text.size());
  text = std::move(out);
}

void lowercase(Text& text) {
  if (is_ascii(text.bytes)) {
    for (char& c : text.bytes) c = static_cast<char>(c >= 'A' && c <= 'Z' ? c + 32 : c);
    return;
  }
  Text out = text.like();
  size_t from = 0;
  for (size_t i = 0, n; i < text.size(); i += n) {
    n = char_length(text.bytes, i);
    uint32_t c = code_point(text.bytes, i), low = lower_case(c);
    if (low == c && c != 0x130) continue;
    out.append(text, from, i);
    std::string lowered;
    append_utf8(lowered, c == 0x130 ? 'i' : low);
    if (c == 0x130) append_utf8(lowered, 0x307);
    out.append_for(lowered, text, i);
    from = i + n;
  }
  out.append(text, from, text.size());
  text = std::move(out);
}

void prepend(Text& text, const std::string& content) {
  if (text.size() == 0) return;
  Text out = text.like();
  out.append_for(content, text, 0);
  out.append(text, 0, text.size());
  text = std::move(out);
}

void strip(Text& text, bool left, bool right) {
  size_t a = 0, b = text.size();
  auto space = [&](size_t at) { return (char_class(code_point(text.bytes, at)) & kSpace) != 0; };
  while (left && a < b && space(a)) a += char_length(text.bytes, a);
  while (right && b > a && space(previous_char(text.bytes, b))) b = previous_char(text.bytes, b);
  if (a == 0 && b == text.size()) return;
  bool at_start = text.at_start;
  text = text.slice(a, b);
  text.at_start = at_start;
}

bool is_han(uint32_t c) {
  return (c >= 0x4E00 && c <= 0x9FFF) || (c >= 0x3400 && c <= 0x4DBF) || (c >= 0x20000 && c <= 0x2A6DF) ||
         (c >= 0x2A700 && c <= 0x2B73F) || (c >= 0x2B740 && c <= 0x2B81F) || (c >= 0x2B920 && c <= 0x2CEAF) ||
         (c >= 0xF900 && c <= 0xFAFF) || (c >= 0x2F800 && c <= 0x2FA1F);
}

void clean(Text& text) {
  filter(text, [](uint32_t c) { return !(char_class(c) & kControl); });
  if (is_ascii(text.bytes)) {
    for (char& c : text.bytes)
      if (c == '\t' || c == '\n' || c == '\r') c = ' ';
    return;
  }
  Text out = text.like();
  size_t from = 0;
  for (size_t i = 0, n; i < text.size(); i += n) {
    n = char_length(text.bytes, i);
    if (text.bytes[i] == ' ' || !(char_class(code_point(text.bytes, i)) & kSpace)) continue;
    out.append(text, from, i);
    out.append_for(" ", text, i);
    from = i + n;
  }
  out.append(text, from, text.size());
  text = std::move(out);
}

void put_spaces_around_han(Text& text) {
  Text out = text.like();
  size_t from = 0;
  for (size_t i = 0, n; i < text.size(); i += n) {
    n = char_length(text.bytes, i);
    if (n < 3 || !is_han(code_point(text.bytes, i))) continue;
    out.append(text, from, i);
    out.append_for(" " + text.bytes.substr(i, n) + " ", text, i);
    from = i + n;
  }
  out.append(text, from, text.size());
  text = std::move(out);
}

Normalizer bert(const Json& json, const std::string& place) {
  bool cleans = json_get_or<bool>(json, "clean_text", true, place),
       han = json_get_or<bool>(json, "handle_chinese_chars", true, place);
  bool lower = json_get_or<bool>(json, "lowercase", true, place),
       accents = json_get_or<bool>(json, "strip_accents", lower, place);
  return [=](Text& text) {
    if (cleans) clean(text);
    if (!is_ascii(text.bytes)) {
      if (han) put_spaces_around_han(text);
      if (accents) {
        normal_form(text, NormalForm::kD);
        filter(text, [](uint32_t c) { return !(char_class(c) & kAccent); });
      }
    }
    if (lower) lowercase(text);
  };
}

}  // namespace

void to_byte_chars(Text& text) {
  Text out = text.like();
  for (size_t i = 0; i < text.size(); ++i)
    out.append_for(byte_char(static_cast<unsigned char>(text.bytes[i])), text, i);
  text = std::move(out);
}

// What stands for a match stands where the match's last character stood.
void replace(Text& text, const Finder& find, const std::string& content) {
  std::vector<Span> found;
  find(text.bytes, 0, found);
  if (found.empty()) return;
  Text out = text.like();
  size_t from = 0;
  for (Span match : found) {
    out.append(text, from, match.first);
    if (match.last > 0)
      out.append_for(content, text, match.last - 1);
    else
      out.append(content, 0, 0);
    from = match.last;
  }
  out.append(text, from, text.size());
  text = std::move(out);
}

Normalizer read_normalizer(const Json& json, const std::string& source) {
  if (json.is_null()) return {};
  std::string type = type_of(json, source, "normalizer"), place = str(source, ": normalizer ", type);
  if (type == "Sequence") {
    std::vector<Normalizer> parts;
    for (const Json& part : list_of(json, "normalizers", place))
      if (auto normalizer = read_normalizer(part, source)) parts.push_back(std::move(normalizer));
    if (parts.empty()) return {};
    return [parts](Text& text) {
      for (const auto& part : parts) part(text);
    };
  }
  static const std::map<std::string, NormalForm> forms = {
      {"NFC", NormalForm::kC}, {"NFD", NormalForm::kD}, {"NFKC", NormalForm::kKC}, {"NFKD", NormalForm::kKD}};
  if (auto it = forms.find(type); it != forms.end())
    return [form = it->second](Text& text) { normal_form(text, form); };
  if (type == "Lowercase") return lowercase;
  if (type == "StripAccents")
    return [](Text& text) { filter(text, [](uint32_t c) { return !(char_class(c) & kCombining); }); };
  if (type == "Prepend")
    return [content = json_get<std::string>(json, "prepend", place)](Text& text) { prepend(text, content); };
  if (type == "Replace")
    return [find = read_finder(json, place), content = json_get<std::string>(json, "content", place)](Text& text) {
      replace(text, find, content);
    };
  if (type == "Strip")
    return [left = json_get_or<bool>(json, "strip_left", true, place),
            right = json_get_or<bool>(json, "strip_right", true, place)](Text& text) { strip(text, left, right); };
  if (type == "ByteLevel") return to_byte_chars;
  if (type == "BertNormalizer") return bert(json, place);
  refuse_type(source, "normalizer", type);
}

}  // namespace trireme::tok
