// Low-rank products of adapters, whose dropout is applied to what lies in registers: no dropped copy and no mask is ever written.
//
// A Philox block says which of four features 16 apart are dropped, and these are what a lane has of 64 columns: each warp works on 64
// columns that begin where the mask's blocks of 64 features do, so that no number is computed twice in it.
#include <algorithm>
#include <cmath>

#include "kernels/arch.h"
#include "kernels/kernels.h"
#include "kernels/launch.h"
#include "kernels/random.h"

namespace trireme::kernels::TRIREME_ARCH {
namespace {

using arch::Shared;

constexpr int kBlock = 64;  // features of a block of the mask, columns of a warp

// Rows in shared memory, an odd number of 16-byte pieces apart: the 8 rows that ldmatrix reads at once lie in different banks.
template <typename T>
struct Tile {
  Shared<T> data;
  int pitch;

  ARCH_HOST_FN static constexpr int pitch_of(int columns) { return columns + 8; }
  ARCH_HOST_FN static constexpr int bytes_of(int rows, int columns) { return rows * pitch_of(columns) * static_cast<int>(sizeof(T)); }
  ARCH_FN static Tile at(int offset_bytes, int rows, int columns) { return {arch::shared<T>(offset_bytes, rows * pitch_of(columns)), pitch_of(columns)}; }

  // The address that a lane gives for 16 x 16 elements from (row, column) on; or with the two 8 x 8 quarters off the diagonal exchanged.
  ARCH_FN const T* corner(int row, int column) const {
    const int lane = arch::lane_index();
    return data.at((row + lane % 16) * pitch + column + lane / 16 * 8, 8);
  }
  ARCH_FN const T* exchanged_corner(int row, int column) const {
    const int lane = arch::lane_index();
    return data.at((row + lane % 8 + lane / 16 * 8) * pitch + column + lane / 8 % 2 * 8, 8);
  }
};

// A matrix in memory, whose rows can be copied 16 bytes at a time or not.
template <typename T>
struct Matrix {
  const T* data;
  int64_t num_rows, num_columns;
  bool in_vectors;
};

// rows x columns from (row, column) on into the tile, with zeros for what is outside. To be committed.
template <int kThreads, typename T>
ARCH_FN void copy(const Tile<T>& tile, int rows, int columns, const Matrix<T>& from, int64_t row, int64_t column) {
  const int pieces = columns / 8;
  for (int i = arch::thread_index(); i < rows * pieces; i += kThreads) {
    const int r = i / pieces, c = i % pieces * 8;
    const bool valid = row + r >= 0 && row + r < from.num_rows && column + c >= 0 && column + c < from.num_columns;
    const T* source = valid ? from.data + (row + r) * from.num_columns + column + c : from.data;
    T* to = tile.data.at(r * tile.pitch + c, 8);
    if (from.in_vectors) {
      arch::copy_async(to, source, valid);
    } else {
      for (int e = 0; e < 8; ++e) to[e] = valid && column + c + e < from.num_columns ? source[e] : arch::from_float<T>(0);
    }
  }
}

struct Mask {
  const int64_t* row_ids;
  int64_t num_rows, first_block;
  uint64_t key, counter;  // counter: of the first feature of block 0
  uint32_t threshold;     // 0: nothing is dropped
  int shift;              // columns of the first block that are not here
  float scale;            // of what is kept

  ARCH_FN uint64_t row_id(int64_t row) const { return threshold && row < num_rows ? static_cast<uint64_t>(row_ids[row]) : 0; }
  // Of features `within` + 0, 16, 32, 48 of block number `block` here: f(w) for each that is dropped.
  template <typename F>
  ARCH_FN void each_dropped(uint64_t row_id, int64_t block, int within, const F& f) const {
    const Random4 words = philox(key, row_id, counter | static_cast<uint32_t>((first_block + block) * 16 + within));
    ARCH_UNROLL
    for (int w = 0; w < 4; ++w)
      if (words.word[w] < threshold) f(w);
  }
};
constexpr uint32_t kKeepLow = 0x0000ffff, kKeepHigh = 0xffff0000;

// y = dropout(x) w^T: a block has kRows rows, and kRank of w's. Its warps share the columns of a step out among them, too, and add up
// at the end, in their order.
template <typename T, int kRank, int kRowWarps>
struct Down {
  struct Params {
    Matrix<T> x, w;
    Mask mask;
    T* y;
    int rank_tiles;
  };
  static constexpr int kThreads = 256, kBlocks = 2, kColumnWarps = 8 / kRowWarps, kRows = 16 * kRowWarps, kColumns = kBlock * kColumnWarps, kStages = 3;
  static constexpr int kRowBytes = Tile<T>::bytes_of(kRows, kColumns), kStageBytes = kRowBytes + Tile<T>::bytes_of(kRank, kColumns), kSharedBytes = kStages * kStageBytes;
  static constexpr int kValues = kRank / 2;  // of a lane
  static_assert(kThreads * kValues * 4 <= kSharedBytes);

