#include "data/tok_scan.h"

#include "data/tok_unicode.h"

namespace trireme::tok {

const char* const kGpt2Pattern = R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";
const char* const kLlama3Pattern = R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3})"
                                   R"(| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
const char* const kQwen2Pattern =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";

namespace {

struct Char {
  uint16_t classes;
  uint8_t length;
};

class Cursor {
 public:
  explicit Cursor(std::string_view text) : text_(text) {}

  Char at(size_t i) const {
    auto c = static_cast<unsigned char>(text_[i]);
    if (c < 0x80) return {classes_[c], 1};
    return {char_class(code_point(text_, i)), static_cast<uint8_t>(char_length(c))};
  }
  // The end of the run from `i` of characters that have one of `classes`, or none of them.
  size_t run(size_t i, uint16_t classes) const {
    while (i < text_.size()) {
      Char c = at(i);
      if (!(c.classes & classes)) break;
      i += c.length;
    }
    return i;
  }
  size_t run_without(size_t i, uint16_t classes) const {
    while (i < text_.size()) {
      Char c = at(i);
      if (c.classes & classes) break;
      i += c.length;
    }
    return i;
  }

 private:
  std::string_view text_;
  const uint16_t* classes_ = kLowClasses;
};

constexpr uint16_t kKnown = kLetter | kNumber | kSpace;

bool is_newline(char c) { return c == '\r' || c == '\n'; }

// \s+(?!\S)|\s+ on the run of spaces [i, end): all of it at the end of the text, else all but its last character, which
// goes to the next word, unless it is the only one.
size_t split_spaces(std::string_view text, size_t i, size_t end) {
  if (end == text.size()) return end;
  size_t last = previous_char(text, end);
  return last > i ? last : end;
}

// The length of 's, 't, 're, 've, 'm, 'll or 'd at the apostrophe `i`; 0: none.
template <bool any_case>
size_t contraction(std::string_view text, size_t i) {
  auto letter = [&](size_t at) {
    if (at >= text.size()) return '\0';
    char c = text[at];
    return any_case && c >= 'A' && c <= 'Z' ? static_cast<char>(c + 32) : c;
  };
  char first = letter(i + 1), second = letter(i + 2);
  if (first == 's' || first == 't' || first == 'm' || first == 'd') return 2;
  if ((first == 'r' && second == 'e') || (first == 'v' && second == 'e') || (first == 'l' && second == 'l')) return 3;
  if (any_case && first == '\xC5' && second == '\xBF') return 3;  // the long s is an s in any case
  return 0;
}

void scan_gpt2(std::string_view text, uint32_t shift, std::vector<Span>& out) {
  Cursor cursor(text);
  for (size_t i = 0, end = 0; i < text.size(); i = end) {
    end = 0;
    if (text[i] == '\'') {
      if (size_t n = contraction<false>(text, i)) end = i + n;
    }
    if (end == 0) {
      size_t body = i;
      Char c = cursor.at(i);
      if (text[i] == ' ' && i + 1 < text.size()) {
        Char next = cursor.at(i + 1);
        if (!(next.classes & kSpace)) body = i + 1, c = next;
      }
      if (c.classes & kLetter)
        end = cursor.run(body + c.length, kLetter);
      else if (c.classes & kNumber)
        end = cursor.run(body + c.length, kNumber);
      else if (!(c.classes & kSpace))
        end = cursor.run_without(body + c.length, kKnown);
      else
        end = split_spaces(text, i, cursor.run(i, kSpace));
    }
    out.push_back({shift + static_cast<uint32_t>(i), shift + static_cast<uint32_t>(end)});
  }
}

template <int max_digits>
void scan_llama3(std::string_view text, uint32_t shift, std::vector<Span>& out) {
  Cursor cursor(text);
  for (size_t i = 0, end = 0; i < text.size(); i = end) {
    Char c = cursor.at(i);
    size_t after = i + c.length;
    auto is = [&](size_t at, uint16_t classes) { return at < text.size() && (cursor.at(at).classes & classes) != 0; };
    auto other = [&](size_t at) { return at < text.size() && !(cursor.at(at).classes & kKnown); };
    size_t n = text[i] == '\'' ? contraction<true>(text, i) : 0;
    if (n > 0) {
      end = i + n;
    } else if (c.classes & kLetter) {
      end = cursor.run(after, kLetter);
    } else if (c.classes & kNumber) {
      end = after;
      for (int k = 1; k < max_digits && is(end, kNumber); ++k) end += cursor.at(end).length;
    } else if (!is_newline(text[i]) && is(after, kLetter)) {
      end = cursor.run(after, kLetter);
    } else if (!(c.classes & kSpace) || (text[i] == ' ' && other(after))) {
      end = cursor.run_without(after, kKnown);
      while (end < text.size() && is_newline(text[end])) ++end;
    } else {
      size_t spaces_end = cursor.run(i, kSpace), newline = spaces_end;
      while (newline > i && !is_newline(text[newline - 1])) --newline;
      end = newline > i ? newline : split_spaces(text, i, spaces_end);
    }
    out.push_back({shift + static_cast<uint32_t>(i), shift + static_cast<uint32_t>(end)});
  }
}

}  // namespace

Scanner scanner_for(std::string_view pattern) {
  if (pattern == kGpt2Pattern) return scan_gpt2;
  if (pattern == kLlama3Pattern) return scan_llama3<3>;
  if (pattern == kQwen2Pattern) return scan_llama3<1>;
  return nullptr;
}

}  // namespace trireme::tok
