// The asynchronous half of sm_90a. Shared memory exists twice: as threads see it, and as the accelerator and the products do.
#include <algorithm>
#include <array>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "kernels/arch_hopper.h"

namespace trireme::kernels::emulated::arch {
namespace {

constexpr unsigned char kPoison = 0xff;
constexpr int kGroup = 128, kTileRowBytes = 128, kTileColumns = 64, kInner = 16;

struct Load {
  char* to;
  TensorMap map;
  int row, head, column;
};
struct Barrier {
  int arrivals = 0, pending = 0, phase = 0;
  int64_t bytes = 0;  // announced and not yet landed
  std::vector<Load> loads;
};
// A warp's part of a product: of 16 rows, and a place for each lane's registers.
struct Product {
  float* d[32];
  AnyFactor a, b;
  uint32_t* registers[32];
  int num_columns;
  bool add;
  float (*widen)(uint16_t);
};
using Signature = std::vector<uint64_t>;  // what all warps of a group have to have alike of their products
struct PerWarp {
  bool fenced = false;
  std::vector<Product> uncommitted;
  std::deque<std::vector<Product>> groups;
  std::map<float*, std::vector<float>> results;              // that products are still added to, by the first lane's place: [16, columns]
  std::map<uint32_t*, std::array<uint32_t, 4>> in_flight;    // registers that are a factor, by each lane's place
  std::vector<Signature> committed;
};
struct Store {
  TensorMap map;
  int row, head, column;
  const char* from;
};
struct PerThread {
  std::vector<std::pair<int, size_t>> unfenced;  // offsets and sizes of what it wrote
  std::vector<Store> stores, committed_stores;
};

struct Hopper : Extension {
  std::map<uint64_t*, Barrier> barriers;
  std::map<int, PerThread> threads;
  std::map<int, PerWarp> warps;
  std::map<int, int> ended;  // threads of a group
  std::vector<char> seen = std::vector<char>(static_cast<size_t>(shared_size()), static_cast<char>(kPoison));

