// Which rows come at which step, for any number of ranks and after a restart.
#include "data/loader.h"

#include <algorithm>
#include <set>

#include "tests/data_fixture.h"

namespace trireme {
namespace {

class Loaders : public DataTest {
 protected:
  void SetUp() override {
    DataTest::SetUp();
    write_pairs("train.jsonl", 22, [](int64_t i) { return 1 + i % 5; });
    dataset_ = build();
  }
  // The rows of the next `num_steps` global batches in global order, from every rank's loader.
  std::vector<int64_t> stream(int64_t micro, int64_t accumulation, int64_t ranks, bool shuffle, int64_t num_steps) const {
    std::vector<Loader> loaders;
    for (int64_t r = 0; r < ranks; ++r) loaders.emplace_back(dataset_, BatchShape{micro, accumulation, r, ranks}, shuffle, 5);
    std::vector<int64_t> rows;
    for (int64_t s = 0; s < num_steps; ++s)
      for (Loader& loader : loaders) {
        for (int64_t m = 0; m < accumulation; ++m) {
          auto part = loader.rows(m);
          rows.insert(rows.end(), part.begin(), part.end());
        }
        loader.advance();
      }
    return rows;
  }
  std::shared_ptr<const Dataset> dataset_;
};

TEST_F(Loaders, FileOrderWithoutShuffling) {
  auto rows = stream(2, 1, 2, false, 11);
  ASSERT_EQ(rows.size(), 44u);
  for (int64_t i = 0; i < 44; ++i) EXPECT_EQ(rows[static_cast<size_t>(i)], i % 22);
}

TEST_F(Loaders, EveryTokenOncePerEpochForAnyNumberOfRanks) {
  for (bool shuffle : {false, true}) {
    auto one = stream(8, 1, 1, shuffle, 11);  // 4 epochs
    EXPECT_EQ(one, stream(1, 8, 1, shuffle, 11));
    EXPECT_EQ(one, stream(2, 2, 2, shuffle, 11));
    EXPECT_EQ(one, stream(4, 1, 2, shuffle, 11));
    EXPECT_EQ(one, stream(1, 2, 4, shuffle, 11));
    EXPECT_EQ(one, stream(2, 1, 4, shuffle, 11));
    for (size_t epoch = 0; epoch < 4; ++epoch) {
      std::set<int64_t> rows(one.begin() + static_cast<long>(22 * epoch), one.begin() + static_cast<long>(22 * (epoch + 1)));
      EXPECT_EQ(rows.size(), 22u) << "epoch " << epoch;
    }
    std::vector<int64_t> first(one.begin(), one.begin() + 22), second(one.begin() + 22, one.begin() + 44);
    EXPECT_EQ(first == second, !shuffle);
  }
}

TEST_F(Loaders, BatchHoldsItsRows) {
  Loader loader(dataset_, {3, 2, 1, 2}, true, 5);
  loader.advance();
  loader.advance();  // rows 24..35 of the stream: the second epoch
  SequenceBatch batch = loader.batch(1);
  ASSERT_EQ(batch.num_segments(), 3);
  auto rows = loader.rows(1);
  for (int64_t s = 0; s < 3; ++s) {
    SequenceBatch one;
    dataset_->append_row(rows[static_cast<size_t>(s)], 1, one);
    EXPECT_EQ(batch.sample_ids[static_cast<size_t>(s)], 22 + rows[static_cast<size_t>(s)]);
    EXPECT_TRUE(std::equal(one.tokens.begin(), one.tokens.end(), batch.tokens.begin() + batch.cu_seqlens[static_cast<size_t>(s)]));
  }
  EXPECT_DOUBLE_EQ(loader.epoch(), 24.0 / 22.0);

  Loader over_the_end(dataset_, {3, 1, 0, 1}, true, 5);
  for (int i = 0; i < 7; ++i) over_the_end.advance();
  std::vector<int64_t> epochs = over_the_end.batch(0).sample_ids;  // row 21 is the first epoch's last
  for (int64_t& id : epochs) id /= 22;
  EXPECT_EQ(epochs, (std::vector<int64_t>{0, 1, 1}));
}

TEST_F(Loaders, ResumeGivesTheSameStream) {
  Loader never_stopped(dataset_, {2, 2, 0, 1}, true, 5);
  for (int i = 0; i < 9; ++i) never_stopped.advance();
  EXPECT_EQ(never_stopped.state(), (DataPosition{5, 1, 14}));
  Loader resumed(dataset_, {2, 2, 0, 1}, true, 5);
  resumed.set_state(never_stopped.state());
  for (int i = 0; i < 9; ++i) {
    for (int64_t m = 0; m < 2; ++m) {
      SequenceBatch a = never_stopped.batch(m), b = resumed.batch(m);
      EXPECT_EQ(a.tokens, b.tokens);
      EXPECT_EQ(a.targets, b.targets);
      EXPECT_EQ(a.sample_ids, b.sample_ids);
    }
    never_stopped.advance(), resumed.advance();
  }
  EXPECT_EQ(never_stopped.state(), resumed.state());
}

TEST_F(Loaders, RefusesAnotherOrder) {
  Loader loader(dataset_, {2, 1, 0, 1}, true, 5);
  EXPECT_EQ(error_of([&] { loader.set_state({6, 0, 0}); }),
            "the checkpoint's data order was drawn with seed 6, this run has run.seed=5; set the seed back");
  EXPECT_EQ(error_of([&] { loader.set_state({5, 1, 22}); }),
            "the checkpoint stands at row 22 of epoch 1, but the training data has 22 rows; it is not the data of that run");
}

TEST_F(Loaders, EvaluationTakesEveryRowOnce) {
  for (int64_t micro : {0, 1, 4, 50})
    for (int64_t ranks : {1, 2, 4}) {
      std::vector<int64_t> seen;
      for (int64_t r = 0; r < ranks; ++r) {
        EvalLoader loader(dataset_, micro, r, ranks);
        for (int64_t i = 0; i < loader.num_batches(); ++i)
          for (int64_t id : loader.batch(i).sample_ids) seen.push_back(id);
      }
      std::sort(seen.begin(), seen.end());
      ASSERT_EQ(seen.size(), 22u);
      for (int64_t i = 0; i < 22; ++i) EXPECT_EQ(seen[static_cast<size_t>(i)], i);
    }
}

TEST_F(Loaders, EvaluationTakesRowsTogetherUpToANumberOfTokens) {
  for (int64_t ranks : {1, 4}) {
    const int64_t most = dataset_->counts().tokens / ranks;
    ASSERT_LT(dataset_->counts().tokens, kEvalTokens);
    for (int64_t r = 0; r < ranks; ++r) {
      EvalLoader loader(dataset_, 0, r, ranks);
      ASSERT_GE(loader.num_batches(), 1) << r;
      for (int64_t i = 0; i < loader.num_batches(); ++i) EXPECT_LE(loader.batch(i).num_tokens(), most);
    }
  }
  write_pairs("train.jsonl", 45, [](int64_t) { return 190; });  // up to 195 tokens a row: 10 rows a batch
  EvalLoader loader(build(), 0, 0, 1);
  ASSERT_EQ(loader.num_batches(), 5);
  for (int64_t i = 0; i < 5; ++i) EXPECT_EQ(loader.batch(i).num_segments(), i < 4 ? 10 : 5);
}

}  // namespace
}  // namespace trireme
