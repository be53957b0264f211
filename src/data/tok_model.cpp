#include "data/tok_model.h"

#include <algorithm>
#include <atomic>

#include "base/check.h"
#include "data/tok_bpe.h"
#include "data/tok_cache.h"
#include "data/tok_word_piece.h"

namespace trireme::tok {

void IdBuffer::grow(size_t capacity) {
  std::unique_ptr<int64_t[]> bigger(new int64_t[capacity]);
  std::copy_n(data_.get(), size_, bigger.get());
  data_ = std::move(bigger);
  capacity_ = capacity;
}

constexpr WordCache::Masks WordCache::kMasks;

WordCache& WordCache::of(uint64_t serial) {
  thread_local WordCache cache;
  if (cache.serial_ != serial) {
    cache.entries_.assign(size_t{2} << kBits, Entry{});  // no word has the key of an empty entry: words have a length
    cache.serial_ = serial;
  }
  return cache;
}

const WordCache::Entry* WordCache::put(const std::vector<Piece>& pieces) {
  if (pieces.size() > kMaxPieces) return nullptr;
  place_[1] = place_[0];
  Entry& e = place_[0];
  std::memcpy(e.key, key_, sizeof key_);
  e.count = static_cast<uint8_t>(pieces.size());
  for (size_t i = 0; i < pieces.size(); ++i) {
    e.ids[i] = pieces[i].id;
    e.ends[i] = static_cast<uint8_t>(pieces[i].end);
  }
  return &e;
}

Model::Model(const Json& model, const std::string& source) {
  static std::atomic<uint64_t> serial{0};
  serial_ = ++serial;
  if (!model.contains("vocab") || !model["vocab"].is_object())
    throw DataError(str(source, ": model: \"vocab\" must be an object"));
  const Json& vocab = model["vocab"];
  vocab_.reserve(vocab.size());
  std::unordered_map<int32_t, const std::string*> seen;
  seen.reserve(vocab.size());
  for (const auto& [token, value] : vocab.items()) {
    if (!value.is_number_integer() || value.get<double>() < 0 || value.get<double>() > 1e8)
      throw DataError(str(source, ": model: the id of \"", token, "\" is ", dump_json(value).substr(0, 80),
                          "; ids are integers of 0 to 100000000"));
    auto id = value.get<int32_t>();
    auto it = vocab_.emplace(token, id).first;
    auto [first, fresh] = seen.emplace(id, &it->first);
    if (!fresh)
      throw DataError(str(source, ": model: \"", *first->second, "\" and \"", token, "\" have the same id ", id));
  }
}

void Model::encode(const Words& words, IdBuffer& out) const {
  WordCache& cache = WordCache::of(serial_);
  std::vector<Piece> pieces;
  const char* text = words.text.bytes.data();
  size_t size = words.text.size();
  for (Span span : words.spans) {
    std::string_view word(text + span.first, span.last - span.first);
    if (word.size() > WordCache::kMaxBytes) {
      pieces.clear();
      tokenize(word, pieces);
    } else {
      const WordCache::Entry* found = cache.find(word, size - span.first);
      if (!found) {
        pieces.clear();
        tokenize(word, pieces);
        found = cache.put(pieces);
      }
      if (found) {
        int64_t* to = out.room(WordCache::kMaxPieces);
        to[0] = found->ids[0];
        for (size_t i = 1; i < found->count; ++i) to[i] = found->ids[i];
        out.advance(found->count);
        continue;
      }
    }
    int64_t* to = out.room(pieces.size());
    for (size_t i = 0; i < pieces.size(); ++i) to[i] = pieces[i].id;
    out.advance(pieces.size());
  }
}

void Model::encode(std::string_view word, std::vector<Piece>& out) const {
  if (word.size() > WordCache::kMaxBytes) return tokenize(word, out);
  WordCache& cache = WordCache::of(serial_);
  const WordCache::Entry* found = cache.find(word, word.size());
  if (!found) {
    std::vector<Piece> pieces;
    tokenize(word, pieces);
    found = cache.put(pieces);
    if (!found) {
      out.insert(out.end(), pieces.begin(), pieces.end());
      return;
    }
  }
  for (uint32_t i = 0, begin = 0; i < found->count; begin = found->ends[i++])
    out.push_back({found->ids[i], begin, found->ends[i]});
}

std::unique_ptr<Model> read_model(const Json& json, const std::string& source) {
  if (!json.is_object()) throw DataError(str(source, ": \"model\" is missing"));
  auto type = json_get_or<std::string>(json, "type",
                                       json.contains("merges")                     ? "BPE"
                                       : json.contains("max_input_chars_per_word") ? "WordPiece"
                                                                                   : "",
                                       source);
  if (type == "BPE") return std::make_unique<Bpe>(json, source);
  if (type == "WordPiece") return std::make_unique<WordPiece>(json, source);
  throw DataError(str(source, ": the model \"", type, "\" is not supported; supported are BPE and WordPiece"));
}

}  // namespace trireme::tok
