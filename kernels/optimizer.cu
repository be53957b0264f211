// The optimizer's step on many tensors at once, the norm of their gradients and the factor that clips it.
#include <cmath>

#include "kernels/arch.h"
#include "kernels/kernels.h"
#include "kernels/launch.h"
#include "kernels/map_code.h"
#include "kernels/random.h"
#include "kernels/rounding.h"
#include "kernels/tensor_list.h"

namespace trireme::kernels::TRIREME_ARCH {
namespace {

constexpr int kVector = 4;  // values at once: 16 bytes of fp32
constexpr int64_t kUpdateChunk = 8192;

// Numbers of a step in fp32, as in src/optim/update_loops.inc.
struct UpdateNumbers {
  float keep, decay, beta1, mix1, beta2, mix2, root, size, epsilon;
  const float* grad_scale;
  uint64_t key, step;
};

// One value: g the gradient, w the weight, m and v the states.
template <UpdateRule kRule>
ARCH_FN void apply(const UpdateNumbers& n, float g, float& w, float& m, float& v) {
  if constexpr (kRule == UpdateRule::kAdamW) {
    m = m + (g - m) * n.mix1;
    v = v * n.beta2 + g * g * n.mix2;
    w = w * n.keep - m / (arch::sqrt(v) / n.root + n.epsilon) * n.size;
  } else if constexpr (kRule == UpdateRule::kSgd) {
    m = m * n.beta1 + (g + w * n.decay);
    w = w - m * n.size;
  } else {
    const float c = m * n.beta1 + g * n.mix1;
    w = w * n.keep - (c > 0 ? n.size : c < 0 ? -n.size : c * 0);
    m = m * n.beta2 + g * n.mix2;
  }
}

// T: of the weights.
template <typename T, UpdateRule kRule>
struct UpdateTensors {
  struct Params {
    UpdateNumbers numbers;
    TensorList<UpdateTensor, kUpdateChunk> list;
  };
  static constexpr int kThreads = 256, kBlocks = 4;

  ARCH_FN static void run(const Params& p) {
    const float scale = p.numbers.grad_scale ? *p.numbers.grad_scale : 1.0f;
    if (!(scale - scale == 0)) return;  // not finite: no step
    p.list.with_chunk(arch::block_index().x, [&](const UpdateTensor& t, int64_t begin, int64_t end) {
      const uintptr_t addresses = reinterpret_cast<uintptr_t>(t.grad) | reinterpret_cast<uintptr_t>(t.m) | reinterpret_cast<uintptr_t>(t.v) |
                                  reinterpret_cast<uintptr_t>(t.master) | reinterpret_cast<uintptr_t>(t.weight) * (4 / sizeof(T));
      const bool in_vectors = addresses % 16 == 0 && (t.places.first | t.places.offset | t.places.run | t.places.stride) % kVector == 0;
      const int64_t whole = in_vectors ? begin + (end - begin) / kVector * kVector : begin;
      for (int64_t i = begin + arch::thread_index() * kVector; i < whole; i += kThreads * kVector) update<kVector>(p.numbers, t, i, scale);
      for (int64_t i = whole + arch::thread_index(); i < end; i += kThreads) update<1>(p.numbers, t, i, scale);
    });
  }

