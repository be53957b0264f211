// Every collective against its formula: all dtypes, odd and zero sizes, sub-groups, several in flight; the order in
// which sums are taken; refusals. Runs on 1, 2 and 4 ranks (and any other number).
#include "comm/communicator.h"

#include <gtest/gtest.h>

#include <chrono>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>
#include <thread>

#include "base/check.h"
#include "comm/mesh.h"
#include "comm/process.h"
#include "comm/progress.h"
#include "comm/watchdog.h"
#include "scratch.h"

namespace trireme {
namespace {

const std::vector<at::ScalarType> kTypes{at::kFloat, at::kDouble, at::kBFloat16, at::kHalf,
                                         at::kLong,  at::kInt,    at::kByte};
// 0, one, odd, around the switch from one round of messages to two, and more than one piece of 4 MiB.
const std::vector<int64_t> kSizes{0, 1, 7, 1023, 4099, 40961};
constexpr int64_t kManyPieces = 2'500'003;

const Communicator& world() {
  static Process process;
  static Communicator world = Communicator::world();
  return world;
}

// Rank's tensor: small integers, so that sums are exact in every dtype.
at::Tensor values(int rank, int64_t size, at::ScalarType type) {
  return (at::arange(size, at::kLong).mul(7 + rank).add(3 * rank).remainder(11)).to(type);
}

// The formula: the ranks' tensors joined one after the other.
at::Tensor expected(const std::vector<int>& ranks, int64_t size, at::ScalarType type, ReduceOp op) {
  at::Tensor result = values(ranks[0], size, type);
  for (size_t i = 1; i < ranks.size(); ++i) {
    const at::Tensor next = values(ranks[i], size, type);
    result = op == ReduceOp::kSum   ? result + next
             : op == ReduceOp::kMax ? at::maximum(result, next)
                                    : at::minimum(result, next);
  }
  return result;
}

bool same_bits(const at::Tensor& a, const at::Tensor& b) {
  return a.sizes() == b.sizes() && a.scalar_type() == b.scalar_type() &&
         (a.numel() == 0 || std::memcmp(a.contiguous().data_ptr(), b.contiguous().data_ptr(), a.nbytes()) == 0);
}

std::vector<int> all_ranks() {
  std::vector<int> ranks;
  for (int r = 0; r < world().size(); ++r) ranks.push_back(r);
  return ranks;
}

template <typename Visit>
void for_all(Visit visit) {
  for (at::ScalarType type : kTypes)
    for (int64_t size : kSizes) {
      SCOPED_TRACE(str(c10::toString(type), " x ", size));
      visit(type, size);
    }
}

TEST(Communicator, AllReduce) {
  for_all([](at::ScalarType type, int64_t size) {
    for (ReduceOp op : {ReduceOp::kSum, ReduceOp::kMax, ReduceOp::kMin}) {
      at::Tensor x = values(world().rank(), size, type);
      world().all_reduce(x, op);
      EXPECT_TRUE(same_bits(x, expected(all_ranks(), size, type, op)));
      x = values(world().rank(), size, type);
      Work work = world().start_all_reduce(x, op);
      work.wait();
      EXPECT_TRUE(same_bits(x, expected(all_ranks(), size, type, op)));
    }
  });
}

TEST(Communicator, ReduceScatter) {
  for_all([](at::ScalarType type, int64_t size) {
    const int n = world().size();
    for (ReduceOp op : {ReduceOp::kSum, ReduceOp::kMax}) {
      at::Tensor out = at::empty({size}, type);
      world().reduce_scatter(out, values(world().rank(), size * n, type), op);
      const at::Tensor right = expected(all_ranks(), size * n, type, op).narrow(0, world().rank() * size, size);
      EXPECT_TRUE(same_bits(out, right));
      out.zero_();
      world().start_reduce_scatter(out, values(world().rank(), size * n, type), op).wait();
      EXPECT_TRUE(same_bits(out, right));
    }
  });
}

TEST(Communicator, AllGather) {
  for_all([](at::ScalarType type, int64_t size) {
    std::vector<at::Tensor> parts;
    for (int r : all_ranks()) parts.push_back(values(r, size, type));
    at::Tensor out = at::empty({size * world().size()}, type);
    world().all_gather(out, values(world().rank(), size, type));
    EXPECT_TRUE(same_bits(out, at::cat(parts)));
    out.zero_();
    at::Tensor own = out.narrow(0, world().rank() * size, size);  // in place
    own.copy_(values(world().rank(), size, type));
    world().start_all_gather(out, own).wait();
    EXPECT_TRUE(same_bits(out, at::cat(parts)));
  });
}

TEST(Communicator, Broadcast) {
  for_all([](at::ScalarType type, int64_t size) {
    for (int root : all_ranks()) {
      at::Tensor x = values(world().rank(), size, type);
      world().broadcast(x, root);
      EXPECT_TRUE(same_bits(x, values(root, size, type)));
    }
    at::Tensor x = values(world().rank(), size, type);
    world().start_broadcast(x, world().size() - 1).wait();
    EXPECT_TRUE(same_bits(x, values(world().size() - 1, size, type)));
  });
}

TEST(Communicator, AllToAll) {
  for_all([](at::ScalarType type, int64_t size) {
    const int n = world().size(), me = world().rank();
    at::Tensor out = at::empty({size * n}, type);
    world().all_to_all(out, values(me, size * n, type));
    at::Tensor other = at::empty({size * n}, type);
    world().start_all_to_all(other, values(me, size * n, type)).wait();
    for (int r : all_ranks()) {
      const at::Tensor part = values(r, size * n, type).narrow(0, me * size, size);
      EXPECT_TRUE(same_bits(out.narrow(0, r * size, size), part));
      EXPECT_TRUE(same_bits(other.narrow(0, r * size, size), part));
    }
  });
}

TEST(Communicator, SendAndReceiveInARing) {
  for_all([](at::ScalarType type, int64_t size) {
    const int n = world().size(), me = world().rank(), before = (me + n - 1) % n;
    at::Tensor x = at::empty({size}, type), y = at::empty({size}, type);
    Work second = world().start_receive(y, before, 6);  // the tag decides, not the order
    Work first = world().start_receive(x, before, 5);
    Work send = world().start_send(values(me, size, type), (me + 1) % n, 5);
    world().send(values(me + 1, size, type), (me + 1) % n, 6);
    send.wait();
    first.wait();
    second.wait();
    EXPECT_TRUE(same_bits(x, values(before, size, type)));
    EXPECT_TRUE(same_bits(y, values(before + 1, size, type)));
  });
}

TEST(Communicator, ReceiveOfAnotherSizeIsAnError) {
  const int n = world().size(), me = world().rank();
  Work send = world().start_send(at::zeros({3}), (me + 1) % n, 1);
  at::Tensor x = at::zeros({5});
  EXPECT_THROW(world().receive(x, (me + n - 1) % n, 1), SystemError);
  send.wait();
  world().barrier();
}

TEST(Communicator, SubGroupsByParityAndReversed) {
  const int me = world().rank();
  Communicator parity = world().split(me % 2, -me, "parity");  // reversed by the key
  std::vector<int> members;
  for (int r = world().size() - 1; r >= 0; --r)
    if (r % 2 == me % 2) members.push_back(r);
  ASSERT_EQ(parity.size(), static_cast<int>(members.size()));
  EXPECT_EQ(members[static_cast<size_t>(parity.rank())], me);
  for (int64_t size : kSizes) {
    at::Tensor x = values(me, size, at::kFloat);
    parity.all_reduce(x);
    EXPECT_TRUE(same_bits(x, expected(members, size, at::kFloat, ReduceOp::kSum)));
  }
  Communicator none = world().split(me == 0 ? -1 : 0, 0, "all but the first");
  EXPECT_EQ(none.valid(), me != 0);
  Communicator self = Communicator::self();
  EXPECT_EQ(self.size(), 1);
  at::Tensor x = values(me, 9, at::kFloat);
  self.all_reduce(x);
  EXPECT_TRUE(same_bits(x, values(me, 9, at::kFloat)));
}

TEST(Communicator, MeshGroups) {
  for (int tensor = 1; tensor <= world().size(); ++tensor) {
    if (world().size() % tensor != 0) continue;
    const Mesh mesh(world().size(), 0, tensor, 1);
    const MeshComms comms(mesh, world());
    for (MeshAxis axis : {MeshAxis::kPipeline, MeshAxis::kData, MeshAxis::kTensor}) {
      EXPECT_EQ(comms.on(axis).rank(), comms.coords.on(axis));
      at::Tensor x = at::full({1}, int64_t{1} << world().rank());
      comms.on(axis).all_reduce(x);
      int64_t mask = 0;
      for (int r : mesh.group(world().rank(), axis)) mask |= int64_t{1} << r;
      EXPECT_EQ(x.item<int64_t>(), mask) << mesh_axis_name(axis);
    }
  }
}

// Many in flight, of different kinds and sizes, completed in another order on every rank.
TEST(Communicator, ManyInFlight) {
  for (bool thread : {true, false}) {
    set_progress_thread(thread);
    const int n = world().size(), me = world().rank();
    std::vector<at::Tensor> sums, parts;
    std::vector<Work> works;
    for (int i = 0; i < 6; ++i) {
      const int64_t size = kSizes[static_cast<size_t>(i)] * (i % 2 ? 1 : 30);
      sums.push_back(values(me + i, size, at::kFloat));
      works.push_back(world().start_all_reduce(sums.back()));
      parts.push_back(at::empty({size}));
      works.push_back(world().start_reduce_scatter(parts.back(), values(me + i, size * n, at::kFloat)));
      works.push_back(world().start_barrier());
    }
    at::Tensor blocking = values(me, 100'000, at::kFloat);
    world().all_reduce(blocking);  // beside them
    for (size_t i = 0; i < works.size(); ++i) works[(i * 7 + static_cast<size_t>(me) * 5) % works.size()].wait();
    for (int i = 0; i < 6; ++i) {
      std::vector<int> ranks;
      for (int r : all_ranks()) ranks.push_back(r + i);
      EXPECT_TRUE(same_bits(sums[i], expected(ranks, sums[i].numel(), at::kFloat, ReduceOp::kSum)));
      EXPECT_TRUE(same_bits(parts[i], expected(ranks, parts[i].numel() * n, at::kFloat, ReduceOp::kSum)
                                          .narrow(0, me * parts[i].numel(), parts[i].numel())));
    }
    EXPECT_TRUE(same_bits(blocking, expected(all_ranks(), 100'000, at::kFloat, ReduceOp::kSum)));
  }
  set_progress_thread(true);
}

// Each rank waits first for the other one: whoever waits must move everything on.
TEST(Communicator, WaitingInOppositeOrderDoesNotLock) {
  for (bool thread : {true, false}) {
    set_progress_thread(thread);
    at::Tensor x = values(world().rank(), 100'000, at::kFloat), y = values(world().rank() + 1, 100'000, at::kFloat);
    Work first = world().start_all_reduce(x), second = world().start_all_reduce(y);
    if (world().rank() % 2) std::swap(first, second);
    first.wait();
    second.wait();
    EXPECT_TRUE(same_bits(x, expected(all_ranks(), 100'000, at::kFloat, ReduceOp::kSum)));
    world().barrier();
  }
  set_progress_thread(true);
}

TEST(Communicator, TestCompletesWithoutWait) {
  for (bool thread : {true, false}) {
    set_progress_thread(thread);
    at::Tensor x = values(world().rank(), 50'000, at::kFloat);
    Work work = world().start_all_reduce(x);
    while (!work.test()) {
    }
    EXPECT_TRUE(same_bits(x, expected(all_ranks(), 50'000, at::kFloat, ReduceOp::kSum)));
    world().barrier();
  }
  set_progress_thread(true);
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

TEST(Communicator, IntegersWrapAndKeepTheirSign) {
  at::Tensor x = at::tensor(
      {world().rank() == 0 ? std::numeric_limits<int64_t>::max() : int64_t{1}, int64_t{-5} - world().rank()});
  at::Tensor sum = x.clone(), smallest = x.clone();
  world().all_reduce(sum);
  const uint64_t wrapped =
      static_cast<uint64_t>(std::numeric_limits<int64_t>::max()) + static_cast<uint64_t>(world().size()) - 1;
  EXPECT_EQ(sum[0].item<int64_t>(), static_cast<int64_t>(wrapped));
  world().all_reduce(smallest, ReduceOp::kMin);
  EXPECT_EQ(smallest[1].item<int64_t>(), -4 - world().size());
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
  EXPECT_NE(dump.find("all_reduce of group statistics, 40 bytes, took"), std::string::npos) << dump;
  for (int i = 0; i < 300; ++i) group.barrier();
  EXPECT_EQ(dump_flight_recorder().find("all_reduce of group statistics"), std::string::npos);  // 256 are kept
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
