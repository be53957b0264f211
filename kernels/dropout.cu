// Dropout of activations, whose mask is computed anew wherever it is wanted.
#include <algorithm>
#include <cmath>

#include "kernels/arch.h"
#include "kernels/kernels.h"
#include "kernels/launch.h"
#include "kernels/random.h"

namespace trireme::kernels::TRIREME_ARCH {
namespace {

// A thread takes kPer counters of a block of 64 features, which are kPer features that stand together in each of its quarters.
template <typename T, int kPer>
struct Mask {
  struct Params {
    Dropout call;
    uint64_t key;
    uint32_t threshold;
    float scale;
    int64_t first_block, units_per_row;  // blocks before the row's first feature; threads that a row takes
  };
  static constexpr int kThreads = 256, kUnits = 16 / kPer;  // of a block of features

  ARCH_FN static void run(const Params& p) {
    const int64_t unit = int64_t{arch::block_index().x} * kThreads + arch::thread_index(), row = unit / p.units_per_row;
    if (row >= p.call.num_rows) return;
    const int64_t in_row = unit - row * p.units_per_row, block = p.first_block + in_row / kUnits;
    const int within = static_cast<int>(in_row % kUnits) * kPer;
    uint32_t random[4][kPer];
    const uint64_t counter = (p.call.module << 32) | static_cast<uint32_t>(block * 16 + within), row_id = static_cast<uint64_t>(p.call.row_ids[row]);
    ARCH_UNROLL
    for (int e = 0; e < kPer; ++e) {
      const Random4 words = philox(p.key, row_id, counter + static_cast<uint64_t>(e));
      ARCH_UNROLL
      for (int w = 0; w < 4; ++w) random[w][e] = words.word[w];
    }
    ARCH_UNROLL
    for (int w = 0; w < 4; ++w) {
      const int64_t column = block * 64 + w * 16 + within - p.call.first_feature;
      if (column < 0 || column >= p.call.width) continue;
      float x[kPer], y[kPer] = {};
      load_values<T, kPer>(static_cast<const T*>(p.call.x) + row * p.call.width + column, x);
      T* to = static_cast<T*>(p.call.y) + row * p.call.width + column;
      if (p.call.add) load_values<T, kPer>(to, y);
      ARCH_UNROLL
      for (int e = 0; e < kPer; ++e) y[e] += x[e] * (random[w][e] < p.threshold ? 0.0f : p.scale);
      store_values<T, kPer>(to, y);
    }
  }
};

void dropout(const Dropout& p, Stream stream) {
  if (!(p.p >= 0 && p.p < 1) || p.num_rows < 0 || p.width < 0 || p.first_feature < 0)
    throw Refused("dropout of " + std::to_string(p.num_rows) + " rows of " + std::to_string(p.width) + " values from feature " + std::to_string(p.first_feature) +
                  " on with probability " + std::to_string(p.p) + ": sizes are not negative, and a probability is 0 or more and less than 1");
  if (p.num_rows == 0 || p.width == 0) return;
  with_type(p.type, [&]<typename T>(T) {
    auto with_per = [&](auto per) {
      using Kernel = Mask<T, per()>;
      const int64_t first_block = p.first_feature / 64, blocks = (p.first_feature + p.width + 63) / 64 - first_block, units = blocks * Kernel::kUnits;
      arch::launch<Kernel>(blocks_of(p.num_rows * units, Kernel::kThreads), 0, stream,
                           {p, random_key(p.seed, kDropout), static_cast<uint32_t>(std::min(4294967295.0, std::floor(p.p * 4294967296.0))),
                            static_cast<float>(1 / (1 - p.p)), first_block, units});
    };
    constexpr int kPer = 16 / sizeof(T);
    if (p.first_feature % kPer == 0 && in_vectors(p.width * int64_t{sizeof(T)}, {p.x, p.y})) with_per(Constant<kPer>());
    else with_per(Constant<1>());
  });
}

}  // namespace

void add_dropout(Kernels& kernels) { kernels.dropout = dropout; }

}  // namespace trireme::kernels::TRIREME_ARCH