  template <int kPer>
  ARCH_FN static void update(const UpdateNumbers& n, const UpdateTensor& t, int64_t i, float scale) {
    T* weight = static_cast<T*>(t.weight) + i;
    float g[kPer], m[kPer] = {}, v[kPer] = {}, w[kPer];
    load_values<float, kPer>(t.grad + i, g);
    if (kRule != UpdateRule::kSgd || t.m) load_values<float, kPer>(static_cast<const float*>(t.m) + i, m);
    if constexpr (kRule == UpdateRule::kAdamW) load_values<float, kPer>(static_cast<const float*>(t.v) + i, v);
    if (t.master) load_values<float, kPer>(t.master + i, w);
    else load_values<T, kPer>(weight, w);
    ARCH_UNROLL
    for (int e = 0; e < kPer; ++e) apply<kRule>(n, g[e] * scale, w[e], m[e], v[e]);
    if (kRule != UpdateRule::kSgd || t.m) store_values<float, kPer>(static_cast<float*>(t.m) + i, m);
    if constexpr (kRule == UpdateRule::kAdamW) store_values<float, kPer>(static_cast<float*>(t.v) + i, v);
    if (t.master) store_values<float, kPer>(t.master + i, w);
    if constexpr (std::is_same_v<T, arch::bf16>)
      if (!t.master) round_at_random<kPer>({n.key, n.step, t.id}, t.places, i, w);
    store_values<T, kPer>(weight, w);
  }
};

// AdamW with m and v in 8 bits. A warp has a block of elements, a lane kPer of them.
template <typename T>
struct UpdateIn8Bits {
  struct Params {
    UpdateNumbers numbers;
    const float* maps;
    TensorList<UpdateTensor, kUpdateChunk> list;
  };
  static constexpr int kThreads = 256, kPer = k8BitBlock / arch::kWarp, kMap = 256;
  static_assert(kUpdateChunk % k8BitBlock == 0);
  struct alignas(kPer) Codes {
    uint8_t of[kPer];
  };

  ARCH_FN static void run(const Params& p) {
    const float scale = p.numbers.grad_scale ? *p.numbers.grad_scale : 1.0f;
    if (!(scale - scale == 0)) return;  // not finite: no step
    const auto maps = arch::shared<float>(0, 2 * kMap);
    for (int i = arch::thread_index(); i < 2 * kMap; i += kThreads) maps[i] = p.maps[i];
    arch::sync_threads();
    p.list.with_chunk(arch::block_index().x, [&](const UpdateTensor& t, int64_t begin, int64_t end) {
      const uintptr_t addresses = reinterpret_cast<uintptr_t>(t.grad) | reinterpret_cast<uintptr_t>(t.master) | reinterpret_cast<uintptr_t>(t.weight) |
                                  (reinterpret_cast<uintptr_t>(t.m) | reinterpret_cast<uintptr_t>(t.v)) * (16 / kPer);
      const bool in_vectors = addresses % 16 == 0 && (t.places.first | t.places.offset | t.places.run | t.places.stride) % kPer == 0;
      for (int64_t block = begin + arch::warp_index() * k8BitBlock; block < end; block += kThreads / arch::kWarp * k8BitBlock) {
        const int64_t i = block + arch::lane_index() * kPer, count = end - i < 0 ? 0 : end - i < kPer ? end - i : kPer;
        update(p.numbers, t, maps, block / k8BitBlock, i, static_cast<int>(count), in_vectors && count == kPer, scale);
      }
    });
  }

