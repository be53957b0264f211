// The model of a tokenizer: words to ids.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "base/json.h"
#include "data/tok_text.h"

namespace trireme::tok {

struct Piece {
  int32_t id;
  uint32_t begin, end;  // bytes of the word
};

// Ids on their way out; grows by doubling and is never cleared to zero first.
class IdBuffer {
 public:
  explicit IdBuffer(size_t expected) { grow(expected + 16); }
  int64_t* room(size_t n) {  // for n more; advance() says how many were written
    if (size_ + n > capacity_) grow(std::max(2 * capacity_, size_ + n));
    return data_.get() + size_;
  }
  void advance(size_t n) { size_ += n; }
  void push(int64_t id) { *room(1) = id, advance(1); }
  std::vector<int64_t> take() const { return {data_.get(), data_.get() + size_}; }

 private:
  void grow(size_t capacity);
  std::unique_ptr<int64_t[]> data_;
  size_t size_ = 0, capacity_ = 0;
};

class Model {
 public:
  virtual ~Model() = default;
  using Vocab = std::unordered_map<std::string, int32_t>;
  const Vocab& vocab() const { return vocab_; }
  // The model's words come as bytes that stand for their printable characters (byte_char).
  // False: it cannot take them so (its vocabulary lacks one of them).
  virtual bool take_bytes() { return false; }
  // Cuts words further where that changes nothing but the time it takes.
  virtual void cut(Words&) const {}

  void encode(const Words& words, IdBuffer& out) const;
  void encode(std::string_view word, std::vector<Piece>& out) const;  // appends

 protected:
  // Reads "vocab": {token: id}. DataError: not so, an id out of range, two tokens of one id.
  Model(const Json& model, const std::string& source);
  // What a word becomes, not looking into the cache.
  virtual void tokenize(std::string_view word, std::vector<Piece>& out) const = 0;
  Vocab vocab_;

 private:
  uint64_t serial_;  // names this object in the caches of threads
};

// Byte-pair encoding (Sennrich et al. 2016), lowest rank first, leftmost of equals; or WordPiece (Wu et al. 2016),
// longest match first. DataError: another model, an inconsistent vocabulary.
std::unique_ptr<Model> read_model(const Json& json, const std::string& source);

}  // namespace trireme::tok
