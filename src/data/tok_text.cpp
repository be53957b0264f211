#define PCRE2_CODE_UNIT_WIDTH 8
#include "data/tok_text.h"

#include <pcre2.h>

#include "base/check.h"

namespace trireme::tok {

void Text::append(std::string_view piece, int32_t from, int32_t to) {
  bytes += piece;
  begin.insert(begin.end(), piece.size(), from);
  end.insert(end.end(), piece.size(), to);
}

void Text::append(const Text& other, size_t first, size_t last) {
  bytes.append(other.bytes, first, last - first);
  begin.insert(begin.end(), other.begin.begin() + static_cast<long>(first), other.begin.begin() + static_cast<long>(last));
  end.insert(end.end(), other.end.begin() + static_cast<long>(first), other.end.begin() + static_cast<long>(last));
}

Text Text::slice(size_t first, size_t last) const {
  Text out;
  out.append(*this, first, last);
  return out;
}

size_t char_length(unsigned char c) { return c < 0x80 ? 1 : c < 0xE0 ? 2 : c < 0xF0 ? 3 : 4; }

Text text_of(std::string_view utf8) {
  Text text;
  text.bytes = utf8;
  text.begin.resize(utf8.size());
  text.end.resize(utf8.size());
  int32_t character = -1;
  for (size_t i = 0; i < utf8.size(); ++i) {
    if ((static_cast<unsigned char>(utf8[i]) & 0xC0) != 0x80) ++character;
    text.begin[i] = character;
    text.end[i] = character + 1;
  }
  return text;
}

uint32_t code_point(std::string_view s, size_t i) {
  auto b = [&](size_t k) { return static_cast<uint32_t>(static_cast<unsigned char>(s[i + k])); };
  size_t n = char_length(static_cast<unsigned char>(s[i]));
  if (n == 1) return b(0);
  if (n == 2) return ((b(0) & 0x1F) << 6) | (b(1) & 0x3F);
  if (n == 3) return ((b(0) & 0x0F) << 12) | ((b(1) & 0x3F) << 6) | (b(2) & 0x3F);
  return ((b(0) & 0x07) << 18) | ((b(1) & 0x3F) << 12) | ((b(2) & 0x3F) << 6) | (b(3) & 0x3F);
}

namespace {

// Length of the valid character at `i`, or 0; `broken` is then the length of the maximal broken part (Unicode 3.9, D93b).
size_t valid_length(std::string_view s, size_t i, size_t* broken) {
  auto c = static_cast<unsigned char>(s[i]);
  *broken = 1;
  if (c < 0x80) return 1;
  size_t n = c >= 0xC2 && c <= 0xDF ? 2 : c >= 0xE0 && c <= 0xEF ? 3 : c >= 0xF0 && c <= 0xF4 ? 4 : 0;
  for (size_t k = 1; k < n; ++k) {
    if (i + k >= s.size()) return *broken = k, 0;
    auto d = static_cast<unsigned char>(s[i + k]);
    unsigned low = 0x80, high = 0xBF;
    if (k == 1) {
      if (c == 0xE0) low = 0xA0;
      if (c == 0xED) high = 0x9F;
      if (c == 0xF0) low = 0x90;
      if (c == 0xF4) high = 0x8F;
    }
    if (d < low || d > high) return *broken = k, 0;
  }
  return n;
}

}  // namespace

std::string lossy_utf8(std::string_view s) {
  std::string out;
  for (size_t i = 0; i < s.size();) {
    size_t broken = 1, n = valid_length(s, i, &broken);
    if (n > 0) out.append(s, i, n);
    else out += "\xEF\xBF\xBD";
    i += n > 0 ? n : broken;
  }
  return out;
}

bool valid_utf8(std::string_view s) {
  for (size_t i = 0, broken = 0; i < s.size();) {
    size_t n = valid_length(s, i, &broken);
    if (n == 0) return false;
    i += n;
  }
  return true;
}

Regex::Regex(const std::string& pattern, const std::string& source) : source_(source) {
  int error = 0;
  PCRE2_SIZE at = 0;
  pcre2_code* code = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern.data()), pattern.size(), PCRE2_UTF | PCRE2_UCP, &error, &at, nullptr);
  if (!code) {
    PCRE2_UCHAR text[200];
    pcre2_get_error_message(error, text, sizeof text);
    throw DataError(str(source, ": the regular expression ", pattern.substr(0, 200), " is wrong at character ", at, ": ",
                        reinterpret_cast<const char*>(text)));
  }
  pcre2_jit_compile(code, PCRE2_JIT_COMPLETE);
  code_ = std::shared_ptr<void>(code, [](void* c) { pcre2_code_free(static_cast<pcre2_code*>(c)); });
}

std::vector<std::pair<size_t, size_t>> Regex::matches(std::string_view text) const {
  const auto* code = static_cast<const pcre2_code*>(code_.get());
  struct Scratch {
    pcre2_match_data* data = pcre2_match_data_create(64, nullptr);
    pcre2_match_context* context = pcre2_match_context_create(nullptr);
    Scratch() {
      pcre2_set_match_limit(context, 10'000'000);
      pcre2_set_depth_limit(context, 100'000);
      pcre2_set_heap_limit(context, 64 << 10);
    }
    ~Scratch() {
      pcre2_match_data_free(data);
      pcre2_match_context_free(context);
    }
  };
  thread_local Scratch scratch;
  std::vector<std::pair<size_t, size_t>> out;
  for (size_t at = 0; at <= text.size();) {
    int found = pcre2_match(code, reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), at, PCRE2_NO_UTF_CHECK, scratch.data, scratch.context);
    if (found == PCRE2_ERROR_NOMATCH) break;
    if (found < 0) throw DataError(str(source_, ": the regular expression takes too long on this text"));
    const PCRE2_SIZE* range = pcre2_get_ovector_pointer(scratch.data);
    if (range[1] > range[0]) {
      out.emplace_back(range[0], range[1]);
      at = range[1];
    } else {
      at = range[1] + (range[1] < text.size() ? char_length(static_cast<unsigned char>(text[range[1]])) : 1);
    }
  }
  return out;
}

}  // namespace trireme::tok
