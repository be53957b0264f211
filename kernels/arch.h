// What the body of a kernel may use, on a GPU (nvcc: instructions) and in the host emulation (g++: kernels/emu). A kernel
// is written once, over this layer:
//
//   namespace trireme::kernels::TRIREME_ARCH {
//   struct Scale {
//     struct Params { float* x; float factor; int64_t n; };
//     static constexpr int kThreads = 256;                       // a block; a multiple of 32
//     ARCH_FN static void run(const Params& p) {
//       const int64_t i = int64_t{arch::block_index().x} * kThreads + arch::thread_index();
//       if (i < p.n) p.x[i] *= p.factor;
//     }
//   };
//   void scale(...) { arch::launch<Scale>({blocks, 1, 1}, /*shared_bytes=*/0, stream, {x, factor, n}); }
//   }
//
// Threads of a block, in `arch`:
//   thread_index(), lane_index(), warp_index(), block_index(), grid_size()
//   sync_threads()                         all threads of the block
//   sync_named(id, num_threads)            barrier 1 .. 15 of so many threads, whole warps
//   wait_for_turn(id, num_threads), give_turn(id, num_threads)  such a barrier, of which half only say that they were there: an order
//                                          that is for speed alone
//   shuffle(x, lane), shuffle_xor(x, mask) whole warps: all lanes must come
//   ballot(p), sync_warp(), count_bits(x)
//   atomic_add(address, x)                 global or shared memory; returns what was there
//   atomic_add4(address, x)                4 floats in global memory, at 16 bytes; each by itself
// Shared memory is one run of bytes a block, of the launch's size, holding anything at first:
//   shared<T>(offset_bytes, count)         Shared<T>: a view whose bounds the emulation checks
// Asynchronous copies from global to shared memory (cp.async, sm_80), 16 bytes of each:
//   copy_async(to, from, valid)            not valid: zeros, and `from` is not read
//   copy_async_commit(), copy_async_wait<N>()  until at most N of this thread's groups are under way
// Matrix products of a warp (sm_80), T of 16 bits, fragments as in PTX (mma.m16n8k16, ldmatrix):
//   load_matrix(r, row), load_matrix_transposed(r, row)  four 8x8 matrices; lane l gives row l % 8 of matrix l / 8
//   mma<T>(d, a, b)                        d[16,8] += a[16,16] b[16,8]
// Numbers: bf16, fp16, e4m3, e5m2; to_float(x), from_float<T>(x) (to the nearest even), pack<T>(low, high), unpack<T>(u, low, high);
//   exp(x), exp2(x), log2(x), rsqrt(x), sqrt(x), erf(x), reciprocal(x) (1 / x to a unit of the last place, 0 where that is below
//   2^-126), exp2_approx(x) (2 ulp; a result below 2^-126 is 0); bits_of(x), float_of(bits); load<V>(p), store<V>(p, v): 16 bytes
//   at once of aligned addresses, stored to global memory; recomputed(x): x, from which the compiler keeps nothing in registers that it had computed before;
//   product(a, b): rounded by itself, where a sum that follows would be joined with it; nearest(x): int, to the nearest even, 0 of NaN, the
//   last one where there is none.
// What only sm_90a has is in arch_hopper.h.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#define TRIREME_ARCH cuda
#define ARCH_FN __device__ __forceinline__
#define ARCH_HOST_FN __host__ __device__ __forceinline__
#define ARCH_UNROLL _Pragma("unroll")
#include "kernels/arch_cuda.h"
#else
#define TRIREME_ARCH emulated
#define ARCH_FN inline
#define ARCH_HOST_FN inline
#define ARCH_UNROLL
#include "kernels/emu/arch_emu.h"
#endif

namespace trireme::kernels::TRIREME_ARCH::arch {

inline constexpr int kWarp = 32;

// Elements [0, size) of a block's shared memory.
template <typename T>
struct Shared {
  T* data;
  int size;

  ARCH_FN T& operator[](int i) const {
    check_index(i, size);
    return data[i];
  }
  ARCH_FN T* at(int i, int count) const {  // the address of elements i .. i + count - 1
    check_index(i, size);
    check_index(i + count - 1, size);
    return data + i;
  }
  ARCH_FN Shared part(int begin, int count) const { return {at(begin, count), count}; }
};

template <typename T>
ARCH_FN Shared<T> shared(int offset_bytes, int count) {
  return {reinterpret_cast<T*>(shared_bytes(offset_bytes, count * static_cast<int>(sizeof(T)))), count};
}

struct alignas(16) Bytes16 {
  uint32_t word[4];
};

ARCH_FN int warp_index() { return thread_index() / kWarp; }
ARCH_FN int lane_index() { return thread_index() % kWarp; }

template <typename T>
ARCH_FN T warp_sum(T x) {
  ARCH_UNROLL
  for (int mask = kWarp / 2; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}
ARCH_FN float warp_max(float x) {
  ARCH_UNROLL
  for (int mask = kWarp / 2; mask > 0; mask /= 2) x = max(x, shuffle_xor(x, mask));
  return x;
}

// Over a block of kThreads, the same bits in every thread; `scratch` has kThreads / 32 elements, which are free again after
// the next sync_threads().
template <int kThreads, typename T>
ARCH_FN T block_sum(T x, const Shared<T>& scratch) {
  x = warp_sum(x);
  if (lane_index() == 0) scratch[warp_index()] = x;
  sync_threads();
  x = 0;
  ARCH_UNROLL
  for (int w = 0; w < kThreads / kWarp; ++w) x += scratch[w];
  return x;
}
template <int kThreads>
ARCH_FN float block_max(float x, const Shared<float>& scratch) {
  x = warp_max(x);
  if (lane_index() == 0) scratch[warp_index()] = x;
  sync_threads();
  x = scratch[0];
  ARCH_UNROLL
  for (int w = 1; w < kThreads / kWarp; ++w) x = max(x, scratch[w]);
  return x;
}

}  // namespace trireme::kernels::TRIREME_ARCH::arch
