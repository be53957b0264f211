// The asynchronous half of sm_90a. Shared memory exists twice: as threads see it, and as the accelerator and the products do.
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
constexpr int kGroup = 128, kTileRowBytes = 128, kTileColumns = 64;

struct Load {
  char* to;
  TensorMap map;
  int row, column;
};
struct Barrier {
  int arrivals = 0, pending = 0, phase = 0;
  int64_t bytes = 0;  // announced and not yet landed
  std::vector<Load> loads;
};
struct Product {
  float* d;
  uint64_t a, b;
  float (*widen)(uint16_t);
};
struct Store {
  TensorMap map;
  int row, column;
  const char* from;
};
struct PerThread {
  std::vector<std::pair<int, size_t>> unfenced;  // offsets and sizes of what it wrote
  bool fenced = false;
  std::vector<Product> uncommitted;
  std::deque<std::vector<Product>> groups;
  std::map<float*, std::vector<float>> results;  // that products are still added to
  std::vector<Store> stores, committed_stores;
};

struct Hopper : Extension {
  std::map<uint64_t*, Barrier> barriers;
  std::map<int, PerThread> threads;
  std::vector<char> seen = std::vector<char>(static_cast<size_t>(shared_size()), static_cast<char>(kPoison));

  void thread_ends() override {
    const PerThread& t = threads[thread_index()];
    if (!t.uncommitted.empty() || !t.groups.empty()) fault("has ended with products under way that nobody waited for");
    if (!t.stores.empty() || !t.committed_stores.empty()) fault("has ended with tile stores under way that nobody waited for");
  }
};
Hopper& hopper() {
  if (!extension()) extension() = std::make_unique<Hopper>();
  return static_cast<Hopper&>(*extension());
}
PerThread& mine() { return hopper().threads[thread_index()]; }

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

// f(offset in shared memory, bytes in the tensor, or null outside of it) for each value of a tile.
template <typename F>
void each_value(int begin, const TensorMap& map, int row, int column, const F& f) {
  for (int r = 0; r < map.tile_rows; ++r)
    for (int c = 0; c < kTileColumns; ++c) {
      const int64_t y = int64_t{row} + r, x = int64_t{column} + c;
      const bool inside = y >= 0 && y < map.rows && x >= 0 && x < map.columns;
      f(swizzled(begin + r * kTileRowBytes + 2 * c), inside ? map.base + (y * map.row_stride + x) * 2 : nullptr);
    }
}

void land(Barrier& b) {
  for (const Load& load : b.loads) {
    each_value(offset_of(load.to), load.map, load.row, load.column, [&](int at, const char* from) {
      uint16_t value = 0;
      if (from) std::memcpy(&value, from, 2);
      std::memcpy(shared_bytes(at, 2), &value, 2);
      std::memcpy(hopper().seen.data() + at, &value, 2);
    });
    b.bytes -= load.map.tile_rows * kTileRowBytes;
  }
  if (!b.loads.empty()) b.loads.clear(), end_phase_if_done(b);
}

float value_at(uint64_t descriptor, int row, int k, float (*widen)(uint16_t)) {
  const int start = static_cast<int>(descriptor & 0x3fff) << 4, group = static_cast<int>(descriptor >> 32 & 0x3fff) << 4;
  const int at = swizzled(start + row / 8 * group + row % 8 * kTileRowBytes + 2 * k);
  if (at + 2 > shared_size()) fault("a product reads outside of shared memory");
  uint16_t bits;
  std::memcpy(&bits, hopper().seen.data() + at, 2);
  return widen(bits);
}

void compute(const Product& p, std::vector<float>& d) {
  const int row = thread_index() % kGroup / 32 * 16 + thread_index() % 32 / 4, column = 2 * (thread_index() % 4);
  float a[2][16];
  for (int h = 0; h < 2; ++h)
    for (int k = 0; k < 16; ++k) a[h][k] = value_at(p.a, row + 8 * h, k, p.widen);
  for (int n = 0; n < 16; ++n) {  // columns of this thread
    const int j = n / 2, e = n % 2;
    for (int k = 0; k < 16; ++k) {
      const float b = value_at(p.b, 8 * j + column + e, k, p.widen);
      for (int h = 0; h < 2; ++h) d[static_cast<size_t>(4 * j + 2 * h + e)] += a[h][k] * b;
    }
  }
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
  Barrier& barrier = barrier_at(b);
  block_until("barrier_wait", [&barrier, parity] {
    if (barrier.phase % 2 == parity) land(barrier);
    return barrier.phase % 2 != parity;
  });
}

void tile_load(void* to, const TensorMap& map, int row, int column, uint64_t* b) {
  const size_t bytes = static_cast<size_t>(map.tile_rows * kTileRowBytes);
  check_shared(to, bytes, 1024, "tile_load");
  std::memset(to, kPoison, bytes);
  std::memset(hopper().seen.data() + offset_of(to), kPoison, bytes);
  barrier_at(b).loads.push_back({static_cast<char*>(to), map, row, column});
}

void tile_store(const TensorMap& map, int row, int column, const void* from) {
  check_shared(from, static_cast<size_t>(map.tile_rows * kTileRowBytes), 1024, "tile_store");
  mine().stores.push_back({map, row, column, static_cast<const char*>(from)});
}
void tile_store_commit() {
  PerThread& t = mine();
  t.committed_stores.insert(t.committed_stores.end(), t.stores.begin(), t.stores.end());
  t.stores.clear();
}
void tile_store_wait() {
  others_first();
  for (const Store& store : mine().committed_stores)
    each_value(offset_of(store.from), store.map, store.row, store.column, [](int at, char* to) {
      if (to) std::memcpy(to, hopper().seen.data() + at, 2);
    });
  mine().committed_stores.clear();
}

void note_store(void* p, size_t count) {
  check_shared(p, count, 1, "store_shared");
  mine().unfenced.emplace_back(offset_of(p), count);
}
void async_fence() {
  for (const auto& [at, count] : mine().unfenced) std::memcpy(hopper().seen.data() + at, shared_bytes(at, static_cast<int>(count)), count);
  mine().unfenced.clear();
}

uint64_t tile_descriptor(const void* p) {
  check_shared(p, 16, 16, "tile_descriptor");
  return static_cast<uint64_t>(offset_of(p)) >> 4 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}
void group_fence() { mine().fenced = true; }
void multiply_tiles(float* d, uint64_t a, uint64_t b, float (*widen)(uint16_t)) {
  meet("group_mma", nullptr, [](Lanes) {});
  PerThread& t = mine();
  if (!t.fenced) fault("multiplies without group_fence");
  if (!t.results.count(d)) {
    t.results[d].assign(d, d + 32);
    std::memset(d, kPoison, 32 * sizeof(float));
  }
  t.uncommitted.push_back({d, a, b, widen});
}
void group_commit() {
  PerThread& t = mine();
  t.groups.push_back(std::exchange(t.uncommitted, {}));
}
void wait_for_products(int num_groups_left) {
  others_first();
  PerThread& t = mine();
  while (static_cast<int>(t.groups.size()) > num_groups_left) {
    for (const Product& p : t.groups.front()) compute(p, t.results[p.d]);
    t.groups.pop_front();
  }
  std::erase_if(t.results, [&t](const auto& result) {
    for (const auto& group : t.groups)
      for (const Product& p : group)
        if (p.d == result.first) return false;
    for (const Product& p : t.uncommitted)
      if (p.d == result.first) return false;
    std::copy(result.second.begin(), result.second.end(), result.first);
    return true;
  });
  t.fenced = false;
}

}  // namespace trireme::kernels::emulated::arch
