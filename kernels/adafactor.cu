// Adafactor's step on a tensor, or on a part of one.
#include <cmath>

#include "kernels/arch.h"
#include "kernels/kernels.h"
#include "kernels/launch.h"
#include "kernels/rounding.h"

namespace trireme::kernels::TRIREME_ARCH {
namespace {

constexpr int kBlock = 256, kWarps = kBlock / arch::kWarp, kPer = kAdafactorColumns / arch::kWarp;
constexpr float kEpsilon = 0x1p-23f;
constexpr double kLeastSize = 1e-3;  // of a tensor, relative to which it moves

struct PartOf : Adafactor {
  AdafactorLines lines;
};
PartOf part_of(const Adafactor& p) { return {p, adafactor_lines(p)}; }

arch::Index3 tiles_of(const PartOf& p) { return blocks_of((p.lines.count + kAdafactorLines - 1) / kAdafactorLines * p.lines.num_tiles, 1); }

// A block has a tile of a part's lines. Its warps take lines in turns, of which a lane has every 32nd column.
struct Tile {
  int64_t first_line, last_line, first_column;
  ARCH_FN explicit Tile(const AdafactorLines& lines) {
    const int64_t block = arch::block_index().x, end = block / lines.num_tiles * kAdafactorLines + kAdafactorLines;
    first_line = end - kAdafactorLines, last_line = end < lines.count ? end : lines.count;
    first_column = block % lines.num_tiles * kAdafactorColumns + arch::lane_index();
  }
  // f(k, column, i) of the lane's elements of a line: k of its own, element i of the part.
  template <typename F>
  ARCH_FN void with_elements(const PartOf& p, int64_t line, const F& f) const {
    const int64_t begin = line * p.lines.width - p.lines.skipped;
    ARCH_UNROLL
    for (int k = 0; k < kPer; ++k) {
      const int64_t column = first_column + k * arch::kWarp, i = begin + column;
      if (column < p.lines.width && i >= 0 && i < p.size) f(k, column, i);
    }
  }
};

ARCH_FN float scale_of(const Adafactor& p) { return p.grad_scale ? *p.grad_scale : 1.0f; }
ARCH_FN bool takes_step(const Adafactor& p) { return scale_of(p) - scale_of(p) == 0; }
ARCH_FN double square(float x) { return double{x} * double{x}; }
ARCH_FN double& square_of_weights(const Adafactor& p) { return p.sums[p.num_rows == 0 ? 0 : p.num_rows + p.num_columns]; }

template <typename T>
ARCH_FN float weight_at(const Adafactor& p, int64_t i) {
  return p.master ? p.master[i] : arch::to_float(static_cast<const T*>(p.weight)[i]);
}

// Where the sums of tiles are: of g^2 of each line [lines, tiles beside one another], of each column [tiles above one another, width], of w^2.
struct Partials {
  double *lines, *columns, *weights;
  int64_t num_above, num_tiles;
  ARCH_HOST_FN static Partials of(const PartOf& p) {
    const int64_t above = (p.lines.count + kAdafactorLines - 1) / kAdafactorLines;
    double* const columns = p.workspace + p.lines.count * p.lines.num_tiles;
    return {p.workspace, columns, columns + above * p.lines.width, above, above * p.lines.num_tiles};
  }
};

template <typename T>
struct SumsOfTiles {
  using Params = PartOf;
  static constexpr int kThreads = kBlock, kColumnBytes = kWarps * kAdafactorColumns * 8, kSharedBytes = kColumnBytes + kWarps * 8;

  ARCH_FN static void run(const Params& p) {
    const Tile tile(p.lines);
    const Partials to = Partials::of(p);
    const float scale = scale_of(p);
    double of_columns[kPer] = {}, of_weights = 0;
    for (int64_t line = tile.first_line + arch::warp_index(); line < tile.last_line; line += kWarps) {
      double of_line = 0;
      tile.with_elements(p, line, [&](int k, int64_t, int64_t i) {
        const double g = square(p.grad[i] * scale);
        of_line += g, of_columns[k] += g, of_weights += square(weight_at<T>(p, i));
      });
      of_line = arch::warp_sum(of_line);
      if (arch::lane_index() == 0) to.lines[line * p.lines.num_tiles + arch::block_index().x % p.lines.num_tiles] = of_line;
    }
    const auto columns = arch::shared<double>(0, kWarps * int{kAdafactorColumns});
    ARCH_UNROLL
    for (int k = 0; k < kPer; ++k) columns[arch::warp_index() * int{kAdafactorColumns} + k * arch::kWarp + arch::lane_index()] = of_columns[k];
    of_weights = arch::block_sum<kThreads>(of_weights, arch::shared<double>(kColumnBytes, kWarps));  // and all columns are there
    if (arch::thread_index() == 0) to.weights[arch::block_index().x] = of_weights;
    for (int c = arch::thread_index(); c < kAdafactorColumns; c += kThreads) {
      const int64_t column = tile.first_column - arch::lane_index() + c;
      if (column >= p.lines.width) continue;
      double sum = 0;
      ARCH_UNROLL
      for (int w = 0; w < kWarps; ++w) sum += columns[w * int{kAdafactorColumns} + c];
      to.columns[arch::block_index().x / p.lines.num_tiles * p.lines.width + column] = sum;
    }
  }
};

// A thread adds up a line or a column of a matrix; the last block the squares of weights.
struct SumsOfPart {
  using Params = PartOf;
  static constexpr int kThreads = kBlock;

