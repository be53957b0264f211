#include "data/tok_word_piece.h"

#include <algorithm>

#include "base/check.h"

namespace trireme::tok {

WordPiece::WordPiece(const Json& model, const std::string& source) : Model(model, source), source_(source) {
  auto prefix = json_get_or<std::string>(model, "continuing_subword_prefix", "##", source + ": model");
  auto characters = json_get_or<int64_t>(model, "max_input_chars_per_word", 100, source + ": model");
  if (characters < 1 || characters > 1000)
    throw DataError(str(source, ": model: max_input_chars_per_word is ", characters, "; allowed are 1 to 1000"));
  max_characters_ = static_cast<size_t>(characters);
  unk_name_ = json_get_or<std::string>(model, "unk_token", "[UNK]", source + ": model");
  if (auto it = vocab_.find(unk_name_); it != vocab_.end()) unk_ = it->second;
  for (const auto& [token, id] : vocab_) {
    whole_.emplace(token, id);
    longest_ = std::max(longest_, token.size());
    if (token.starts_with(prefix)) inner_.emplace(std::string_view(token).substr(prefix.size()), id);
  }
}

void WordPiece::tokenize(std::string_view word, std::vector<Piece>& out) const {
  size_t first_piece = out.size(), characters = 0;
  for (char c : word) characters += (static_cast<unsigned char>(c) & 0xC0) != 0x80;
  bool known = characters <= max_characters_;
  for (size_t begin = 0; known && begin < word.size();) {
    const auto& tokens = begin == 0 ? whole_ : inner_;
    size_t end = std::min(word.size(), begin + longest_);
    auto it = tokens.end();
    for (; end > begin; end = previous_char(word, end))
      if ((end == word.size() || (static_cast<unsigned char>(word[end]) & 0xC0) != 0x80) &&
          (it = tokens.find(word.substr(begin, end - begin))) != tokens.end())
        break;
    known = it != tokens.end();
    if (known) out.push_back({it->second, static_cast<uint32_t>(begin), static_cast<uint32_t>(end)});
    begin = end;
  }
  if (known) return;
  if (unk_ < 0)
    throw DataError(
        str(source_, ": a word is not in the vocabulary, and neither is the unk_token \"", unk_name_, "\""));
  out.resize(first_piece);
  out.push_back({unk_, 0, static_cast<uint32_t>(word.size())});
}

}  // namespace trireme::tok
