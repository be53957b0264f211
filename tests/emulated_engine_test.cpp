// The emulation itself: that it computes what the instructions do, and that each kind of mistake in a kernel shows.
#include "emulated.h"

namespace trireme::kernels::TRIREME_ARCH {
namespace {

using arch::bf16;
using kernels::test::Guarded;

// What is wrong with a kernel.
enum class Broken { kNothing, kBarrier, kWait, kStride, kBounds, kOverrun, kAlignment, kLanes, kNamedBarrier };

// d[16,8] = a[16,16] b[16,8] by one warp of four, and its sum over all elements by all: through shared memory, with
// asynchronous copies, matrix loads and a reduction.
template <Broken kBroken>
struct Product {
  struct Params {
    const bf16 *a, *b;
    float *d, *sum;
  };
  static constexpr int kThreads = 128, kSharedBytes = 512 + 256 + 512;

  ARCH_FN static void run(const Params& p) {
    const auto a = arch::shared<bf16>(0, 256), b = arch::shared<bf16>(512, 128);
    const auto d = arch::shared<float>(768, 128);
    const int t = arch::thread_index(), lane = arch::lane_index();
    if (t < 32) arch::copy_async(a.at(t * 8, 8), p.a + t * (kBroken == Broken::kOverrun ? 9 : 8) / 8 * 8, true);
    if (t >= 32 && t < 48) arch::copy_async(b.at((t - 32) * 8 + (kBroken == Broken::kAlignment ? 1 : 0), kBroken == Broken::kAlignment ? 1 : 8), p.b + (t - 32) * 8, true);
    arch::copy_async_commit();
    if (kBroken != Broken::kWait) arch::copy_async_wait<0>();
    if (kBroken != Broken::kBarrier) arch::sync_threads();
    if (kBroken == Broken::kNamedBarrier && t < 32) arch::sync_named(1, 64);
    if (arch::warp_index() == 0) {
      uint32_t rows[4], columns[4];
      arch::load_matrix(rows, a.at((lane % 16) * (kBroken == Broken::kStride ? 8 : 16) + lane / 16 * 8, 8));
      arch::load_matrix_transposed(columns, b.at(lane % 16 * 8, 8));
      if (kBroken == Broken::kLanes && lane == 3) return;
      float sum[4] = {};
      arch::mma<bf16>(sum, rows, columns[0], columns[1]);
      for (int i = 0; i < 4; ++i) d[(lane / 4 + 8 * (i / 2)) * 8 + 2 * (lane % 4) + i % 2] = sum[i];
    }
    if (kBroken == Broken::kWait) arch::copy_async_wait<0>();
    arch::sync_threads();
    const float mine = d[kBroken == Broken::kBounds ? t + 1 : t];
    arch::sync_threads();
    const float sum = arch::block_sum<kThreads>(mine, arch::shared<float>(0, kThreads / 32));
    p.d[t] = mine;
    if (t == 0) *p.sum = sum;
  }
};

struct Result {
  bool right;
  std::string fault;
};

template <Broken kBroken>
Result multiply(uint64_t seed) {
  Guarded a(512), b(256), d(512), sum(4);
  for (int i = 0; i < 256; ++i) a.as<bf16>()[i] = arch::from_float<bf16>(static_cast<float>(i * 37 % 17 - 8));
  for (int i = 0; i < 128; ++i) b.as<bf16>()[i] = arch::from_float<bf16>(static_cast<float>(i * 53 % 13 - 6));
  set_seed(seed);
  try {
    arch::launch<Product<kBroken>>({1, 1, 1}, Product<kBroken>::kSharedBytes, nullptr, {a.as<bf16>(), b.as<bf16>(), d.as<float>(), sum.as<float>()});
  } catch (const Fault& fault) {
    return {false, fault.what()};
  }
  bool right = true;
  float total = 0;
  for (int r = 0; r < 16; ++r)
    for (int c = 0; c < 8; ++c) {
      float expected = 0;  // small integers: exact
      for (int k = 0; k < 16; ++k) expected += arch::to_float(a.as<bf16>()[r * 16 + k]) * arch::to_float(b.as<bf16>()[k * 8 + c]);
      right &= d.as<float>()[r * 8 + c] == expected;
      total += expected;
    }
  return {right && *sum.as<float>() == total, ""};
}

// How many of 20 orders of threads give a wrong result, without a Fault.
template <Broken kBroken>
int num_wrong() {
  int wrong = 0;
  for (uint64_t seed = 1; seed <= 20; ++seed) {
    const Result result = multiply<kBroken>(seed);
    EXPECT_EQ(result.fault, "");
    wrong += !result.right;
  }
  return wrong;
}

TEST(Emulation, ComputesWhatTheInstructionsDo) { EXPECT_EQ(num_wrong<Broken::kNothing>(), 0); }

TEST(Emulation, AMissingBarrierShows) { EXPECT_GT(num_wrong<Broken::kBarrier>(), 5); }  // where the copying warp lags behind
TEST(Emulation, AMissingWaitForACopyShowsAlways) { EXPECT_EQ(num_wrong<Broken::kWait>(), 20); }
TEST(Emulation, AWrongStrideShows) { EXPECT_EQ(num_wrong<Broken::kStride>(), 20); }
TEST(Emulation, AnElementBeyondAViewIsNamed) {
  EXPECT_EQ(multiply<Broken::kBounds>(1).fault, "block (0, 0, 0), thread 127: element 128 of 128 in shared memory");
}
TEST(Emulation, ACopyToAnOddAddressIsNamed) {
  EXPECT_NE(multiply<Broken::kAlignment>(1).fault.find(": copy_async at an address that is no multiple of 16"), std::string::npos);
}
TEST(Emulation, ALaneThatDoesNotComeIsNamed) {
  const std::string fault = multiply<Broken::kLanes>(1).fault;
  EXPECT_NE(fault.find("waits for ever in "), std::string::npos) << fault;
}
TEST(Emulation, ABarrierOfThreadsThatDoNotComeIsNamed) {
  const std::string fault = multiply<Broken::kNamedBarrier>(1).fault;
  EXPECT_NE(fault.find("waits for ever in barrier "), std::string::npos) << fault;
}
TEST(EmulationDeathTest, AReadBeyondABufferEndsTheTest) { EXPECT_DEATH(multiply<Broken::kOverrun>(1), ""); }

struct StoresToSharedMemory {
  using Params = int;
  static constexpr int kThreads = 32;
  ARCH_FN static void run(const Params&) { arch::store(arch::shared<float>(0, 4).at(0, 4), arch::Bytes16{}); }
};
TEST(Emulation, AStoreOf16BytesToSharedMemoryIsNamed) {
  try {
    arch::launch<StoresToSharedMemory>({1, 1, 1}, 16, nullptr, 0);
    ADD_FAILURE() << "no fault";
  } catch (const Fault& fault) {
    EXPECT_NE(std::string(fault.what()).find(": store of 16 bytes to shared memory"), std::string::npos) << fault.what();
  }
}

// --- warps and numbers -------------------------------------------------------------------------------------------------

struct Shuffles {
  using Params = int*;
  static constexpr int kThreads = 64;
  ARCH_FN static void run(const Params& out) {
    const int lane = arch::lane_index();
    const uint32_t odd = arch::ballot(lane % 2 == 1);
    int x = arch::shuffle(arch::thread_index(), 31 - lane);
    x = arch::shuffle_xor(x, 5);
    arch::sync_warp();
    arch::sync_named(3, kThreads);
    out[arch::thread_index()] = odd == 0xaaaaaaaau ? x : -1;
  }
};

TEST(Emulation, LanesReadOneAnother) {
  Guarded out(64 * 4);
  arch::launch<Shuffles>({1, 1, 1}, 0, nullptr, out.as<int>());
  for (int t = 0; t < 64; ++t) EXPECT_EQ(out.as<int>()[t], t / 32 * 32 + 31 - (t % 32 ^ 5));
}

struct Counts {
  using Params = int*;
  static constexpr int kThreads = 32;
  ARCH_FN static void run(const Params& out) {
    const auto [x, y, z] = arch::block_index();
    const auto size = arch::grid_size();
    arch::atomic_add(out + (z * size.y + y) * size.x + x, 1);
  }
};

TEST(Emulation, EveryBlockRunsOnce) {
  std::vector<int> out(3 * 4 * 5);
  arch::launch<Counts>({3, 4, 5}, 0, nullptr, out.data());
  EXPECT_EQ(out, std::vector<int>(60, 32));
  EXPECT_THROW(arch::launch<Counts>({0, 1, 1}, 0, nullptr, out.data()), Fault);
}

TEST(Emulation, RoundsToTheNearestEven) {
  using kernels::Type;
  std::mt19937 random(1);
  for (int i = 0; i < 200000; ++i) {
    const float x = std::bit_cast<float>(static_cast<uint32_t>(random()));
    if (x != x) continue;
    ASSERT_EQ(arch::to_float(arch::from_float<bf16>(x)), kernels::reference::round_to(Type::kBFloat16, x)) << x;
    ASSERT_EQ(arch::to_float(arch::from_float<arch::fp16>(x)), kernels::reference::round_to(Type::kFloat16, x)) << x;
  }
  EXPECT_TRUE(std::isnan(arch::to_float(arch::from_float<bf16>(NAN))) && std::isnan(arch::to_float(arch::from_float<arch::fp16>(NAN))));
}

}  // namespace
}  // namespace trireme::kernels::TRIREME_ARCH
