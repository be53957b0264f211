// Shuffling without a table: a keyed permutation, so that an element costs O(1) memory and the order depends on nothing but
// (seed, epoch).
#pragma once

#include <cstdint>

namespace trireme {

// Bijection of 0 .. size-1: a Feistel network over the next even power of two, walked until it lands inside (Black and
// Rogaway 2002), with Philox as round function.
class Permutation {
 public:
  Permutation(uint64_t seed, int64_t epoch, int64_t size);
  int64_t operator()(int64_t index) const;

 private:
  uint64_t seed_, epoch_, size_;
  int half_bits_;
};

}  // namespace trireme
