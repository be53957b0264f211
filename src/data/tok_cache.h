// Words and what they became. Text repeats its words: nearly all of natural language is found here.
#pragma once

#include <cstdint>
#include <cstring>
#include <string_view>
#include <vector>

#include "data/tok_model.h"

namespace trireme::tok {

// Two places a word, the one used last first; bounded, no memory taken after it is made. One a thread.
class WordCache {
 public:
  static constexpr size_t kMaxBytes = 31, kMaxPieces = 6;
  struct alignas(64) Entry {  // one cache line
    uint64_t key[4];          // the word, filled up with zeros; the last byte is its length
    int32_t ids[kMaxPieces];
    uint8_t ends[kMaxPieces];
    uint8_t count;
  };

  // The thread's cache, emptied if another model used it last.
  static WordCache& of(uint64_t serial);

  // The entry of a word of at most kMaxBytes, or null. `readable`: bytes that may be read from word.data() on.
  const Entry* find(std::string_view word, size_t readable) {
    if (readable >= 32) {
      std::memcpy(key_, word.data(), 32);
      for (size_t i = 0; i < 4; ++i) key_[i] &= kMasks.bits[word.size()][i];
    } else {
      std::memset(key_, 0, 32);
      std::memcpy(key_, word.data(), word.size());
    }
    key_[3] |= static_cast<uint64_t>(word.size()) << 56;
    uint64_t hash = fold(key_[0] ^ 0x9E3779B97F4A7C15u, key_[1] ^ key_[3] ^ 0xD6E8FEB86659FD93u);
    if (word.size() > 16) hash ^= fold(key_[2] ^ 0xA0761D6478BD642Fu, hash ^ 0xE7037ED1A0B428DBu);
    place_ = &entries_[2 * (hash >> (64 - kBits))];
    if (same(place_[0])) return place_;
    if (!same(place_[1])) return nullptr;
    std::swap(place_[0], place_[1]);
    return place_;
  }
  // What the word just looked for became. Null: it has too many pieces to be kept.
  const Entry* put(const std::vector<Piece>& pieces);

 private:
  static constexpr int kBits = 15;  // of pairs of entries: 4 MiB
  static uint64_t fold(uint64_t a, uint64_t b) {
    auto product = static_cast<unsigned __int128>(a) * b;
    return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
  }
  bool same(const Entry& e) const {
    return ((e.key[0] ^ key_[0]) | (e.key[1] ^ key_[1]) | (e.key[2] ^ key_[2]) | (e.key[3] ^ key_[3])) == 0;
  }
  struct Masks {
    uint64_t bits[32][4];
    constexpr Masks() : bits{} {
      for (size_t n = 0; n < 32; ++n)
        for (size_t b = 0; b < n; ++b) bits[n][b / 8] |= uint64_t{0xFF} << (8 * (b % 8));
    }
  };
  static const Masks kMasks;

  std::vector<Entry> entries_;
  uint64_t serial_ = 0;
  uint64_t key_[4] = {};
  Entry* place_ = nullptr;
};

}  // namespace trireme::tok
