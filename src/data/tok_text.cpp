#include "data/tok_text.h"

#include <array>
#include <cstring>

#include "base/check.h"

namespace trireme::tok {

void Text::append(std::string_view piece, int32_t from, int32_t to) {
  if (bytes.size() + piece.size() > limit)
    throw DataError(str("the tokenizer lets a text grow to more than ", limit, " bytes"));
  bytes += piece;
  if (!aligned) return;
  begin.insert(begin.end(), piece.size(), from);
  end.insert(end.end(), piece.size(), to);
}

void Text::append(const Text& other, size_t first, size_t last) {
  bytes.append(other.bytes, first, last - first);
  if (!aligned) return;
  auto part = [&](const std::vector<int32_t>& from, std::vector<int32_t>& to) {
    to.insert(to.end(), from.begin() + static_cast<std::ptrdiff_t>(first),
              from.begin() + static_cast<std::ptrdiff_t>(last));
  };
  part(other.begin, begin);
  part(other.end, end);
}

Text Text::like() const {
  Text out;
  out.aligned = aligned;
  out.at_start = at_start;
  out.limit = limit;
  out.bytes.reserve(bytes.size() + bytes.size() / 2);
  return out;
}

Text Text::slice(size_t first, size_t last) const {
  Text out;
  out.aligned = aligned;
  out.at_start = at_start && first == 0;
  out.limit = limit;
  out.append(*this, first, last);
  return out;
}

Text text_of(std::string_view utf8, bool aligned) {
  Text text;
  text.bytes = utf8;
  text.aligned = aligned;
  text.limit = 100 * utf8.size() + (1 << 16);
  if (!aligned) return text;
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

size_t previous_char(std::string_view s, size_t at) {
  do --at;
  while (at > 0 && (static_cast<unsigned char>(s[at]) & 0xC0) == 0x80);
  return at;
}

void append_utf8(std::string& out, uint32_t c) {
  auto put = [&](uint32_t byte) { out += static_cast<char>(byte); };
  if (c < 0x80) return put(c);
  if (c < 0x800) {
    put(0xC0 | (c >> 6));
  } else {
    if (c < 0x10000) {
      put(0xE0 | (c >> 12));
    } else {
      put(0xF0 | (c >> 18));
      put(0x80 | ((c >> 12) & 0x3F));
    }
    put(0x80 | ((c >> 6) & 0x3F));
  }
  put(0x80 | (c & 0x3F));
}

namespace {

// The first byte that is not ASCII, eight at a time.
size_t ascii_prefix(std::string_view s) {
  size_t i = 0;
  for (uint64_t eight; i + 8 <= s.size(); i += 8) {
    std::memcpy(&eight, s.data() + i, 8);
    if (eight & 0x8080808080808080u) break;
  }
  while (i < s.size() && static_cast<unsigned char>(s[i]) < 0x80) ++i;
  return i;
}

}  // namespace

bool is_ascii(std::string_view s) { return ascii_prefix(s) == s.size(); }

size_t valid_length(std::string_view s, size_t i, size_t* broken, bool* cut_off) {
  auto c = static_cast<unsigned char>(s[i]);
  *broken = 1;
  *cut_off = false;
  if (c < 0x80) return 1;
  size_t n = c >= 0xC2 && c <= 0xDF ? 2 : c >= 0xE0 && c <= 0xEF ? 3 : c >= 0xF0 && c <= 0xF4 ? 4 : 0;
  for (size_t k = 1; k < n; ++k) {
    if (i + k >= s.size()) return *broken = k, *cut_off = true, 0;
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

bool valid_utf8(std::string_view s) {
  bool cut_off = false;
  for (size_t i = ascii_prefix(s), broken = 0; i < s.size();) {
    size_t n = valid_length(s, i, &broken, &cut_off);
    if (n == 0) return false;
    i += n;
    if (n == 1) i += ascii_prefix(s.substr(i));
  }
  return true;
}

const std::string& byte_char(unsigned char byte) {
  static const auto table = [] {
    std::array<std::string, 256> out;
    uint32_t next = 256;
    for (uint32_t b = 0; b < 256; ++b) {
      bool printable = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
      append_utf8(out[b], printable ? b : next++);
    }
    return out;
  }();
  return table[byte];
}

int char_byte(uint32_t character) {
  static const auto table = [] {
    std::array<int, 512> out;
    out.fill(-1);
    for (int b = 0; b < 256; ++b) out[code_point(byte_char(static_cast<unsigned char>(b)), 0)] = b;
    return out;
  }();
  return character < table.size() ? table[character] : -1;
}

}  // namespace trireme::tok
