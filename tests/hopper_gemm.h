// A matrix product over kernels/arch_hopper.h: a producer warp group that loads tiles, a consumer that multiplies; each of its parts may
// be left out, to see that the emulation notices.
#pragma once

#include "kernels/arch_hopper.h"

namespace trireme::kernels::TRIREME_ARCH {

enum class Without { kNothing, kWaitForTiles, kWaitForSpace, kWaitForProducts, kGroupFence, kAsyncFence, kStoreShared, kSwizzle, kStoreWait, kBytes, kInit };

// c[m, n] = a[m, k] b[n, k]^T in 64 x 64 tiles, k in steps of 64 through two stages; a tile of c goes out through the accelerator.
template <typename T, Without kWithout = Without::kNothing>
struct HopperGemm {
  struct Params {
    arch::TensorMap a, b, c;
    int k;
  };
  static constexpr bool kHopper = true;
  static constexpr int kThreads = 256, kTileBytes = 64 * 128, kStages = 2, kSharedBytes = (2 * kStages + 1) * kTileBytes + 1024;
  template <Without kPart>
  static constexpr bool without = kWithout == kPart;

  ARCH_FN static void run(const Params& p) {
    const auto tile = [](int i) { return arch::shared<T>(i * kTileBytes, kTileBytes / 2); };
    const auto full = arch::shared<uint64_t>((2 * kStages + 1) * kTileBytes, kStages), empty = arch::shared<uint64_t>((2 * kStages + 1) * kTileBytes + 64, kStages);
    const int row = arch::block_index().y * 64, column = arch::block_index().x * 64, steps = (p.k + 63) / 64;
    if (arch::thread_index() == 0 && !without<Without::kInit>) {
      for (int s = 0; s < kStages; ++s) {
        arch::barrier_init(&full[s], 1);
        arch::barrier_init(&empty[s], 128);
      }
      arch::barrier_init_done();
    }
    arch::sync_threads();
    if (arch::warp_index() >= 4) {
      arch::registers_down<40>();
      if (arch::thread_index() != 128) return;
      for (int i = 0; i < steps; ++i) {
        const int s = i % kStages;
        if (i >= kStages && !without<Without::kWaitForSpace>) arch::barrier_wait(&empty[s], (i / kStages - 1) % 2);
        arch::barrier_arrive_expect(&full[s], without<Without::kBytes> ? kTileBytes : 2 * kTileBytes);
        arch::tile_load(tile(2 * s).data, p.a, row, i * 64, &full[s]);
        arch::tile_load(tile(2 * s + 1).data, p.b, column, i * 64, &full[s]);
      }
      return;
    }
    arch::registers_up<232>();
    float d[32] = {};
    for (int i = 0; i < steps; ++i) {
      const int s = i % kStages;
      if (!without<Without::kWaitForTiles>) arch::barrier_wait(&full[s], i / kStages % 2);
      if (!without<Without::kGroupFence>) arch::group_fence();
      ARCH_UNROLL
      for (int k = 0; k < 64; k += 16) arch::group_mma<T>(d, arch::tile_descriptor(tile(2 * s).at(k, 8)), arch::tile_descriptor(tile(2 * s + 1).at(k, 8)));
      arch::group_commit();
      if (!without<Without::kWaitForProducts> || i + 1 == steps) arch::group_wait<0>(d);
      arch::barrier_arrive(&empty[s]);
    }
    const auto out = tile(2 * kStages);
    const int lane = arch::lane_index();
    ARCH_UNROLL
    for (int i = 0; i < 32; i += 2) {
      const int r = arch::warp_index() * 16 + lane / 4 + i / 2 % 2 * 8, c = i / 4 * 8 + lane % 4 * 2;
      const int at = r * 64 + (without<Without::kSwizzle> ? c : c ^ r % 8 * 8);
      auto* pair = reinterpret_cast<uint32_t*>(out.at(at, 2));
      if constexpr (without<Without::kStoreShared>) *pair = arch::pack<T>(d[i], d[i + 1]);
      else arch::store_shared(pair, arch::pack<T>(d[i], d[i + 1]));
    }
    if (!without<Without::kAsyncFence>) arch::async_fence();
    arch::sync_named(1, 128);
    if (arch::thread_index() > 0) return;
    arch::tile_store(p.c, row, column, out.data);
    arch::tile_store_commit();
    if (!without<Without::kStoreWait>) arch::tile_store_wait();
  }
};

template <typename T, Without kWithout = Without::kNothing>
void hopper_gemm(const T* a, const T* b, T* c, int m, int n, int k, int stride_k, int stride_n, void* stream) {
  using Kernel = HopperGemm<T, kWithout>;
  arch::launch<Kernel>({(n + 63) / 64, (m + 63) / 64, 1}, Kernel::kSharedBytes, stream,
                       {arch::make_tile_map(a, m, k, stride_k, 64), arch::make_tile_map(b, n, k, stride_k, 64), arch::make_tile_map(c, m, n, stride_n, 64), k});
}

}  // namespace trireme::kernels::TRIREME_ARCH

namespace trireme::kernels::cuda {
void hopper_gemm(bool of_bf16, const void* a, const void* b, void* c, int m, int n, int k, int stride_k, int stride_n);
}
