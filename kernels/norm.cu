// RMSNorm and LayerNorm, which has a mean to take off and a bias to add: one pass over memory in each direction. A team of
// threads, a warp or a block, has a row in its registers.
#include <algorithm>

#include "kernels/arch.h"
#include "kernels/kernels.h"
#include "kernels/launch.h"

namespace trireme::kernels::TRIREME_ARCH {
namespace {

// A row in the registers of a team: thread `lane` has columns (v * kTeam + lane) * kPer + e as values v * kPer + e.
template <typename T, int kTeam, int kPer>
struct Row {
  static constexpr int kVectors = kPer == 1 ? 8 : 32 / kPer, kValues = kVectors * kPer;
  float value[kValues] = {};

  // f(values, column) for each vector within the row.
  template <typename F>
  ARCH_FN void each(int width, int lane, const F& f) {
    ARCH_UNROLL
    for (int v = 0; v < kVectors; ++v)
      if (const int column = (v * kTeam + lane) * kPer; column < width) f(&value[v * kPer], column);
  }
  ARCH_FN void load(const void* row, int width, int lane) {
    each(width, lane, [&](float* x, int column) { load_values<T, kPer>(static_cast<const T*>(row) + column, x); });
  }
  ARCH_FN void store(void* row, int width, int lane) {
    each(width, lane, [&](float* x, int column) { store_values<T, kPer>(static_cast<T*>(row) + column, x); });
  }
  // f(x, y) with the values of another row.
  template <typename F>
  ARCH_FN void combine(const void* row, int width, int lane, const F& f) {
    each(width, lane, [&](float* x, int column) {
      float y[kPer];
      load_values<T, kPer>(static_cast<const T*>(row) + column, y);
      ARCH_UNROLL
      for (int e = 0; e < kPer; ++e) f(x[e], y[e]);
    });
  }
};

template <int kTeam>
ARCH_FN float team_sum(float x, int num_sums) {
  if constexpr (kTeam == arch::kWarp) return arch::warp_sum(x);
  else return arch::block_sum<kTeam>(x, arch::shared<float>(num_sums % 2 * kTeam / 8, kTeam / arch::kWarp));  // in turns: free again after the next
}
template <int kTeam>
constexpr int kSumBytes = kTeam == arch::kWarp ? 0 : kTeam / 4;

// kCentred: LayerNorm.
template <typename T, int kTeam, int kPer, bool kCentred>
struct Forward {
  using Params = LayerNormForward;
  static constexpr int kThreads = kTeam == arch::kWarp ? 256 : kTeam;
  static constexpr int kBlocks = std::max(1, (sizeof(T) == 2 ? 1024 : 512) / kThreads);  // 64 or 128 registers: a row, and vectors of another
  using R = Row<T, kTeam, kPer>;

  ARCH_FN static void run(const Params& p) {
    const int lane = arch::thread_index() % kTeam, width = static_cast<int>(p.width);
    const int64_t row = int64_t{arch::block_index().x} * (kThreads / kTeam) + arch::thread_index() / kTeam;
    if (row >= p.num_rows) return;
    const int64_t begin = row * p.width * int64_t{sizeof(T)};
    R s;
    s.load(static_cast<const char*>(p.x) + begin, width, lane);
    if (p.residual) {
      s.combine(static_cast<const char*>(p.residual) + begin, width, lane, [](float& x, float y) { x = rounded<T>(x + y); });
      s.store(static_cast<char*>(p.sum) + begin, width, lane);
    }
    if constexpr (kCentred) {
      float sum = 0;
      ARCH_UNROLL
      for (float x : s.value) sum += x;
      const float mean = team_sum<kTeam>(sum, 1) / static_cast<float>(width);
      s.each(width, lane, [&](float* x, int) {  // no others: they are 0
        ARCH_UNROLL
        for (int e = 0; e < kPer; ++e) x[e] -= mean;
      });
      if (lane == 0) p.mean[row] = mean;
    }
    float squares = 0;
    ARCH_UNROLL
    for (float x : s.value) squares += x * x;
    const float rstd = arch::rsqrt(team_sum<kTeam>(squares, 0) / static_cast<float>(width) + p.eps);
    if constexpr (kCentred) {
      s.combine(p.weight, width, lane, [&](float& x, float w) { x = x * rstd * w; });
      if (p.bias) s.combine(p.bias, width, lane, [](float& x, float b) { x += b; });
    } else {
      s.combine(p.weight, width, lane, [&](float& x, float w) { x = rounded<T>(x * rstd) * w; });
    }
    s.store(static_cast<char*>(p.y) + begin, width, lane);
    if (lane == 0) p.rstd[row] = rstd;
  }
};

// Team number t takes rows t, t + num_teams, ...; its sums for the weight's gradient become row t of the workspace, those for the
// bias row num_teams + t. Registers do not suffice for both: LayerNorm's are in shared memory, each thread's own.
template <typename T, int kTeam, int kPer, bool kCentred>
struct Backward {
  struct Params : LayerNormBackward {
    int64_t num_teams;
  };
  static constexpr int kThreads = kTeam == arch::kWarp ? 256 : kTeam;
  static constexpr int kBlocks = std::max(1, 512 / kThreads);  // 128 registers: three rows
  using R = Row<T, kTeam, kPer>;
  static constexpr int kSharedBytes = kSumBytes<kTeam> + (kCentred ? 2 * R::kValues * kThreads * 4 : 0);

