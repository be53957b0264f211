// kernels/arch.h for g++: every instruction as its documentation says, with what hardware leaves open made as unkind as it
// may be. Included by arch.h alone; the engine below runs the threads.
//
// What goes wrong is a Fault that names the thread:
//   - threads run in a random order (seed), one at a time, until they wait: a missing barrier shows sooner or later
//   - shared memory holds NaNs at first; a copy_async lands only when its thread waits for it, and until then its target
//     holds NaNs: a missing wait shows
//   - bounds of shared views and alignments of 16 bytes are checked; so is that all lanes of a warp come to one and the same
//     operation, and all threads to a barrier
//   - what lies outside of global buffers is for the tests' guard pages (emu/guarded.h) and for AddressSanitizer
#pragma once

#include <bit>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace trireme::kernels::emulated {

struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Of the launches that follow: the order of threads, and of blocks. The same seed gives the same order.
void set_seed(uint64_t seed);

// Breaks kernels, for tests of the tests: in the launches that follow, no thread does the call number `number` (from 0) that
// it makes of `op`: "barrier" (sync_threads, sync_named), "copy_async_wait", "barrier_wait", "group_wait" or "async_fence". Null: all
// is done again.
void leave_out(const char* op, int number = 0);
// Whether that call has come up since.
bool was_left_out();

namespace arch {

struct Index3 {
  int x, y, z;
};

// --- the engine (engine.cpp) -------------------------------------------------------------------------------------------

// Runs `body` once for each thread of each block. Fault; whatever the body throws.
void run_grid(const Index3& grid, int num_threads, int shared_bytes, const std::function<void()>& body);

int thread_index();
Index3 block_index();
Index3 grid_size();
void sync_threads();
void sync_named(int id, int num_threads);
void wait_for_turn(int id, int num_threads);
void give_turn(int id, int num_threads);

// The lanes of a warp meet in `op`: each brings `mine`, and the last one lets `act` work on all of them, by lane.
using Lanes = void* const*;
void meet(const char* op, void* mine, void (*act)(Lanes lanes));

char* shared_bytes(int offset, int count);
void check_index(int i, int size);
void check_shared(const void* p, size_t count, const char* op);   // all in shared memory, at a multiple of 16 bytes
void check_shared(const void* p, size_t count, size_t alignment, const char* op);
void check_aligned(const void* p, size_t alignment, const char* op);
void check_global(const void* p, const char* op);                 // not in shared memory

// For emu/hopper.cpp: what it keeps of a block, whose threads end; waits for a condition, which is looked at while others run or
// nobody can; and lets others run first.
struct Extension {
  virtual ~Extension() = default;
  virtual void thread_ends() = 0;
};
std::unique_ptr<Extension>& extension();
int shared_size();
[[noreturn]] void fault(const std::string& what);
void block_until(const char* what, const std::function<bool()>& ready);
void others_first();
bool left_out(const char* op);  // whether this call of it shall not be done

void copy_async(void* to, const void* from, bool valid);
void copy_async_commit();
void wait_for_copies(int num_groups_left);

// --- warps (warp.cpp) --------------------------------------------------------------------------------------------------

void load_matrix(uint32_t (&r)[4], const void* row);
void load_matrix_transposed(uint32_t (&r)[4], const void* row);
void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float (*widen)(uint16_t));

// --- what needs neither ------------------------------------------------------------------------------------------------

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

struct e4m3 {  // 8 bits: sign, exponent, mantissa (Micikevicius et al. 2022)
  uint8_t bits;
};
struct e5m2 {
  uint8_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return std::bit_cast<float>(uint32_t{x.bits} << 16); }
inline float to_float(fp16 x) { return static_cast<float>(std::bit_cast<_Float16>(x.bits)); }
inline float to_float(e5m2 x) { return to_float(fp16{static_cast<uint16_t>(x.bits << 8)}); }
inline float to_float(e4m3 x) {  // the digits of a float16 but one, whose exponents are 8 higher; no infinity
  if ((x.bits & 0x7f) == 0x7f) return std::numeric_limits<float>::quiet_NaN();
  return to_float(fp16{static_cast<uint16_t>((x.bits & 0x80) << 8 | (x.bits & 0x7f) << 7)}) * 256;
}
// To the nearest, ties to even; beyond the largest, the largest.
inline uint8_t float8_bits(float x, int digits, int bias, float largest) {  // digits behind the point
  if (x != x) return 0x7f;
  const float magnitude = std::fmin(std::abs(x), largest);
  const int exponent = std::max(magnitude > 0 ? std::ilogb(magnitude) : -bias, 1 - bias);
  const int units = static_cast<int>(std::nearbyint(std::ldexp(magnitude, digits - exponent)));
  return static_cast<uint8_t>((std::signbit(x) ? 0x80 : 0) | (((exponent + bias - 1) << digits) + units));
}
template <typename T>
T from_float(float x) {
  if constexpr (std::is_same_v<T, bf16>) {
    const uint32_t u = std::bit_cast<uint32_t>(x);
    if (x != x) return {0x7fff};
    return {static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16)};
  } else if constexpr (std::is_same_v<T, fp16>) {
    return {std::bit_cast<uint16_t>(static_cast<_Float16>(x))};
  } else if constexpr (std::is_same_v<T, e4m3>) {
    return {float8_bits(x, 3, 7, 448)};
  } else if constexpr (std::is_same_v<T, e5m2>) {
    return {float8_bits(x, 2, 15, 57344)};
  } else {
    return x;
  }
}
template <typename T>
uint32_t pack(float low, float high) {
  return from_float<T>(low).bits | uint32_t{from_float<T>(high).bits} << 16;
}
template <typename T>
float widen(uint16_t bits) {
  return to_float(T{bits});
}
template <typename T>
void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  multiply(d, a, b0, b1, widen<T>);
}