  ARCH_FN static void run(const Params& p) {
    const int warp = arch::warp_index(), lane = arch::lane_index(), row_warp = warp / kColumnWarps, column_warp = warp % kColumnWarps;
    const int rank_tile = arch::block_index().x % p.rank_tiles;
    const int64_t first_row = int64_t{arch::block_index().x / p.rank_tiles} * kRows, own_row = first_row + 16 * row_warp + lane / 4;
    const int num_steps = static_cast<int>((p.x.num_columns + p.mask.shift + kColumns - 1) / kColumns);
    const uint64_t row_ids[2] = {p.mask.row_id(own_row), p.mask.row_id(own_row + 8)};
    auto x_tile = [](int step) { return Tile<T>::at(step % kStages * kStageBytes, kRows, kColumns); };
    auto w_tile = [](int step) { return Tile<T>::at(step % kStages * kStageBytes + kRowBytes, kRank, kColumns); };
    auto fetch = [&](int step) {
      if (step < num_steps) {
        copy<kThreads>(x_tile(step), kRows, kColumns, p.x, first_row, int64_t{step} * kColumns - p.mask.shift);
        copy<kThreads>(w_tile(step), kRank, kColumns, p.w, rank_tile * kRank, int64_t{step} * kColumns - p.mask.shift);
      }
      arch::copy_async_commit();
    };
    float y[kRank / 8][4] = {};
    for (int s = 0; s < kStages - 1; ++s) fetch(s);
    for (int step = 0; step < num_steps; ++step) {
      arch::copy_async_wait<kStages - 2>();
      arch::sync_threads();
      fetch(step + kStages - 1);
      uint32_t left[4][4];
      ARCH_UNROLL
      for (int k = 0; k < 4; ++k) arch::load_matrix(left[k], x_tile(step).corner(16 * row_warp, kBlock * column_warp + 16 * k));
      if (p.mask.threshold) {  // a lane has columns 2q, 2q + 1, 2q + 8, 2q + 9 of each 16, q = lane % 4, of rows lane / 4 and 8 later
        ARCH_UNROLL
        for (int half = 0; half < 2; ++half)
          ARCH_UNROLL
          for (int j = 0; j < 4; ++j)
            p.mask.each_dropped(row_ids[half], int64_t{step} * kColumnWarps + column_warp, 2 * (lane % 4) + j % 2 + j / 2 * 8,
                                [&](int k) { left[k][half + j / 2 * 2] &= j % 2 ? kKeepLow : kKeepHigh; });
      }
      ARCH_UNROLL
      for (int k = 0; k < 4; ++k)
        ARCH_UNROLL
        for (int n = 0; n < kRank / 8; n += 2) {
          uint32_t right[4];
          arch::load_matrix(right, w_tile(step).exchanged_corner(8 * n, kBlock * column_warp + 16 * k));
          arch::mma<T>(y[n], left[k], right[0], right[1]);
          arch::mma<T>(y[n + 1], left[k], right[2], right[3]);
        }
    }
    arch::copy_async_wait<0>();
    arch::sync_threads();  // the tiles are free
    const auto sums = arch::shared<float>(0, kThreads * kValues);
    auto place = [&](int w, int i) -> float& { return sums[(w * kValues + i) * arch::kWarp + lane]; };
    if (column_warp > 0) {
      ARCH_UNROLL
      for (int i = 0; i < kValues; ++i) place(warp, i) = y[i / 4][i % 4];
    }
    arch::sync_threads();
    if (column_warp > 0) return;
    ARCH_UNROLL
    for (int i = 0; i < kValues; ++i) {
      float sum = y[i / 4][i % 4];
      for (int w = 1; w < kColumnWarps; ++w) sum += place(warp + w, i);
      const int64_t row = own_row + i % 4 / 2 * 8;
      const int r = rank_tile * kRank + i / 4 * 8 + 2 * (lane % 4) + i % 2;
      if (row < p.x.num_rows && r < p.w.num_rows) p.y[row * p.w.num_rows + r] = arch::from_float<T>(sum * p.mask.scale);
    }
  }
};

// y += dropout(x w^T): a block has 128 rows and 64 columns of y, which wait in shared memory.
template <typename T, bool kByRank>
struct Up {
  struct Params {
    Matrix<T> x, w, y;
    Mask mask;
    T* out;
    float scale;
    int inner;       // the rank in whole 16
    int column_tiles;
  };
  static constexpr int kThreads = 256, kBlocks = 3, kRows = 128;
  static int shared_bytes(int inner) {
    return Tile<T>::bytes_of(kRows, kBlock) + Tile<T>::bytes_of(kRows, inner) + (kByRank ? Tile<T>::bytes_of(inner, kBlock) : Tile<T>::bytes_of(kBlock, inner));
  }