  // All lanes of a warp come, those with a count of 0 too.
  ARCH_FN static void update(const UpdateNumbers& n, const UpdateTensor& t, const arch::Shared<float>& maps, int64_t block, int64_t i, int count, bool in_vectors, float scale) {
    T* weight = static_cast<T*>(t.weight) + i;
    uint8_t *m_codes = static_cast<uint8_t*>(t.m) + i, *v_codes = static_cast<uint8_t*>(t.v) + i;
    float g[kPer] = {}, w[kPer] = {}, m[kPer] = {}, v[kPer] = {};
    Codes of_m{}, of_v{};
    if (in_vectors) {
      load_values<float, kPer>(t.grad + i, g);
      if (t.master) load_values<float, kPer>(t.master + i, w);
      else load_values<T, kPer>(weight, w);
      of_m = arch::load<Codes>(m_codes), of_v = arch::load<Codes>(v_codes);
    } else {
      ARCH_UNROLL
      for (int e = 0; e < kPer; ++e)
        if (e < count) g[e] = t.grad[i + e], w[e] = t.master ? t.master[i + e] : arch::to_float(weight[e]), of_m.of[e] = m_codes[e], of_v.of[e] = v_codes[e];
    }
    const float m_scale = t.m_scale[block], v_scale = t.v_scale[block];
    float m_most = 0, v_most = 0;
    ARCH_UNROLL
    for (int e = 0; e < kPer; ++e) {
      if (e >= count) continue;
      m[e] = maps[of_m.of[e]] * m_scale, v[e] = maps[kMap + of_v.of[e]] * v_scale;
      apply<UpdateRule::kAdamW>(n, g[e] * scale, w[e], m[e], v[e]);
      m_most = arch::max(m_most, m[e] < 0 ? -m[e] : m[e]), v_most = arch::max(v_most, v[e]);
    }
    m_most = arch::warp_max(m_most), v_most = arch::warp_max(v_most);  // and every lane has read the old ones
    if (arch::lane_index() == 0) t.m_scale[block] = m_most, t.v_scale[block] = v_most;
    const float m_inverse = 1 / m_most, v_inverse = 1 / v_most;
    ARCH_UNROLL
    for (int e = 0; e < kPer; ++e) {
      if (e >= count) continue;
      const auto code = static_cast<int>(map_code(maps.part(0, kMap), m[e] * m_inverse));
      of_m.of[e] = static_cast<uint8_t>(m[e] < 0 && maps[code] == 0 ? code - 1 : code);
      of_v.of[e] = static_cast<uint8_t>(map_code(maps.part(kMap, kMap), v[e] * v_inverse));
    }
    float to[kPer];
    ARCH_UNROLL
    for (int e = 0; e < kPer; ++e) to[e] = w[e];
    if constexpr (std::is_same_v<T, arch::bf16>) {
      if (!t.master && in_vectors) round_at_random<kPer>({n.key, n.step, t.id}, t.places, i, to);
      if (!t.master && !in_vectors) {
        ARCH_UNROLL
        for (int e = 0; e < kPer; ++e)
          if (e < count) round_at_random<1>({n.key, n.step, t.id}, t.places, i + e, to + e);
      }
    }
    if (in_vectors) {
      if (t.master) store_values<float, kPer>(t.master + i, w);
      store_values<T, kPer>(weight, to);
      arch::store(m_codes, of_m), arch::store(v_codes, of_v);
      return;
    }
    ARCH_UNROLL
    for (int e = 0; e < kPer; ++e) {
      if (e >= count) continue;
      if (t.master) t.master[i + e] = w[e];
      weight[e] = arch::from_float<T>(to[e]), m_codes[e] = of_m.of[e], v_codes[e] = of_v.of[e];
    }
  }

};

template <typename Kernel>
void launch_update(const Update& p, typename Kernel::Params params, int shared_bytes, Stream stream) {
  for_lists<kUpdateChunk>("update", p.tensors, p.num_tensors, params.list,
                          [&](int64_t) { arch::launch<Kernel>({params.list.num_chunks, 1, 1}, shared_bytes, stream, params); });
}

void update(const Update& p, Stream stream) {
  for (int64_t i = 0; i < p.num_tensors; ++i)
    if (p.type == Type::kFloat16 && !p.tensors[i].master)
      throw Refused("update of tensor " + std::to_string(i) + ": weights in float16 need a master in fp32; bfloat16 does without, by stochastic rounding");
  const auto f = [](double x) { return static_cast<float>(x); };
  const UpdateNumbers numbers{f(1 - p.lr * p.weight_decay), f(p.weight_decay), f(p.beta1), f(1 - p.beta1), f(p.beta2), f(1 - p.beta2), f(std::sqrt(p.correction2)),
                              f(p.lr / p.correction1), f(p.epsilon), p.grad_scale, random_key(p.seed, kRounding), p.step};
  with_type(p.type, [&]<typename T>(T) {
    switch (p.rule) {
      case UpdateRule::kAdamW:
        return launch_update<UpdateTensors<T, UpdateRule::kAdamW>>(p, {numbers, {}}, 0, stream);
      case UpdateRule::kSgd:
        return launch_update<UpdateTensors<T, UpdateRule::kSgd>>(p, {numbers, {}}, 0, stream);
      case UpdateRule::kLion:
        return launch_update<UpdateTensors<T, UpdateRule::kLion>>(p, {numbers, {}}, 0, stream);
      case UpdateRule::kAdamW8Bit:
        return launch_update<UpdateIn8Bits<T>>(p, {numbers, p.maps, {}}, 2 * UpdateIn8Bits<T>::kMap * int{sizeof(float)}, stream);
    }
  });
}

// The sum of the squares of chunk c in fp64, where no square of an fp32 overflows: each thread its values, then the threads.
template <typename T>
struct SumSquares {
  struct Params {
    double* partials;
    TensorList<GradientTensor, kGradientChunk> list;
  };
  static constexpr int kThreads = 256, kPer = 16 / sizeof(T);