  ARCH_FN static void run(const Params& p) {
    const int lane = arch::thread_index() % kTeam, width = static_cast<int>(p.width);
    const int64_t team = int64_t{arch::block_index().x} * (kThreads / kTeam) + arch::thread_index() / kTeam;
    if (team >= p.num_teams) return;
    R sums;
    auto weight_sum = [&](int i) -> float& {
      if constexpr (kCentred) return arch::shared<float>(kSumBytes<kTeam>, R::kValues * kThreads)[i * kThreads + arch::thread_index()];
      else return sums.value[i];
    };
    [[maybe_unused]] auto bias_sum = [&](int i) -> float& {
      return arch::shared<float>(kSumBytes<kTeam> + R::kValues * kThreads * 4, R::kValues * kThreads)[i * kThreads + arch::thread_index()];
    };
    if constexpr (kCentred) {
      ARCH_UNROLL
      for (int i = 0; i < R::kValues; ++i) weight_sum(i) = bias_sum(i) = 0;
    }
    int num_sums = 0;
    for (int64_t row = team; row < p.num_rows; row += p.num_teams) {
      const int64_t begin = row * p.width * int64_t{sizeof(T)};
      const float rstd = p.rstd[row];
      R g, s;
      g.load(static_cast<const char*>(p.grad_y) + begin, width, lane);
      s.load(static_cast<const char*>(p.s) + begin, width, lane);
      if constexpr (kCentred) {
        const float mean = p.mean[row];
        ARCH_UNROLL
        for (float& x : s.value) x -= mean;  // beyond the row g is 0
        if (p.grad_bias) {
          ARCH_UNROLL
          for (int i = 0; i < R::kValues; ++i) bias_sum(i) += g.value[i];
        }
      }
      if (p.grad_weight) {
        ARCH_UNROLL
        for (int i = 0; i < R::kValues; ++i) weight_sum(i) += g.value[i] * (kCentred ? s.value[i] * rstd : rounded<T>(s.value[i] * rstd));
      }
      if (!p.grad_x) continue;
      g.combine(p.weight, width, lane, [](float& x, float w) { x *= w; });
      if constexpr (kCentred) {
        float sum = 0;
        ARCH_UNROLL
        for (float x : g.value) sum += x;
        const float mean = team_sum<kTeam>(sum, 1) / static_cast<float>(width);
        g.each(width, lane, [&](float* x, int) {
          ARCH_UNROLL
          for (int e = 0; e < kPer; ++e) x[e] -= mean;
        });
      }
      float products = 0;
      ARCH_UNROLL
      for (int i = 0; i < R::kValues; ++i) products += g.value[i] * s.value[i];
      const float mean = team_sum<kTeam>(products, kCentred ? 0 : num_sums++) / static_cast<float>(width) * rstd * rstd;
      ARCH_UNROLL
      for (int i = 0; i < R::kValues; ++i) g.value[i] = (g.value[i] - s.value[i] * mean) * rstd;
      if (p.grad_sum) g.combine(static_cast<const char*>(p.grad_sum) + begin, width, lane, [](float& x, float y) { x += y; });
      g.store(static_cast<char*>(p.grad_x) + begin, width, lane);
    }
    auto put = [&](const auto& sum, int64_t row) {
      ARCH_UNROLL
      for (int i = 0; i < R::kValues; ++i) sums.value[i] = sum(i);
      sums.each(width, lane, [&](const float* x, int column) {
        ARCH_UNROLL
        for (int e = 0; e < kPer; ++e) p.workspace[row * p.width + column + e] = x[e];
      });
    };
    if (p.grad_weight) put(weight_sum, team);
    if constexpr (kCentred) {
      if (p.grad_bias) put(bias_sum, p.num_teams + team);
    }
  }
};

// The rows of the workspace: each warp every 8th, then the warps in their order. Lanes have columns.
struct SumPartials {
  struct Params {
    const float* partials;
    float* sum;
    int64_t num_partials, width;
  };
  static constexpr int kThreads = 256;