  ARCH_FN static void run(const Params& p) {
    const int lane = arch::lane_index(), warp_row = 16 * arch::warp_index(), block = arch::block_index().x % p.column_tiles, inner = p.inner;
    const int64_t first_row = int64_t{arch::block_index().x / p.column_tiles} * kRows, first_column = int64_t{block} * kBlock - p.mask.shift;
    const auto y_tile = Tile<T>::at(0, kRows, kBlock), x_tile = Tile<T>::at(Tile<T>::bytes_of(kRows, kBlock), kRows, inner);
    const auto w_tile = Tile<T>::at(Tile<T>::bytes_of(kRows, kBlock) + Tile<T>::bytes_of(kRows, inner), kByRank ? inner : kBlock, kByRank ? kBlock : inner);
    copy<kThreads>(x_tile, kRows, inner, p.x, first_row, 0);
    if constexpr (kByRank) copy<kThreads>(w_tile, inner, kBlock, p.w, 0, first_column);
    else copy<kThreads>(w_tile, kBlock, inner, p.w, first_column, 0);
    arch::copy_async_commit();
    copy<kThreads>(y_tile, kRows, kBlock, p.y, first_row, first_column);
    arch::copy_async_commit();
    arch::copy_async_wait<1>();
    arch::sync_threads();
    float product[8][4] = {};
    for (int k = 0; k < inner; k += 16) {
      uint32_t left[4];
      arch::load_matrix(left, x_tile.corner(warp_row, k));
      ARCH_UNROLL
      for (int n = 0; n < 8; n += 2) {
        uint32_t right[4];
        if constexpr (kByRank) arch::load_matrix_transposed(right, w_tile.corner(k, 8 * n));
        else arch::load_matrix(right, w_tile.exchanged_corner(8 * n, k));
        arch::mma<T>(product[n], left, right[0], right[1]);
        arch::mma<T>(product[n + 1], left, right[2], right[3]);
      }
    }
    if (p.mask.threshold) {
      ARCH_UNROLL
      for (int half = 0; half < 2; ++half) {
        const uint64_t row_id = p.mask.row_id(first_row + warp_row + lane / 4 + 8 * half);
        ARCH_UNROLL
        for (int j = 0; j < 4; ++j)
          p.mask.each_dropped(row_id, block, 2 * (lane % 4) + j % 2 + j / 2 * 8, [&](int w) { product[2 * w + j / 2][2 * half + j % 2] = 0; });
      }
    }
    arch::copy_async_wait<0>();
    arch::sync_threads();
    const float scale = p.scale * p.mask.scale;
    ARCH_UNROLL
    for (int n = 0; n < 8; ++n)
      ARCH_UNROLL
      for (int half = 0; half < 2; ++half) {
        T* at = y_tile.data.at((warp_row + lane / 4 + 8 * half) * y_tile.pitch + 8 * n + 2 * (lane % 4), 2);
        float y[2];
        load_values<T, 2>(at, y);
        y[0] += scale * product[n][2 * half], y[1] += scale * product[n][2 * half + 1];
        store_values<T, 2>(at, y);
      }
    arch::sync_warp();
    for (int i = lane; i < 16 * (kBlock / 8); i += arch::kWarp) {
      const int r = warp_row + i / 8, c = i % 8 * 8;
      const int64_t row = first_row + r, column = first_column + c;
      if (row < p.y.num_rows && column >= 0 && column < p.y.num_columns)
        arch::store(p.out + row * p.y.num_columns + column, arch::load<arch::Bytes16>(y_tile.data.at(r * y_tile.pitch + c, 8)));
    }
  }
};

// Sums over a slice of the rows of narrow^T dropout(wide): a block has kRank columns of the one and 256 of the other.
template <typename T, int kRank>
struct Slice {
  struct Params {
    Matrix<T> wide, narrow;
    Mask mask;
    float* partials;  // [slices, rank, width]
    int64_t rows_per_slice;
    int rank_tiles, column_tiles;
  };
  static constexpr int kThreads = 128, kRows = 32, kColumns = kBlock * 4, kStages = 3;
  static constexpr int kWideBytes = Tile<T>::bytes_of(kRows, kColumns), kStageBytes = kWideBytes + Tile<T>::bytes_of(kRows, kRank), kSharedBytes = kStages * kStageBytes;

