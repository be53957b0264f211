// Cross-entropy: a block has a row. It reads it forwards for maximum and sum at once (Milakov & Gimelshein 2018), and backwards
// for the gradient: what was read last is still near. One block of 1024 threads fits a multiprocessor, so that the rows under
// way fit the second-level cache: memory gives each logit once and takes each gradient once.
#include <cmath>
#include <limits>

#include "kernels/arch.h"
#include "kernels/kernels.h"
#include "kernels/launch.h"

namespace trireme::kernels::TRIREME_ARCH {
namespace {

constexpr float kLog2E = 1.44269504f, kLn2 = 0.69314718f;
constexpr int kNone = std::numeric_limits<int>::max();

// A row in pieces of 16 bytes that begin at multiples of 16: the first and the last may reach beyond it.
template <typename T>
struct Pieces {
  static constexpr int kPer = 16 / sizeof(T), kAhead = 4;
  T* row;
  int width, before;  // values of the first piece that are not the row's

  ARCH_FN Pieces(T* begin, int size) : row(begin), width(size), before(static_cast<int>(reinterpret_cast<uintptr_t>(begin) % 16 / sizeof(T))) {}
  ARCH_FN int count() const { return (before + width + kPer - 1) / kPer; }
  ARCH_FN int column(int piece) const { return piece * kPer - before; }
  ARCH_FN int piece_of(int c) const { return (c + before) / kPer; }
  ARCH_FN bool has(int c) const { return c >= 0 && c < width; }
  ARCH_FN bool is_whole(int c) const { return c >= 0 && c + kPer <= width; }

  // What is not the row's reads as `outside`, and is not written.
  ARCH_FN void load(int piece, float* x, float outside) const {
    const int c = column(piece);
    if (is_whole(c)) return load_values<T, kPer>(row + c, x);
    ARCH_UNROLL
    for (int e = 0; e < kPer; ++e) x[e] = has(c + e) ? arch::to_float(row[c + e]) : outside;
  }
  ARCH_FN void store(int piece, const float* x) const {
    const int c = column(piece);
    if (is_whole(c)) return store_values<T, kPer>(row + c, x);
    ARCH_UNROLL
    for (int e = 0; e < kPer; ++e)
      if (has(c + e)) row[c + e] = arch::from_float<T>(x[e]);
  }

  // f(piece, values) for the pieces of this thread among kThreads; a few are read before the first is used.
  template <int kThreads, bool kBackwards, typename F>
  ARCH_FN void each(float outside, const F& f) const {
    const int last = count() - 1, thread = arch::thread_index();
    for (int i = thread; i <= last; i += kAhead * kThreads) {
      float x[kAhead][kPer];
      ARCH_UNROLL
      for (int a = 0; a < kAhead; ++a)
        if (const int j = i + a * kThreads; j <= last) load(kBackwards ? last - j : j, x[a], outside);
      ARCH_UNROLL
      for (int a = 0; a < kAhead; ++a)
        if (const int j = i + a * kThreads; j <= last) f(kBackwards ? last - j : j, x[a]);
    }
  }
};

ARCH_FN int warp_min(int x) {
  ARCH_UNROLL
  for (int mask = arch::kWarp / 2; mask > 0; mask /= 2) {
    const int other = arch::shuffle_xor(x, mask);
    x = other < x ? other : x;
  }
  return x;
}

// e^(x - largest), where a `largest` of -infinity means that all are.
ARCH_FN float exponential(float x, float largest) { return arch::exp2((x - (largest == -INFINITY ? 0 : largest)) * kLog2E); }

enum class Phase { kWhole, kPart, kFinish };

template <typename T>
struct Loss {
  struct Params : CrossEntropyPart {
    Phase phase;
  };
  static constexpr int kThreads = 1024, kWarps = kThreads / arch::kWarp, kSharedBytes = 4 * kWarps * 4;

  struct Row {
    float maximum, sum, logit_sum;
    int largest;  // the first column of the maximum; kNone: NaNs have none. In thread 0 alone
  };

  ARCH_FN static Row read(const Pieces<T>& pieces, bool with_sum) {
    Row mine{-INFINITY, 0, 0, kNone};
    pieces.template each<kThreads, false>(-INFINITY, [&](int piece, const float* x) {
      float largest = x[0], sum = 0;
      ARCH_UNROLL
      for (int e = 1; e < pieces.kPer; ++e) largest = arch::max(largest, x[e]);
      if (largest > mine.maximum) {
        mine.sum *= exponential(mine.maximum, largest);
        mine.maximum = largest;
        mine.largest = piece;
      }
      ARCH_UNROLL
      for (int e = 0; e < pieces.kPer; ++e) sum += exponential(x[e], mine.maximum);
      mine.sum += sum;
      if (!with_sum) return;
      ARCH_UNROLL
      for (int e = 0; e < pieces.kPer; ++e)
        if (pieces.has(pieces.column(piece) + e)) mine.logit_sum += x[e];
    });
    Row all;
    all.maximum = arch::block_max<kThreads>(mine.maximum, arch::shared<float>(0, kWarps));
    const int first = warp_min(mine.maximum == all.maximum ? mine.largest : kNone);
    const auto firsts = arch::shared<int>(4 * kWarps, kWarps);
    if (arch::lane_index() == 0) firsts[arch::warp_index()] = first;  // seen behind the barriers of the sums
    all.sum = arch::block_sum<kThreads>(mine.sum * exponential(mine.maximum, all.maximum), arch::shared<float>(8 * kWarps, kWarps));
    all.logit_sum = with_sum ? arch::block_sum<kThreads>(mine.logit_sum, arch::shared<float>(12 * kWarps, kWarps)) : 0;
    all.largest = kNone;
    if (arch::thread_index() == 0) {
      int piece = kNone;
      for (int w = 0; w < kWarps; ++w) piece = firsts[w] < piece ? firsts[w] : piece;
      float x[Pieces<T>::kPer];
      if (piece != kNone) pieces.load(piece, x, -INFINITY);
      ARCH_UNROLL
      for (int e = pieces.kPer - 1; e >= 0; --e)
        if (piece != kNone && x[e] == all.maximum && pieces.has(pieces.column(piece) + e)) all.largest = pieces.column(piece) + e;
    }
    return all;
  }

