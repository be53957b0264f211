// Rotary embedding and gated activations: each value is read once and written once.
#include "kernels/arch.h"
#include "kernels/elements.h"
#include "kernels/kernels.h"

namespace trireme::kernels::TRIREME_ARCH {
namespace {

// A thread has kPer columns of a few heads of a token, in both halves: the heads share the tables' values.
template <typename T, int kPer>
struct Rotate {
  struct Params : Rope {
    int num_parts, num_rotated;      // of a head: runs of kPer values that a thread has (two of them where it rotates)
    int num_groups, tokens_per_block;  // of heads
  };
  static constexpr int kThreads = 256, kHeads = 4;

  ARCH_FN static void run(const Params& p) {
    const int per_token = p.num_groups * p.num_parts;
    for (int i = arch::thread_index(); i < p.tokens_per_block * per_token; i += kThreads) {
      const int64_t token = int64_t{arch::block_index().x} * p.tokens_per_block + i / per_token;
      if (token >= p.num_tokens) return;
      const int group = i % per_token / p.num_parts, part = i % p.num_parts;
      const int first = group * kHeads, count = static_cast<int>(p.num_heads) - first;  // of which it has kHeads at most
      const T* x = static_cast<const T*>(p.x) + token * p.x_stride + first * p.head_dim;
      T* y = static_cast<T*>(p.y) + token * p.y_stride + first * p.head_dim;
      if (part < p.num_rotated) rotate(p, token, part * kPer, count, x, y);
      else copy(p, p.rotary_dims + (part - p.num_rotated) * kPer, count, x, y);
    }
  }

  ARCH_FN static void rotate(const Params& p, int64_t token, int column, int count, const T* x, T* y) {
    const int half = static_cast<int>(p.rotary_dims / 2);
    float cos_low[kPer], cos_high[kPer], sin_low[kPer], sin_high[kPer];
    const int64_t row = token * p.rotary_dims + column;
    load_values<float, kPer>(p.cos + row, cos_low);
    load_values<float, kPer>(p.cos + row + half, cos_high);
    load_values<float, kPer>(p.sin + row + (p.inverse ? half : 0), sin_low);
    load_values<float, kPer>(p.sin + row + (p.inverse ? 0 : half), sin_high);
    const float sign = p.inverse ? -1.0f : 1.0f;
    float low[kHeads][kPer], high[kHeads][kPer];
    ARCH_UNROLL
    for (int h = 0; h < kHeads; ++h)
      if (h < count) {
        load_values<T, kPer>(x + h * p.head_dim + column, low[h]);
        load_values<T, kPer>(x + h * p.head_dim + column + half, high[h]);
      }
    ARCH_UNROLL
    for (int h = 0; h < kHeads; ++h)
      if (h < count) {
        float rotated_low[kPer], rotated_high[kPer];
        ARCH_UNROLL
        for (int e = 0; e < kPer; ++e) {
          rotated_low[e] = low[h][e] * cos_low[e] - high[h][e] * sin_low[e] * sign;
          rotated_high[e] = high[h][e] * cos_high[e] + low[h][e] * sin_high[e] * sign;
        }
        store_values<T, kPer>(y + h * p.head_dim + column, rotated_low);
        store_values<T, kPer>(y + h * p.head_dim + column + half, rotated_high);
      }
  }

  ARCH_FN static void copy(const Params& p, int64_t column, int count, const T* x, T* y) {
    for (int h = 0; h < count && h < kHeads; ++h) {
      float values[kPer];
      load_values<T, kPer>(x + h * p.head_dim + column, values);
      store_values<T, kPer>(y + h * p.head_dim + column, values);
    }
  }
};

void rope(const Rope& p, Stream stream) {
  if (p.num_tokens < 0 || p.num_heads < 1 || p.rotary_dims < 0 || p.rotary_dims % 2 != 0 || p.rotary_dims > p.head_dim ||
      p.num_heads * p.head_dim > 1 << 30 || std::min(p.x_stride, p.y_stride) < p.num_heads * p.head_dim)
    throw Refused("rope of " + std::to_string(p.rotary_dims) + " dims of " + std::to_string(p.num_heads) + " heads of " + std::to_string(p.head_dim) + ", tokens " +
                  std::to_string(p.x_stride) + " and " + std::to_string(p.y_stride) + " values apart: an even number of dims, at most a head's, and heads that do not overlap");
  if (p.num_tokens == 0 || p.head_dim == 0) return;
  with_type(p.type, [&]<typename T>(T) {
    auto run = [&](auto per) {
      using Kernel = Rotate<T, per()>;
      const int64_t rotated = p.rotary_dims / 2 / per(), copied = p.x == p.y ? 0 : (p.head_dim - p.rotary_dims) / per();
      const int64_t groups = (p.num_heads + Kernel::kHeads - 1) / Kernel::kHeads, per_token = groups * (rotated + copied);
      if (per_token == 0) return;
      const int64_t tokens = std::max<int64_t>(1, Kernel::kThreads / per_token);
      arch::launch<Kernel>(blocks_of(p.num_tokens, tokens), 0, stream,
                           {p, static_cast<int>(rotated + copied), static_cast<int>(rotated), static_cast<int>(groups), static_cast<int>(tokens)});
    };
    const int64_t steps = p.rotary_dims / 2 | p.head_dim | p.x_stride | p.y_stride;  // in whole 16 bytes where each is
    if (in_vectors(steps * int64_t{sizeof(T)}, {p.x, p.y, p.cos, p.sin})) run(Constant<16 / sizeof(T)>());
    else run(Constant<1>());
  });
}

// Of one value: act(g) and its derivative. Two of them are g * sigmoid(v(g)).
struct Activation {
  float value, slope;
};
ARCH_FN Activation activate(Gate gate, float g) {
  if (gate == Gate::kGelu) {
    const float below = 0.5f + 0.5f * arch::erf(g * 0.70710678f);  // the normal distribution
    return {g * below, below + g * 0.39894228f * arch::exp(-0.5f * g * g)};
  }
  float v = g, slope = 1;
  if (gate == Gate::kGeluTanh) {
    constexpr float kScale = 1.5957691216f;  // 2 sqrt(2/pi), for (1 + tanh(u)) / 2 = sigmoid(2u)
    v = kScale * (g + 0.044715f * g * g * g);
    slope = kScale * (1 + 0.134145f * g * g);
  }
  const float sigmoid = arch::reciprocal(arch::exp(-v) + 1);
  return {g * sigmoid, sigmoid * (g * (1 - sigmoid) * slope + 1)};
}

template <typename T, int kPer>
struct Forward {
  struct Params : GluForward {
    Parts parts;
  };
  static constexpr int kThreads = Parts::kThreads;

