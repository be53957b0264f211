// Counter-based random numbers (Philox4x32-10, Salmon et al. 2011): a value is a pure function of (seed, stream, index),
// so it depends neither on the number of ranks nor on what was drawn before.
#pragma once

#include <array>
#include <cstdint>

namespace trireme {

inline std::array<uint32_t, 4> philox(uint64_t key, uint64_t counter_high, uint64_t counter_low) {
  std::array<uint32_t, 4> c{static_cast<uint32_t>(counter_low), static_cast<uint32_t>(counter_low >> 32),
                            static_cast<uint32_t>(counter_high), static_cast<uint32_t>(counter_high >> 32)};
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    uint64_t p0 = 0xD2511F53ull * c[0], p1 = 0xCD9E8D57ull * c[2];
    c = {static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ k0, static_cast<uint32_t>(p1),
         static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ k1, static_cast<uint32_t>(p0)};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

// What random numbers are drawn for; each has its own stream.
enum class RandomStream : uint64_t { kInit = 1, kShuffle = 2, kDropout = 3, kSampling = 4, kSplit = 5, kRounding = 6 };

// Uniform 64 bits.
inline uint64_t random_bits(uint64_t seed, RandomStream stream, uint64_t a, uint64_t b = 0) {
  auto r = philox(seed ^ (static_cast<uint64_t>(stream) << 56), a, b);
  return (static_cast<uint64_t>(r[1]) << 32) | r[0];
}

// Uniform in [0, 1) with 53 bits.
inline double random_uniform(uint64_t seed, RandomStream stream, uint64_t a, uint64_t b = 0) {
  return static_cast<double>(random_bits(seed, stream, a, b) >> 11) * 0x1.0p-53;
}

}  // namespace trireme