  ARCH_FN static void run(const Params& p) {
    const int64_t r = arch::block_index().x;
    const int64_t target = p.rows.targets[r], column = target - p.first_id;
    const int width = static_cast<int>(p.rows.width);
    const bool here = column >= 0 && column < width, ignored = target < 0, first_thread = arch::thread_index() == 0;
    T* begin = static_cast<T*>(p.rows.logits) + r * p.rows.stride;
    const Pieces<T> pieces(begin, width);
    Row row{0, 0, 0, 0};
    float target_logit = 0;
    bool correct = false;
    if (p.phase == Phase::kFinish) {
      row = {p.maximum[r], p.sum[r], p.logit_sum[r], 0};
      target_logit = p.target_logit[r];
      correct = p.largest[r] == target;
    } else if (!ignored) {
      row = read(pieces, p.rows.label_smoothing != 0);
      if (first_thread) target_logit = here ? arch::to_float(begin[column]) : p.phase == Phase::kWhole ? NAN : 0;
      correct = row.largest == column;
    }
    if (p.phase == Phase::kPart) {
      if (!first_thread) return;
      p.maximum[r] = row.maximum;
      p.sum[r] = row.sum;
      p.target_logit[r] = target_logit;
      p.logit_sum[r] = row.logit_sum;
      p.largest[r] = p.first_id + row.largest;
      return;
    }
    const float log_sum = arch::log2(row.sum) * kLn2, log_all = row.maximum + log_sum, smoothing = p.rows.label_smoothing;
    const float every = smoothing / static_cast<float>(p.vocabulary);
    if (first_thread) {
      const float loss = row.maximum - target_logit + log_sum + (smoothing * target_logit - every * row.logit_sum) + p.rows.z_loss * log_all * log_all;
      p.rows.loss[r] = ignored ? 0 : loss;
      p.rows.correct[r] = !ignored && correct;
    }
    if (!p.rows.gradient) return;
    arch::sync_threads();  // the first thread has read the target's logit and the largest
    const float of_target = p.rows.gradient_scale * (1 - smoothing), of_each = p.rows.gradient_scale * every;
    const float factor = p.rows.gradient_scale * (1 + 2 * p.rows.z_loss * log_all) / row.sum;
    const int target_piece = here ? pieces.piece_of(static_cast<int>(column)) : -1;
    pieces.template each<kThreads, true>(0, [&](int piece, float* x) {
      ARCH_UNROLL
      for (int e = 0; e < pieces.kPer; ++e) x[e] = ignored ? 0 : exponential(x[e], row.maximum) * factor - of_each;
      if (piece == target_piece) {
        ARCH_UNROLL
        for (int e = 0; e < pieces.kPer; ++e)
          if (pieces.column(piece) + e == column) x[e] -= of_target;
      }
      pieces.store(piece, x);
    });
  }
};

void run(const char* name, const CrossEntropyPart& p, Phase phase, Stream stream) {
  const CrossEntropy& rows = p.rows;
  if (rows.num_rows < 0 || rows.width < 1 || rows.width > 1 << 30 || rows.stride < rows.width || p.first_id < 0 || p.vocabulary - p.first_id < rows.width)
    throw Refused(std::string(name) + " of " + std::to_string(rows.num_rows) + " rows of " + std::to_string(rows.width) + " logits, " + std::to_string(rows.stride) +
                  " apart, from " + std::to_string(p.first_id) + " of " + std::to_string(p.vocabulary) + ": a row has 1 to 2^30 of the vocabulary's, and they do not overlap");
  if (rows.num_rows == 0) return;
  with_type(rows.type, [&]<typename T>(T) { arch::launch<Loss<T>>(blocks_of(rows.num_rows, 1), Loss<T>::kSharedBytes, stream, {p, phase}); });
}

void whole(const CrossEntropy& p, Stream stream) {
  run("cross_entropy", {p, 0, p.width, nullptr, nullptr, nullptr, nullptr, nullptr}, Phase::kWhole, stream);
}
void part(const CrossEntropyPart& p, Stream stream) { run("cross_entropy_part", p, Phase::kPart, stream); }
void finish(const CrossEntropyPart& p, Stream stream) { run("cross_entropy_finish", p, Phase::kFinish, stream); }

}  // namespace

void add_cross_entropy(Kernels& kernels) {
  kernels.cross_entropy = whole;
  kernels.cross_entropy_part = part;
  kernels.cross_entropy_finish = finish;
}

}  // namespace trireme::kernels::TRIREME_ARCH
