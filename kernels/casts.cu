// Conversions and transposes.
#include "kernels/arch.h"
#include "kernels/elements.h"
#include "kernels/kernels.h"

namespace trireme::kernels::TRIREME_ARCH {
namespace {

template <typename From, typename To, int kPer>
struct Converted {
  struct Params : Convert {
    Parts parts;
  };
  static constexpr int kThreads = Parts::kThreads;

  ARCH_FN static void run(const Params& p) {
    const float scale = p.factor ? p.scale * *p.factor : p.scale;
    if (p.x == p.y && !p.add && scale == 1) return;
    with_part<kPer>(p.parts, [&](int64_t, int64_t i, int64_t count) {
      float x[kPer] = {}, y[kPer] = {};
      load_part<From, kPer>(static_cast<const From*>(p.x) + i, count, x);
      if (p.add) load_part<To, kPer>(static_cast<const To*>(p.y) + i, count, y);
      ARCH_UNROLL
      for (int e = 0; e < kPer; ++e) x[e] = p.add ? y[e] + scale * x[e] : scale * x[e];
      store_part<To, kPer>(static_cast<To*>(p.y) + i, count, x);
    });
  }
};

void convert(const Convert& p, Stream stream) {
  if (p.count < 0) throw Refused("convert of " + std::to_string(p.count) + " values");
  if (p.x == p.y && p.x && p.from != p.to) throw Refused("convert in place: the types must be the same");
  if (p.count == 0) return;
  with_type(p.from, [&]<typename From>(From) {
    with_type(p.to, [&]<typename To>(To) {
      auto run = [&](auto per) {
        const Parts parts = Parts::of(1, p.count, true, per());
        arch::launch<Converted<From, To, per()>>(parts.grid(), 0, stream, {p, parts});
      };
      if (in_vectors(0, {p.x, p.y})) run(Constant<std::max<int>(16 / sizeof(From), 16 / sizeof(To))>());
      else run(Constant<1>());
    });
  });
}

// Of values of U: a block has a square of 128 bytes a side, in rows of shared memory that stand an odd number of words apart, so
// that neither its rows nor its columns meet in a bank.
template <typename U>
struct Transposed {
  struct Params : Transpose {
    int64_t row_tiles, column_tiles;
    bool rows_in_vectors, columns_in_vectors;
  };
  static constexpr int kThreads = 256, kPer = 16 / sizeof(U), kTile = 128 / sizeof(U), kStride = kTile + 4 / sizeof(U), kParts = kTile * 8;
  static constexpr int kSharedBytes = kTile * kStride * sizeof(U);
  static constexpr int kRun = sizeof(U) == 2 ? 4 : 8;  // parts of a row of y that lanes have side by side
  struct alignas(16) Part {
    U value[kPer];
  };

  ARCH_FN static void run(const Params& p) {
    const auto tile = arch::shared<U>(0, kTile * kStride);
    const int64_t tiles = arch::block_index().x / p.column_tiles, batch = tiles / p.row_tiles, before = batch * p.num_rows * p.num_columns;
    const int64_t first_row = (tiles - batch * p.row_tiles) * kTile, first_column = (arch::block_index().x - tiles * p.column_tiles) * kTile;
    for (int i = arch::thread_index(); i < kParts; i += kThreads) {
      const int r = i / 8, c = i % 8 * kPer;
      const int64_t row = first_row + r, count = p.num_columns - first_column - c;
      if (row >= p.num_rows || count <= 0) continue;
      const U* from = static_cast<const U*>(p.x) + before + row * p.num_columns + first_column + c;
      Part part;
      if (p.rows_in_vectors && count >= kPer) part = arch::load<Part>(from);
      ARCH_UNROLL
      for (int e = 0; e < kPer; ++e)
        if (e < count) tile[r * kStride + c + e] = p.rows_in_vectors && count >= kPer ? part.value[e] : from[e];
    }
    arch::sync_threads();
    for (int i = arch::thread_index(); i < kParts; i += kThreads) {
      const int c = i / kRun % kTile, r = (i % kRun + i / (kRun * kTile) * kRun) * kPer;
      const int64_t column = first_column + c, count = p.num_rows - first_row - r;
      if (column >= p.num_columns || count <= 0) continue;
      U* to = static_cast<U*>(p.y) + before + column * p.num_rows + first_row + r;
      Part part;
      ARCH_UNROLL
      for (int e = 0; e < kPer; ++e)
        if (e < count) part.value[e] = tile[(r + e) * kStride + c];
      if (p.columns_in_vectors && count >= kPer) {
        arch::store(to, part);
      } else {
        ARCH_UNROLL
        for (int e = 0; e < kPer; ++e)
          if (e < count) to[e] = part.value[e];
      }
    }
  }
};

void transpose(const Transpose& p, Stream stream) {
  if (p.num_batches < 0 || p.num_rows < 0 || p.num_columns < 0 || (p.x == p.y && p.x))
    throw Refused("transpose of " + std::to_string(p.num_batches) + " x " + std::to_string(p.num_rows) + " x " + std::to_string(p.num_columns) + " values: never in place");
  if (size_of(p.type) == 1) throw Refused("transpose of float8: of what it is made of instead");
  if (p.num_batches == 0 || p.num_rows == 0 || p.num_columns == 0) return;
  auto run = [&]<typename U>(U) {
    using Kernel = Transposed<U>;
    const int64_t columns = (p.num_columns + Kernel::kTile - 1) / Kernel::kTile, rows = (p.num_rows + Kernel::kTile - 1) / Kernel::kTile;
    arch::launch<Kernel>(blocks_of(p.num_batches * rows * columns, 1), Kernel::kSharedBytes, stream,
                         {p, rows, columns, in_vectors(p.num_columns * int64_t{sizeof(U)}, {p.x}), in_vectors(p.num_rows * int64_t{sizeof(U)}, {p.y})});
  };
  if (size_of(p.type) == 2) run(uint16_t{});
  else run(uint32_t{});
}

}  // namespace

void add_casts(Kernels& kernels) {
  kernels.convert = convert;
  kernels.transpose = transpose;
}

}  // namespace trireme::kernels::TRIREME_ARCH
