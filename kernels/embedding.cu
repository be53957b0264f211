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

// The tokens by their ids, those of one id in their order; ids of other devices are num_ids. Sorted by one digit of the id after
// the other, from the lowest: a block has a run of tokens, counts their digits, and then puts each where it finds from the counts of
// all blocks that it goes.
struct alignas(8) Entry {
  uint32_t id, token;
};
constexpr int kDigitBits = 8, kDigits = 1 << kDigitBits;

struct Pass {
  const int64_t* ids;
  const Entry* from;       // null: the ids, in the order of tokens
  Entry* to;
  uint32_t* counts;        // [blocks, kDigits]
  int64_t num_tokens, first_id, num_ids;
  int per_block, shift;    // per_block: tokens, in whole rounds of a block

  ARCH_FN Entry entry(int64_t i) const {
    if (from) return from[i];
    const int64_t id = ids[i] - first_id;
    return {static_cast<uint32_t>(id >= 0 && id < num_ids ? id : num_ids), static_cast<uint32_t>(i)};
  }
  ARCH_FN uint32_t digit(const Entry& e) const { return e.id >> shift & (kDigits - 1); }
};

struct Count {
  using Params = Pass;
  static constexpr int kThreads = kDigits;

  ARCH_FN static void run(const Pass& p) {
    const auto counts = arch::shared<uint32_t>(0, kDigits);
    const int thread = arch::thread_index();
    counts[thread] = 0;
    arch::sync_threads();
    const int64_t begin = int64_t{arch::block_index().x} * p.per_block;
    for (int64_t i = begin + thread; i < begin + p.per_block && i < p.num_tokens; i += kThreads) arch::atomic_add(counts.at(static_cast<int>(p.digit(p.entry(i))), 1), 1u);
    arch::sync_threads();
    p.counts[int64_t{arch::block_index().x} * kDigits + thread] = counts[thread];
  }
};

// A warp has a part of the block's run.
struct Scatter {
  using Params = Pass;
  static constexpr int kThreads = kDigits, kWarps = kThreads / arch::kWarp, kSharedBytes = (kWarps * kDigits + kWarps) * 4;

  ARCH_FN static void run(const Pass& p) {
    const auto next = arch::shared<uint32_t>(0, kWarps * kDigits);  // of a warp, by digit: how many it has; then where the next one goes
    const auto in_warp = arch::shared<uint32_t>(kWarps * kDigits * 4, kWarps);
    const int thread = arch::thread_index(), warp = arch::warp_index(), lane = arch::lane_index(), block = arch::block_index().x;
    for (int w = 0; w < kWarps; ++w) next[w * kDigits + thread] = 0;
    arch::sync_threads();
    // f(entry, its digit's element of `next`, the lanes before it that have the same digit), then adds theirs to that.
    auto each = [&](const auto& f) {
      const int per_warp = p.per_block / kWarps;
      for (int64_t i = int64_t{block} * p.per_block + warp * per_warp, end = i + per_warp; i < end && i < p.num_tokens; i += arch::kWarp) {
        const bool valid = i + lane < p.num_tokens;
        const Entry entry = valid ? p.entry(i + lane) : Entry{};
        const uint32_t digit = p.digit(entry);
        uint32_t same = arch::ballot(valid);
        ARCH_UNROLL
        for (int bit = 0; bit < kDigitBits; ++bit) {
          const uint32_t set = arch::ballot(digit >> bit & 1);
          same &= digit >> bit & 1 ? set : ~set;
        }
        const uint32_t before = same & ((1u << lane) - 1);
        uint32_t& place = next[warp * kDigits + static_cast<int>(digit)];
        if (valid) f(entry, place, arch::count_bits(before));
        arch::sync_warp();
        if (valid && before == 0) place += arch::count_bits(same);
        arch::sync_warp();
      }
    };
    each([](const Entry&, uint32_t, uint32_t) {});
    // Of this thread's digit: all of the lower ones come first, then those of the blocks before, then of the warps before.
    uint32_t total = 0, place = 0;
    for (int b = 0; b < arch::grid_size().x; ++b) {
      const uint32_t count = p.counts[int64_t{b} * kDigits + thread];
      total += count;
      if (b < block) place += count;
    }
    uint32_t until = total;
    ARCH_UNROLL
    for (int d = 1; d < arch::kWarp; d *= 2) {
      const uint32_t lower = arch::shuffle(until, lane >= d ? lane - d : lane);
      if (lane >= d) until += lower;
    }
    if (lane == arch::kWarp - 1) in_warp[warp] = until;
    arch::sync_threads();
    place += until - total;
    for (int w = 0; w < warp; ++w) place += in_warp[w];
    for (int w = 0; w < kWarps; ++w) {
      const uint32_t count = next[w * kDigits + thread];
      next[w * kDigits + thread] = place;
      place += count;
    }
    arch::sync_threads();
    each([&](const Entry& entry, uint32_t first, uint32_t before) { p.to[first + before] = entry; });
  }
};

