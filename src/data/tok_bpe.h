#pragma once

#include <array>

#include "data/tok_model.h"

namespace trireme::tok {

// (left id, right id) -> (rank, id of the two together), open addressing.
class MergeTable {
 public:
  static constexpr uint64_t kNone = ~uint64_t{0};
  static uint64_t key(int32_t left, int32_t right) {
    return static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32 | static_cast<uint32_t>(right);
  }
  explicit MergeTable(size_t merges);
  void set(uint64_t key, uint64_t value);  // a later value of the same key counts, as in the library
  // rank << 32 | id, or kNone
  uint64_t find(int32_t left, int32_t right) const {
    uint64_t wanted = key(left, right);
    for (size_t i = wanted * 0x9E3779B97F4A7C15u >> shift_;; i = (i + 1) & (slots_.size() - 1)) {
      if (slots_[i].key == wanted) return slots_[i].value;
      if (slots_[i].key == kNone) return kNone;
    }
  }

 private:
  struct Slot {
    uint64_t key = kNone, value = kNone;
  };
  std::vector<Slot> slots_;
  int shift_;
};

class Bpe : public Model {
 public:
  Bpe(const Json& model, const std::string& source);
  bool take_bytes() override;
  void cut(Words& words) const override;

 private:
  void tokenize(std::string_view word, std::vector<Piece>& out) const override;
  void first_symbols(std::string_view word, std::vector<Piece>& out) const;
  void merge_few(Piece* symbols, size_t& count) const;
  void merge_many(std::vector<Piece>& symbols, size_t first) const;

  MergeTable merges_{0};
  std::unordered_map<uint32_t, int32_t> characters_;  // tokens of one character
  std::unordered_map<std::string, int32_t> whole_;    // with ignore_merges: words that are tokens
  std::array<int32_t, 256> byte_ids_;                 // where words are bytes: each byte's token; else those of <0x..>
  int32_t unk_ = -1;
  bool byte_fallback_ = false, fuse_unk_ = false, ignore_merges_ = false, words_are_bytes_ = false,
       cuts_at_mark_ = false;
};

}  // namespace trireme::tok
