// The stages of a tokenizer around its model, as tokenizer.json lists them.
//   normalizers     Sequence, NFC, NFD, NFKC, NFKD, Lowercase, Strip, StripAccents, Replace, Prepend, ByteLevel,
//   BertNormalizer pre-tokenizers  Sequence, ByteLevel, Metaspace, Split, Digits, Punctuation, Whitespace,
//   WhitespaceSplit, CharDelimiterSplit,
//                   BertPreTokenizer
//   post-processors Sequence, TemplateProcessing, ByteLevel, BertProcessing, RobertaProcessing
//   decoders        Sequence, ByteLevel, ByteFallback, Metaspace, WordPiece, Replace, Strip, Fuse
// Each read_ function reads one component; null gives an empty result (a decoder: tokens with spaces between).
// DataError names what is not supported or wrong.
#pragma once

#include <functional>
#include <memory>
#include <optional>

#include "base/json.h"
#include "data/tok_regex.h"
#include "data/tok_text.h"

namespace trireme::tok {

using Normalizer = std::function<void(Text&)>;
Normalizer read_normalizer(const Json& json, const std::string& source);

// Moves each byte to its printable character.
void to_byte_chars(Text& text);
void words_to_byte_chars(Words& words);

struct PreTokenizer {
  std::vector<std::function<void(Words&)>> steps;
  bool bytes_to_chars = false;  // afterwards each byte of a word is to be taken for its printable character
  bool asks_for_start = false;  // a step asks whether a word begins the original text
  void run(Words& words) const {
    for (const auto& step : steps) step(words);
  }
};
PreTokenizer read_pre_tokenizer(const Json& json, const std::string& source);

struct PostStep {
  std::vector<int64_t> before, after;             // put around the text
  bool trims = false, adds_prefix_space = false;  // spaces at the ends of tokens are left out of their offsets
};
std::vector<PostStep> read_post_processor(const Json& json, const std::string& source);

// Tokens to text, one at a time. Steps hand on what later tokens cannot change any more.
class DecodeStep {
 public:
  virtual ~DecodeStep() = default;
  // A token, or the next part of one that is complete where `complete`.
  virtual void put(std::string_view part, bool complete) = 0;
  virtual void finish() = 0;  // no token follows
  DecodeStep* next = nullptr;
};
using DecodeStepMaker = std::function<std::unique_ptr<DecodeStep>()>;
std::vector<DecodeStepMaker> read_decoder(const Json& json, const std::string& source);

// What components have in common.
std::string type_of(const Json& json, const std::string& source, const char* stage);
[[noreturn]] void refuse_type(const std::string& source, const char* stage, const std::string& type);
const Json& list_of(const Json& json, const char* key, const std::string& place);
std::string one_character(const Json& json, const char* key, const char* fallback, const std::string& place);
std::string metaspace_scheme(const Json& json, const std::string& place);

// {"String": ...} or {"Regex": ...} under "pattern".
using Finder = std::function<void(std::string_view text, uint32_t shift, std::vector<Span>& out)>;
Finder find_string(std::string needle);
Finder read_finder(const Json& json, const std::string& place);
void replace(Text& text, const Finder& find, const std::string& content);

}  // namespace trireme::tok
