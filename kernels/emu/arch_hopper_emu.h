// kernels/arch_hopper.h for g++. Included by it alone. As unkind as arch_emu.h:
//   - a tile lands only when a thread is blocked in a wait of its barrier, and until then its target holds NaNs
//   - products are computed from what is in shared memory when they are waited for; until then their results hold NaNs, and so do
//     registers that are a factor
//   - what threads write is seen by copies and products only if it went through store_shared, and after async_fence
// Faults: barriers that were not begun, or get more than was announced; products that not all lanes of a warp come to, that the
// warps of a group do not have alike, or without group_fence; registers of a factor that were written before the product was waited
// for; threads that end before their copies and products.
#pragma once

namespace trireme::kernels::emulated::arch {

void barrier_init(uint64_t* b, int arrivals);
inline void barrier_init_done() {}
void barrier_arrive(uint64_t* b);
void barrier_arrive_expect(uint64_t* b, int bytes);
void barrier_wait(uint64_t* b, int parity);

struct TensorMap {
  char* base;
  int64_t rows, heads, columns, row_stride, head_stride;  // in values
  int tile_rows;
};
template <typename T>
TensorMap make_tile_map(const T* base, int64_t rows, int64_t heads, int64_t columns, int64_t row_stride, int64_t head_stride, int tile_rows) {
  static_assert(sizeof(T) == 2);
  for (int64_t size : {rows, heads, columns})
    if (size < 1 || size > int64_t{1} << 32) throw Fault("a tensor map that the driver would refuse: a size of " + std::to_string(size));
  for (int64_t stride : {row_stride, head_stride})
    if (stride < 1 || stride % 8 != 0 || stride >= int64_t{1} << 39) throw Fault("a tensor map that the driver would refuse: a stride of " + std::to_string(stride));
  if (reinterpret_cast<uintptr_t>(base) % 16 != 0 || tile_rows < 1 || tile_rows > 256) throw Fault("a tensor map that the driver would refuse");
  return {reinterpret_cast<char*>(const_cast<T*>(base)), rows, heads, columns, row_stride, head_stride, tile_rows};
}
void tile_load(void* to, const TensorMap& map, int row, int head, int column, uint64_t* b);
void tile_store(const TensorMap& map, int row, int head, int column, const void* from);
void tile_store_commit();
void tile_store_wait();

void note_store(void* p, size_t count);
template <typename V>
void store_shared(V* p, const V& v) {
  std::memcpy(p, &v, sizeof v);
  note_store(p, sizeof v);
}
void async_fence();

template <bool kColumns>
struct Factor {
  uint64_t bits;
};
Factor<false> rows_of(const void* p);
Factor<true> columns_of(const void* p, int next);

void group_fence_all();
template <typename... X>
void group_fence(X&...) {
  group_fence_all();
}
struct AnyFactor {
  bool columns;
  uint64_t bits;
  uint32_t* registers;  // null: of shared memory
};
void multiply_group(float* d, int num_columns, const AnyFactor& a, const AnyFactor& b, bool add, float (*widen)(uint16_t));
template <typename T, int kN, bool kA, bool kB>
void group_mma(float (&d)[kN][4], Factor<kA> a, Factor<kB> b, bool add) {
  static_assert(kN == 8 || kN == 16);
  multiply_group(d[0], 8 * kN, {kA, a.bits, nullptr}, {kB, b.bits, nullptr}, add, widen<T>);
}
template <typename T, int kN, bool kB>
void group_mma(float (&d)[kN][4], uint32_t (&a)[4], Factor<kB> b, bool add) {
  static_assert(kN == 8 || kN == 16);
  multiply_group(d[0], 8 * kN, {false, 0, a}, {kB, b.bits, nullptr}, add, widen<T>);
}
void group_commit();
void wait_for_products(int num_groups_left);
template <int kGroups, typename... X>
void group_wait(X&...) {
  wait_for_products(kGroups);
}
inline void settle(float x) {
  if (x < 0) fault("settles what is negative");
}
template <int kRegisters>
void registers_up() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
}
template <int kRegisters>
void registers_down() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
}

}  // namespace trireme::kernels::emulated::arch