template <typename V>
V load(const void* p) {
  check_aligned(p, alignof(V), "load");
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <typename V>
void store(void* p, const V& v) {
  check_aligned(p, alignof(V), "store");
  if (sizeof(V) % 16 == 0) check_global(p, "store of 16 bytes");
  std::memcpy(p, &v, sizeof v);
}

inline uint32_t count_bits(uint32_t x) { return static_cast<uint32_t>(std::popcount(x)); }
inline int recomputed(int x) { return x; }
inline float max(float a, float b) { return std::fmax(a, b); }
inline float exp(float x) { return std::exp(x); }
inline float erf(float x) { return std::erf(x); }
inline float reciprocal(float x) { return std::abs(x) > 0x1p126f ? 0 : 1 / x; }
inline float exp2(float x) { return std::exp2(x); }
inline float exp2_approx(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0 : y;
}
inline float log2(float x) { return std::log2(x); }
inline float rsqrt(float x) { return 1.0f / std::sqrt(x); }
inline float sqrt(float x) { return std::sqrt(x); }
inline double sqrt(double x) { return std::sqrt(x); }
inline float product(float a, float b) { return a * b; }
inline int nearest(float x) {
  if (x != x) return 0;
  return std::abs(x) < 0x1p31f ? static_cast<int>(std::nearbyint(x)) : x < 0 ? std::numeric_limits<int>::min() : std::numeric_limits<int>::max();
}
inline uint32_t bits_of(float x) { return std::bit_cast<uint32_t>(x); }
inline float float_of(uint32_t bits) { return std::bit_cast<float>(bits); }

template <int kGroups>
void copy_async_wait() {
  wait_for_copies(kGroups);
}

// Blocks run one after the other: nothing comes between.
template <typename T>
T atomic_add(T* address, T x) {
  const T before = *address;
  *address = before + x;
  return before;
}

inline void atomic_add4(float* address, const float (&x)[4]) {
  check_aligned(address, 16, "atomic_add4");
  for (int i = 0; i < 4; ++i) address[i] += x[i];
}

inline void sync_warp() {
  meet("sync_warp", nullptr, [](Lanes) {});
}

template <typename T>
struct Shuffle {
  T value;
  int lane;
  T found;
};
template <typename T>
T shuffle(T x, int lane) {
  Shuffle<T> mine{x, lane, {}};
  meet("shuffle", &mine, [](Lanes lanes) {
    for (int l = 0; l < 32; ++l) {
      auto& s = *static_cast<Shuffle<T>*>(lanes[l]);
      s.found = static_cast<Shuffle<T>*>(lanes[s.lane & 31])->value;
    }
  });
  return mine.found;
}
template <typename T>
T shuffle_xor(T x, int mask) {
  return shuffle(x, (thread_index() % 32) ^ mask);
}
inline uint32_t ballot(bool p) {
  struct Vote {
    bool mine;
    uint32_t all;
  } vote{p, 0};
  meet("ballot", &vote, [](Lanes lanes) {
    uint32_t all = 0;
    for (int l = 0; l < 32; ++l) all |= uint32_t{static_cast<Vote*>(lanes[l])->mine} << l;
    for (int l = 0; l < 32; ++l) static_cast<Vote*>(lanes[l])->all = all;
  });
  return vote.all;
}

inline int device_architecture() { return 80; }
inline int num_multiprocessors() { return 2; }

template <typename Kernel>
void launch(const Index3& grid, int shared_bytes, void*, const typename Kernel::Params& params) {
  static_assert(Kernel::kThreads % 32 == 0);
  run_grid(grid, Kernel::kThreads, shared_bytes, [&params] { Kernel::run(params); });
}

}  // namespace arch
}  // namespace trireme::kernels::emulated