  ARCH_FN static void run(const Params& p) {
    const int lane = arch::lane_index(), warp = arch::warp_index();
    const int rank_tile = arch::block_index().x % p.rank_tiles, tile = arch::block_index().x / p.rank_tiles, column_tile = tile % p.column_tiles, slice = tile / p.column_tiles;
    const int64_t begin = slice * p.rows_per_slice, rest = p.wide.num_rows - begin, count = rest < p.rows_per_slice ? rest : p.rows_per_slice;
    const int num_steps = static_cast<int>((count + kRows - 1) / kRows);
    const int64_t first_column = int64_t{column_tile} * kColumns - p.mask.shift, block = int64_t{column_tile} * 4 + warp;
    auto wide_tile = [](int step) { return Tile<T>::at(step % kStages * kStageBytes, kRows, kColumns); };
    auto narrow_tile = [](int step) { return Tile<T>::at(step % kStages * kStageBytes + kWideBytes, kRows, kRank); };
    auto fetch = [&](int step) {
      if (step < num_steps) {
        copy<kThreads>(wide_tile(step), kRows, kColumns, p.wide, begin + int64_t{step} * kRows, first_column);
        copy<kThreads>(narrow_tile(step), kRows, kRank, p.narrow, begin + int64_t{step} * kRows, rank_tile * kRank);
      }
      arch::copy_async_commit();
    };
    float sum[kRank / 16][8][4] = {};
    for (int s = 0; s < kStages - 1; ++s) fetch(s);
    for (int step = 0; step < num_steps; ++step) {
      arch::copy_async_wait<kStages - 2>();
      arch::sync_threads();
      fetch(step + kStages - 1);
      ARCH_UNROLL
      for (int k = 0; k < kRows; k += 16) {
        uint32_t right[4][4];
        ARCH_UNROLL
        for (int w = 0; w < 4; ++w) arch::load_matrix_transposed(right[w], wide_tile(step).corner(k, kBlock * warp + 16 * w));
        if (p.mask.threshold) {  // a lane has columns lane / 4 and 8 later of each 16, of rows 2q, 2q + 1, 2q + 8, 2q + 9, q = lane % 4
          ARCH_UNROLL
          for (int j = 0; j < 4; ++j) {
            const uint64_t row_id = p.mask.row_id(begin + int64_t{step} * kRows + k + 2 * (lane % 4) + j % 2 + j / 2 * 8);
            ARCH_UNROLL
            for (int u = 0; u < 2; ++u)
              p.mask.each_dropped(row_id, block, lane / 4 + 8 * u, [&](int w) { right[w][2 * u + j / 2] &= j % 2 ? kKeepLow : kKeepHigh; });
          }
        }
        ARCH_UNROLL
        for (int m = 0; m < kRank / 16; ++m) {
          uint32_t left[4];
          arch::load_matrix_transposed(left, narrow_tile(step).exchanged_corner(k, 16 * m));
          ARCH_UNROLL
          for (int w = 0; w < 4; ++w) {
            arch::mma<T>(sum[m][2 * w], left, right[w][0], right[w][1]);
            arch::mma<T>(sum[m][2 * w + 1], left, right[w][2], right[w][3]);
          }
        }
      }
    }
    arch::copy_async_wait<0>();
    const int64_t rank = p.narrow.num_columns, width = p.wide.num_columns;
    ARCH_UNROLL
    for (int m = 0; m < kRank / 16; ++m)
      ARCH_UNROLL
      for (int n = 0; n < 8; ++n)
        ARCH_UNROLL
        for (int half = 0; half < 2; ++half) {
          const int64_t r = rank_tile * kRank + 16 * m + lane / 4 + 8 * half, c = first_column + kBlock * warp + 8 * n + 2 * (lane % 4);
          if (r < rank && c >= 0 && c < width) store_values<float, 2>(p.partials + (slice * rank + r) * width + c, &sum[m][n][2 * half]);
        }
  }
};

// The slices in their order.
template <typename G>
struct SumSlices {
  struct Params {
    const float* partials;
    G* gradient;
    int64_t rank, width;
    int num_slices;
    float scale;
    bool by_rank, add;
  };
  static constexpr int kThreads = 256;

