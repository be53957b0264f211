// The split patterns of well-known tokenizers, by hand: what PCRE2 would match, many times faster.
//   gpt2     's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
//   llama 3  (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|
//   ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+ qwen 2   the same with \p{N}
// Each matches every character of any text, so its matches are the words.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "data/tok_text.h"

namespace trireme::tok {

extern const char* const kGpt2Pattern;
extern const char* const kLlama3Pattern;
extern const char* const kQwen2Pattern;

// Appends the words of `text`, valid UTF-8, each moved by `shift` bytes.
using Scanner = void (*)(std::string_view text, uint32_t shift, std::vector<Span>& out);

// The scanner of exactly this pattern, or null.
Scanner scanner_for(std::string_view pattern);

}  // namespace trireme::tok
