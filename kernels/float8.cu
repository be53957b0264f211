// Conversion to eight bits with one scale a tensor: the largest magnitude by blocks, then all of them and the values.
#include "kernels/arch.h"
#include "kernels/elements.h"
#include "kernels/kernels.h"

namespace trireme::kernels::TRIREME_ARCH {
namespace {

constexpr float kLeastScale = 0x1p-126f;  // 1 / it is finite

template <typename From, int kPer>
struct Largest {
  struct Params {
    const From* x;
    float* largest;  // of each block
    int64_t count;
  };
  static constexpr int kThreads = 256, kSharedBytes = kThreads / arch::kWarp * 4;

  ARCH_FN static void run(const Params& p) {
    float largest = 0;
    const int64_t stride = int64_t{arch::grid_size().x} * kThreads * kPer;
    for (int64_t i = (int64_t{arch::block_index().x} * kThreads + arch::thread_index()) * kPer; i < p.count; i += stride) {
      float x[kPer] = {};
      load_part<From, kPer>(p.x + i, p.count - i, x);
      ARCH_UNROLL
      for (int e = 0; e < kPer; ++e) largest = arch::max(largest, x[e] < 0 ? -x[e] : x[e]);
    }
    largest = arch::block_max<kThreads>(largest, arch::shared<float>(0, kThreads / arch::kWarp));
    if (arch::thread_index() == 0) p.largest[arch::block_index().x] = largest;
  }
};

template <typename From, typename To, int kPer>
struct Scaled {
  struct Params {
    const From* x;
    To* y;
    const float* largest;
    float* scale;
    float largest_of_type;
    int num_blocks;
    Parts parts;
  };
  static constexpr int kThreads = Parts::kThreads, kSharedBytes = kThreads / arch::kWarp * 4;

  ARCH_FN static void run(const Params& p) {
    float largest = 0;
    for (int i = arch::thread_index(); i < p.num_blocks; i += kThreads) largest = arch::max(largest, p.largest[i]);
    largest = arch::block_max<kThreads>(largest, arch::shared<float>(0, kThreads / arch::kWarp));
    const float scale = arch::max(largest / p.largest_of_type, kLeastScale), inverse = 1 / scale;
    if (arch::block_index().x == 0 && arch::thread_index() == 0) *p.scale = scale;
    with_part<kPer>(p.parts, [&](int64_t, int64_t i, int64_t count) {
      float x[kPer] = {};
      load_part<From, kPer>(p.x + i, count, x);
      ARCH_UNROLL
      for (int e = 0; e < kPer; ++e) x[e] *= inverse;
      store_part<To, kPer>(p.y + i, count, x);
    });
  }
};

void to_float8(const ToFloat8& p, Stream stream) {
  if (p.count < 0 || size_of(p.from) == 1 || size_of(p.to) != 1) throw Refused("to_float8 of " + std::to_string(p.count) + " values: from float32, bfloat16 or float16 to float8");
  auto run = [&]<typename From, typename To>(From, To, float largest_of_type) {
    auto with = [&](auto per) {
      const int64_t blocks = std::clamp<int64_t>((p.count + 256 * per() - 1) / (256 * per()), 1, kFloat8Partials);
      arch::launch<Largest<From, per()>>({static_cast<int>(blocks), 1, 1}, Largest<From, per()>::kSharedBytes, stream, {static_cast<const From*>(p.x), p.workspace, p.count});
      const Parts parts = Parts::of(1, std::max<int64_t>(p.count, 1), true, per());  // the scale of nothing is a number, too
      using Kernel = Scaled<From, To, per()>;
      arch::launch<Kernel>(parts.grid(), Kernel::kSharedBytes, stream,
                           {static_cast<const From*>(p.x), static_cast<To*>(p.y), p.workspace, p.scale, largest_of_type, static_cast<int>(blocks), {parts.num_rows, p.count, parts.blocks_per_row}});
    };
    if (in_vectors(0, {p.x, p.y})) with(Constant<16>());
    else with(Constant<1>());
  };
  with_type(p.from, [&]<typename From>(From from) {
    if (p.to == Type::kFloat8E4M3) run(from, arch::e4m3{}, 448);
    else run(from, arch::e5m2{}, 57344);
  });
}

}  // namespace

void add_float8(Kernels& kernels) { kernels.to_float8 = to_float8; }

}  // namespace trireme::kernels::TRIREME_ARCH
