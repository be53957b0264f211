#include "data/tok_added.h"

#include <algorithm>

#include "base/check.h"
#include "data/tok_unicode.h"

namespace trireme::tok {

AddedToken read_added_token(const Json& json, const std::string& source) {
  std::string place = source + ": added token";
  AddedToken t;
  t.id = json_get<int64_t>(json, "id", place);
  t.content = json_get<std::string>(json, "content", place);
  if (t.id < 0 || t.id > 100'000'000)
    throw DataError(str(source, ": the id of the added token \"", t.content, "\" is ", t.id,
                        "; ids are integers of 0 to 100000000"));
  t.single_word = json_get_or<bool>(json, "single_word", false, place);
  t.lstrip = json_get_or<bool>(json, "lstrip", false, place);
  t.rstrip = json_get_or<bool>(json, "rstrip", false, place);
  t.special = json_get_or<bool>(json, "special", false, place);
  t.normalized = json_get_or<bool>(json, "normalized", !t.special, place);
  return t;
}

void AddedTokens::add(const AddedToken& token) {
  if (!token.content.empty()) tokens_.push_back(token);
}

void AddedTokens::finish() {
  std::stable_sort(tokens_.begin(), tokens_.end(), [](const AddedToken& a, const AddedToken& b) {
    return a.content != b.content ? a.content < b.content : a.special && !b.special;
  });
  auto same = [](const AddedToken& a, const AddedToken& b) { return a.content == b.content; };
  tokens_.erase(std::unique(tokens_.begin(), tokens_.end(), same), tokens_.end());
  for (const AddedToken& token : tokens_) begins_[static_cast<unsigned char>(token.content[0])] = true;
}

// Narrows the sorted tokens byte by byte to those that the text goes on with.
const AddedToken* AddedTokens::match(std::string_view text, size_t at) const {
  const AddedToken *first = tokens_.data(), *last = first + tokens_.size(), *found = nullptr;
  for (size_t depth = 0; at + depth < text.size() && first != last; ++depth) {
    char c = text[at + depth];
    auto byte = [&](const AddedToken& t) { return static_cast<unsigned char>(t.content[depth]); };
    auto wanted = static_cast<unsigned char>(c);
    first = std::partition_point(first, last, [&](const AddedToken& t) { return byte(t) < wanted; });
    last = std::partition_point(first, last, [&](const AddedToken& t) { return byte(t) == wanted; });
    if (first != last && first->content.size() == depth + 1) found = first++;  // the shortest of them is the first
  }
  return found;
}

bool AddedTokens::cut(std::string_view text, std::vector<Part>& out) const {
  if (tokens_.empty()) return false;
  auto is = [&](size_t at, uint16_t classes) { return (char_class(code_point(text, at)) & classes) != 0; };
  auto part = [](size_t first, size_t last, int64_t id) {
    return Part{{static_cast<uint32_t>(first), static_cast<uint32_t>(last)}, id};
  };
  size_t from = 0;
  bool any = false;
  for (size_t at = 0; at < text.size();) {
    const AddedToken* token = begins_[static_cast<unsigned char>(text[at])] ? match(text, at) : nullptr;
    if (!token) {
      ++at;
      continue;
    }
    size_t begin = at, end = at + token->content.size();
    at = end;
    if (token->single_word &&
        ((begin > 0 && is(previous_char(text, begin), kWordChar)) || (end < text.size() && is(end, kWordChar))))
      continue;
    if (token->lstrip) {
      size_t space = begin;
      while (space > 0 && is(previous_char(text, space), kSpace)) space = previous_char(text, space);
      begin = std::max(space, from);
    }
    while (token->rstrip && end < text.size() && is(end, kSpace)) end += char_length(text, end);
    if (from < begin) out.push_back(part(from, begin, -1));
    out.push_back(part(begin, end, token->id));
    from = end;
    any = true;
  }
  if (any && from < text.size()) out.push_back(part(from, text.size(), -1));
  return any;
}

}  // namespace trireme::tok