  ARCH_FN static void run(const Params& p) {
    p.list.with_chunk(arch::block_index().x, [&](const GradientTensor& t, int64_t begin, int64_t end) {
      const T* x = static_cast<const T*>(t.data);
      const bool in_vectors = reinterpret_cast<uintptr_t>(x) % 16 == 0;
      const int64_t whole = in_vectors ? begin + (end - begin) / kPer * kPer : begin;
      double sum = 0;
      for (int64_t i = begin + arch::thread_index() * kPer; i < whole; i += kThreads * kPer) add<kPer>(x + i, sum);
      for (int64_t i = whole + arch::thread_index(); i < end; i += kThreads) add<1>(x + i, sum);
      sum = arch::block_sum<kThreads>(sum, arch::shared<double>(0, kThreads / arch::kWarp));
      if (arch::thread_index() == 0) p.partials[arch::block_index().x] = sum;
    });
  }
  template <int kCount>
  ARCH_FN static void add(const T* from, double& sum) {
    float x[kCount];
    load_values<T, kCount>(from, x);
    ARCH_UNROLL
    for (int e = 0; e < kCount; ++e) sum += double{x[e]} * double{x[e]};
  }
};

ARCH_FN void set_clip(double squares, const Clip& p) {
  if (p.loss) squares += *p.loss * 0;
  const double root = arch::sqrt(squares), norm = p.scale * root;
  if (p.norm) *p.norm = static_cast<float>(norm);
  if (!p.factor || (p.hold && *p.factor != *p.factor)) return;
  // Not finite: NaN, for infinity would make a factor of 0 that looks like a step.
  const double clip = p.max_norm > 0 ? p.max_norm / (norm + 1e-6) : 1.0;
  *p.factor = root - root == 0 ? static_cast<float>(p.scale * (clip < 1 ? clip : 1.0)) : static_cast<float>(root - root);
}

struct SumOfPartials {
  struct Params {
    const double* partials;
    int64_t num_partials;
    double* squares;
    Clip clip;
  };
  static constexpr int kThreads = 1024;

  ARCH_FN static void run(const Params& p) {
    double sum = 0;
    for (int64_t i = arch::thread_index(); i < p.num_partials; i += kThreads) sum += p.partials[i];
    sum = arch::block_sum<kThreads>(sum, arch::shared<double>(0, kThreads / arch::kWarp));
    if (arch::thread_index() > 0) return;
    *p.squares = sum;
    set_clip(sum, p.clip);
  }
};

struct FactorOfSquares {
  using Params = ClipFactor;
  static constexpr int kThreads = 32;
  ARCH_FN static void run(const Params& p) {
    if (arch::thread_index() == 0) set_clip(*p.squares, p.clip);
  }
};

void gradient_norm(const GradientNorm& p, Stream stream) {
  int64_t num_partials = 0;
  with_type(p.type, [&]<typename T>(T) {
    using Kernel = SumSquares<T>;
    typename Kernel::Params params{};
    for_lists<kGradientChunk>("gradient_norm", p.tensors, p.num_tensors, params.list, [&](int64_t chunks_before) {
      params.partials = p.workspace + chunks_before;
      arch::launch<Kernel>({params.list.num_chunks, 1, 1}, Kernel::kThreads / arch::kWarp * int{sizeof(double)}, stream, params);
      num_partials = chunks_before + params.list.num_chunks;
    });
  });
  arch::launch<SumOfPartials>({1, 1, 1}, SumOfPartials::kThreads / arch::kWarp * int{sizeof(double)}, stream,
                              {p.workspace, num_partials, p.squares, p.clip});
}

void clip_factor(const ClipFactor& p, Stream stream) { arch::launch<FactorOfSquares>({1, 1, 1}, 0, stream, p); }

}  // namespace

void add_optimizer(Kernels& kernels) {
  kernels.update = update;
  kernels.gradient_norm = gradient_norm;
  kernels.clip_factor = clip_factor;
}

}  // namespace trireme::kernels::TRIREME_ARCH
