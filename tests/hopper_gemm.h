// A matrix product over kernels/arch_hopper.h: a producer warp group that loads tiles, a consumer that multiplies; each of its parts may
// be left out or done wrong, to see that the emulation notices.
#pragma once

#include <algorithm>

#include "kernels/arch_hopper.h"

namespace trireme::kernels {

enum class Left { kRows, kColumns, kRegisters };  // a as [m, k], as [k, m], and the former by way of registers
struct GemmForm {
  Left left = Left::kRows;
  bool right_columns = false;  // b as [k, n], not [n, k]
  int tile_columns = 64;       // of c: 64 or 128
};
inline constexpr GemmForm kGemmForms[] = {{}, {Left::kRows, true, 64}, {Left::kRows, false, 128}, {Left::kColumns, true, 128}, {Left::kColumns, false, 64}, {Left::kRegisters, true, 128}, {Left::kRegisters, false, 64}};

}  // namespace trireme::kernels

namespace trireme::kernels::TRIREME_ARCH {

enum class Without { kNothing, kWaitForTiles, kWaitForSpace, kWaitForProducts, kGroupFence, kAsyncFence, kStoreShared, kSwizzle, kStoreWait, kBytes, kInit, kNext, kColumns, kKeptRegisters, kSameProducts, kFirst };

// c[m, n] = a b in tiles of 64 rows, k in steps of 64 through two stages; a tile of c goes out through the accelerator.
template <typename T, GemmForm kForm, Without kWithout = Without::kNothing>
struct HopperGemm {
  struct Params {
    arch::TensorMap a, b, c;
    int k;
  };
  static constexpr bool kHopper = true;
  static constexpr int kN = kForm.tile_columns;
  static constexpr int kThreads = 256, kTileBytes = 64 * 128, kTiles = 1 + kN / 64, kStages = 2, kOut = kStages * kTiles, kBarriers = (kOut + kN / 64) * kTileBytes,
                       kSharedBytes = kBarriers + 1024;
  template <Without kPart>
  static constexpr bool without = kWithout == kPart;

