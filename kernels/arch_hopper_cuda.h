// kernels/arch_hopper.h for nvcc. Included by it alone.
#pragma once

#include <cuda.h>

namespace trireme::kernels::cuda::arch {

ARCH_FN void barrier_init(uint64_t* b, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(arrivals) : "memory");
}
ARCH_FN void barrier_init_done() { asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory"); }
ARCH_FN void barrier_arrive(uint64_t* b) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(b)) : "memory"); }
ARCH_FN void barrier_arrive_expect(uint64_t* b, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)), "r"(bytes) : "memory");
}
ARCH_FN void barrier_wait(uint64_t* b, int parity) {
  for (uint32_t done = 0; !done;)
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done) : "r"(shared_address(b)), "r"(parity) : "memory");
}

struct TensorMap {
  CUtensorMap map;
};
template <typename T>
TensorMap make_tile_map(const T* base, int64_t rows, int64_t columns, int64_t row_stride, int tile_rows) {
  void* encode = nullptr;
  cudaDriverEntryPointQueryResult found;
  check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &encode, 12000, cudaEnableDefault, &found), "cudaGetDriverEntryPointByVersion");
  if (found != cudaDriverEntryPointSuccess) throw std::runtime_error("the driver has no cuTensorMapEncodeTiled; it has to be of CUDA 12 or later");
  TensorMap out;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)}, strides[] = {static_cast<cuuint64_t>(row_stride) * sizeof(T)};
  const cuuint32_t box[] = {64, static_cast<cuuint32_t>(tile_rows)}, steps[] = {1, 1};
  const auto error = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(encode)(
      &out.map, std::is_same_v<T, bf16> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, const_cast<T*>(base), sizes, strides, box, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (error != CUDA_SUCCESS) throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(error));
  return out;
}
ARCH_FN void tile_load(void* to, const TensorMap& map, int row, int column, uint64_t* b) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(shared_address(to)),
               "l"(&map), "r"(column), "r"(row), "r"(shared_address(b)) : "memory");
}
ARCH_FN void tile_store(const TensorMap& map, int row, int column, const void* from) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&map), "r"(column), "r"(row), "r"(shared_address(from)) : "memory");
}
ARCH_FN void tile_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
ARCH_FN void tile_store_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

template <typename V>
ARCH_FN void store_shared(V* p, const V& v) {
  *p = v;
}
ARCH_FN void async_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// 128-byte swizzle; groups of 8 rows stand 1024 bytes apart.
ARCH_FN uint64_t tile_descriptor(const void* p) {
  return (shared_address(p) & 0x3ffff) >> 4 | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}
ARCH_FN void group_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
ARCH_FN void group_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
#define TRIREME_FOUR(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define TRIREME_GROUP_MMA(type)                                                                                                          \
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type                                                               \
               " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}," \
               " %32, %33, 1, 1, 1, 0, 0;"                                                                                               \
               : TRIREME_FOUR(0), TRIREME_FOUR(4), TRIREME_FOUR(8), TRIREME_FOUR(12), TRIREME_FOUR(16), TRIREME_FOUR(20), TRIREME_FOUR(24), TRIREME_FOUR(28) \
               : "l"(a), "l"(b))
template <typename T>
ARCH_FN void group_mma(float (&d)[32], uint64_t a, uint64_t b) {
  if constexpr (std::is_same_v<T, bf16>) TRIREME_GROUP_MMA("bf16");
  else TRIREME_GROUP_MMA("f16");
}
#undef TRIREME_GROUP_MMA
#undef TRIREME_FOUR
template <int kGroups>
ARCH_FN void group_wait(float (&d)[32]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
  ARCH_UNROLL
  for (float& x : d) asm volatile("" : "+f"(x)::"memory");  // not read before
}

template <int kRegisters>
ARCH_FN void registers_up() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
ARCH_FN void registers_down() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace trireme::kernels::cuda::arch
