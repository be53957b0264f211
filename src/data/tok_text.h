// Text under way through a tokenizer: UTF-8 bytes, each knowing, where offsets are wanted, the character of the
// original text that it came from.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace trireme::tok {

struct Span {
  uint32_t first, last;  // bytes [first, last)
};

struct Text {
  std::string bytes;
  bool aligned = false;             // `begin` and `end` are kept
  std::vector<int32_t> begin, end;  // [bytes] the original characters a byte stands for
  bool at_start = true;             // the original's first character is the first of this text (before any change)
  size_t limit = 0;                 // of `bytes`: a hostile file could let a text grow without end

  size_t size() const { return bytes.size(); }
  // The characters [from, to) of the original; what they are does not matter where the text is not aligned.
  // DataError where the text becomes longer than `limit`.
  void append(std::string_view piece, int32_t from, int32_t to);
  // `piece` stands for what the byte `at` of `other` stands for.
  void append_for(std::string_view piece, const Text& other, size_t at) {
    if (aligned)
      append(piece, other.begin[at], other.end[at]);
    else
      append(piece, 0, 0);
  }
  void append(const Text& other, size_t first, size_t last);
  Text slice(size_t first, size_t last) const;
  Text like() const;  // an empty text of the same kind, with room for as much
};

// A text cut into words.
struct Words {
  Text text;
  std::vector<Span> spans;
  std::string_view word(size_t i) const {
    return std::string_view(text.bytes).substr(spans[i].first, spans[i].last - spans[i].first);
  }
};

// begin = character, end = character + 1, limit: a hundred times as long (no normal form needs more than eleven).
Text text_of(std::string_view utf8, bool aligned);

inline size_t char_length(unsigned char c) { return c < 0x80 ? 1 : c < 0xE0 ? 2 : c < 0xF0 ? 3 : 4; }  // of valid UTF-8
inline size_t char_length(std::string_view s, size_t at) { return char_length(static_cast<unsigned char>(s[at])); }
// The character at `at` of valid UTF-8, and before `at`.
inline uint32_t code_point(std::string_view s, size_t at) {
  auto b = [&](size_t k) { return static_cast<uint32_t>(static_cast<unsigned char>(s[at + k])); };
  if (b(0) < 0x80) return b(0);
  if (b(0) < 0xE0) return ((b(0) & 0x1F) << 6) | (b(1) & 0x3F);
  if (b(0) < 0xF0) return ((b(0) & 0x0F) << 12) | ((b(1) & 0x3F) << 6) | (b(2) & 0x3F);
  return ((b(0) & 0x07) << 18) | ((b(1) & 0x3F) << 12) | ((b(2) & 0x3F) << 6) | (b(3) & 0x3F);
}
size_t previous_char(std::string_view s, size_t at);
void append_utf8(std::string& out, uint32_t code_point);

bool is_ascii(std::string_view bytes);
bool valid_utf8(std::string_view bytes);
// Length of the valid character at `at`, or 0; `broken` is then the length of the maximal broken part (Unicode, D93b),
// and of all that is left where more bytes could still complete it and `cut_off` is true.
size_t valid_length(std::string_view bytes, size_t at, size_t* broken, bool* cut_off);

const std::string& byte_char(unsigned char byte);  // GPT-2's printable character for a byte, UTF-8
int char_byte(uint32_t character);                 // and back; -1: stands for none

}  // namespace trireme::tok