  ARCH_FN static void run(const Params& p) {
    const Partials from = Partials::of(p);
    if (arch::block_index().x == arch::grid_size().x - 1) {
      double sum = 0;
      for (int64_t i = arch::thread_index(); i < from.num_tiles; i += kThreads) sum += from.weights[i];
      sum = arch::block_sum<kThreads>(sum, arch::shared<double>(0, kWarps));
      if (arch::thread_index() == 0) square_of_weights(p) += sum;
      return;
    }
    const int64_t item = int64_t{arch::block_index().x} * kThreads + arch::thread_index(), column = item - p.lines.count;
    double sum = 0;
    if (column < 0) {
      for (int64_t t = 0; t < p.lines.num_tiles; ++t) sum += from.lines[item * p.lines.num_tiles + t];
      p.sums[p.lines.row + item] += sum;
    } else if (column < p.lines.width) {
      for (int64_t t = 0; t < from.num_above; ++t) sum += from.columns[t * p.lines.width + column];
      p.sums[p.num_rows + p.lines.column + column] += sum;
    }
  }
};

ARCH_FN float moved(float mean, double to, double mix) { return mean + static_cast<float>((to - double{mean}) * mix); }

struct MeansOfMatrix {
  using Params = Adafactor;
  static constexpr int kThreads = 1024;

  ARCH_FN static void run(const Params& p) {
    if (!takes_step(p)) return;
    double mean = 0;
    for (int64_t r = arch::thread_index(); r < p.num_rows; r += kThreads) {
      const float row = moved(p.rows[r], p.sums[r] / static_cast<double>(p.num_columns), p.mix);
      p.rows[r] = row, mean += double{row} / static_cast<double>(p.num_rows);
    }
    for (int64_t c = arch::thread_index(); c < p.num_columns; c += kThreads)
      p.columns[c] = moved(p.columns[c], p.sums[p.num_rows + c] / static_cast<double>(p.num_rows), p.mix);
    mean = arch::block_sum<kThreads>(mean, arch::shared<double>(0, kThreads / arch::kWarp));
    if (arch::thread_index() == 0) *p.mean_of_rows = mean;
  }
};

struct MeansOfVector {
  using Params = Adafactor;
  static constexpr int kThreads = kBlock;

  ARCH_FN static void run(const Params& p) {
    const int64_t i = int64_t{arch::block_index().x} * kThreads + arch::thread_index();
    if (i >= p.size || !takes_step(p)) return;
    const float g = p.grad[i] * scale_of(p);
    p.squares[i] = moved(p.squares[i], double{g * g}, p.mix);
  }
};

// u before it is scaled.
struct Direction {
  float scale, of_row = 1;
  const float* of_columns;  // of the line's columns
  ARCH_FN Direction(const PartOf& p, int64_t line) : scale(scale_of(p)) {
    if (p.num_rows == 0) {
      of_columns = p.squares;
      return;
    }
    const double mean = *p.mean_of_rows;
    of_row = static_cast<float>(double{p.rows[p.lines.row + line]} / (mean > double{kEpsilon} ? mean : double{kEpsilon}));
    of_columns = p.columns + p.lines.column;
  }
  ARCH_FN float operator()(const PartOf& p, int64_t column, int64_t i) const {
    return p.grad[i] * scale / arch::sqrt(arch::max(of_row * of_columns[column], kEpsilon * kEpsilon));
  }
};

struct NormOfTiles {
  using Params = PartOf;
  static constexpr int kThreads = kBlock;

  ARCH_FN static void run(const Params& p) {
    const Tile tile(p.lines);
    double sum = 0;
    for (int64_t line = tile.first_line + arch::warp_index(); line < tile.last_line; line += kWarps) {
      const Direction direction(p, line);
      tile.with_elements(p, line, [&](int, int64_t column, int64_t i) { sum += square(direction(p, column, i)); });
    }
    sum = arch::block_sum<kThreads>(sum, arch::shared<double>(0, kWarps));
    if (arch::thread_index() == 0) p.workspace[arch::block_index().x] = sum;
  }
};

struct NormOfPart {
  struct Params {
    const double* partials;
    int64_t num_partials;
    double* norm;
  };
  static constexpr int kThreads = 1024;

