// What the attention kernels for Hopper GPUs are made of. A block has some warp groups that compute and behind them a loader, one
// thread of which lets the accelerator fill tiles of rows: shared memory has them as parts of 64 columns, one behind the other, with
// the 128-byte swizzle. The accelerator knows nothing of segments: what it brings of rows behind a segment's last are another
// segment's, whose infinities would reach products through probabilities of 0; so such rows are cleared.
#pragma once

#include "kernels/arch_hopper.h"
#include "kernels/attention_rows.h"

namespace trireme::kernels::TRIREME_ARCH::attention {

inline constexpr int kGroup = 4 * arch::kWarp;

// Barriers of hardware, of which 0 is sync_threads.
inline constexpr int kAllGroups = 1, kTurn = 2;  // the latter: one a group

// Registers of the threads that compute and of the loader's, of those that a block of kComputing + kGroup threads begins with: with more
// it would wait for ever.
template <int kComputing, int kRegisters, int kLoaders>
ARCH_HOST_FN constexpr bool registers_suffice() {
  constexpr int kThreads = kComputing + kGroup, kEach = 65536 / kThreads / 8 * 8;
  return kComputing * kRegisters + kGroup * kLoaders <= kThreads * kEach;
}

// Tiles in kStages places, which are filled and read one after the other: number i lies at place i % kStages. Readers are warps.
template <int kStages>
struct Pipe {
  Shared<uint64_t> filled, read;

  ARCH_FN void begin(int num_arrivals, int num_readers) const {  // by one thread
    ARCH_UNROLL
    for (int s = 0; s < kStages; ++s) {
      arch::barrier_init(&filled[s], num_arrivals);
      arch::barrier_init(&read[s], num_readers);
    }
  }
  ARCH_FN uint64_t* at(int i) const { return &filled[i % kStages]; }
  ARCH_FN void wait_for_space(int i) const {
    if (i >= kStages) arch::barrier_wait(&read[i % kStages], (i / kStages + 1) % 2);
  }
  ARCH_FN void wait_for_tile(int i) const { arch::barrier_wait(&filled[i % kStages], i / kStages % 2); }
  ARCH_FN void release(int i) const {
    if (arch::lane_index() == 0) arch::barrier_arrive(&read[i % kStages]);
  }
};
template <int kStages>
ARCH_FN Pipe<kStages> pipe_at(int offset_bytes) {
  return {arch::shared<uint64_t>(offset_bytes, kStages), arch::shared<uint64_t>(offset_bytes + 8 * kStages, kStages)};
}
template <int kStages>
inline constexpr int kPipeBytes = 16 * kStages;

// A tile of kRows rows of D elements.
template <typename T, int kRows, int D>
struct HopperTile {
  static constexpr int kPart = kRows * 64, kBytes = kRows * D * static_cast<int>(sizeof(T)), kPartBytes = kBytes / (D / 64);
  Shared<T> all;

  ARCH_FN explicit HopperTile(int offset_bytes) : all(arch::shared<T>(offset_bytes, kRows * D)) {}
  // 8 elements, of a column that is a multiple of 8.
  ARCH_FN T* at(int row, int column) const { return all.at(column / 64 * kPart + row * 64 + (column % 64 ^ row % 8 * 8), 8); }

  ARCH_FN void load(const arch::TensorMap& map, int row, int head, uint64_t* barrier) const {
    ARCH_UNROLL
    for (int c = 0; c < D; c += 64) arch::tile_load(all.at(c / 64 * kPart, kPart), map, row, head, c, barrier);
  }
  // Rows from `row` on as a factor whose k are 16 columns from `column` on; and columns from `column` on, whose k are 16 rows.
  ARCH_FN arch::Factor<false> rows(int row, int column) const { return arch::rows_of(all.at(column / 64 * kPart + row * 64 + column % 64, 8)); }
  ARCH_FN arch::Factor<true> columns(int row, int column) const { return arch::columns_of(all.at(column / 64 * kPart + row * 64, 8), kPartBytes); }

  // Zeros into the rows from `count` on, by kThreads threads; then async_fence and a barrier of theirs.
  template <int kThreads>
  ARCH_FN void clear(int count) const {
    for (int i = count * (D / 8) + arch::thread_index(); i < kRows * (D / 8); i += kThreads) arch::store_shared(reinterpret_cast<arch::Bytes16*>(at(i / (D / 8), i % (D / 8) * 8)), arch::Bytes16{});
  }
  // A warp's 16 rows of a result; rows l / 4 times `low`, rows l / 4 + 8 times `high`.
  ARCH_FN void put_result(int row, const float (&x)[D / 8][4], float low, float high) const {
    const int lane = arch::recomputed(arch::lane_index());  // the addresses would not fit in registers across a loop
    ARCH_UNROLL
    for (int n = 0; n < D / 8; ++n) {
      arch::store(at(row + lane / 4, 8 * n) + 2 * (lane % 4), arch::pack<T>(x[n][0] * low, x[n][1] * low));
      arch::store(at(row + lane / 4 + 8, 8 * n) + 2 * (lane % 4), arch::pack<T>(x[n][2] * high, x[n][3] * high));
    }
  }
  // Such rows that were rounded to left factors, as a factor of products.
  ARCH_FN void put_left(int row, const uint32_t (&x)[D / 16][4]) const {
    const int lane = arch::recomputed(arch::lane_index());
    ARCH_UNROLL
    for (int k = 0; k < D / 16; ++k)
      ARCH_UNROLL
      for (int i = 0; i < 4; ++i) arch::store_shared(reinterpret_cast<uint32_t*>(at(row + lane / 4 + i % 2 * 8, 16 * k + i / 2 * 8) + 2 * (lane % 4)), x[k][i]);
  }
  // 16 rows from `row` on to rows to[0 .. count), by one warp.
  ARCH_FN void write_rows(int row, T* to, int64_t stride, int count) const {
    constexpr int kPieces = D / 8;
    ARCH_UNROLL
    for (int i = 0; i < 16 * kPieces; i += arch::kWarp) {
      const int r = (i + arch::lane_index()) / kPieces, c = (i + arch::lane_index()) % kPieces * 8;
      if (r < count) arch::store(to + r * stride + c, arch::load<arch::Bytes16>(at(row + r, c)));
    }
  }
};

// Rounded, a result x[n] is kN / 2 left factors of products.
template <typename T, int kN>
ARCH_FN void as_left(uint32_t (&a)[kN / 2][4], const float (&x)[kN][4]) {
  ARCH_UNROLL
  for (int k = 0; k < kN / 2; ++k) as_left<T>(a[k], x[2 * k], x[2 * k + 1]);
}

template <int kN>
ARCH_FN void set_zero(float (&x)[kN][4]) {
  ARCH_UNROLL
  for (auto& columns : x)
    ARCH_UNROLL
    for (float& value : columns) value = 0;
}

template <typename T>
arch::TensorMap map_of(const ConstHeads& x, int64_t rows, int64_t heads, int head_dim, int tile_rows) {
  return arch::make_tile_map(static_cast<const T*>(x.data), rows, heads, head_dim, x.row_stride, x.head_stride, tile_rows);
}

// f(T{}, Constant<head dim>{}) of those head dims that these kernels are for.
template <typename F>
void with_type_and_hopper_dim(const AttentionShape& s, const F& f) {
  auto with_dim = [&](auto t) { s.head_dim == 64 ? f(t, Constant<64>{}) : f(t, Constant<128>{}); };
  s.type == Type::kBFloat16 ? with_dim(arch::bf16{}) : with_dim(arch::fp16{});
}

}  // namespace trireme::kernels::TRIREME_ARCH::attention