  ARCH_FN static void run(const Params& p) {
    const int64_t i = int64_t{arch::block_index().x} * kThreads + arch::thread_index(), size = p.rank * p.width;
    if (i >= size) return;
    float sum = 0;
    for (int s = 0; s < p.num_slices; ++s) sum += p.partials[s * size + i];
    G& to = p.gradient[p.by_rank ? i : i % p.width * p.rank + i / p.width];
    to = arch::from_float<G>(p.scale * sum + (p.add ? arch::to_float(to) : 0));
  }
};

// --- on the host -------------------------------------------------------------------------------------------------------

// The mask of rows whose first column is feature first_feature.
Mask mask_of(const LoraDropout& d, int64_t num_rows) {
  if (d.p == 0) return {nullptr, num_rows, 0, 0, 0, 0, 0, 1};
  return {d.row_ids, num_rows, d.first_feature / kBlock, random_key(d.seed, kDropout), d.module << 32,
          static_cast<uint32_t>(std::min(4294967295.0, std::floor(d.p * 4294967296.0))), static_cast<int>(d.first_feature % kBlock), static_cast<float>(1 / (1 - d.p))};
}

template <typename P>
void check(const std::string& name, const P& p, const LoraDropout& d, std::initializer_list<const void*> wide) {
  auto refuse = [&](const std::string& what) { throw Refused(name + ": " + what); };
  if (p.type != Type::kBFloat16 && p.type != Type::kFloat16) refuse("the type must be bfloat16 or float16");
  if (p.rank < 1 || p.rank > 256) refuse("a rank of " + std::to_string(p.rank) + " is not within 1 .. 256");
  if (p.num_rows < 0 || p.width < 0 || p.width > 1 << 30) refuse(std::to_string(p.num_rows) + " rows of " + std::to_string(p.width) + " values: a row has at most 2^30");
  if (!in_vectors(p.width * 2, wide)) refuse("rows of " + std::to_string(p.width) + " values are not in whole 16 bytes, or do not begin at a multiple of them");
  if (!(d.p >= 0 && d.p < 1)) refuse("a probability of " + std::to_string(d.p) + " is not 0 or more and less than 1");
  if (d.p > 0 && (d.first_feature < 0 || d.first_feature % 8 != 0)) refuse("a first feature of " + std::to_string(d.first_feature) + " is no multiple of 8");
}

template <typename T>
Matrix<T> matrix(const void* data, int64_t num_rows, int64_t num_columns) {
  return {static_cast<const T*>(data), num_rows, num_columns, in_vectors(num_columns * int64_t{sizeof(T)}, {data})};
}

template <typename F>
void with_half(Type type, const F& f) {
  type == Type::kBFloat16 ? f(arch::bf16{}) : f(arch::fp16{});
}

int tiles_of(int64_t size, int tile) { return blocks_of(size, tile).x; }

void lora_down(const LoraDown& p, Stream stream) {
  check("lora_down", p, p.dropout, {p.x, p.w});
  if (p.num_rows == 0) return;
  with_half(p.type, [&]<typename T>(T) {
    auto run = [&]<typename Kernel>(Kernel, int rank_tiles) {
      arch::launch<Kernel>(blocks_of(int64_t{tiles_of(p.num_rows, Kernel::kRows)} * rank_tiles, 1), Kernel::kSharedBytes, stream,
                           {matrix<T>(p.x, p.num_rows, p.width), matrix<T>(p.w, p.rank, p.width), mask_of(p.dropout, p.num_rows), static_cast<T*>(p.y), rank_tiles});
    };
    if (p.rank <= 16) run(Down<T, 16, 2>{}, 1);
    else run(Down<T, 64, 4>{}, tiles_of(p.rank, 64));
  });
}

void lora_up(const LoraUp& p, Stream stream) {
  check("lora_up", p, p.dropout, {p.y, p.by_rank ? p.w : nullptr});
  if (p.num_rows == 0 || p.width == 0) return;
  with_half(p.type, [&]<typename T>(T) {
    auto run = [&]<typename Kernel>(Kernel) {
      const Mask mask = mask_of(p.dropout, p.num_rows);
      const int columns = tiles_of(p.width + mask.shift, kBlock), inner = tiles_of(p.rank, 16) * 16;
      arch::launch<Kernel>(blocks_of(int64_t{tiles_of(p.num_rows, Kernel::kRows)} * columns, 1), Kernel::shared_bytes(inner), stream,
                           {matrix<T>(p.x, p.num_rows, p.rank), p.by_rank ? matrix<T>(p.w, p.rank, p.width) : matrix<T>(p.w, p.width, p.rank),
                            matrix<T>(p.y, p.num_rows, p.width), mask, static_cast<T*>(p.y), p.scale, inner, columns});
    };
    if (p.by_rank) run(Up<T, true>{});
    else run(Up<T, false>{});
  });
}

void lora_gradient(const LoraGradient& p, Stream stream) {
  check("lora_gradient", p, p.dropout, {p.wide, p.workspace});
  if (p.gradient_type != Type::kFloat32 && p.gradient_type != p.type) throw Refused("lora_gradient: the gradient is float32 or of the type of the factors");
  if (p.width == 0) return;
  const int64_t slices = lora_gradient_slices(p.num_rows, p.width, p.rank);
  with_half(p.type, [&]<typename T>(T) {
    auto run = [&]<typename Kernel>(Kernel, int rank_tiles) {
      const Mask mask = mask_of(p.dropout, p.num_rows);
      const int columns = tiles_of(p.width + mask.shift, Kernel::kColumns);
      arch::launch<Kernel>(blocks_of(slices * columns * rank_tiles, 1), Kernel::kSharedBytes, stream,
                           {matrix<T>(p.wide, p.num_rows, p.width), matrix<T>(p.narrow, p.num_rows, p.rank), mask, p.workspace,
                            int64_t{tiles_of(p.num_rows, static_cast<int>(slices) * Kernel::kRows)} * Kernel::kRows, rank_tiles, columns});
    };
    if (p.rank <= 16) run(Slice<T, 16>{}, 1);
    else run(Slice<T, 64>{}, tiles_of(p.rank, 64));
    auto sum = [&]<typename G>(G) {
      arch::launch<SumSlices<G>>(blocks_of(p.rank * p.width, SumSlices<G>::kThreads), 0, stream,
                                 {p.workspace, static_cast<G*>(p.gradient), p.rank, p.width, static_cast<int>(slices), p.scale * mask_of(p.dropout, 0).scale, p.by_rank, p.add});
    };
    if (p.gradient_type == Type::kFloat32) sum(float{});
    else sum(T{});
  });
}

}  // namespace

void add_lora(Kernels& kernels) {
  kernels.lora_down = lora_down;
  kernels.lora_up = lora_up;
  kernels.lora_gradient = lora_gradient;
}

}  // namespace trireme::kernels::TRIREME_ARCH
