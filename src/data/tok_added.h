// Added tokens: found in the text before anything else, each with its own rules.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "base/json.h"
#include "data/tok_text.h"

namespace trireme::tok {

struct AddedToken {
  int64_t id = 0;
  std::string content;
  bool single_word = false;  // not inside a word
  bool lstrip = false;       // takes the white space before it
  bool rstrip = false;       // and after it
  bool normalized = true;    // searched for in normalized text
  bool special = false;
};

// DataError: a key is missing, of a wrong type or out of range.
AddedToken read_added_token(const Json& json, const std::string& source);

// Searches for many tokens at once: the leftmost, of those the longest.
class AddedTokens {
 public:
  struct Part {
    Span span;
    int64_t id;  // -1: text between tokens
  };
  void add(const AddedToken& token);  // all before the first cut()
  void finish();
  // Appends the parts of `text` in their order. False: there is no token in it, and nothing is appended.
  bool cut(std::string_view text, std::vector<Part>& out) const;

 private:
  const AddedToken* match(std::string_view text, size_t at) const;
  std::vector<AddedToken> tokens_;  // by content
  bool begins_[256] = {};           // some token begins with this byte
};

}  // namespace trireme::tok
