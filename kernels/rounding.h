// Weights without a master: rounded to one of their two neighbours at random (kernels.h, Update).
#pragma once

#include "kernels/arch.h"
#include "kernels/kernels.h"
#include "kernels/random.h"

namespace trireme::kernels::TRIREME_ARCH {

// To one of the two neighbours in bf16, the probability of the upper one being the distance from the lower: adds 16 random bits
// below those that stay. What is not finite stays.
ARCH_FN float round_stochastically(float x, uint32_t random16) {
  const uint32_t bits = arch::bits_of(x);
  return (bits & 0x7f800000u) == 0x7f800000u ? x : arch::float_of((bits + random16) & 0xffff0000u);
}

// Of a step, and a tensor.
struct RandomBits {
  uint64_t key, step;
  uint32_t id;
};

// kPer values, which stand together from a multiple of kPer on; i: the first one's number in the part.
template <int kPer>
ARCH_FN void round_at_random(const RandomBits& bits, const Places& places, int64_t i, float* w) {
  const int64_t in_slice = places.first + i, in_run = in_slice % places.run;
  const auto place = static_cast<uint64_t>(places.offset + in_slice / places.run * places.stride + in_run);
  const Random4 random = philox(bits.key, bits.step << 32 | bits.id, place / 8);
  ARCH_UNROLL
  for (int e = 0; e < kPer; ++e) {
    const uint32_t at = static_cast<uint32_t>(kPer == 8 ? 0 : place & (kPer == 1 ? 7 : 4)) + static_cast<uint32_t>(e);  // of the 8 halves of words
    const uint32_t low = at & 2 ? random.word[1] : random.word[0], high = at & 2 ? random.word[3] : random.word[2];
    w[e] = round_stochastically(w[e], (at & 4 ? high : low) >> (at & 1) * 16 & 0xffff);
  }
}

}  // namespace trireme::kernels::TRIREME_ARCH
