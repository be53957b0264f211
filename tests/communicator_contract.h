// What a Communicator promises whatever its tensors live on: every collective against its formula, in all dtypes, odd
// and zero sizes, sub-groups, several in flight. A test program gives the three functions of its kind of tensor:
//   at::Tensor give(const at::Tensor& cpu)                         a copy there, which the current stream may make later
//   at::Tensor take(const at::Tensor& tensor)                      a copy on the CPU, when the current stream is done
//   at::Tensor part(const at::Tensor& tensor, int64_t begin, int64_t size)  a view of contiguous elements
#pragma once

#include <gtest/gtest.h>

#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "base/check.h"
#include "comm/communicator.h"
#include "comm/mesh.h"
#include "comm/process.h"
#include "comm/progress.h"

namespace trireme {
namespace {

at::Tensor give(const at::Tensor& cpu);
at::Tensor take(const at::Tensor& tensor);
at::Tensor part(const at::Tensor& tensor, int64_t begin, int64_t size);

const std::vector<at::ScalarType> kTypes{at::kFloat, at::kDouble, at::kBFloat16, at::kHalf,
                                         at::kLong,  at::kInt,    at::kChar,     at::kByte};
// 0, one, odd, around the switch from one round of messages to two, and more than one piece of 4 MiB.
const std::vector<int64_t> kSizes{0, 1, 7, 1023, 4099, 40961};

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
      at::Tensor x = give(values(world().rank(), size, type));
      world().all_reduce(x, op);
      EXPECT_TRUE(same_bits(take(x), expected(all_ranks(), size, type, op)));
      x = give(values(world().rank(), size, type));
      Work work = world().start_all_reduce(x, op);
      work.wait();
      EXPECT_TRUE(same_bits(take(x), expected(all_ranks(), size, type, op)));
    }
  });
}

TEST(Communicator, ReduceScatter) {
  for_all([](at::ScalarType type, int64_t size) {
    const int n = world().size();
    for (ReduceOp op : {ReduceOp::kSum, ReduceOp::kMax}) {
      at::Tensor out = give(at::empty({size}, type));
      world().reduce_scatter(out, give(values(world().rank(), size * n, type)), op);
      const at::Tensor right = expected(all_ranks(), size * n, type, op).narrow(0, world().rank() * size, size);
      EXPECT_TRUE(same_bits(take(out), right));
      out = give(at::zeros({size}, type));
      world().start_reduce_scatter(out, give(values(world().rank(), size * n, type)), op).wait();
      EXPECT_TRUE(same_bits(take(out), right));
    }
  });
}

TEST(Communicator, AllGather) {
  for_all([](at::ScalarType type, int64_t size) {
    std::vector<at::Tensor> parts;
    for (int r : all_ranks()) parts.push_back(values(r, size, type));
    at::Tensor out = give(at::empty({size * world().size()}, type));
    world().all_gather(out, give(values(world().rank(), size, type)));
    EXPECT_TRUE(same_bits(take(out), at::cat(parts)));
    at::Tensor whole = at::zeros({size * world().size()}, type);
    whole.narrow(0, world().rank() * size, size).copy_(values(world().rank(), size, type));
    out = give(whole);
    world().start_all_gather(out, part(out, world().rank() * size, size)).wait();  // in place
    EXPECT_TRUE(same_bits(take(out), at::cat(parts)));
  });
}

TEST(Communicator, Broadcast) {
  for_all([](at::ScalarType type, int64_t size) {
    for (int root : all_ranks()) {
      at::Tensor x = give(values(world().rank(), size, type));
      world().broadcast(x, root);
      EXPECT_TRUE(same_bits(take(x), values(root, size, type)));
    }
    at::Tensor x = give(values(world().rank(), size, type));
    world().start_broadcast(x, world().size() - 1).wait();
    EXPECT_TRUE(same_bits(take(x), values(world().size() - 1, size, type)));
  });
}

TEST(Communicator, AllToAll) {
  for_all([](at::ScalarType type, int64_t size) {
    const int n = world().size(), me = world().rank();
    at::Tensor out = give(at::empty({size * n}, type));
    world().all_to_all(out, give(values(me, size * n, type)));
    at::Tensor other = give(at::empty({size * n}, type));
    world().start_all_to_all(other, give(values(me, size * n, type))).wait();
    for (int r : all_ranks()) {
      const at::Tensor right = values(r, size * n, type).narrow(0, me * size, size);
      EXPECT_TRUE(same_bits(take(out).narrow(0, r * size, size), right));
      EXPECT_TRUE(same_bits(take(other).narrow(0, r * size, size), right));
    }
  });
}

