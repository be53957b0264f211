// Embedding: rows by their ids, and their gradient, added in the order of the tokens.
#include "kernels/arch.h"
#include "kernels/elements.h"
#include "kernels/kernels.h"

namespace trireme::kernels::TRIREME_ARCH {
namespace {

// Rows as runs of U, whatever their type.
template <typename U>
struct Gather {
  struct Params : Embedding {
    Parts parts;
  };
  static constexpr int kThreads = Parts::kThreads;

  ARCH_FN static void run(const Params& p) {
    with_part<1>(p.parts, [&](int64_t token, int64_t i, int64_t) {
      const int64_t id = p.ids[token] - p.first_id;
      U value = {};
      if (id >= 0 && id < p.num_ids) value = arch::load<U>(static_cast<const U*>(p.weight) + id * p.parts.width + i);
      arch::store(static_cast<U*>(p.y) + token * p.parts.width + i, value);
    });
  }
};

struct Entry {
  int64_t id, token;
};
constexpr int64_t kNoId = std::numeric_limits<int64_t>::max();

// The tokens by their ids, those of one id in their order: each finds its place by counting who comes before.
struct Sort {
  struct Params {
    int64_t num_tokens;
    const int64_t* ids;
    int64_t first_id, num_ids;
    Entry* sorted;
  };
  static constexpr int kThreads = 256;

  ARCH_FN static int64_t row_of(const Params& p, int64_t token) {
    const int64_t id = p.ids[token] - p.first_id;
    return id >= 0 && id < p.num_ids ? id : kNoId;
  }
  ARCH_FN static void run(const Params& p) {
    const int64_t token = int64_t{arch::block_index().x} * kThreads + arch::thread_index();
    if (token >= p.num_tokens) return;
    const int64_t id = row_of(p, token);
    int64_t place = 0;
    for (int64_t t = 0; t < p.num_tokens; ++t) {
      const int64_t other = row_of(p, t);
      place += other < id || (other == id && t < token);
    }
    p.sorted[place] = {id, token};
  }
};

// A block has some columns of the row of one id: that of which the first token stands at its place, if any does.
template <typename T, int kPer>
struct Add {
  struct Params : EmbeddingGradient {
    int blocks_per_row;
  };
  static constexpr int kThreads = 64, kAhead = 4;  // small blocks: an id of many tokens has the more of them at work

  ARCH_FN static void run(const Params& p) {
    const auto* sorted = reinterpret_cast<const Entry*>(p.workspace);
    const int64_t first = arch::block_index().x / p.blocks_per_row, id = sorted[first].id;
    if (id == kNoId || (first > 0 && sorted[first - 1].id == id)) return;
    const int64_t column = (int64_t{arch::block_index().x % p.blocks_per_row} * kThreads + arch::thread_index()) * kPer;
    if (column >= p.width) return;
    float sum[kPer] = {};
    for (int64_t i = first; i < p.num_tokens && sorted[i].id == id; i += kAhead) {
      float x[kAhead][kPer] = {};
      ARCH_UNROLL
      for (int a = 0; a < kAhead; ++a)
        if (i + a < p.num_tokens && sorted[i + a].id == id) load_values<T, kPer>(static_cast<const T*>(p.grad_y) + sorted[i + a].token * p.width + column, x[a]);
      ARCH_UNROLL
      for (int a = 0; a < kAhead; ++a) {
        ARCH_UNROLL
        for (int e = 0; e < kPer; ++e) sum[e] += x[a][e];
      }
    }
    const int64_t at = id * p.width + column;
    if (p.weight_type == Type::kFloat32) add<float>(static_cast<float*>(p.grad_weight) + at, sum);
    else add<T>(static_cast<T*>(p.grad_weight) + at, sum);
  }

  template <typename W>
  ARCH_FN static void add(W* to, const float* sum) {
    float total[kPer];
    load_values<W, kPer>(to, total);
    ARCH_UNROLL
    for (int e = 0; e < kPer; ++e) total[e] += sum[e];
    store_values<W, kPer>(to, total);
  }
};

void check(const char* name, int64_t num_tokens, int64_t width, int64_t num_ids, int64_t most_tokens) {
  if (num_tokens < 0 || num_tokens > most_tokens || width < 0 || width > 1 << 30 || num_ids < 0)
    throw Refused(std::string(name) + " of " + std::to_string(num_tokens) + " tokens, " + std::to_string(num_ids) + " ids of " + std::to_string(width) +
                  " values: at most " + std::to_string(most_tokens) + " tokens of 2^30 values");
}

void forward(const Embedding& p, Stream stream) {
  check("embedding", p.num_tokens, p.width, p.num_ids, int64_t{1} << 31);
  if (p.num_tokens == 0 || p.width == 0) return;
  const int64_t row_bytes = p.width * size_of(p.type);
  auto run = [&]<typename U>(U) {
    const Parts parts = Parts::of(p.num_tokens, row_bytes / int64_t{sizeof(U)}, false, 1);
    arch::launch<Gather<U>>(parts.grid(), 0, stream, {p, parts});
  };
  if (in_vectors(row_bytes, {p.weight, p.y})) run(arch::Bytes16{});
  else run(uint16_t{});
}

void backward(const EmbeddingGradient& p, Stream stream) {
  check("embedding_gradient", p.num_tokens, p.width, p.num_ids, kEmbeddingTokens);
  if (p.weight_type != Type::kFloat32 && p.weight_type != p.type) throw Refused("embedding_gradient: the weight's gradient is float32 or of the type of the outputs' gradient");
  if (p.num_tokens == 0 || p.width == 0) return;
  arch::launch<Sort>(blocks_of(p.num_tokens, Sort::kThreads), 0, stream, {p.num_tokens, p.ids, p.first_id, p.num_ids, reinterpret_cast<Entry*>(p.workspace)});
  with_type(p.type, [&]<typename T>(T) {
    auto run = [&](auto per) {
      using Kernel = Add<T, per()>;
      const int64_t blocks = (p.width + Kernel::kThreads * per() - 1) / (Kernel::kThreads * per());
      arch::launch<Kernel>(blocks_of(p.num_tokens * blocks, 1), 0, stream, {p, static_cast<int>(blocks)});
    };
    if (in_vectors(p.width * int64_t{sizeof(T)}, {p.grad_y, p.grad_weight})) run(Constant<16 / sizeof(T)>());
    else run(Constant<1>());
  });
}

}  // namespace

void add_embedding(Kernels& kernels) {
  kernels.embedding = forward;
  kernels.embedding_gradient = backward;
}

}  // namespace trireme::kernels::TRIREME_ARCH
