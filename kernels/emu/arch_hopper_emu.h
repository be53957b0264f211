// kernels/arch_hopper.h for g++. Included by it alone. As unkind as arch_emu.h:
//   - a tile lands only when a thread is blocked in a wait of its barrier, and until then its target holds NaNs
//   - products are computed from what is in shared memory when they are waited for; until then their results are NaNs
//   - what threads write is seen by copies and products only if it went through store_shared, and after async_fence
// Faults: barriers that were not begun, or get more than was announced, products that not all lanes of a warp come to, or
// without group_fence, threads that end before their copies and products.
#pragma once

namespace trireme::kernels::emulated::arch {

void barrier_init(uint64_t* b, int arrivals);
inline void barrier_init_done() {}
void barrier_arrive(uint64_t* b);
void barrier_arrive_expect(uint64_t* b, int bytes);
void barrier_wait(uint64_t* b, int parity);

struct TensorMap {
  char* base;
  int64_t rows, columns, row_stride;  // in values
  int tile_rows;
};
template <typename T>
TensorMap make_tile_map(const T* base, int64_t rows, int64_t columns, int64_t row_stride, int tile_rows) {
  static_assert(sizeof(T) == 2);
  if (reinterpret_cast<uintptr_t>(base) % 16 != 0 || row_stride % 8 != 0 || tile_rows < 1 || tile_rows > 256) throw Fault("a tensor map that the driver would refuse");
  return {reinterpret_cast<char*>(const_cast<T*>(base)), rows, columns, row_stride, tile_rows};
}
void tile_load(void* to, const TensorMap& map, int row, int column, uint64_t* b);
void tile_store(const TensorMap& map, int row, int column, const void* from);
void tile_store_commit();
void tile_store_wait();

void note_store(void* p, size_t count);
template <typename V>
void store_shared(V* p, const V& v) {
  std::memcpy(p, &v, sizeof v);
  note_store(p, sizeof v);
}
void async_fence();

uint64_t tile_descriptor(const void* p);
void group_fence();
void multiply_tiles(float* d, uint64_t a, uint64_t b, float (*widen)(uint16_t));
template <typename T>
void group_mma(float (&d)[32], uint64_t a, uint64_t b) {
  multiply_tiles(d, a, b, widen<T>);
}
void group_commit();
void wait_for_products(int num_groups_left);
template <int kGroups>
void group_wait(float (&)[32]) {
  wait_for_products(kGroups);
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
