#include "data/tok_bpe.h"

#include <algorithm>
#include <bit>
#include <queue>

#include "base/check.h"

namespace trireme::tok {
namespace {

constexpr std::string_view kMark = "\xE2\x96\x81";  // SentencePiece's sign for a space
constexpr size_t kFew = 48;                         // symbols of a word that are merged by looking at all each time

std::pair<std::string, std::string> read_merge(const Json& merge, size_t rank, const std::string& source) {
  if (merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string())
    return {merge[0].get<std::string>(), merge[1].get<std::string>()};
  if (!merge.is_string()) throw DataError(str(source, ": merge ", rank, " must be a pair of tokens"));
  auto both = merge.get<std::string>();
  size_t space = both.find(' ');
  if (space == std::string::npos) throw DataError(str(source, ": merge ", rank, " (\"", both, "\") is no pair"));
  return {both.substr(0, space), both.substr(space + 1)};
}

}  // namespace

MergeTable::MergeTable(size_t merges) {
  slots_.resize(std::bit_ceil(2 * merges + 2));
  shift_ = 64 - std::countr_zero(slots_.size());
}

void MergeTable::set(uint64_t key, uint64_t value) {
  size_t i = key * 0x9E3779B97F4A7C15u >> shift_;
  while (slots_[i].key != kNone && slots_[i].key != key) i = (i + 1) & (slots_.size() - 1);
  slots_[i] = {key, value};
}

Bpe::Bpe(const Json& model, const std::string& source) : Model(model, source) {
  for (const char* key : {"dropout", "continuing_subword_prefix", "end_of_word_suffix"})
    if (model.contains(key) && !model[key].is_null() && model[key] != "" && model[key] != 0.0)
      throw DataError(str(source, ": model: \"", key, "\" is set, which is not supported"));
  byte_fallback_ = json_get_or<bool>(model, "byte_fallback", false, source);
  fuse_unk_ = json_get_or<bool>(model, "fuse_unk", false, source);
  ignore_merges_ = json_get_or<bool>(model, "ignore_merges", false, source);
  auto find = [&](const std::string& token) {
    auto it = vocab_.find(token);
    return it == vocab_.end() ? -1 : it->second;
  };
  if (!model.contains("merges") || !model["merges"].is_array())
    throw DataError(str(source, ": model: \"merges\" must be a list"));
  const Json& merges = model["merges"];
  merges_ = MergeTable(merges.size());
  cuts_at_mark_ = !ignore_merges_ && vocab_.count(std::string(kMark)) != 0;
  for (size_t rank = 0; rank < merges.size(); ++rank) {
    auto [left, right] = read_merge(merges[rank], rank, source);
    int32_t ids[3] = {};
    for (int i = 0; const std::string& token : {left, right, left + right})
      if ((ids[i++] = find(token)) < 0)
        throw DataError(
            str(source, ": merge ", rank, " names the token \"", token, "\", which is not in the vocabulary"));
    merges_.set(MergeTable::key(ids[0], ids[1]), static_cast<uint64_t>(rank) << 32 | static_cast<uint32_t>(ids[2]));
    if (right.starts_with(kMark) && !left.ends_with(kMark)) cuts_at_mark_ = false;
  }
  if (model.contains("unk_token") && !model["unk_token"].is_null()) {
    auto unk = json_get<std::string>(model, "unk_token", source + ": model");
    unk_ = find(unk);
    if (unk_ < 0) throw DataError(str(source, ": model: the unk_token \"", unk, "\" is not in the vocabulary"));
  }
  if (unk_ < 0) cuts_at_mark_ = false;  // characters without a token move all that follow them
  for (int b = 0; b < 256; ++b) {
    char name[8];
    std::snprintf(name, sizeof name, "<0x%02X>", b);
    byte_ids_[static_cast<size_t>(b)] = find(name);
  }
  for (const auto& [token, id] : vocab_)
    if (!token.empty() && char_length(token, 0) == token.size()) characters_[code_point(token, 0)] = id;
  if (ignore_merges_) whole_ = vocab_;
}

bool Bpe::take_bytes() {
  std::array<int32_t, 256> ids;
  for (int b = 0; b < 256; ++b) {
    auto it = vocab_.find(byte_char(static_cast<unsigned char>(b)));
    if (it == vocab_.end()) return false;
    ids[static_cast<size_t>(b)] = it->second;
  }
  byte_ids_ = ids;
  words_are_bytes_ = true;
  whole_.clear();
  for (const auto& [token, id] : vocab_) {
    if (!ignore_merges_) break;
    std::string bytes;
    size_t i = 0;
    for (; i < token.size(); i += char_length(token, i)) {
      int byte = char_byte(code_point(token, i));
      if (byte < 0) break;
      bytes += static_cast<char>(byte);
    }
    if (i >= token.size()) whole_[bytes] = id;
  }
  return true;
}

// Where no merge joins anything with a ▁ after it, a text falls apart before each ▁ that follows something else: the
// parts are tokenized one by one, and most of them are in the cache.
void Bpe::cut(Words& words) const {
  if (!cuts_at_mark_ || words_are_bytes_) return;
  std::vector<Span> out;
  std::string_view text = words.text.bytes;
  for (Span word : words.spans) {
    for (size_t at = word.first;;) {
      at = text.find(kMark, at + 1);
      if (at >= word.last) break;
      if (at - word.first >= kMark.size() && text.substr(at - kMark.size(), kMark.size()) == kMark) continue;
      out.push_back({word.first, static_cast<uint32_t>(at)});
      word.first = static_cast<uint32_t>(at);
    }
    out.push_back(word);
  }
  words.spans = std::move(out);
}

void Bpe::tokenize(std::string_view word, std::vector<Piece>& out) const {
  if (ignore_merges_)
    if (auto it = whole_.find(std::string(word)); it != whole_.end()) {
      out.push_back({it->second, 0, static_cast<uint32_t>(word.size())});
      return;
    }
  size_t first = out.size();
  if (words_are_bytes_) {
    out.resize(first + word.size());
    for (uint32_t i = 0; i < word.size(); ++i)
      out[first + i] = {byte_ids_[static_cast<unsigned char>(word[i])], i, i + 1};
  } else {
    first_symbols(word, out);
  }
  size_t count = out.size() - first;
  if (count > kFew) return merge_many(out, first);
  merge_few(out.data() + first, count);
  out.resize(first + count);
}

// A token for each character. The library counts lengths, not places: a character that gives no token moves the
// following ones forward, and an unknown one stands after the bytes that follow it.
void Bpe::first_symbols(std::string_view word, std::vector<Piece>& out) const {
  uint32_t at = 0, unknown = 0;  // bytes of the unknown token that is still to come
  auto add = [&](int32_t id, uint32_t length) {
    out.push_back({id, at, at + length});
    at += length;
  };
  auto end_unknown = [&] {
    if (unknown > 0) add(unk_, unknown);
    unknown = 0;
  };
  for (size_t i = 0; i < word.size();) {
    size_t n = char_length(word, i);
    auto it = characters_.find(code_point(word, i));
    if (it != characters_.end()) {
      end_unknown();
      add(it->second, static_cast<uint32_t>(n));
    } else {
      bool bytes = byte_fallback_;
      for (size_t k = 0; k < n && bytes; ++k) bytes = byte_ids_[static_cast<unsigned char>(word[i + k])] >= 0;
      if (bytes) {
        for (size_t k = 0; k < n; ++k) add(byte_ids_[static_cast<unsigned char>(word[i + k])], 1);
      } else if (unk_ >= 0) {
        if (!fuse_unk_) end_unknown();
        unknown += static_cast<uint32_t>(n);
      }
    }
    i += n;
  }
  end_unknown();
}

void Bpe::merge_few(Piece* symbols, size_t& count) const {
  uint64_t pairs[kFew];  // of each symbol with the next one
  for (size_t i = 0; i + 1 < count; ++i) pairs[i] = merges_.find(symbols[i].id, symbols[i + 1].id);
  while (count > 1) {
    size_t best = 0;
    for (size_t i = 1; i + 1 < count; ++i)
      if (pairs[i] < pairs[best]) best = i;
    if (pairs[best] == MergeTable::kNone) return;
    symbols[best].id = static_cast<int32_t>(pairs[best]);
    symbols[best].end = symbols[best + 1].end;
    std::copy(symbols + best + 2, symbols + count, symbols + best + 1);
    if (best + 2 < count) std::copy(pairs + best + 2, pairs + count - 1, pairs + best + 1);
    --count;
    if (best > 0) pairs[best - 1] = merges_.find(symbols[best - 1].id, symbols[best].id);
    if (best + 1 < count) pairs[best] = merges_.find(symbols[best].id, symbols[best + 1].id);
  }
}

// The same with a queue, for words of any length.
void Bpe::merge_many(std::vector<Piece>& pieces, size_t first) const {
  struct Link {
    int32_t previous, next;
    uint64_t pair;  // with the next one
  };
  struct Candidate {
    uint32_t rank, left;
    bool operator>(const Candidate& o) const { return rank != o.rank ? rank > o.rank : left > o.left; }
  };
  Piece* symbols = pieces.data() + first;
  auto count = static_cast<int32_t>(pieces.size() - first);
  std::vector<Link> links(static_cast<size_t>(count));
  std::vector<Candidate> waiting;
  waiting.reserve(static_cast<size_t>(count));
  std::priority_queue<Candidate, std::vector<Candidate>, std::greater<>> queue({}, std::move(waiting));
  auto look = [&](int32_t left) {
    Link& link = links[static_cast<size_t>(left)];
    link.pair = link.next < 0 ? MergeTable::kNone : merges_.find(symbols[left].id, symbols[link.next].id);
    if (link.pair != MergeTable::kNone)
      queue.push({static_cast<uint32_t>(link.pair >> 32), static_cast<uint32_t>(left)});
  };
  for (int32_t i = 0; i < count; ++i) {
    links[static_cast<size_t>(i)] = {i - 1, i + 1 < count ? i + 1 : -1, 0};
    look(i);
  }
  while (!queue.empty()) {
    auto [rank, left] = queue.top();
    queue.pop();
    Link& link = links[left];
    if (link.pair == MergeTable::kNone || link.pair >> 32 != rank) continue;  // overtaken by another merge
    symbols[left].id = static_cast<int32_t>(link.pair);
    symbols[left].end = symbols[link.next].end;
    Link& gone = links[static_cast<size_t>(link.next)];
    link.next = gone.next;
    gone.pair = MergeTable::kNone;
    if (link.next >= 0) links[static_cast<size_t>(link.next)].previous = static_cast<int32_t>(left);
    if (link.previous >= 0) look(link.previous);
    look(static_cast<int32_t>(left));
  }
  size_t kept = first;
  for (int32_t i = 0; i >= 0 && i < count; i = links[static_cast<size_t>(i)].next) pieces[kept++] = symbols[i];
  pieces.resize(kept);
}

}  // namespace trireme::tok
