// The Communicator's contract on CPU tensors; the order in which sums are taken; what concerns hosts only; refusals. Runs
// on 1, 2 and 4 ranks (and any other number).
#include "communicator_contract.h"

#include <gtest/gtest.h>

#include <chrono>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>
#include <thread>

#include "comm/watchdog.h"
#include "scratch.h"

namespace trireme {
namespace {

at::Tensor give(const at::Tensor& cpu) { return cpu.clone(); }
at::Tensor take(const at::Tensor& tensor) { return tensor; }
at::Tensor part(const at::Tensor& tensor, int64_t begin, int64_t size) { return tensor.narrow(0, begin, size); }

constexpr int64_t kManyPieces = 2'500'003;  // more than one piece of 4 MiB

TEST(Communicator, ReceiveOfAnotherSizeIsAnError) {
  const int n = world().size(), me = world().rank();
  Work send = world().start_send(at::zeros({3}), (me + 1) % n, 1);
  at::Tensor x = at::zeros({5});
  EXPECT_THROW(world().receive(x, (me + n - 1) % n, 1), SystemError);
  send.wait();
  world().barrier();
}

// Random values, where the order of additions shows: rank order, whatever the size, in every way to reduce.
TEST(Communicator, SumsAreTakenInRankOrder) {
  const int n = world().size(), me = world().rank();
  auto random = [](int rank, int64_t size) {
    auto generator = at::make_generator<at::CPUGeneratorImpl>(static_cast<uint64_t>(100 + rank));
    return at::randn({size}, generator);
  };
  const int64_t size = kManyPieces / n * n;
  std::vector<at::Tensor> all;
  for (int r = 0; r < n; ++r) all.push_back(random(r, size));
  at::Tensor right = all[0].clone();
  for (int r = 1; r < n; ++r) right.add_(all[static_cast<size_t>(r)]);

  at::Tensor whole = all[static_cast<size_t>(me)].clone();
  world().all_reduce(whole);
  EXPECT_TRUE(same_bits(whole, right));
  at::Tensor part = at::empty({size / n});
  world().reduce_scatter(part, all[static_cast<size_t>(me)]);
  EXPECT_TRUE(same_bits(part, right.narrow(0, me * (size / n), size / n)));
  for (int64_t piece : {int64_t{1}, int64_t{1000}, int64_t{65537}}) {
    at::Tensor x = all[static_cast<size_t>(me)].narrow(0, 13, piece).clone();
    world().all_reduce(x);
    EXPECT_TRUE(same_bits(x, right.narrow(0, 13, piece)));
  }

  // 16-bit floats: summed in fp32, rounded once.
  for (at::ScalarType type : {at::kBFloat16, at::kHalf}) {
    at::Tensor sum = all[0].to(type).to(at::kFloat);
    for (int r = 1; r < n; ++r) sum.add_(all[static_cast<size_t>(r)].to(type).to(at::kFloat));
    at::Tensor x = all[static_cast<size_t>(me)].to(type);
    world().all_reduce(x);
    EXPECT_TRUE(same_bits(x, sum.to(type))) << c10::toString(type);
  }
}

TEST(Communicator, InfinitiesAndNansTravel) {
  const float nan = std::numeric_limits<float>::quiet_NaN(), inf = std::numeric_limits<float>::infinity();
  for (at::ScalarType type : {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf}) {
    const bool last = world().rank() == world().size() - 1;
    for (ReduceOp op : {ReduceOp::kSum, ReduceOp::kMax, ReduceOp::kMin}) {
      at::Tensor x = at::tensor({last ? nan : 1.0f, world().rank() == 0 ? nan : 1.0f, last ? inf : 1.0f}).to(type);
      world().all_reduce(x, op);
      EXPECT_TRUE(std::isnan(x[0].item<double>()));
      EXPECT_TRUE(std::isnan(x[1].item<double>()));
      EXPECT_EQ(x[2].item<double>(), op == ReduceOp::kMin && world().size() > 1 ? 1.0 : HUGE_VAL);
    }
  }
}

TEST(Communicator, SmallThings) {
  const int n = world().size(), me = world().rank();
  EXPECT_EQ(world().agree(me == n - 1 ? 3 : 0), 3);
  EXPECT_EQ(world().sum(int64_t{1}), n);
  EXPECT_EQ(world().sum(0.5), 0.5 * n);
  EXPECT_EQ(world().max(-1.0 - me), -1.0);
  EXPECT_EQ(world().broadcast_bytes(me == 0 ? std::string("a\0b", 3) : "x"), std::string("a\0b", 3));
  EXPECT_EQ(world().broadcast_bytes(me == 0 ? "" : "x"), "");
  const std::vector<std::string> texts = world().gather_bytes(std::string(static_cast<size_t>(me) * 3, 'z'));
  ASSERT_EQ(texts.size(), me == 0 ? static_cast<size_t>(n) : 0u);
  for (size_t r = 0; r < texts.size(); ++r) EXPECT_EQ(texts[r], std::string(r * 3, 'z'));
}

// Whoever has passed sees that every rank had arrived: each leaves a file before. The last comes well after the first, once
// from the front and once from the back.
TEST(Communicator, NobodyPassesABarrierBeforeAllHaveArrived) {
  namespace fs = std::filesystem;
  const std::string folder = world().broadcast_bytes(world().rank() == 0 ? scratch_folder() : "");
  const int n = world().size(), me = world().rank();
  int round = 0;
  for (bool blocking : {true, false})
    for (int turn : {me, n - 1 - me}) {
      auto file = [&](int rank) { return trireme::str(folder, "/", round, "-", rank); };
      std::this_thread::sleep_for(std::chrono::milliseconds(50 * turn));
      std::ofstream(file(me)).put('x');
      if (blocking) world().barrier();
      else world().start_barrier().wait();
      for (int rank = 0; rank < n; ++rank) EXPECT_TRUE(fs::exists(file(rank))) << rank << (blocking ? "" : ", not blocking");
      ++round;
    }
  world().sum(int64_t{1});  // none looks any more
  if (me == 0) fs::remove_all(folder);
}

TEST(Communicator, StatisticsAndRecorder) {
  Communicator group = world().split(0, 0, "statistics");
  at::Tensor x = at::zeros({10});
  group.all_reduce(x);
  group.start_all_reduce(x).wait();
  group.barrier();
  const CommStatistics statistics = group.statistics();
  ASSERT_EQ(statistics.lines.size(), 2u);
  EXPECT_EQ(statistics.lines[0].op, "all_reduce");
  EXPECT_EQ(statistics.lines[0].num_calls, 2);
  EXPECT_EQ(statistics.lines[0].num_bytes, 80);
  EXPECT_EQ(statistics.bytes_reduced, 80);
  EXPECT_GT(statistics.lines[0].seconds, 0);
  group.reset_statistics();
  EXPECT_TRUE(group.statistics().lines.empty());
  const std::string dump = dump_flight_recorder();
  EXPECT_NE(dump.find("all_reduce #1 of group statistics, 40 bytes (float32), took"), std::string::npos) << dump;
  for (int i = 0; i < 300; ++i) group.barrier();
  EXPECT_EQ(dump_flight_recorder().find("of group statistics, 40 bytes"), std::string::npos);  // 256 are kept
}

TEST(Communicator, RefusesWrongTensors) {
  at::Tensor good = at::zeros({4 * world().size()});
  EXPECT_THROW(world().all_reduce(at::zeros({4, 4}).t()), InternalError);
  EXPECT_THROW(world().all_reduce(at::zeros({4}, at::kShort)), InternalError);
  EXPECT_THROW(world().all_reduce(at::Tensor()), InternalError);
  EXPECT_THROW(world().reduce_scatter(at::zeros({5}), good), InternalError);
  EXPECT_THROW(world().reduce_scatter(at::zeros({4}, at::kDouble), good), InternalError);
  EXPECT_THROW(world().all_gather(at::zeros({3}), at::zeros({4})), InternalError);
  EXPECT_THROW(world().all_to_all(good, good), InternalError);
  EXPECT_THROW(world().broadcast(good, world().size()), InternalError);
  EXPECT_THROW(world().send(good, -1), InternalError);
  EXPECT_THROW(world().send(good, 0, -1), InternalError);
  world().barrier();
}

}  // namespace
}  // namespace trireme
