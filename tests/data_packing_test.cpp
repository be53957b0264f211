// Shuffling and packing as pure functions.
#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <set>

#include "base/random.h"
#include "data/packing.h"
#include "data/sampler.h"

namespace trireme {
namespace {

std::vector<int64_t> order(uint64_t seed, int64_t epoch, int64_t n) {
  Permutation permutation(seed, epoch, n);
  std::vector<int64_t> values;
  for (int64_t i = 0; i < n; ++i) values.push_back(permutation(i));
  return values;
}

TEST(Permutation, TakesEveryElementOnce) {
  for (int64_t n : {1, 2, 3, 4, 5, 16, 17, 63, 64, 65, 1000, 4097}) {
    auto values = order(7, 3, n);
    std::sort(values.begin(), values.end());
    for (int64_t i = 0; i < n; ++i) ASSERT_EQ(values[static_cast<size_t>(i)], i) << "n = " << n;
  }
}

TEST(Permutation, DependsOnSeedAndEpoch) {
  EXPECT_EQ(order(1, 0, 100), order(1, 0, 100));
  EXPECT_NE(order(1, 0, 100), order(1, 1, 100));
  EXPECT_NE(order(1, 0, 100), order(2, 0, 100));
}

// Over many epochs every element comes at every place about equally often: chi-squared of 49 degrees of freedom stays
// below its 1e-6 quantile (about 117) for every place.
TEST(Permutation, IsUniform) {
  constexpr int64_t kSize = 50, kEpochs = 5000;
  std::vector<std::vector<int64_t>> seen(kSize, std::vector<int64_t>(kSize));
  for (int64_t e = 0; e < kEpochs; ++e) {
    Permutation permutation(11, e, kSize);
    for (int64_t i = 0; i < kSize; ++i) ++seen[static_cast<size_t>(i)][static_cast<size_t>(permutation(i))];
  }
  double expected = static_cast<double>(kEpochs) / kSize;
  for (const auto& row : seen) {
    double chi = 0;
    for (int64_t count : row) chi += (static_cast<double>(count) - expected) * (static_cast<double>(count) - expected) / expected;
    EXPECT_LT(chi, 117.0);
  }
}

std::vector<int64_t> random_lengths(uint64_t seed, int64_t n, int64_t capacity) {
  std::vector<int64_t> lengths;
  for (int64_t i = 0; i < n; ++i)
    lengths.push_back(1 + static_cast<int64_t>(random_bits(seed, RandomStream::kSplit, static_cast<uint64_t>(i)) %
                                               static_cast<uint64_t>(capacity)));
  return lengths;
}

TEST(Packing, EverySampleOnceAndNoRowTooLong) {
  for (bool shuffle : {false, true})
    for (int64_t n : {0, 1, 7, 500}) {
      auto lengths = random_lengths(5, n, 100);
      PackedRows packed = pack_samples(lengths, 100, shuffle, 3);
      auto samples = packed.samples;
      std::sort(samples.begin(), samples.end());
      std::vector<int64_t> all(static_cast<size_t>(n));
      std::iota(all.begin(), all.end(), int64_t{0});
      EXPECT_EQ(samples, all);
      int64_t last_first = -1;
      for (size_t r = 0; r + 1 < packed.offsets.size(); ++r) {
        int64_t total = 0;
        for (int64_t i = packed.offsets[r]; i < packed.offsets[r + 1]; ++i)
          total += lengths[static_cast<size_t>(packed.samples[static_cast<size_t>(i)])];
        EXPECT_LE(total, 100);
        EXPECT_GT(total, 0);
        EXPECT_GT(packed.samples[static_cast<size_t>(packed.offsets[r])], last_first);
        last_first = packed.samples[static_cast<size_t>(packed.offsets[r])];
      }
    }
}

TEST(Packing, IsTight) {
  // Pairs that fit exactly: the optimum is reached.
  std::vector<int64_t> lengths;
  for (int64_t i = 1; i < 50; ++i) lengths.push_back(i), lengths.push_back(100 - i);
  EXPECT_EQ(pack_samples(lengths, 100, false, 0).offsets.size() - 1, 49u);
  // The longest first, each where least room is left: neither alone gets by with two rows.
  EXPECT_EQ(pack_samples({60, 70, 20, 30, 20}, 100, false, 0).offsets.size() - 1, 2u);
  // Many short ones: rows full to 99 % but the last.
  auto short_ones = random_lengths(9, 4000, 60);
  int64_t total = std::accumulate(short_ones.begin(), short_ones.end(), int64_t{0});
  auto rows = static_cast<int64_t>(pack_samples(short_ones, 512, true, 1).offsets.size()) - 1;
  EXPECT_LE(rows, total / 507 + 1);
}

TEST(Packing, IsAFunctionOfItsSeed) {
  std::vector<int64_t> lengths(64, 10);
  EXPECT_EQ(pack_samples(lengths, 20, true, 1).samples, pack_samples(lengths, 20, true, 1).samples);
  EXPECT_NE(pack_samples(lengths, 20, true, 1).samples, pack_samples(lengths, 20, true, 2).samples);
  auto plain = pack_samples(lengths, 20, false, 1);
  EXPECT_EQ(plain.samples, pack_samples(lengths, 20, false, 2).samples);
  EXPECT_TRUE(std::is_sorted(plain.samples.begin(), plain.samples.end()));
}

}  // namespace
}  // namespace trireme