  ARCH_FN static void run(const Params& p) {
    const auto tile = [](int i) { return arch::shared<T>(i * kTileBytes, kTileBytes / 2); };
    const auto full = arch::shared<uint64_t>(kBarriers, kStages), empty = arch::shared<uint64_t>(kBarriers + 64, kStages);
    const int row = arch::block_index().y * 64, column = arch::block_index().x * kN, steps = (p.k + 63) / 64;
    if (arch::thread_index() == 0 && !without<Without::kInit>) {
      for (int s = 0; s < kStages; ++s) {
        arch::barrier_init(&full[s], 1);
        arch::barrier_init(&empty[s], 4);
      }
      arch::barrier_init_done();
    }
    arch::sync_threads();
    if (arch::warp_index() >= 4) {
      arch::registers_down<40>();
      if (arch::thread_index() != 128) return;
      for (int i = 0; i < steps; ++i) {
        const int s = i % kStages, first = s * kTiles;
        if (i >= kStages && !without<Without::kWaitForSpace>) arch::barrier_wait(&empty[s], (i / kStages - 1) % 2);
        arch::barrier_arrive_expect(&full[s], without<Without::kBytes> ? kTileBytes : kTiles * kTileBytes);
        if constexpr (kForm.left == Left::kColumns) arch::tile_load(tile(first).data, p.a, i * 64, 0, row, &full[s]);
        else arch::tile_load(tile(first).data, p.a, row, 0, i * 64, &full[s]);
        ARCH_UNROLL
        for (int n = 0; n < kN; n += 64) {
          if constexpr (kForm.right_columns) arch::tile_load(tile(first + 1 + n / 64).data, p.b, i * 64, 0, column + n, &full[s]);
          else arch::tile_load(tile(first + 1 + n / 64).data, p.b, column + n, 0, i * 64, &full[s]);
        }
      }
      return;
    }
    arch::registers_up<232>();
    const int lane = arch::lane_index(), warp_row = arch::warp_index() * 16;
    float d[kN / 8][4];
    uint32_t left[4][4];
    for (int i = 0; i < steps; ++i) {
      const int s = i % kStages;
      const auto a = tile(s * kTiles), b = tile(s * kTiles + 1);
      if (!without<Without::kWaitForTiles>) arch::barrier_wait(&full[s], i / kStages % 2);
      if constexpr (kForm.left == Left::kRegisters) {
        ARCH_UNROLL
        for (int k = 0; k < 4; ++k)
          ARCH_UNROLL
          for (int r = 0; r < 4; ++r) {
            const int y = warp_row + lane / 4 + r % 2 * 8, x = 16 * k + 2 * (lane % 4) + r / 2 * 8;
            left[k][r] = *reinterpret_cast<const uint32_t*>(a.at(y * 64 + (x ^ y % 8 * 8), 2));
          }
      }
      if (!without<Without::kGroupFence>) arch::group_fence(d);
      ARCH_UNROLL
      for (int k = 0; k < 64; k += 16) {
        const bool add = without<Without::kFirst> || i > 0 || k > 0;
        const int step = without<Without::kSameProducts> && arch::warp_index() == 3 ? 0 : k;
        const auto with = [&](auto right) {
          if constexpr (kForm.left == Left::kRegisters) arch::group_mma<T>(d, left[k / 16], right, add);
          else if constexpr (kForm.left == Left::kColumns && !without<Without::kColumns>) arch::group_mma<T>(d, arch::columns_of(a.at(step * 64, 8), kTileBytes), right, add);
          else arch::group_mma<T>(d, arch::rows_of(a.at(step, 8)), right, add);
        };
        if constexpr (kForm.right_columns) with(arch::columns_of(b.at(k * 64, 8), without<Without::kNext> ? 0 : kTileBytes));
        else with(arch::rows_of(b.at(k, 8)));
      }
      arch::group_commit();
      if (without<Without::kKeptRegisters>) left[1][2] = 0;
      if (!without<Without::kWaitForProducts> || i + 1 == steps) arch::group_wait<0>(d, left);
      if (lane == 0) arch::barrier_arrive(&empty[s]);
    }
    ARCH_UNROLL
    for (int n = 0; n < kN / 8; ++n)
      ARCH_UNROLL
      for (int h = 0; h < 2; ++h) {
        const int r = warp_row + lane / 4 + 8 * h, c = n % 8 * 8 + lane % 4 * 2;
        auto* pair = reinterpret_cast<uint32_t*>(tile(kOut + n / 8).at(r * 64 + (without<Without::kSwizzle> ? c : c ^ r % 8 * 8), 2));
        if constexpr (without<Without::kStoreShared>) *pair = arch::pack<T>(d[n][2 * h], d[n][2 * h + 1]);
        else arch::store_shared(pair, arch::pack<T>(d[n][2 * h], d[n][2 * h + 1]));
      }
    if (!without<Without::kAsyncFence>) arch::async_fence();
    arch::sync_named(1, 128);
    if (arch::thread_index() > 0) return;
    ARCH_UNROLL
    for (int n = 0; n < kN; n += 64) arch::tile_store(p.c, row, 0, column + n, tile(kOut + n / 64).data);
    arch::tile_store_commit();
    if (!without<Without::kStoreWait>) arch::tile_store_wait();
  }
};

// Rows of a, b and c stand stride_a, stride_b and stride_c values apart.
template <typename T, GemmForm kForm, Without kWithout = Without::kNothing>
void hopper_gemm(const T* a, const T* b, T* c, int m, int n, int k, int stride_a, int stride_b, int stride_c, void* stream) {
  using Kernel = HopperGemm<T, kForm, kWithout>;
  const auto map = [](const T* x, int rows, int columns, int stride) { return arch::make_tile_map(x, rows, 1, columns, stride, stride, 64); };
  constexpr bool kLeftColumns = kForm.left == Left::kColumns, kRightColumns = kForm.right_columns;
  arch::launch<Kernel>({(n + Kernel::kN - 1) / Kernel::kN, (m + 63) / 64, 1}, Kernel::kSharedBytes, stream,
                       {map(a, kLeftColumns ? k : m, kLeftColumns ? m : k, stride_a), map(b, kRightColumns ? k : n, kRightColumns ? n : k, stride_b), map(c, m, n, stride_c), k});
}

}  // namespace trireme::kernels::TRIREME_ARCH

namespace trireme::kernels::cuda {
void hopper_gemm(bool of_bf16, size_t form, const void* a, const void* b, void* c, int m, int n, int k, int stride_a, int stride_b, int stride_c);
}