  ARCH_FN static void run(const Params& p) {
    constexpr int kWarps = kThreads / arch::kWarp;
    const auto sums = arch::shared<float>(0, kThreads);
    const int64_t c = int64_t{arch::block_index().x} * arch::kWarp + arch::lane_index();
    float sum = 0;
    if (c < p.width)
      for (int64_t r = arch::warp_index(); r < p.num_partials; r += kWarps) sum += p.partials[r * p.width + c];
    sums[arch::thread_index()] = sum;
    arch::sync_threads();
    if (arch::warp_index() > 0 || c >= p.width) return;
    for (int w = 1; w < kWarps; ++w) sum += sums[w * arch::kWarp + arch::lane_index()];
    p.sum[c] = sum;
  }
};

// f(team, per) with the smallest team that holds a row, and the number of values that are read at once.
template <typename T, typename F>
void with_team(const char* name, int64_t num_rows, int64_t width, std::initializer_list<const void*> rows, const F& f) {
  auto with_per = [&](auto per) {
    constexpr int kValues = Row<T, 32, per()>::kValues, kLargest = per() == 1 ? 1024 : 512;
    if (num_rows < 0 || width < 1 || width > kLargest * kValues)
      throw Refused(std::string(name) + " of " + std::to_string(num_rows) + " rows of " + std::to_string(width) + " values: a row has 1 to " +
                    std::to_string(kLargest * kValues) + (per() == 1 ? " where it is not in whole 16 bytes" : ""));
    if (num_rows == 0) return;
    if (width <= 32 * kValues) f(Constant<32>(), per);
    else if (width <= 256 * kValues) f(Constant<256>(), per);
    else f(Constant<kLargest>(), per);
  };
  if (in_vectors(width * int64_t{sizeof(T)}, rows)) with_per(Constant<16 / sizeof(T)>());
  else with_per(Constant<1>());
}

template <bool kCentred>
void forward(const char* name, const LayerNormForward& p, Stream stream) {
  with_type(p.type, [&]<typename T>(T) {
    with_team<T>(name, p.num_rows, p.width, {p.x, p.residual, p.sum, p.y, p.weight, p.bias}, [&](auto team, auto per) {
      using Kernel = Forward<T, team(), per(), kCentred>;
      arch::launch<Kernel>(blocks_of(p.num_rows, Kernel::kThreads / team()), kSumBytes<team()>, stream, p);
    });
  });
}

template <bool kCentred>
void backward(const char* name, const LayerNormBackward& p, Stream stream) {
  const int64_t partials = p.grad_weight || p.grad_bias ? std::min(p.num_rows, kRmsNormPartials) : p.num_rows;
  with_type(p.type, [&]<typename T>(T) {
    with_team<T>(name, p.num_rows, p.width, {p.grad_y, p.grad_sum, p.s, p.weight, p.grad_x}, [&](auto team, auto per) {
      using Kernel = Backward<T, team(), per(), kCentred>;
      arch::launch<Kernel>(blocks_of(partials, Kernel::kThreads / team()), Kernel::kSharedBytes, stream, {p, partials});
    });
  });
  auto sum = [&](int64_t first, float* to) {
    if (to) arch::launch<SumPartials>(blocks_of(p.width, arch::kWarp), SumPartials::kThreads * int{sizeof(float)}, stream, {p.workspace + first * p.width, to, partials, p.width});
  };
  sum(0, p.grad_weight);
  sum(partials, p.grad_bias);
}

void rms_norm_forward(const RmsNormForward& p, Stream stream) {
  forward<false>("rms_norm_forward", {p.type, p.num_rows, p.width, p.x, p.residual, p.weight, nullptr, p.eps, p.y, p.sum, nullptr, p.rstd}, stream);
}
void rms_norm_backward(const RmsNormBackward& p, Stream stream) {
  backward<false>("rms_norm_backward", {p.type, p.num_rows, p.width, p.grad_y, p.grad_sum, p.s, p.weight, nullptr, p.rstd, p.grad_x, p.grad_weight, nullptr, p.workspace}, stream);
}
void layer_norm_forward(const LayerNormForward& p, Stream stream) { forward<true>("layer_norm_forward", p, stream); }
void layer_norm_backward(const LayerNormBackward& p, Stream stream) { backward<true>("layer_norm_backward", p, stream); }

}  // namespace

void add_norm(Kernels& kernels) {
  kernels.rms_norm_forward = rms_norm_forward;
  kernels.rms_norm_backward = rms_norm_backward;
  kernels.layer_norm_forward = layer_norm_forward;
  kernels.layer_norm_backward = layer_norm_backward;
}

}  // namespace trireme::kernels::TRIREME_ARCH
