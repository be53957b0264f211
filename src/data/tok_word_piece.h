#pragma once

#include "data/tok_model.h"

namespace trireme::tok {

// Longest match first; a word with a part that is no token, or of too many characters, is the unknown token.
class WordPiece : public Model {
 public:
  WordPiece(const Json& model, const std::string& source);

 private:
  void tokenize(std::string_view word, std::vector<Piece>& out) const override;
  std::unordered_map<std::string_view, int32_t> inner_;  // tokens that go on a word, without their prefix
  std::unordered_map<std::string_view, int32_t> whole_;  // all, as the beginning of one
  size_t longest_ = 0, max_characters_ = 100;
  int32_t unk_ = -1;
  std::string unk_name_, source_;
};

}  // namespace trireme::tok