TEST(Communicator, SendAndReceiveInARing) {
  for_all([](at::ScalarType type, int64_t size) {
    const int n = world().size(), me = world().rank(), before = (me + n - 1) % n;
    at::Tensor x = give(at::empty({size}, type)), y = give(at::empty({size}, type));
    Work second = world().start_receive(y, before, 6);  // the tag decides, not the order
    Work first = world().start_receive(x, before, 5);
    Work send = world().start_send(give(values(me, size, type)), (me + 1) % n, 5);
    world().send(give(values(me + 1, size, type)), (me + 1) % n, 6);
    send.wait();
    first.wait();
    second.wait();
    EXPECT_TRUE(same_bits(take(x), values(before, size, type)));
    EXPECT_TRUE(same_bits(take(y), values(before + 1, size, type)));
  });
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
    at::Tensor x = give(values(me, size, at::kFloat));
    parity.all_reduce(x);
    EXPECT_TRUE(same_bits(take(x), expected(members, size, at::kFloat, ReduceOp::kSum)));
  }
  Communicator none = world().split(me == 0 ? -1 : 0, 0, "all but the first");
  EXPECT_EQ(none.valid(), me != 0);
  Communicator self = Communicator::self();
  EXPECT_EQ(self.size(), 1);
  at::Tensor x = give(values(me, 9, at::kFloat));
  self.all_reduce(x);
  EXPECT_TRUE(same_bits(take(x), values(me, 9, at::kFloat)));
}

TEST(Communicator, MeshGroups) {
  for (int tensor = 1; tensor <= world().size(); ++tensor) {
    if (world().size() % tensor != 0) continue;
    const Mesh mesh(world().size(), 0, tensor, 1);
    const MeshComms comms(mesh, world());
    for (MeshAxis axis : {MeshAxis::kPipeline, MeshAxis::kData, MeshAxis::kTensor}) {
      EXPECT_EQ(comms.on(axis).rank(), comms.coords.on(axis));
      at::Tensor x = give(at::full({1}, int64_t{1} << world().rank()));
      comms.on(axis).all_reduce(x);
      int64_t mask = 0;
      for (int r : mesh.group(world().rank(), axis)) mask |= int64_t{1} << r;
      EXPECT_EQ(take(x).item<int64_t>(), mask) << mesh_axis_name(axis);
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
      sums.push_back(give(values(me + i, size, at::kFloat)));
      works.push_back(world().start_all_reduce(sums.back()));
      parts.push_back(give(at::empty({size})));
      works.push_back(world().start_reduce_scatter(parts.back(), give(values(me + i, size * n, at::kFloat))));
      works.push_back(world().start_barrier());
    }
    at::Tensor blocking = give(values(me, 100'000, at::kFloat));
    world().all_reduce(blocking);  // beside them
    for (size_t i = 0; i < works.size(); ++i) works[(i * 7 + static_cast<size_t>(me) * 5) % works.size()].wait();
    for (int i = 0; i < 6; ++i) {
      std::vector<int> ranks;
      for (int r : all_ranks()) ranks.push_back(r + i);
      EXPECT_TRUE(same_bits(take(sums[i]), expected(ranks, sums[i].numel(), at::kFloat, ReduceOp::kSum)));
      EXPECT_TRUE(same_bits(take(parts[i]), expected(ranks, parts[i].numel() * n, at::kFloat, ReduceOp::kSum)
                                                .narrow(0, me * parts[i].numel(), parts[i].numel())));
    }
    EXPECT_TRUE(same_bits(take(blocking), expected(all_ranks(), 100'000, at::kFloat, ReduceOp::kSum)));
  }
  set_progress_thread(true);
}

// Each rank waits first for the other one: whoever waits must move everything on.
TEST(Communicator, WaitingInOppositeOrderDoesNotLock) {
  for (bool thread : {true, false}) {
    set_progress_thread(thread);
    at::Tensor x = give(values(world().rank(), 100'000, at::kFloat));
    at::Tensor y = give(values(world().rank() + 1, 100'000, at::kFloat));
    Work first = world().start_all_reduce(x), second = world().start_all_reduce(y);
    if (world().rank() % 2) std::swap(first, second);
    first.wait();
    second.wait();
    EXPECT_TRUE(same_bits(take(x), expected(all_ranks(), 100'000, at::kFloat, ReduceOp::kSum)));
    world().barrier();
  }
  set_progress_thread(true);
}

TEST(Communicator, TestCompletesWithoutWait) {
  for (bool thread : {true, false}) {
    set_progress_thread(thread);
    at::Tensor x = give(values(world().rank(), 50'000, at::kFloat));
    Work work = world().start_all_reduce(x);
    while (!work.test()) {
    }
    EXPECT_TRUE(same_bits(take(x), expected(all_ranks(), 50'000, at::kFloat, ReduceOp::kSum)));
    world().barrier();
  }
  set_progress_thread(true);
}

TEST(Communicator, IntegersWrapAndKeepTheirSign) {
  at::Tensor x = at::tensor(
      {world().rank() == 0 ? std::numeric_limits<int64_t>::max() : int64_t{1}, int64_t{-5} - world().rank()});
  at::Tensor sum = give(x), smallest = give(x);
  world().all_reduce(sum);
  const uint64_t wrapped =
      static_cast<uint64_t>(std::numeric_limits<int64_t>::max()) + static_cast<uint64_t>(world().size()) - 1;
  EXPECT_EQ(take(sum)[0].item<int64_t>(), static_cast<int64_t>(wrapped));
  world().all_reduce(smallest, ReduceOp::kMin);
  EXPECT_EQ(take(smallest)[1].item<int64_t>(), -4 - world().size());
}

}  // namespace
}  // namespace trireme
