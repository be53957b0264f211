// Samples into rows of at most `capacity` tokens: best fit, longest first (Johnson 1974; at most 11/9 of the optimum + 1).
#pragma once

#include <cstdint>
#include <vector>

namespace trireme {

struct PackedRows {
  std::vector<int64_t> offsets;  // [rows + 1]
  std::vector<int64_t> samples;  // row r holds samples[offsets[r] .. offsets[r+1]), ascending
};

// A pure function of its arguments. lengths[i] in 1..capacity. With `shuffle`, which samples of equal length share a row is
// drawn from `seed`; else from their order. Rows are ordered by their first sample.
PackedRows pack_samples(const std::vector<int64_t>& lengths, int64_t capacity, bool shuffle, uint64_t seed);

}  // namespace trireme
