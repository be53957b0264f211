// Random numbers as functions of their index: Philox4x32-10 (Salmon et al. 2011), the bits of src/base/random.h.
#pragma once

#include "kernels/arch.h"

namespace trireme::kernels::TRIREME_ARCH {

enum RandomStream : uint64_t { kDropout = 3, kRounding = 6 };  // as in src/base/random.h
ARCH_HOST_FN uint64_t random_key(uint64_t seed, RandomStream stream) { return seed ^ (static_cast<uint64_t>(stream) << 56); }

struct Random4 {
  uint32_t word[4];
};
ARCH_FN Random4 philox(uint64_t key, uint64_t counter_high, uint64_t counter_low) {
  uint32_t c0 = static_cast<uint32_t>(counter_low), c1 = static_cast<uint32_t>(counter_low >> 32);
  uint32_t c2 = static_cast<uint32_t>(counter_high), c3 = static_cast<uint32_t>(counter_high >> 32);
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  ARCH_UNROLL
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c0, p1 = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace trireme::kernels::TRIREME_ARCH
