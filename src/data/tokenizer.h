// Text <-> ids by a Hugging Face tokenizer.json (https://github.com/huggingface/tokenizers), id for id and offset for
// offset what that library gives.
//   models          BPE (byte-level, SentencePiece-style with byte fallback, ignore_merges, fuse_unk), WordPiece
//   normalizers, pre-tokenizers, post-processors, decoders: see tok_components.h
// The sections "truncation" and "padding" are ignored, as transformers does. Anything else unknown is refused by name.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace trireme {

struct Encoding {
  std::vector<int64_t> ids;
  std::vector<std::pair<int64_t, int64_t>> offsets;  // [begin, end) of each id in the text, in Unicode characters
  std::vector<uint8_t> special;                      // 1: put in by the post-processor (offsets are then 0, 0)
};

namespace tok {
struct Pipeline;
class DecodeState;
}  // namespace tok

// Immutable once loaded: copies share one state, and every member may be called from many threads at a time.
class Tokenizer {
 public:
  // `path`: a tokenizer.json, or a folder that holds one. DataError (file, component or key, the way out): not there,
  // not JSON, a component that is not supported, an inconsistent vocabulary.
  static Tokenizer load(const std::string& path);
  // The same from memory; `source` begins every message.
  static Tokenizer parse(std::string_view json, const std::string& source);

  // add_special_tokens: what the post-processor adds (<s>, [CLS], ...). Special tokens written in the text are always
  // recognised. Invalid UTF-8 in `text` is a DataError: text comes from files, which are checked where they are read.
  Encoding encode(std::string_view text, bool add_special_tokens) const;
  // The ids alone; several times faster.
  std::vector<int64_t> encode_ids(std::string_view text, bool add_special_tokens) const;

  // Ids outside the vocabulary give no text. Bytes that are no UTF-8 become U+FFFD as in the library.
  std::string decode(std::span<const int64_t> ids, bool skip_special) const;

  int64_t vocab_size() const;  // largest id + 1, added tokens included
  std::optional<int64_t> token_to_id(std::string_view token) const;
  std::string id_to_token(int64_t id) const;  // empty for an id that has no token
  bool is_special(int64_t id) const;          // an added token with "special": true
  bool is_added(int64_t id) const;            // a token that its text always becomes, whatever is around
  const std::string& content_hash() const;    // of the file's bytes; 32 hex digits
  const std::string& source() const;          // the path it was loaded from

 private:
  friend class StreamDecoder;
  explicit Tokenizer(std::shared_ptr<const tok::Pipeline> pipeline) : pipeline_(std::move(pipeline)) {}
  std::shared_ptr<const tok::Pipeline> pipeline_;
};

// Text id by id, for generation. All that push() returned plus finish() is exactly decode() of the same ids: text is
// held back while later ids could still change it (half a character, a run of byte tokens).
class StreamDecoder {
 public:
  StreamDecoder(const Tokenizer& tokenizer, bool skip_special);
  ~StreamDecoder();
  StreamDecoder(StreamDecoder&&) noexcept;
  StreamDecoder& operator=(StreamDecoder&&) noexcept;
  std::string push(int64_t id);
  std::string finish();  // the rest; afterwards the decoder is as newly made

 private:
  std::unique_ptr<tok::DecodeState> state_;
};

}  // namespace trireme
