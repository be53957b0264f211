// The stages of a tokenizer: normalizer, pre-tokenizer, model, post-processor, decoder, as tokenizer.json lists them.
#pragma once

#include <functional>
#include <optional>
#include <unordered_map>

#include "base/json.h"
#include "data/tok_text.h"
#include "data/tokenizer.h"

namespace trireme::tok {

using Normalizer = std::function<Text(Text)>;
using PreTokenizer = std::function<std::vector<Text>(std::vector<Text>)>;
using Decoder = std::function<std::vector<std::string>(std::vector<std::string>)>;

// Each reads one component; null gives an empty function. DataError names a component that is not supported.
Normalizer read_normalizer(const Json& json, const std::string& source);
PreTokenizer read_pre_tokenizer(const Json& json, const std::string& source);
Decoder read_decoder(const Json& json, const std::string& source);

const std::string& byte_char(unsigned char byte);          // GPT-2's printable character for a byte, UTF-8
std::optional<unsigned char> char_byte(uint32_t character);  // and back

// Byte-pair encoding (Sennrich et al. 2016) over characters, lowest rank first, leftmost of equals.
class Bpe {
 public:
  Bpe(const Json& model, const std::string& source);
  struct Piece {
    int64_t id;
    uint32_t begin, end;  // bytes of the word
  };
  void encode(std::string_view word, std::vector<Piece>& out) const;
  const std::unordered_map<std::string, int64_t>& vocab() const { return vocab_; }

 private:
  void merge(std::string_view word, std::vector<Piece>& out) const;

  struct Merge {
    int64_t rank, id;
  };
  std::unordered_map<std::string, int64_t> vocab_;
  std::unordered_map<uint64_t, Merge> merges_;
  int64_t unk_ = -1;
  int64_t byte_ids_[256];
  bool byte_fallback_ = false, fuse_unk_ = false, ignore_merges_ = false;
  uint64_t serial_ = 0;  // names this object in the caches of threads
};

struct AddedToken {
  int64_t id = 0;
  std::string content;
  bool single_word = false, lstrip = false, rstrip = false, normalized = true, special = false;
};

// What the post-processor puts around a text, and whether it trims offsets (ByteLevel).
struct PostProcessor {
  std::vector<int64_t> before, after;
  bool trims_offsets = false, add_prefix_space = false;
};
PostProcessor read_post_processor(const Json& json, const std::string& source);

struct Pipeline {
  std::string source, hash;
  std::vector<AddedToken> added;
  std::vector<size_t> raw_order, normalized_order;  // of `added`, by first byte then longest first
  Normalizer normalizer;
  PreTokenizer pre_tokenizer;
  std::optional<Bpe> model;
  PostProcessor post;
  Decoder decoder;
  std::unordered_map<int64_t, std::string> tokens;  // id -> text
  std::unordered_map<std::string, int64_t> ids;
  std::unordered_map<int64_t, bool> special;
  int64_t vocab_size = 0;
};

class DecodeState {
 public:
  std::vector<int64_t> ids;
  size_t emitted = 0;
};

}  // namespace trireme::tok
