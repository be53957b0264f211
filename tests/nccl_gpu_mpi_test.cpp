// The Communicator on CUDA tensors over the real NCCL: its whole contract, the streams of its callers, messages that cross,
// the end of a group. Ranks share devices where there are fewer. Without a device everything is skipped.
#include "communicator_contract.h"

#include <c10/core/Event.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <dlfcn.h>
#include <gtest/gtest.h>

#include "comm/nccl_api.h"

namespace trireme {
namespace {

int num_devices() {
  static const int number = [] {
    void* driver = ::dlopen("libcuda.so.1", RTLD_NOW);
    auto init = driver ? reinterpret_cast<int (*)(unsigned)>(::dlsym(driver, "cuInit")) : nullptr;
    auto count = driver ? reinterpret_cast<int (*)(int*)>(::dlsym(driver, "cuDeviceGetCount")) : nullptr;
    int devices = 0;
    return init && count && init(0) == 0 && count(&devices) == 0 ? devices : 0;
  }();
  return number;
}

// Before any test of this program; with no device each of them is a counted skip.
class Devices : public testing::Environment {
  void SetUp() override {
    if (num_devices() == 0) GTEST_SKIP() << "no CUDA device";
    if (!::dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_GLOBAL)) FAIL() << ::dlerror();
    at::globalContext().lazyInitDevice(c10::kCUDA);
    set_share_device(num_devices() < world().size());
    c10::impl::VirtualGuardImpl(c10::kCUDA).setDevice(here());
  }

 public:
  static c10::Device here() {
    return c10::Device(c10::kCUDA, static_cast<c10::DeviceIndex>(world().rank() % num_devices()));
  }
};
[[maybe_unused]] const testing::Environment* const devices = testing::AddGlobalTestEnvironment(new Devices);

at::Tensor give(const at::Tensor& cpu) { return cpu.to(Devices::here()); }
at::Tensor take(const at::Tensor& tensor) { return tensor.cpu(); }
at::Tensor part(const at::Tensor& tensor, int64_t begin, int64_t size) { return tensor.narrow(0, begin, size); }

// The library that libtorch has loaded takes our configuration and our numbers.
TEST(NcclOnDevices, IsOfAVersionThatIsKnown) {
  int version = 0;
  EXPECT_EQ(nccl_api().get_version(&version), kNcclSuccess);
  EXPECT_GE(version, 21800);
  EXPECT_EQ(nccl_api().device_uuid(Devices::here().index()).size(), 16u);
}

// A long product before and after, in another stream than the one that was current before.
TEST(NcclOnDevices, OrdersTheStreamsOfItsCallers) {
  const c10::impl::VirtualGuardImpl guard(c10::kCUDA);
  const c10::Stream last = guard.exchangeStream(guard.getStreamFromGlobalPool(Devices::here(), false));
  const int64_t size = 2048;
  at::Tensor ones = give(at::ones({size, size}));
  for (int round = 0; round < 5; ++round) {
    at::Tensor x = at::mm(at::mm(ones, ones) / static_cast<double>(size), ones);  // size everywhere
    Work work = world().start_all_reduce(x);
    guard.exchangeStream(guard.getStreamFromGlobalPool(Devices::here(), false));
    work.wait();
    const at::Tensor right = at::full({size, size}, static_cast<double>(size) * world().size(), at::kFloat);
    EXPECT_TRUE(at::equal(take(x + 0), right)) << round;
  }
  guard.exchangeStream(last);
}

TEST(NcclOnDevices, SumsOfSixteenBitsAreRounded) {
  for (at::ScalarType type : {at::kBFloat16, at::kHalf}) {
    at::Tensor x = give(at::full({10'001}, 0.1 * (world().rank() + 1)).to(type));
    world().all_reduce(x);
    const double right = 0.05 * world().size() * (world().size() + 1);
    // 2^-9 (bf16) a rounding: of the values, and of each addition.
    EXPECT_LT((take(x).to(at::kDouble) - right).abs().max().item<double>(), right * world().size() * 0x1p-8);
  }
}

TEST(NcclOnDevices, LargeMessagesCross) {
  const int n = world().size(), me = world().rank();
  std::vector<Work> works;
  std::vector<at::Tensor> received;
  const int64_t size = 3'000'001;  // no buffer of NCCL's holds it: both ends must be there
  for (int peer = 0; peer < n; ++peer) works.push_back(world().start_send(give(at::full({size}, 10 * me + peer)), peer, 3));
  for (int peer = n - 1; peer >= 0; --peer) {
    received.push_back(give(at::zeros({size}, at::kLong)));
    works.push_back(world().start_receive(received.back(), peer, 3));
  }
  at::Tensor sum = give(at::ones({size}));
  world().all_reduce(sum);
  for (Work& work : works) work.wait();
  for (int peer = n - 1, i = 0; peer >= 0; --peer, ++i)
    EXPECT_TRUE(at::equal(take(received[static_cast<size_t>(i)]), at::full({size}, 10 * peer + me)));
  EXPECT_TRUE(at::equal(take(sum), at::full({size}, static_cast<float>(n))));
}

TEST(NcclOnDevices, GroupsComeAndGo) {
  for (int round = 0; round < 3; ++round) {
    Communicator group = world().split(world().rank() % 2, world().rank(), "passing");
    at::Tensor x = give(at::ones({1000}));
    group.all_reduce(x);  // still under way when the group ends
  }
  world().barrier();
}

}  // namespace
}  // namespace trireme
