// What each Unicode character counts as, as Hugging Face tokenizers has it (its parts follow four versions of Unicode,
// so the table is asked of that package: tests/tokenizer_unicode.py).
#pragma once

#include <cstdint>

namespace trireme::tok {

enum CharClass : uint16_t {
  kLetter = 1 << 0,         // \p{L} of its regular expressions
  kNumber = 1 << 1,         // \p{N}
  kSpace = 1 << 2,          // \s, White_Space
  kMark = 1 << 3,           // \p{M}
  kWordChar = 1 << 4,       // \w where added tokens and the pre-tokenizer Whitespace look at words
  kNumeric = 1 << 5,        // the pre-tokenizer Digits
  kPunctuation = 1 << 6,    // the pre-tokenizers Punctuation and BertPreTokenizer
  kControl = 1 << 7,        // what BertNormalizer drops
  kAccent = 1 << 8,         // what BertNormalizer strips after NFD
  kCombining = 1 << 9,      // what StripAccents strips
  kUnnormalized = 1 << 10,  // too new for its normal forms, which leave it alone
  kSettledC = 1 << 11,      // NFC leaves it as it is whatever stands around it
  kSettledKC = 1 << 12,     // and NFKC
};

namespace detail {
const uint16_t* low_classes();  // of the first 65,536 characters
uint16_t high_class(uint32_t character);
}  // namespace detail

inline const uint16_t* const kLowClasses = detail::low_classes();
inline uint16_t char_class(uint32_t c) { return c < 0x10000 ? kLowClasses[c] : detail::high_class(c); }

uint32_t lower_case(uint32_t character);  // where it is one character: all but U+0130

}  // namespace trireme::tok
