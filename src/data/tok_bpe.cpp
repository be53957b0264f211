#include <atomic>
#include <queue>

#include "base/check.h"
#include "data/tok_pipeline.h"

namespace trireme::tok {
namespace {

uint64_t pair_key(int64_t a, int64_t b) { return (static_cast<uint64_t>(a) << 32) | static_cast<uint32_t>(b); }

}  // namespace

Bpe::Bpe(const Json& model, const std::string& source) {
  static std::atomic<uint64_t> serial{0};
  serial_ = ++serial;
  for (const char* key : {"dropout", "continuing_subword_prefix", "end_of_word_suffix"})
    if (model.contains(key) && !model[key].is_null() && model[key] != "" && model[key] != 0.0)
      throw DataError(str(source, ": model: \"", key, "\" is set, which is not supported"));
  byte_fallback_ = json_get_or<bool>(model, "byte_fallback", false, source);
  fuse_unk_ = json_get_or<bool>(model, "fuse_unk", false, source);
  ignore_merges_ = json_get_or<bool>(model, "ignore_merges", false, source);
  if (!model.contains("vocab") || !model["vocab"].is_object()) throw DataError(str(source, ": model: \"vocab\" must be an object"));
  for (const auto& item : model["vocab"].items()) {
    if (!item.value().is_number_integer() || item.value().get<double>() < 0 || item.value().get<double>() > 1e8)
      throw DataError(str(source, ": model: the id of \"", item.key(), "\" is ", dump_json(item.value()), "; ids are 0 to 100000000"));
    vocab_.emplace(item.key(), item.value().get<int64_t>());
  }
  if (!model.contains("merges") || !model["merges"].is_array()) throw DataError(str(source, ": model: \"merges\" must be a list"));
  int64_t rank = 0;
  for (const Json& merge : model["merges"]) {
    std::string a, b;
    if (merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string()) {
      a = merge[0].get<std::string>(), b = merge[1].get<std::string>();
    } else if (merge.is_string()) {
      std::string both = merge.get<std::string>();
      size_t space = both.find(' ');
      if (space == std::string::npos) throw DataError(str(source, ": merge ", rank, " (\"", both, "\") is no pair"));
      a = both.substr(0, space), b = both.substr(space + 1);
    } else {
      throw DataError(str(source, ": merge ", rank, " must be a pair of tokens"));
    }
    for (const std::string& token : {a, b, a + b})
      if (!vocab_.count(token))
        throw DataError(str(source, ": merge ", rank, " names the token \"", token, "\", which is not in the vocabulary"));
    merges_.emplace(pair_key(vocab_[a], vocab_[b]), Merge{rank++, vocab_[a + b]});
  }
  if (model.contains("unk_token") && model["unk_token"].is_string()) {
    auto it = vocab_.find(model["unk_token"].get<std::string>());
    if (it == vocab_.end()) throw DataError(str(source, ": unk_token ", dump_json(model["unk_token"]), " is not in the vocabulary"));
    unk_ = it->second;
  }
  for (int b = 0; b < 256; ++b) {
    char name[8];
    std::snprintf(name, sizeof name, "<0x%02X>", b);
    auto it = vocab_.find(name);
    byte_ids_[b] = it == vocab_.end() ? -1 : it->second;
  }
}

void Bpe::encode(std::string_view word, std::vector<Piece>& out) const {
  // Words repeat: text of natural language is nearly all found here. A thread's cache serves the tokenizer it used last.
  struct Cache {
    uint64_t owner = 0;
    std::unordered_map<std::string, std::vector<Piece>> words;
  };
  thread_local Cache cache;
  if (cache.owner != serial_ || cache.words.size() > (1 << 16)) cache.words.clear(), cache.owner = serial_;
  std::string key(word);
  auto it = cache.words.find(key);
  if (it == cache.words.end()) {
    std::vector<Piece> pieces;
    auto whole = ignore_merges_ ? vocab_.find(key) : vocab_.end();
    if (whole != vocab_.end()) pieces.push_back({whole->second, 0, static_cast<uint32_t>(word.size())});
    else merge(word, pieces);
    if (word.size() > 256) {  // long words are rare and would only fill the cache
      out.insert(out.end(), pieces.begin(), pieces.end());
      return;
    }
    it = cache.words.emplace(std::move(key), std::move(pieces)).first;
  }
  out.insert(out.end(), it->second.begin(), it->second.end());
}

void Bpe::merge(std::string_view word, std::vector<Piece>& out) const {
  struct Symbol {
    int64_t id;
    uint32_t begin, end;
    int32_t previous, next;
  };
  std::vector<Symbol> symbols;
  bool last_unknown = false;
  auto add = [&](int64_t id, size_t begin, size_t end) {
    auto n = static_cast<int32_t>(symbols.size());
    symbols.push_back({id, static_cast<uint32_t>(begin), static_cast<uint32_t>(end), n - 1, n + 1});
  };
  for (size_t i = 0; i < word.size();) {
    size_t n = std::min(char_length(static_cast<unsigned char>(word[i])), word.size() - i);
    auto it = vocab_.find(std::string(word.substr(i, n)));
    bool unknown = it == vocab_.end();
    if (!unknown) {
      add(it->second, i, i + n);
    } else {
      bool bytes = byte_fallback_;
      for (size_t k = 0; k < n && bytes; ++k) bytes = byte_ids_[static_cast<unsigned char>(word[i + k])] >= 0;
      if (bytes) {
        for (size_t k = 0; k < n; ++k) add(byte_ids_[static_cast<unsigned char>(word[i + k])], i, i + n);
        unknown = false;
      } else if (unk_ >= 0) {
        if (fuse_unk_ && last_unknown) symbols.back().end = static_cast<uint32_t>(i + n);
        else add(unk_, i, i + n);
      }
    }
    last_unknown = unknown;
    i += n;
  }
  if (symbols.empty()) return;
  symbols.back().next = -1;

  struct Candidate {
    int64_t rank;
    int32_t left;
    int64_t left_id, right_id, id;
    bool operator>(const Candidate& o) const { return rank != o.rank ? rank > o.rank : left > o.left; }
  };
  std::priority_queue<Candidate, std::vector<Candidate>, std::greater<>> queue;
  auto offer = [&](int32_t left) {
    if (left < 0 || symbols[static_cast<size_t>(left)].next < 0) return;
    const Symbol& a = symbols[static_cast<size_t>(left)];
    const Symbol& b = symbols[static_cast<size_t>(a.next)];
    auto it = merges_.find(pair_key(a.id, b.id));
    if (it != merges_.end()) queue.push({it->second.rank, left, a.id, b.id, it->second.id});
  };
  for (int32_t i = 0; i + 1 < static_cast<int32_t>(symbols.size()); ++i) offer(i);
  while (!queue.empty()) {
    Candidate c = queue.top();
    queue.pop();
    Symbol& a = symbols[static_cast<size_t>(c.left)];
    if (a.id != c.left_id || a.next < 0) continue;  // overtaken by another merge
    Symbol& b = symbols[static_cast<size_t>(a.next)];
    if (b.id != c.right_id) continue;
    a.id = c.id;
    a.end = b.end;
    b.id = -1;
    int32_t after = b.next;
    a.next = after;
    if (after >= 0) symbols[static_cast<size_t>(after)].previous = c.left;
    offer(a.previous);
    offer(c.left);
  }
  for (int32_t i = 0; i >= 0; i = symbols[static_cast<size_t>(i)].next)
    out.push_back({symbols[static_cast<size_t>(i)].id, symbols[static_cast<size_t>(i)].begin, symbols[static_cast<size_t>(i)].end});
}

}  // namespace trireme::tok
