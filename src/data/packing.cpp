#include "data/packing.h"

#include <algorithm>
#include <numeric>
#include <set>
#include <tuple>

#include "base/check.h"
#include "data/sampler.h"

namespace trireme {

// Keeps the draw of equal lengths apart from the shuffles of the epochs, which count from 0.
constexpr int64_t kPackingEpoch = int64_t{1} << 40;

PackedRows pack_samples(const std::vector<int64_t>& lengths, int64_t capacity, bool shuffle, uint64_t seed) {
  int64_t n = static_cast<int64_t>(lengths.size());
  std::vector<int64_t> order(lengths.size());
  std::iota(order.begin(), order.end(), int64_t{0});
  if (shuffle && n > 0) {
    Permutation permutation(seed, kPackingEpoch, n);
    for (int64_t& i : order) i = permutation(i);
  }
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    return lengths[static_cast<size_t>(a)] > lengths[static_cast<size_t>(b)];
  });

  // Best fit: the row with the least room that still holds the sample; of several, the oldest.
  std::vector<std::vector<int64_t>> rows;
  std::set<std::pair<int64_t, size_t>> open;  // (room, row)
  for (int64_t sample : order) {
    int64_t length = lengths[static_cast<size_t>(sample)];
    TRIREME_CHECK(length > 0 && length <= capacity, length, " of ", capacity);
    int64_t room = capacity;
    size_t row = rows.size();
    if (auto fit = open.lower_bound({length, 0}); fit != open.end()) {
      std::tie(room, row) = *fit;
      open.erase(fit);
    } else {
      rows.emplace_back();
    }
    rows[row].push_back(sample);
    if (room > length) open.insert({room - length, row});
  }
  for (auto& row : rows) std::sort(row.begin(), row.end());
  std::sort(rows.begin(), rows.end(), [](const auto& a, const auto& b) { return a.front() < b.front(); });

  PackedRows packed;
  packed.offsets.push_back(0);
  for (const auto& row : rows) {
    packed.samples.insert(packed.samples.end(), row.begin(), row.end());
    packed.offsets.push_back(static_cast<int64_t>(packed.samples.size()));
  }
  return packed;
}

}  // namespace trireme
