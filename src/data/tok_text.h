// Text under way through a tokenizer: UTF-8 bytes, each knowing the character of the original text it came from.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace trireme::tok {

struct Text {
  std::string bytes;
  std::vector<int32_t> begin, end;  // [bytes] the original characters a byte stands for

  size_t size() const { return bytes.size(); }
  void append(std::string_view piece, int32_t from, int32_t to);
  void append(const Text& other, size_t first, size_t last);
  Text slice(size_t first, size_t last) const;
};

Text text_of(std::string_view utf8);  // begin = character, end = character + 1

size_t char_length(unsigned char first_byte);  // of a UTF-8 character
std::string lossy_utf8(std::string_view bytes);  // each maximal broken part becomes U+FFFD
bool valid_utf8(std::string_view bytes);
uint32_t code_point(std::string_view bytes, size_t at);

// A regular expression of a tokenizer.json. PCRE2 with Unicode properties; limits keep a hostile pattern from running on.
class Regex {
 public:
  // DataError beginning with `source` where the pattern is not one.
  Regex(const std::string& pattern, const std::string& source);
  // Matches in `text`, as [first, last) bytes; empty matches are passed over. DataError where the limits are reached.
  std::vector<std::pair<size_t, size_t>> matches(std::string_view text) const;

 private:
  std::shared_ptr<void> code_;
  std::string source_;
};

}  // namespace trireme::tok