  void thread_ends() override {
    const PerThread& t = threads[thread_index()];
    const PerWarp& w = warps[thread_index() / 32];
    if (!w.uncommitted.empty() || !w.groups.empty()) fault("has ended with products under way that nobody waited for");
    if (!t.stores.empty() || !t.committed_stores.empty()) fault("has ended with tile stores under way that nobody waited for");
    const int group = thread_index() / kGroup;
    if (++ended[group] == kGroup)
      for (int i = 1; i < kGroup / 32; ++i)
        if (warps[group * 4 + i].committed != warps[group * 4].committed) fault("has ended where the warps of its group had different products");
  }
};
Hopper& hopper() {
  if (!extension()) extension() = std::make_unique<Hopper>();
  return static_cast<Hopper&>(*extension());
}
PerThread& mine() { return hopper().threads[thread_index()]; }
PerWarp& my_warp() { return hopper().warps[thread_index() / 32]; }

int offset_of(const void* p) { return static_cast<int>(static_cast<const char*>(p) - shared_bytes(0, 0)); }
int swizzled(int offset) { return offset ^ (offset >> 7 & 7) << 4; }

Barrier& barrier_at(uint64_t* b) {
  const auto found = hopper().barriers.find(b);
  if (found == hopper().barriers.end()) fault("uses a barrier that was not begun");
  return found->second;
}
void end_phase_if_done(Barrier& b) {
  if (b.pending > 0 || b.bytes != 0) return;
  ++b.phase;
  b.pending = b.arrivals;
}

// f(offset in shared memory, bytes in the tensor, how many of them are within it) for each 16 bytes of a tile.
template <typename F>
void each_piece(int begin, const TensorMap& map, int row, int head, int column, const F& f) {
  constexpr int kPiece = 8;  // values
  for (int r = 0; r < map.tile_rows; ++r)
    for (int c = 0; c < kTileColumns; c += kPiece) {
      const int64_t y = int64_t{row} + r, x = int64_t{column} + c;
      const bool inside = y >= 0 && y < map.rows && head >= 0 && head < map.heads && x >= 0 && x < map.columns;
      f(swizzled(begin + r * kTileRowBytes + 2 * c), map.base + (y * map.row_stride + head * map.head_stride + x) * 2,
        inside ? static_cast<size_t>(std::min<int64_t>(kPiece, map.columns - x)) * 2 : 0);
    }
}

void land(Barrier& b) {
  for (const Load& load : b.loads) {
    each_piece(offset_of(load.to), load.map, load.row, load.head, load.column, [](int at, const char* from, size_t count) {
      char piece[16] = {};
      if (count > 0) std::memcpy(piece, from, count);
      std::memcpy(shared_bytes(at, 16), piece, 16);
      std::memcpy(hopper().seen.data() + at, piece, 16);
    });
    b.bytes -= load.map.tile_rows * kTileRowBytes;
  }
  if (!b.loads.empty()) b.loads.clear(), end_phase_if_done(b);
}

// Where value k of row (or column) i of a factor lies in shared memory.
int place_of(const AnyFactor& x, int i, int k) {
  const int start = static_cast<int>(x.bits & 0x3fff) << 4, leading = static_cast<int>(x.bits >> 16 & 0x3fff) << 4, stride = static_cast<int>(x.bits >> 32 & 0x3fff) << 4;
  if (x.columns) return swizzled(start + i / 64 * leading + k / 8 * stride + k % 8 * kTileRowBytes + 2 * (i % 64));
  return swizzled(start + i / 8 * stride + i % 8 * kTileRowBytes + 2 * k);
}
float shared_value(const AnyFactor& x, int i, int k, float (*widen)(uint16_t)) {
  const int at = place_of(x, i, k);
  if (at + 2 > shared_size()) fault("a product reads outside of shared memory");
  uint16_t bits;
  std::memcpy(&bits, hopper().seen.data() + at, 2);
  return widen(bits);
}

// Value i of a lane's registers of a [16, 8n] result, in the order of the array.
int place_of_result(int lane, int i, int num_columns) { return (lane / 4 + i / 2 % 2 * 8) * num_columns + i / 4 * 8 + 2 * (lane % 4) + i % 2; }

void compute(const Product& p, PerWarp& warp) {
  std::vector<float>& d = warp.results[p.d[0]];
  const int n = p.num_columns, first_row = thread_index() % kGroup / 32 * 16;
  float a[16][kInner];
  std::vector<float> b(static_cast<size_t>(kInner * n));
  if (!p.a.registers) {
    for (int i = 0; i < 16; ++i)
      for (int k = 0; k < kInner; ++k) a[i][k] = shared_value(p.a, first_row + i, k, p.widen);
  } else {
    for (int l = 0; l < 32; ++l)
      for (int r = 0; r < 4; ++r)
        for (int e = 0; e < 2; ++e) a[l / 4 + r % 2 * 8][2 * (l % 4) + r / 2 * 8 + e] = p.widen(static_cast<uint16_t>(warp.in_flight[p.registers[l]][static_cast<size_t>(r)] >> 16 * e));
  }
  for (int j = 0; j < n; ++j)
    for (int k = 0; k < kInner; ++k) b[static_cast<size_t>(k * n + j)] = shared_value(p.b, j, k, p.widen);
  for (int i = 0; i < 16; ++i) {
    float* row = d.data() + i * n;
    if (!p.add) std::fill_n(row, n, 0.0f);
    for (int k = 0; k < kInner; ++k)
      for (int j = 0; j < n; ++j) row[j] += a[i][k] * b[static_cast<size_t>(k * n + j)];
  }
}

// What some product of these, or of those after them, still uses.
template <typename F>
bool any_product(const PerWarp& warp, const F& f) {
  for (const auto& group : warp.groups)
    if (std::any_of(group.begin(), group.end(), f)) return true;
  return std::any_of(warp.uncommitted.begin(), warp.uncommitted.end(), f);
}

}  // namespace

void barrier_init(uint64_t* b, int arrivals) {
  check_shared(b, 8, 8, "barrier_init");
  if (arrivals < 1) fault("begins a barrier of " + std::to_string(arrivals) + " arrivals");
  hopper().barriers[b] = {arrivals, arrivals, 0, 0, {}};
}
void barrier_arrive_expect(uint64_t* b, int bytes) {
  Barrier& barrier = barrier_at(b);
  barrier.bytes += bytes;
  if (--barrier.pending < 0) fault("comes to a barrier that waits for nobody else");
  end_phase_if_done(barrier);
}
void barrier_arrive(uint64_t* b) { barrier_arrive_expect(b, 0); }
void barrier_wait(uint64_t* b, int parity) {
  if (left_out("barrier_wait")) return;
  Barrier& barrier = barrier_at(b);
  block_until("barrier_wait", [&barrier, parity] {
    if (barrier.phase % 2 == parity) land(barrier);
    return barrier.phase % 2 != parity;
  });
}

void tile_load(void* to, const TensorMap& map, int row, int head, int column, uint64_t* b) {
  const size_t bytes = static_cast<size_t>(map.tile_rows * kTileRowBytes);
  check_shared(to, bytes, 1024, "tile_load");
  std::memset(to, kPoison, bytes);
  std::memset(hopper().seen.data() + offset_of(to), kPoison, bytes);
  barrier_at(b).loads.push_back({static_cast<char*>(to), map, row, head, column});
}

void tile_store(const TensorMap& map, int row, int head, int column, const void* from) {
  check_shared(from, static_cast<size_t>(map.tile_rows * kTileRowBytes), 1024, "tile_store");
  mine().stores.push_back({map, row, head, column, static_cast<const char*>(from)});
}
void tile_store_commit() {
  PerThread& t = mine();
  t.committed_stores.insert(t.committed_stores.end(), t.stores.begin(), t.stores.end());
  t.stores.clear();
}
void tile_store_wait() {
  others_first();
  for (const Store& store : mine().committed_stores)
    each_piece(offset_of(store.from), store.map, store.row, store.head, store.column, [](int at, char* to, size_t count) {
      if (count > 0) std::memcpy(to, hopper().seen.data() + at, count);
    });
  mine().committed_stores.clear();
}

void note_store(void* p, size_t count) {
  check_shared(p, count, 1, "store_shared");
  mine().unfenced.emplace_back(offset_of(p), count);
}
void async_fence() {
  if (left_out("async_fence")) return;
  for (const auto& [at, count] : mine().unfenced) std::memcpy(hopper().seen.data() + at, shared_bytes(at, static_cast<int>(count)), count);
  mine().unfenced.clear();
}

Factor<false> rows_of(const void* p) {
  check_shared(p, 16, 16, "rows_of");
  if (offset_of(p) % 1024 >= kTileRowBytes) fault("rows_of at a row that is no multiple of 8");
  return {static_cast<uint64_t>(offset_of(p)) >> 4 | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62};
}
Factor<true> columns_of(const void* p, int next) {
  check_shared(p, 16, 16, "columns_of");
  if (offset_of(p) % 1024 != 0) fault("columns_of not at the first column of a row that is a multiple of 8");
  if (next % 1024 != 0 || next >= 1 << 18) fault("columns_of with the next 64 columns " + std::to_string(next) + " bytes apart");
  return {static_cast<uint64_t>(offset_of(p)) >> 4 | static_cast<uint64_t>(next >> 4) << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62};
}

void group_fence_all() {
  meet("group_fence", nullptr, [](Lanes) { my_warp().fenced = true; });
}
void multiply_group(float* d, int num_columns, const AnyFactor& a, const AnyFactor& b, bool add, float (*widen)(uint16_t)) {
  Product mine{{d}, a, b, {a.registers}, num_columns, add, widen};
  meet("group_mma", &mine, [](Lanes lanes) {
    PerWarp& w = my_warp();
    if (!w.fenced) fault("multiplies without group_fence");
    Product p = *static_cast<Product*>(lanes[0]);
    for (int l = 0; l < 32; ++l) {
      const Product& lane = *static_cast<Product*>(lanes[l]);
      if (lane.a.bits != p.a.bits || lane.b.bits != p.b.bits || lane.add != p.add) fault("multiplies other factors than the first lane of its warp");
      p.d[l] = lane.d[0], p.registers[l] = lane.registers[0];
    }
    if (const auto [at, is_new] = w.results.try_emplace(p.d[0], static_cast<size_t>(16 * p.num_columns)); is_new)
      for (int l = 0; l < 32; ++l)
        for (int i = 0; i < p.num_columns / 2; ++i) {
          at->second[static_cast<size_t>(place_of_result(l, i, p.num_columns))] = p.d[l][i];
          std::memset(p.d[l] + i, kPoison, sizeof(float));
        }
    if (p.a.registers)
      for (uint32_t* registers : p.registers)
        if (const auto [at, is_new] = w.in_flight.try_emplace(registers); is_new) {
          std::copy_n(registers, 4, at->second.begin());
          std::memset(registers, kPoison, 4 * sizeof(uint32_t));
        }
    w.uncommitted.push_back(p);
  });
}
void group_commit() {
  meet("group_commit", nullptr, [](Lanes) {
    PerWarp& w = my_warp();
    Signature all;
    for (const Product& p : w.uncommitted)
      for (uint64_t part : {p.a.bits, p.b.bits, uint64_t{p.a.columns} | uint64_t{p.b.columns} << 1 | uint64_t{p.add} << 2 | static_cast<uint64_t>(p.num_columns) << 3}) all.push_back(part);
    w.committed.push_back(std::move(all));
    w.groups.push_back(std::exchange(w.uncommitted, {}));
  });
}
void wait_for_products(int num_groups_left) {
  if (left_out("group_wait")) return;
  others_first();
  meet("group_wait", &num_groups_left, [](Lanes lanes) {
    PerWarp& w = my_warp();
    while (static_cast<int>(w.groups.size()) > *static_cast<int*>(lanes[0])) {
      std::vector<Product> done = std::exchange(w.groups.front(), {});
      w.groups.pop_front();
      for (const Product& p : done) compute(p, w);
      for (const Product& p : done) {
        if (const auto result = w.results.find(p.d[0]); result != w.results.end() && !any_product(w, [&p](const Product& other) { return other.d[0] == p.d[0]; })) {
          for (int l = 0; l < 32; ++l)
            for (int i = 0; i < p.num_columns / 2; ++i) p.d[l][i] = result->second[static_cast<size_t>(place_of_result(l, i, p.num_columns))];
          w.results.erase(result);
        }
        if (!p.a.registers || any_product(w, [&p](const Product& other) { return other.a.registers == p.a.registers; })) continue;
        for (uint32_t* registers : p.registers) {
          const auto at = w.in_flight.find(registers);
          if (at == w.in_flight.end()) continue;  // of two products of this group
          for (int i = 0; i < 4; ++i)
            if (registers[i] != 0xffffffff) fault("its warp has written registers that are a factor of a product under way");
          std::copy_n(at->second.begin(), 4, registers);
          w.in_flight.erase(at);
        }
      }
    }
    w.fenced = false;
  });
}

}  // namespace trireme::kernels::emulated::arch
