#include "data/sampler.h"

#include <bit>

#include "base/check.h"
#include "base/random.h"

namespace trireme {

constexpr int kRounds = 6;

Permutation::Permutation(uint64_t seed, int64_t epoch, int64_t size)
    : seed_(seed), epoch_(static_cast<uint64_t>(epoch)), size_(static_cast<uint64_t>(size)) {
  TRIREME_CHECK(size > 0 && epoch >= 0, size, " ", epoch);
  half_bits_ = (std::bit_width(size_ - 1) + 1) / 2;
  if (half_bits_ == 0) half_bits_ = 1;
}

int64_t Permutation::operator()(int64_t index) const {
  TRIREME_CHECK(index >= 0 && static_cast<uint64_t>(index) < size_, index, " of ", size_);
  uint64_t mask = (1ull << half_bits_) - 1, value = static_cast<uint64_t>(index);
  do {
    uint64_t left = value >> half_bits_, right = value & mask;
    for (uint64_t round = 0; round < kRounds; ++round) {
      // The epoch takes the high half of the counter; the round sits above every possible half.
      uint64_t f = random_bits(seed_, RandomStream::kShuffle, epoch_, (round << 56) | right) & mask;
      uint64_t next = left ^ f;
      left = right;
      right = next;
    }
    value = (left << half_bits_) | right;
  } while (value >= size_);
  return static_cast<int64_t>(value);
}

}  // namespace trireme
