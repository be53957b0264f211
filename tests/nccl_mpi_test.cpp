// The Communicator on device tensors, over a double of NCCL in host memory: its whole contract, and what NCCL adds to it:
// streams, numbering, messages that are agreed on before they are sent, failure, the end of a group.
#include "nccl_double.h"

#include "communicator_contract.h"

#include <gtest/gtest.h>

#if __has_include(<nccl.h>) && __has_include(<cuda_runtime.h>)
#include <nccl.h>
#endif

#include <chrono>
#include <cstdlib>
#include <thread>

#include "base/log.h"
#include "comm/nccl_group.h"
#include "comm/watchdog.h"

namespace trireme {
namespace {

using test::nccl_counts;

void install_once() {
  static const bool installed = (test::install_nccl_double(), true);
  (void)installed;
}

at::Tensor give(const at::Tensor& cpu) { return install_once(), test::to_device(cpu); }
at::Tensor take(const at::Tensor& tensor) { return test::to_host(tensor); }
at::Tensor part(const at::Tensor& tensor, int64_t begin, int64_t size) {
  return test::device_part(tensor, begin, size);
}

// What follows fails or is counted, so each test has a Communicator of its own.
Communicator fresh(const char* name) {
  install_once();
  return world().split(0, world().rank(), name);
}

template <typename Error = SystemError, typename F>
std::string message_of(const F& f) {
  try {
    f();
  } catch (const Error& error) {
    return error.what();
  }
  return "nothing was thrown";
}

TEST(Nccl, TheHostDoesNotWaitForTheDevice) {
  Communicator group = fresh("paused");
  at::Tensor x = give(at::ones({5}));
  group.all_reduce(x);  // makes the communicator
  take(x);
  test::pause_device(true);
  at::Tensor y = give(values(group.rank(), 9, at::kFloat));
  Work work = group.start_all_reduce(y);
  at::Tensor z = give(values(group.rank(), 9, at::kFloat));
  group.all_reduce(z);
  work.wait();
  at::Tensor other = give(at::ones({5}));
  Work third = group.start_all_reduce(other);
  EXPECT_FALSE(third.test());
  group.barrier();  // between hosts: also while devices stand still
  test::pause_device(false);
  EXPECT_TRUE(same_bits(take(y), expected(all_ranks(), 9, at::kFloat, ReduceOp::kSum)));
  EXPECT_TRUE(same_bits(take(z), expected(all_ranks(), 9, at::kFloat, ReduceOp::kSum)));
  third.wait();
}

TEST(Nccl, OrdersTheStreamsOfItsCallers) {
  Communicator group = fresh("streams");
  const int n = group.size();
  const c10::Stream first = test::new_stream(), second = test::new_stream();
  const c10::Stream last = test::exchange_stream(first);
  for (int round = 0; round < 20; ++round) {
    test::exchange_stream(first);
    at::Tensor x = give(at::full({1000}, 1.0f));  // in the first stream
    Work work = group.start_all_reduce(x);
    test::exchange_stream(second);
    work.wait();
    EXPECT_TRUE(same_bits(take(x), at::full({1000}, static_cast<float>(n)))) << round;  // when the second is done
  }
  test::exchange_stream(last);
}

TEST(Nccl, SizesThatDifferAreAnErrorAtBothEndsAndTheGroupLives) {
  Communicator group = fresh("sizes");
  const int n = group.size(), me = group.rank();
  Work send = group.start_send(give(at::zeros({3})), (me + 1) % n, 1);
  at::Tensor x = give(at::zeros({5}));
  EXPECT_EQ(message_of([&] { group.receive(x, (me + n - 1) % n, 1); }),
            str("rank ", me, " cannot receive where 12 bytes are sent and 20 are expected; the ranks do not do the same "
                "operations"));
  EXPECT_NE(message_of([&] { send.wait(); }).find("cannot send where 12 bytes are sent and 20"), std::string::npos);
  send = group.start_send(give(at::ones({5})), (me + 1) % n, 1);
  group.receive(x, (me + n - 1) % n, 1);
  send.wait();
  EXPECT_TRUE(same_bits(take(x), at::ones({5})));
}

// Each rank sends to all before it receives from any, in another order than they were sent.
TEST(Nccl, MessagesCrossInEveryOrder) {
  Communicator group = fresh("crossing");
  const int n = group.size(), me = group.rank();
  std::vector<Work> works;
  std::vector<at::Tensor> received;
  for (int tag = 0; tag < 3; ++tag)
    for (int peer = 0; peer < n; ++peer)
      works.push_back(group.start_send(give(at::full({2000}, 100 * tag + 10 * me + peer)), peer, tag));
  for (int tag : {2, 0, 1})
    for (int peer = n - 1; peer >= 0; --peer) {
      received.push_back(give(at::zeros({2000}, at::kLong)));
      works.push_back(group.start_receive(received.back(), peer, tag));
    }
  at::Tensor sum = give(at::ones({3}));
  group.all_reduce(sum);  // beside them
  for (Work& work : works) work.wait();
  size_t i = 0;
  for (int tag : {2, 0, 1})
    for (int peer = n - 1; peer >= 0; --peer)
      EXPECT_TRUE(same_bits(take(received[i++]), at::full({2000}, 100 * tag + 10 * peer + me)));
  EXPECT_TRUE(same_bits(take(sum), at::full({3}, static_cast<float>(n))));
}

// One by one the messages would wait for each other.
TEST(Nccl, AllToAllIsOneGroupOfMessages) {
  Communicator group = fresh("grouped");
  const int n = group.size(), me = group.rank();
  at::Tensor x = give(at::full({3 * n}, me, at::kBFloat16)), y = give(at::zeros({3 * n}, at::kBFloat16));
  const int kernels = nccl_counts().kernels;
  group.all_to_all(y, x);
  EXPECT_EQ(nccl_counts().kernels, kernels + 1);
  const at::Tensor received = take(y);
  for (int rank = 0; rank < n; ++rank) EXPECT_TRUE(same_bits(received.narrow(0, 3 * rank, 3), at::full({3}, rank, at::kBFloat16)));
}

TEST(Nccl, CountsAndRecordsLikeTheOtherHalf) {
  Communicator group = fresh("counting");
  at::Tensor x = give(at::zeros({10}));
  group.all_reduce(x);
  group.start_all_reduce(x).wait();
  const CommStatistics statistics = group.statistics();
  ASSERT_EQ(statistics.lines.size(), 1u);
  EXPECT_EQ(statistics.lines[0].num_calls, 2);
  EXPECT_EQ(statistics.bytes_reduced, 80);
  take(x);
  for (int i = 0; i < 1000 && dump_flight_recorder().find("counting, 40 bytes (float32), in flight") != std::string::npos; ++i)
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  EXPECT_NE(dump_flight_recorder().find("of group counting, 40 bytes (float32), took"), std::string::npos);
}

TEST(Nccl, FreesItsCommunicators) {
  install_once();
  world().barrier();
  const test::NcclCounts before = nccl_counts();
  {
    Communicator group = fresh("freed"), unused = fresh("unused");
    at::Tensor x = give(at::ones({4000}));
    group.all_reduce(x);  // still under way when the group ends
    Work send = group.start_send(x, group.rank(), 0);
    group.receive(give(at::ones({4000})), group.rank(), 0);
    send.wait();
    EXPECT_EQ(nccl_counts().made - before.made, 2);
  }
  EXPECT_EQ(nccl_counts().destroyed - before.destroyed, 2);
  EXPECT_EQ(nccl_counts().aborted, before.aborted);
}

TEST(Nccl, AnExceptionThatPassesEndsWhatIsInFlight) {
  const int aborted = (install_once(), nccl_counts().aborted);
  try {
    Communicator group = fresh("left");
    at::Tensor x = give(at::ones({4}));
    group.all_reduce(x);
    take(x);
    test::pause_device(true);
    group.all_reduce(x);
    throw DataError("a bad file");
  } catch (const DataError&) {
  }
  test::pause_device(false);
  EXPECT_EQ(nccl_counts().aborted, aborted + 1);
  at::Tensor y = give(at::ones({4}));
  world().all_reduce(y);  // others go on
  EXPECT_TRUE(same_bits(take(y), at::full({4}, static_cast<float>(world().size()))));
}

TEST(Nccl, AFailureAbortsAndIsThrownFromThenOn) {
  {
    Communicator group = fresh("failing");
    at::Tensor x = give(at::ones({4}));
    group.all_reduce(x);
    take(x);
    world().barrier();
    const int aborted = nccl_counts().aborted;
    test::pause_device(true);  // both are called before the first fails
    test::fail_next_kernel(kNcclRemoteError);
    Work work = group.start_all_reduce(x), behind = group.start_all_reduce(x);
    test::pause_device(false);
    while (nccl_counts().aborted == aborted) std::this_thread::yield();  // by the background thread
    take(x);  // the stream goes on
    const std::string message = str("NCCL failed in all_reduce of group failing on rank ", log_rank(), ", host ",
                                    host_name(), ": remote process exited (a peer is gone)");
    EXPECT_EQ(message_of([&] { work.wait(); work.test(); group.barrier(); }), message);
    EXPECT_EQ(message_of([&] { behind.wait(); behind.test(); group.barrier(); }), message);
    EXPECT_EQ(message_of([&] { world().barrier(); }), message);  // nor on the CPU
    EXPECT_EQ(nccl_counts().aborted, aborted + 1);
  }
  forget_nccl_failure();
  world().barrier();
}

TEST(Nccl, AFailureToMakeTheCommunicatorIsThrown) {
  {
    Communicator group = fresh("unmade");
    test::fail_next_init(kNcclRemoteError);
    at::Tensor x = give(at::ones({4}));
    EXPECT_NE(message_of([&] { group.all_reduce(x); }).find("NCCL failed in all_reduce of group unmade"),
              std::string::npos);
  }
  forget_nccl_failure();
  world().barrier();
}

// What the watchdog does before it ends the job.
TEST(Nccl, ALateOperationIsAborted) {
  install_once();
  {
    NcclGroup group("late", MpiGroup::self(), c10::Device(nccl_device_type(), 0));
    group.connect({MpiGroup::self(), 0});
    at::Tensor x = give(at::ones({4}));
    auto first = group.all_reduce(CommType::kFloat32, ReduceOp::kSum, x.data_ptr(), 4);
    while (!first->try_advance()) std::this_thread::yield();
    test::pause_device(true);
    const int aborted = nccl_counts().aborted;
    auto late = group.all_reduce(CommType::kFloat32, ReduceOp::kSum, x.data_ptr(), 4);
    engine_wait(*late);
    late->abort();
    EXPECT_EQ(nccl_counts().aborted, aborted + 1);
    while (!late->try_advance()) std::this_thread::yield();
    EXPECT_NE(message_of([&] { late->rethrow(); }).find("all_reduce of group late on rank "), std::string::npos);
    test::pause_device(false);
    take(x);
  }
  forget_nccl_failure();
}

TEST(Nccl, RanksThatShareADeviceAreRefusedUnlessTheyMay) {
  install_once();
  const int me = world().rank(), n = world().size();
  test::set_device_uuid('x');
  {
    Communicator group = fresh("sharing");
    at::Tensor x = give(at::ones({4}));
    if (n == 1) {
      group.all_reduce(x);
    } else {
      EXPECT_NE(message_of<ConfigError>([&] { group.all_reduce(x); })
                    .find("ranks 0 and 1 of group sharing use the same GPU; start as many ranks on a host as it has GPUs, "
                          "or say comm.share_device=true"),
                std::string::npos);
    }
  }
  forget_nccl_failure();
  world().barrier();
  set_share_device(true);
  {
    Communicator group = fresh("sharing");
    at::Tensor x = give(at::ones({4}));
    group.all_reduce(x);
    EXPECT_TRUE(same_bits(take(x), at::full({4}, static_cast<float>(n))));
    EXPECT_EQ(std::string(std::getenv("NCCL_HOSTID")), str(host_name(), "-", me));
    EXPECT_EQ(std::string(std::getenv("NCCL_SOCKET_IFNAME")), "lo");
  }
  set_share_device(false);
  test::set_device_uuid(static_cast<char>(me));
}

TEST(Nccl, SharedDevicesAreNamed) {
  EXPECT_EQ(shared_device_problem({"a", "b", "c"}, "world", false), "");
  EXPECT_EQ(shared_device_problem({"a", "b", "a"}, "world", true), "");
  EXPECT_EQ(shared_device_problem({"a", "b", "b"}, "world", false).find("ranks 1 and 2 of group world use the same GPU"),
            0u);
}

TEST(NcclApi, HasTheNumbersAndLayoutsOfTheHeader) {
#ifdef NCCL_H_
  static_assert(sizeof(NcclUniqueId) == sizeof(ncclUniqueId) && alignof(NcclUniqueId) == alignof(ncclUniqueId));
  static_assert(sizeof(NcclConfig) <= sizeof(ncclConfig_t));
  static_assert(offsetof(NcclConfig, version) == offsetof(ncclConfig_t, version));
  static_assert(offsetof(NcclConfig, blocking) == offsetof(ncclConfig_t, blocking));
  static_assert(offsetof(NcclConfig, max_ctas) == offsetof(ncclConfig_t, maxCTAs));
  static_assert(offsetof(NcclConfig, net_name) == offsetof(ncclConfig_t, netName));
  static_assert(offsetof(NcclConfig, split_share) == offsetof(ncclConfig_t, splitShare));
  const ncclConfig_t theirs = NCCL_CONFIG_INITIALIZER;
  const NcclConfig ours;
  EXPECT_EQ(ours.magic, theirs.magic);
  EXPECT_LE(ours.version, theirs.version);
  EXPECT_EQ(ours.split_share, theirs.splitShare);
  static_assert(int{kNcclSuccess} == int{ncclSuccess} && int{kNcclInvalidUsage} == int{ncclInvalidUsage} &&
                int{kNcclRemoteError} == int{ncclRemoteError} && int{kNcclInProgress} == int{ncclInProgress});
  EXPECT_EQ(nccl_type(CommType::kFloat32), ncclFloat32);
  EXPECT_EQ(nccl_type(CommType::kFloat64), ncclFloat64);
  EXPECT_EQ(nccl_type(CommType::kBfloat16), ncclBfloat16);
  EXPECT_EQ(nccl_type(CommType::kFloat16), ncclFloat16);
  EXPECT_EQ(nccl_type(CommType::kInt64), ncclInt64);
  EXPECT_EQ(nccl_type(CommType::kInt32), ncclInt32);
  EXPECT_EQ(nccl_type(CommType::kInt8), ncclInt8);
  EXPECT_EQ(nccl_type(CommType::kUint8), ncclUint8);
  EXPECT_EQ(nccl_op(ReduceOp::kSum), ncclSum);
  EXPECT_EQ(nccl_op(ReduceOp::kMax), ncclMax);
  EXPECT_EQ(nccl_op(ReduceOp::kMin), ncclMin);
#else
  GTEST_SKIP() << "no nccl.h";
#endif
}

// Without a device too: every function of the table is in the library.
TEST(NcclApi, FindsItsFunctionsInTheLibrary) {
  install_once();
  const NcclApi* const double_api = &nccl_api();
  set_nccl_api(nullptr);
  int version = 0;
  std::string problem;
  try {
    EXPECT_EQ(nccl_api().get_version(&version), kNcclSuccess);
    EXPECT_GE(version, 21800);
    EXPECT_NE(std::string(nccl_api().get_error_string(kNcclRemoteError)), "");
  } catch (const SystemError& error) {
    problem = error.what();
  }
  set_nccl_api(double_api);
  if (problem.find("is not there") != std::string::npos) GTEST_SKIP() << problem;
  EXPECT_EQ(problem, "");
}

// The double is as strict as what it stands for, or the tests above would say little.
TEST(NcclDouble, RefusesAndHangsAsNcclWould) {
  install_once();
  const NcclApi& api = nccl_api();
  const int me = world().rank(), n = world().size();
  NcclUniqueId id{};
  if (me == 0) api.get_unique_id(&id);
  const std::string bytes = world().broadcast_bytes(std::string(id.bytes, sizeof id.bytes));
  std::copy(bytes.begin(), bytes.end(), id.bytes);
  NcclConfig config;
  NcclHandle comm = nullptr;
  EXPECT_EQ(api.comm_init_rank_config(&comm, n, id, me, &config), kNcclInProgress);
  float x[4] = {}, y[4] = {};
  auto settle = [&] {
    int state = kNcclInProgress;
    while (state == kNcclInProgress) api.comm_get_async_error(comm, &state);
    return state;
  };
  test::pause_device(true);
  EXPECT_EQ(settle(), kNcclSuccess);
  EXPECT_EQ(api.send(x, 4, 7, me, comm, nullptr), kNcclInvalidUsage);  // to oneself, alone
  EXPECT_EQ(api.send(x, 4, 7, n, comm, nullptr), 4);
  test::pause_calls(true);
  EXPECT_EQ(api.all_reduce(x, x, 4, 7, 0, comm, nullptr), kNcclInProgress);
  EXPECT_EQ(api.all_reduce(x, x, 4, 7, 0, comm, nullptr), kNcclInvalidUsage);  // before the first is settled
  test::pause_calls(false);
  EXPECT_EQ(settle(), kNcclSuccess);
  EXPECT_NE(api.comm_destroy(comm), kNcclSuccess);  // at work
  test::pause_device(false);
  take(give(at::zeros({1})));
  if (n == 2) {  // both send, then receive: each send waits for a receive that is behind the other send
    EXPECT_EQ(api.send(x, 4, 7, 1 - me, comm, nullptr), kNcclInProgress);
    settle();
    EXPECT_EQ(api.receive(y, 4, 7, 1 - me, comm, nullptr), kNcclInProgress);
    settle();
    c10::Event event(nccl_device_type());
    event.record(c10::Stream(c10::Stream::UNSAFE, c10::Device(nccl_device_type(), 0), 0));
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    EXPECT_FALSE(event.query());
  }
  world().barrier();
  EXPECT_EQ(api.comm_abort(comm), kNcclSuccess);
  take(give(at::zeros({1})));  // the stream goes on
}

}  // namespace
}  // namespace trireme
