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
inline auto tensor_map_encoder() {
  static const auto encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result), "cudaGetDriverEntryPointByVersion");
    if (result != cudaDriverEntryPointSuccess) throw std::runtime_error("the driver has no cuTensorMapEncodeTiled; it has to be of CUDA 12 or later");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  }();
  return encode;
}
template <typename T>
TensorMap make_tile_map(const T* base, int64_t rows, int64_t heads, int64_t columns, int64_t row_stride, int64_t head_stride, int tile_rows) {
  TensorMap out;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(heads), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(head_stride) * sizeof(T), static_cast<cuuint64_t>(row_stride) * sizeof(T)};
  const cuuint32_t box[] = {64, 1, static_cast<cuuint32_t>(tile_rows)}, steps[] = {1, 1, 1};
  const auto error = tensor_map_encoder()(
      &out.map, std::is_same_v<T, bf16> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 3, const_cast<T*>(base), sizes, strides, box, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (error != CUDA_SUCCESS) throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(error));
  return out;
}
ARCH_FN void tile_load(void* to, const TensorMap& map, int row, int head, int column, uint64_t* b) {
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(shared_address(to)),
               "l"(&map), "r"(column), "r"(head), "r"(row), "r"(shared_address(b)) : "memory");
}
ARCH_FN void tile_store(const TensorMap& map, int row, int head, int column, const void* from) {
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%1, %2, %3}], [%4];" ::"l"(&map), "r"(column), "r"(head), "r"(row), "r"(shared_address(from)) : "memory");
}
ARCH_FN void tile_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
ARCH_FN void tile_store_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

template <typename V>
ARCH_FN void store_shared(V* p, const V& v) {
  *p = v;
}
ARCH_FN void async_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// PTX ISA, matrix descriptors: address, leading and stride offset of 16 bytes each, 128-byte swizzle. Groups of 8 rows stand 1024 bytes
// apart (the stride offset); where columns are what is not k, the next 64 stand the leading offset apart.
template <bool kColumns>
struct Factor {
  uint64_t bits;
};
ARCH_FN uint64_t factor_bits(const void* p, int leading) {
  return (shared_address(p) & 0x3ffff) >> 4 | static_cast<uint64_t>(leading >> 4) << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}
ARCH_FN Factor<false> rows_of(const void* p) { return {factor_bits(p, 16)}; }
ARCH_FN Factor<true> columns_of(const void* p, int next) { return {factor_bits(p, next)}; }

// Not read or written by the compiler's own code across this place.
template <int kN>
ARCH_FN void pin(float (&x)[kN][4]) {
  ARCH_UNROLL
  for (auto& row : x)
    ARCH_UNROLL
    for (float& value : row) asm volatile("" : "+f"(value)::"memory");
}
template <int kN>
ARCH_FN void pin(uint32_t (&x)[kN][4]) {
  ARCH_UNROLL
  for (auto& row : x)
    ARCH_UNROLL
    for (uint32_t& value : row) asm volatile("" : "+r"(value)::"memory");
}
template <typename... X>
ARCH_FN void group_fence(X&... x) {
  (pin(x), ...);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
ARCH_FN void group_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
#define TRIREME_4(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define TRIREME_32(i) TRIREME_4(i), TRIREME_4(i + 1), TRIREME_4(i + 2), TRIREME_4(i + 3), TRIREME_4(i + 4), TRIREME_4(i + 5), TRIREME_4(i + 6), TRIREME_4(i + 7)
#define TRIREME_NUMBERS_8 \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define TRIREME_NUMBERS_16 \
  TRIREME_NUMBERS_8       \
  ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define TRIREME_VALUES_8 TRIREME_32(0)
#define TRIREME_VALUES_16 TRIREME_32(0), TRIREME_32(8)
// The last operands: whether d is added to, and of a and b whether the columns are what is not k.
#define TRIREME_MMA(type, columns, n, a0, b0, add0, transposes, ...)                                                              \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " add0 ", 0;\nwgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type "." type " {"    \
               TRIREME_NUMBERS_##n "}, " a0 ", " b0 ", p, 1, 1, " transposes ";\n}" : TRIREME_VALUES_##n : __VA_ARGS__)
#define TRIREME_MMA_OF_TYPE(...)                                        \
  if constexpr (std::is_same_v<T, bf16>) TRIREME_MMA("bf16", __VA_ARGS__); \
  else TRIREME_MMA("f16", __VA_ARGS__)
template <typename T, int kN, bool kA, bool kB>
ARCH_FN void group_mma(float (&d)[kN][4], Factor<kA> a, Factor<kB> b, bool add) {
  static_assert(kN == 8 || kN == 16);
  if constexpr (kN == 8) {
    TRIREME_MMA_OF_TYPE("64", 8, "%32", "%33", "%34", "%35, %36", "l"(a.bits), "l"(b.bits), "r"(int{add}), "n"(int{kA}), "n"(int{kB}));
  } else {
    TRIREME_MMA_OF_TYPE("128", 16, "%64", "%65", "%66", "%67, %68", "l"(a.bits), "l"(b.bits), "r"(int{add}), "n"(int{kA}), "n"(int{kB}));
  }
}
template <typename T, int kN, bool kB>
ARCH_FN void group_mma(float (&d)[kN][4], uint32_t (&a)[4], Factor<kB> b, bool add) {
  static_assert(kN == 8 || kN == 16);
  if constexpr (kN == 8) {
    TRIREME_MMA_OF_TYPE("64", 8, "{%32,%33,%34,%35}", "%36", "%37", "%38", "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.bits), "r"(int{add}), "n"(int{kB}));
  } else {
    TRIREME_MMA_OF_TYPE("128", 16, "{%64,%65,%66,%67}", "%68", "%69", "%70", "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.bits), "r"(int{add}), "n"(int{kB}));
  }
}
#undef TRIREME_MMA_OF_TYPE
#undef TRIREME_MMA
#undef TRIREME_VALUES_16
#undef TRIREME_VALUES_8
#undef TRIREME_NUMBERS_16
#undef TRIREME_NUMBERS_8
#undef TRIREME_32
#undef TRIREME_4
template <int kGroups, typename... X>
ARCH_FN void group_wait(X&... x) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
  (pin(x), ...);
}

// The store never happens, but stands before the waits, which no store passes.
ARCH_FN void settle(float x) { asm volatile("{\n.reg .pred p;\nsetp.lt.f32 p, %0, 0f00000000;\n@p st.shared.f32 [%1], %0;\n}" ::"f"(x), "r"(0) : "memory"); }

template <int kRegisters>
ARCH_FN void registers_up() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
ARCH_FN void registers_down() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace trireme::kernels::cuda::arch
