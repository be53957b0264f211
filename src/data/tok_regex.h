// Regular expressions of a tokenizer.json. They are written for Oniguruma (Ruby syntax); PCRE2 runs them, with what the
// two read differently rewritten, and with limits that keep a hostile pattern from running on.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "data/tok_scan.h"
#include "data/tok_text.h"

namespace trireme::tok {

class Regex {
 public:
  // DataError beginning with `source` where the pattern is none, or holds what PCRE2 cannot say.
  // `by_hand`: a well-known pattern is matched by its scanner; off, always by PCRE2.
  Regex(const std::string& pattern, const std::string& source, bool by_hand = true);
  // Appends the matches in `text`, empty ones too, each moved by `shift` bytes. DataError where the limits are reached.
  void matches(std::string_view text, uint32_t shift, std::vector<Span>& out) const;

 private:
  std::shared_ptr<void> code_;
  Scanner scanner_ = nullptr;
  std::string source_;
};

}  // namespace trireme::tok
