// Sums over rows, in two steps: over slices of the rows, and over those.
#include "kernels/arch.h"
#include "kernels/kernels.h"
#include "kernels/launch.h"

namespace trireme::kernels::TRIREME_ARCH {
namespace {

// Lanes have columns; warps take the rows of a slice in turns, and are added in their order.
template <typename T, int kPer>
struct Slices {
  struct Params {
    const T* x;
    float* sums;  // [slices, width]
    int64_t num_rows, width, rows_per_slice;
    int blocks_per_row;
  };
  static constexpr int kThreads = 256, kWarps = kThreads / arch::kWarp, kColumns = arch::kWarp * kPer, kSharedBytes = kWarps * kColumns * 4;

  ARCH_FN static void run(const Params& p) {
    const auto sums = arch::shared<float>(0, kWarps * kColumns);
    const int64_t slice = arch::block_index().x / p.blocks_per_row;
    const int64_t begin = slice * p.rows_per_slice, rest = p.num_rows - begin, count = rest < p.rows_per_slice ? rest : p.rows_per_slice;
    const int64_t first_column = int64_t{arch::block_index().x % p.blocks_per_row} * kColumns, column = first_column + arch::lane_index() * kPer;
    float sum[kPer] = {};
    if (column < p.width) {
      for (int64_t r = arch::warp_index(); r < count; r += kWarps) {
        float x[kPer];
        load_values<T, kPer>(p.x + (begin + r) * p.width + column, x);
        ARCH_UNROLL
        for (int e = 0; e < kPer; ++e) sum[e] += x[e];
      }
    }
    ARCH_UNROLL
    for (int e = 0; e < kPer; ++e) sums[arch::warp_index() * kColumns + e * arch::kWarp + arch::lane_index()] = sum[e];
    arch::sync_threads();
    for (int i = arch::thread_index(); i < kColumns; i += kThreads) {
      const int64_t c = first_column + i % arch::kWarp * kPer + i / arch::kWarp;
      if (c >= p.width) continue;
      float total = 0;
      ARCH_UNROLL
      for (int w = 0; w < kWarps; ++w) total += sums[w * kColumns + i];
      p.sums[slice * p.width + c] = total;
    }
  }
};

template <typename T>
void sum_slices(const void* x, float* sums, int64_t num_rows, int64_t width, int64_t num_slices, Stream stream) {
  auto run = [&](auto per) {
    using Kernel = Slices<T, per()>;
    const int64_t blocks = (width + Kernel::kColumns - 1) / Kernel::kColumns;
    arch::launch<Kernel>(blocks_of(num_slices * blocks, 1), Kernel::kSharedBytes, stream,
                         {static_cast<const T*>(x), sums, num_rows, width, (num_rows + num_slices - 1) / num_slices, static_cast<int>(blocks)});
  };
  if (in_vectors(width * int64_t{sizeof(T)}, {x})) run(Constant<16 / sizeof(T)>());
  else run(Constant<1>());
}

void sum_rows(const SumRows& p, Stream stream) {
  if (p.num_rows < 0 || p.width < 0 || p.width > 1 << 30)
    throw Refused("sum_rows of " + std::to_string(p.num_rows) + " rows of " + std::to_string(p.width) + " values: a row has at most 2^30");
  if (p.width == 0) return;
  const int64_t slices = sum_rows_slices(p.num_rows);
  with_type(p.type, [&]<typename T>(T) { sum_slices<T>(p.x, slices > 1 ? p.workspace : p.sum, p.num_rows, p.width, slices, stream); });
  if (slices > 1) sum_slices<float>(p.workspace, p.sum, slices, p.width, 1, stream);
}

}  // namespace

void add_sums(Kernels& kernels) { kernels.sum_rows = sum_rows; }

}  // namespace trireme::kernels::TRIREME_ARCH
