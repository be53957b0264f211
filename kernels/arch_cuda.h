// kernels/arch.h for nvcc: one instruction each. Included by it alone.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace trireme::kernels::cuda::arch {

using bf16 = __nv_bfloat16;
using fp16 = __half;
using e4m3 = __nv_fp8_e4m3;
using e5m2 = __nv_fp8_e5m2;

struct Index3 {
  int x, y, z;
};

ARCH_FN int thread_index() { return static_cast<int>(threadIdx.x); }
ARCH_FN Index3 block_index() { return {static_cast<int>(blockIdx.x), static_cast<int>(blockIdx.y), static_cast<int>(blockIdx.z)}; }
ARCH_FN Index3 grid_size() { return {static_cast<int>(gridDim.x), static_cast<int>(gridDim.y), static_cast<int>(gridDim.z)}; }
ARCH_FN void check_index(int, int) {}
ARCH_FN void sync_threads() { __syncthreads(); }
ARCH_FN void sync_warp() { __syncwarp(); }
ARCH_FN void sync_named(int id, int num_threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(num_threads) : "memory"); }
ARCH_FN void wait_for_turn(int id, int num_threads) { sync_named(id, num_threads); }
ARCH_FN void give_turn(int id, int num_threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(num_threads) : "memory"); }
template <typename T>
ARCH_FN T shuffle(T x, int lane) {
  return __shfl_sync(0xffffffffu, x, lane);
}
template <typename T>
ARCH_FN T shuffle_xor(T x, int mask) {
  return __shfl_xor_sync(0xffffffffu, x, mask);
}
ARCH_FN uint32_t ballot(bool p) { return __ballot_sync(0xffffffffu, p); }
ARCH_FN uint32_t count_bits(uint32_t x) { return static_cast<uint32_t>(__popc(x)); }
template <typename T>
ARCH_FN T atomic_add(T* address, T x) {
  return atomicAdd(address, x);
}
ARCH_FN void atomic_add4(float* address, const float (&x)[4]) {
#if __CUDA_ARCH__ >= 900
  atomicAdd(reinterpret_cast<float4*>(address), make_float4(x[0], x[1], x[2], x[3]));
#else
  ARCH_UNROLL
  for (int i = 0; i < 4; ++i) atomicAdd(address + i, x[i]);
#endif
}

ARCH_FN char* shared_bytes(int offset, int) {
  extern __shared__ __align__(1024) char all[];
  return all + offset;
}
ARCH_FN uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

ARCH_FN void copy_async(void* to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid ? 16 : 0) : "memory");
}
ARCH_FN void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kGroups>
ARCH_FN void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

ARCH_FN void load_matrix(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
ARCH_FN void load_matrix_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
template <typename T>
ARCH_FN void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t b0, const uint32_t b1) {
  if constexpr (std::is_same_v<T, bf16>)
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

ARCH_FN float max(float a, float b) { return fmaxf(a, b); }
ARCH_FN float exp(float x) { return expf(x); }
ARCH_FN float erf(float x) { return erff(x); }
ARCH_FN float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
ARCH_FN float exp2(float x) { return exp2f(x); }
ARCH_FN float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
ARCH_FN float log2(float x) { return log2f(x); }
ARCH_FN float rsqrt(float x) { return rsqrtf(x); }
ARCH_FN float sqrt(float x) { return sqrtf(x); }
ARCH_FN double sqrt(double x) { return ::sqrt(x); }
ARCH_FN float product(float a, float b) { return __fmul_rn(a, b); }
ARCH_FN int nearest(float x) { return __float2int_rn(x); }
ARCH_FN uint32_t bits_of(float x) { return __float_as_uint(x); }
ARCH_FN float float_of(uint32_t bits) { return __uint_as_float(bits); }
ARCH_FN float to_float(float x) { return x; }
ARCH_FN float to_float(bf16 x) { return __bfloat162float(x); }
ARCH_FN float to_float(fp16 x) { return __half2float(x); }
template <typename T>
ARCH_FN T from_float(float x) {
  if constexpr (std::is_same_v<T, bf16>) return __float2bfloat16_rn(x);
  else if constexpr (std::is_same_v<T, fp16>) return __float2half_rn(x);
  else return T(x);  // float8: beyond the largest, the largest
}
template <typename T>
ARCH_FN uint32_t pack(float low, float high) {
  if constexpr (std::is_same_v<T, bf16>) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(both);
  } else {
    const __half2 both = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(both);
  }
}
ARCH_FN int recomputed(int x) {
  asm volatile("" : "+r"(x));
  return x;
}
template <typename V>
ARCH_FN V load(const void* p) {
  return *static_cast<const V*>(p);
}
template <typename V>
ARCH_FN void store(void* p, const V& v) {
  if constexpr (sizeof(V) % 16 == 0) {  // as written: where branches meet the compiler cuts stores of 16 bytes into their values
    uint32_t word[sizeof(V) / 4];
    __builtin_memcpy(word, &v, sizeof v);
    ARCH_UNROLL
    for (size_t i = 0; i < sizeof(V) / 4; i += 4)
      asm volatile("st.global.v4.b32 [%0], {%1,%2,%3,%4};" ::"l"(__cvta_generic_to_global(static_cast<uint32_t*>(p) + i)), "r"(word[i]), "r"(word[i + 1]), "r"(word[i + 2]), "r"(word[i + 3]) : "memory");
  } else {
    *static_cast<V*>(p) = v;
  }
}

inline void check(cudaError_t error, const char* call) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(call) + ": " + cudaGetErrorString(error));
}

inline int device_architecture() {  // 90: compute capability 9.0
  int device = 0, major = 0, minor = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "cudaDeviceGetAttribute");
  return 10 * major + minor;
}

inline int num_multiprocessors() {
  int device = 0, count = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  return count;
}

// Blocks that a multiprocessor shall hold, which bounds their registers: Kernel::kBlocks, or 1. Left to the compiler, it spills.
template <typename Kernel>
constexpr int blocks_together() {
  if constexpr (requires { Kernel::kBlocks; }) return Kernel::kBlocks;
  else return 1;
}

template <typename Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, blocks_together<Kernel>()) entry(const __grid_constant__ typename Kernel::Params params) {
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
  if constexpr (requires { Kernel::kHopper; }) __trap();  // never an empty kernel
  else
#endif
    Kernel::run(params);
}

template <typename Kernel>
void launch(const Index3& grid, int shared_bytes, void* stream, const typename Kernel::Params& params) {
  constexpr int kWithoutAsking = 48 << 10;
  if (shared_bytes > kWithoutAsking)
    check(cudaFuncSetAttribute(entry<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), "cudaFuncSetAttribute");
  entry<Kernel><<<dim3(grid.x, grid.y, grid.z), Kernel::kThreads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(params);
  check(cudaGetLastError(), "kernel launch");
}

}  // namespace trireme::kernels::cuda::arch
