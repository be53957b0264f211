#include "data/tok_normal_form.h"

#include <utf8proc.h>

#include <algorithm>
#include <unordered_map>

#include "data/tok_unicode.h"

namespace trireme::tok {
namespace {

struct Char {
  uint32_t code;
  uint8_t combining;
  int32_t change;  // 0: takes the place of the next character of the source; n > 0: added; n < 0: and of -n more
};

bool known(uint32_t c) { return !(char_class(c) & kUnnormalized); }

uint8_t combining_class(uint32_t c) {
  return c < 0x300 || !known(c)
             ? 0
             : static_cast<uint8_t>(utf8proc_get_property(static_cast<utf8proc_int32_t>(c))->combining_class);
}

void decompose(uint32_t c, bool compatible, std::vector<Char>& out) {
  utf8proc_int32_t parts[32];
  int boundary = 0;
  utf8proc_ssize_t n = 1;
  parts[0] = static_cast<utf8proc_int32_t>(c);
  if (c >= 0x80 && known(c))
    n = utf8proc_decompose_char(parts[0], parts, 32,
                                static_cast<utf8proc_option_t>(UTF8PROC_DECOMPOSE | (compatible ? UTF8PROC_COMPAT : 0)),
                                &boundary);
  for (utf8proc_ssize_t i = 0; i < n; ++i) {
    auto part = static_cast<uint32_t>(parts[i]);
    out.push_back({part, combining_class(part), i > 0});
  }
}

// The character that `a` and `b` compose, or 0.
uint32_t compose(uint32_t a, uint32_t b) {
  if (a >= 0x1100 && a < 0x1113 && b >= 0x1161 && b < 0x1176) return 0xAC00 + ((a - 0x1100) * 21 + (b - 0x1161)) * 28;
  if (a >= 0xAC00 && a < 0xD7A4 && (a - 0xAC00) % 28 == 0 && b > 0x11A7 && b < 0x11C3) return a + (b - 0x11A7);
  static const auto pairs = [] {  // those that a character decomposes into, and that compose it again
    std::unordered_map<uint64_t, uint32_t> out;
    for (utf8proc_int32_t c = 0xC0; c < 0x30000; ++c) {
      if ((c >= 0xAC00 && c < 0xF900) || !known(static_cast<uint32_t>(c))) continue;
      utf8proc_int32_t parts[8];
      int boundary = 0;
      auto n = utf8proc_decompose_char(c, parts, 8, UTF8PROC_DECOMPOSE, &boundary);
      if (n < 2 || n > 8) continue;
      auto last = static_cast<uint32_t>(parts[n - 1]);
      auto composed = static_cast<utf8proc_option_t>(UTF8PROC_COMPOSE | UTF8PROC_STABLE);
      utf8proc_int32_t whole[8];
      std::copy(parts, parts + n, whole);
      if (utf8proc_normalize_utf32(whole, n, composed) != 1 || whole[0] != c) continue;
      if (utf8proc_normalize_utf32(parts, n - 1, composed) != 1) continue;
      out[static_cast<uint64_t>(parts[0]) << 32 | last] = static_cast<uint32_t>(c);
    }
    return out;
  }();
  auto it = pairs.find(static_cast<uint64_t>(a) << 32 | b);
  return it == pairs.end() ? 0 : it->second;
}

// UAX 15: each mark composes with the last starter unless a mark of its class or a higher one stands between.
void recompose(std::vector<Char>& chars) {
  size_t starter = chars.size(), kept = 0;
  int last_class = -1;  // of the marks kept since the starter; -1: none
  for (size_t i = 0; i < chars.size(); ++i) {
    Char c = chars[i];
    if (starter < kept && (last_class < 0 || last_class < c.combining)) {
      if (uint32_t both = compose(chars[starter].code, c.code)) {
        chars[starter].code = both;
        chars[starter].change += c.change - 1;
        continue;
      }
    }
    if (c.combining == 0)
      starter = kept, last_class = -1;
    else
      last_class = c.combining;
    chars[kept++] = c;
  }
  chars.resize(kept);
}

}  // namespace

void normal_form(Text& text, NormalForm form) {
  if (is_ascii(text.bytes)) return;
  const std::string& s = text.bytes;
  bool compatible = form == NormalForm::kKC || form == NormalForm::kKD,
       composed = form == NormalForm::kC || form == NormalForm::kKC;
  Text out = text.like();
  std::vector<Char> chars;
  std::string piece;
  for (size_t i = 0; i < s.size();) {
    // ASCII stays as it is, but for the last one of a run, which may compose with what follows.
    size_t run = i;
    while (run < s.size() && static_cast<unsigned char>(s[run]) < 0x80) ++run;
    if (run > i + 1 || run == s.size()) {
      size_t stop = run == s.size() ? run : run - 1;
      out.append(text, i, stop);
      i = stop;
      continue;
    }
    // As far as the next ASCII character, all at once: nothing composes with a character before an ASCII one.
    size_t end = run;
    bool settled = composed;
    for (; end < s.size() && static_cast<unsigned char>(s[end]) >= 0x80; end += char_length(s, end))
      settled = settled && (char_class(code_point(s, end)) & (compatible ? kSettledKC : kSettledC));
    if (settled) {
      out.append(text, i, end);
      i = end;
      continue;
    }
    chars.clear();
    for (size_t at = i; at < end; at += char_length(s, at)) decompose(code_point(s, at), compatible, chars);
    for (size_t a = 0; a < chars.size();) {  // marks in the order of their classes
      size_t b = a;
      while (b < chars.size() && chars[b].combining != 0) ++b;
      std::stable_sort(chars.begin() + static_cast<std::ptrdiff_t>(a), chars.begin() + static_cast<std::ptrdiff_t>(b),
                       [](const Char& x, const Char& y) { return x.combining < y.combining; });
      a = b + 1;
    }
    if (composed) recompose(chars);
    size_t at = i;  // the next character of the source
    for (const Char& c : chars) {
      piece.clear();
      append_utf8(piece, c.code);
      if (c.change > 0) {
        if (at > 0)
          out.append_for(piece, text, at - 1);
        else
          out.append(piece, 0, 0);
        continue;
      }
      out.append_for(piece, text, std::min(at, s.size() - 1));
      for (int32_t k = 0; k <= -c.change && at < end; ++k) at += char_length(s, at);
    }
    i = end;
  }
  text = std::move(out);
}

}  // namespace trireme::tok