// A block has some columns of the row of one id: that of which the first token stands at its place, if any does.
template <typename T, int kPer>
struct Add {
  struct Params : EmbeddingGradient {
    const Entry* sorted;
    int blocks_per_row;
  };
  static constexpr int kThreads = 64, kAhead = 8;  // small blocks: an id of many tokens has the more of them at work

  ARCH_FN static void run(const Params& p) {
    const Entry* sorted = p.sorted;
    const int64_t first = arch::block_index().x / p.blocks_per_row, id = sorted[first].id;
    if (id == p.num_ids || (first > 0 && sorted[first - 1].id == id)) return;
    const int64_t column = (int64_t{arch::block_index().x % p.blocks_per_row} * kThreads + arch::thread_index()) * kPer;
    if (column >= p.width) return;
    float sum[kPer] = {};
    for (int64_t i = first; i < p.num_tokens && sorted[i].id == id; i += kAhead) {
      float x[kAhead][kPer] = {};
      ARCH_UNROLL
      for (int a = 0; a < kAhead; ++a)
        if (i + a < p.num_tokens && sorted[i + a].id == id) load_values<T, kPer>(static_cast<const T*>(p.grad_y) + int64_t{sorted[i + a].token} * p.width + column, x[a]);
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

void check(const char* name, int64_t num_tokens, int64_t width, int64_t num_ids) {
  if (num_tokens < 0 || num_tokens >= int64_t{1} << 31 || width < 0 || width > 1 << 30 || num_ids < 0 || num_ids > int64_t{1} << 31)
    throw Refused(std::string(name) + " of " + std::to_string(num_tokens) + " tokens, " + std::to_string(num_ids) + " ids of " + std::to_string(width) +
                  " values: fewer than 2^31 tokens, and at most 2^31 ids of 2^30 values");
}

void forward(const Embedding& p, Stream stream) {
  check("embedding", p.num_tokens, p.width, p.num_ids);
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
  check("embedding_gradient", p.num_tokens, p.width, p.num_ids);
  if (p.weight_type != Type::kFloat32 && p.weight_type != p.type) throw Refused("embedding_gradient: the weight's gradient is float32 or of the type of the outputs' gradient");
  if (p.num_tokens == 0 || p.width == 0 || p.num_ids == 0) return;
  auto* entries = reinterpret_cast<Entry*>(p.workspace);
  const int64_t num_blocks = embedding_gradient_blocks(p.num_tokens);
  const arch::Index3 blocks = blocks_of(num_blocks, 1);
  Pass pass{p.ids, nullptr, entries, reinterpret_cast<uint32_t*>(entries + 2 * p.num_tokens), p.num_tokens, p.first_id, p.num_ids, 0, 0};
  pass.per_block = blocks_of(p.num_tokens, num_blocks * kDigits).x * kDigits;
  for (; p.num_ids >> pass.shift != 0; pass.shift += kDigitBits) {
    arch::launch<Count>(blocks, kDigits * 4, stream, pass);
    arch::launch<Scatter>(blocks, Scatter::kSharedBytes, stream, pass);
    pass.from = pass.to;
    pass.to = pass.from == entries ? entries + p.num_tokens : entries;
  }
  with_type(p.type, [&]<typename T>(T) {
    auto run = [&](auto per) {
      using Kernel = Add<T, per()>;
      const int64_t columns = (p.width + Kernel::kThreads * per() - 1) / (Kernel::kThreads * per());
      arch::launch<Kernel>(blocks_of(p.num_tokens * columns, 1), 0, stream, {p, pass.from, static_cast<int>(columns)});
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