  ARCH_FN static void run(const Params& p) {
    with_part<kPer>(p.parts, [&](int64_t row, int64_t column, int64_t count) {
      const int64_t in = row * p.stride + column;
      float gate[kPer] = {}, up[kPer] = {};
      load_part<T, kPer>(static_cast<const T*>(p.gate) + in, count, gate);
      load_part<T, kPer>(static_cast<const T*>(p.up) + in, count, up);
      ARCH_UNROLL
      for (int e = 0; e < kPer; ++e) up[e] *= activate(p.activation, gate[e]).value;
      store_part<T, kPer>(static_cast<T*>(p.y) + row * p.width + column, count, up);
    });
  }
};

template <typename T, int kPer>
struct Backward {
  struct Params : GluBackward {
    Parts parts;
  };
  static constexpr int kThreads = Parts::kThreads;

  ARCH_FN static void run(const Params& p) {
    with_part<kPer>(p.parts, [&](int64_t row, int64_t column, int64_t count) {
      const int64_t in = row * p.stride + column;
      float grad[kPer] = {}, gate[kPer] = {}, up[kPer] = {};
      load_part<T, kPer>(static_cast<const T*>(p.grad_y) + row * p.width + column, count, grad);
      load_part<T, kPer>(static_cast<const T*>(p.gate) + in, count, gate);
      load_part<T, kPer>(static_cast<const T*>(p.up) + in, count, up);
      ARCH_UNROLL
      for (int e = 0; e < kPer; ++e) {
        const Activation a = activate(p.activation, gate[e]);
        gate[e] = grad[e] * up[e] * a.slope;
        up[e] = grad[e] * a.value;
      }
      store_part<T, kPer>(static_cast<T*>(p.grad_gate) + in, count, gate);
      store_part<T, kPer>(static_cast<T*>(p.grad_up) + in, count, up);
    });
  }
};

template <template <typename, int> class Kernel, typename P>
void glu(const char* name, const P& p, std::initializer_list<const void*> tensors, Stream stream) {
  if (p.num_rows < 0 || p.width < 0 || p.stride < p.width)
    throw Refused(std::string(name) + " of " + std::to_string(p.num_rows) + " rows of " + std::to_string(p.width) + " values, " + std::to_string(p.stride) +
                  " apart: rows must not overlap");
  if (p.num_rows == 0 || p.width == 0) return;
  with_type(p.type, [&]<typename T>(T) {
    const bool is_dense = p.stride == p.width;
    auto run = [&](auto per) {
      const Parts parts = Parts::of(p.num_rows, p.width, is_dense, per());
      arch::launch<Kernel<T, per()>>(parts.grid(), 0, stream, {p, parts});
    };
    if (in_vectors(is_dense ? 0 : (p.stride | p.width) * int64_t{sizeof(T)}, tensors)) run(Constant<16 / sizeof(T)>());
    else run(Constant<1>());
  });
}

void glu_forward(const GluForward& p, Stream stream) { glu<Forward>("glu_forward", p, {p.gate, p.up, p.y}, stream); }
void glu_backward(const GluBackward& p, Stream stream) {
  glu<Backward>("glu_backward", p, {p.grad_y, p.gate, p.up, p.grad_gate, p.grad_up}, stream);
}

}  // namespace

void add_elementwise(Kernels& kernels) {
  kernels.rope = rope;
  kernels.glu_forward = glu_forward;
  kernels.glu_backward = glu_backward;
}

}  // namespace trireme::kernels::TRIREME_ARCH