  ARCH_FN static void run(const Params& p) {
    double sum = 0;
    for (int64_t i = arch::thread_index(); i < p.num_partials; i += kThreads) sum += p.partials[i];
    sum = arch::block_sum<kThreads>(sum, arch::shared<double>(0, kThreads / arch::kWarp));
    if (arch::thread_index() == 0) *p.norm += sum;
  }
};

template <typename T>
struct UpdateTiles {
  using Params = PartOf;
  static constexpr int kThreads = kBlock;

  ARCH_FN static void run(const Params& p) {
    if (!takes_step(p)) return;
    const double size = static_cast<double>(p.num_rows == 0 ? p.num_columns : p.num_rows * p.num_columns), of_weight = arch::sqrt(square_of_weights(p) / size),
                 of_u = arch::sqrt(*p.norm / size);
    const double rate = (of_weight > kLeastSize ? of_weight : kLeastSize) * p.largest_rate / (of_u > 1 ? of_u : 1.0);
    const float step = static_cast<float>(rate), decay = rate > 0 ? static_cast<float>(p.lr * p.weight_decay / rate) : 0.0f;
    const Tile tile(p.lines);
    for (int64_t line = tile.first_line + arch::warp_index(); line < tile.last_line; line += kWarps) {
      const Direction direction(p, line);
      tile.with_elements(p, line, [&](int, int64_t column, int64_t i) {
        float w = weight_at<T>(p, i);
        w = w - (direction(p, column, i) + w * decay) * step;
        if (p.master) p.master[i] = w;
        if constexpr (std::is_same_v<T, arch::bf16>)
          if (!p.master) round_at_random<1>({random_key(p.seed, kRounding), p.step, p.id}, p.places, i, &w);
        static_cast<T*>(p.weight)[i] = arch::from_float<T>(w);
      });
    }
  }
};

void refuse(const char* name, const Adafactor& p) {
  if (p.size < 0 || p.num_rows < 0 || p.num_columns < 0)
    throw Refused(std::string(name) + " of " + std::to_string(p.size) + " values of " + std::to_string(p.num_rows) + " x " + std::to_string(p.num_columns));
  if (p.size > 0 && p.type == Type::kFloat16 && !p.master) throw Refused(std::string(name) + ": weights in float16 need a master in fp32; bfloat16 does without, by stochastic rounding");
}

void adafactor_sums(const Adafactor& p, Stream stream) {
  refuse("adafactor_sums", p);
  if (p.size == 0) return;
  const PartOf part = part_of(p);
  with_type(p.type, [&]<typename T>(T) { arch::launch<SumsOfTiles<T>>(tiles_of(part), SumsOfTiles<T>::kSharedBytes, stream, part); });
  const int items = p.num_rows == 0 ? 0 : blocks_of(part.lines.count + part.lines.width, kBlock).x;
  arch::launch<SumsOfPart>({items + 1, 1, 1}, kWarps * int{sizeof(double)}, stream, part);
}

void adafactor_means(const Adafactor& p, Stream stream) {
  refuse("adafactor_means", p);
  if (p.num_rows > 0) arch::launch<MeansOfMatrix>({1, 1, 1}, MeansOfMatrix::kThreads / arch::kWarp * int{sizeof(double)}, stream, p);
  else if (p.size > 0) arch::launch<MeansOfVector>(blocks_of(p.size, kBlock), 0, stream, p);
}

void adafactor_norm(const Adafactor& p, Stream stream) {
  refuse("adafactor_norm", p);
  if (p.size == 0) return;
  const PartOf part = part_of(p);
  arch::launch<NormOfTiles>(tiles_of(part), kWarps * int{sizeof(double)}, stream, part);
  arch::launch<NormOfPart>({1, 1, 1}, NormOfPart::kThreads / arch::kWarp * int{sizeof(double)}, stream, {p.workspace, tiles_of(part).x, p.norm});
}

void adafactor_update(const Adafactor& p, Stream stream) {
  refuse("adafactor_update", p);
  if (p.size == 0) return;
  const PartOf part = part_of(p);
  with_type(p.type, [&]<typename T>(T) { arch::launch<UpdateTiles<T>>(tiles_of(part), 0, stream, part); });
}

}  // namespace

void add_adafactor(Kernels& kernels) {
  kernels.adafactor_sums = adafactor_sums;
  kernels.adafactor_means = adafactor_means;
  kernels.adafactor_norm = adafactor_norm;
  kernels.adafactor_update = adafactor_update;
}

}  // namespace trireme::kernels::TRIREME_ARCH
