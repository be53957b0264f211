// Paged state and Adafactor on a device that only writes down what is put into its streams, and Adafactor by kernels on the CPU.
#include "base/tensor.h"

#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <cstring>

#include "base/check.h"
#include "emulated_ops.h"
#include "quant_values.h"
#include "ops/device.h"
#include "ops/paged_memory.h"
#include "optim/optimizer.h"
#include "support.h"

namespace trireme {
namespace {

using test::near;
using test::same_bits;

constexpr c10::DeviceType kType = c10::DeviceType::PrivateUse1;
const c10::Device kHere(kType, 0);

// --- the device: its memory is the host's, and it computes at once -----------------------------------------------------

struct Range {
  const char *begin, *end;
  bool within(const Range& other) const { return begin >= other.begin && end <= other.end; }
};
// What a stream does, and what it knows to have been done: of its own and behind the events that it waits for.
struct Doing {
  enum Kind { kPrefetch, kUpdate } kind;
  std::vector<Range> ranges;
  std::set<size_t> behind;  // numbers of those before it
};
std::vector<Doing> doings;
std::map<c10::StreamId, std::set<size_t>> known;
std::map<const void*, size_t> blocks;  // of paged memory

void put(c10::StreamId stream, Doing::Kind kind, std::vector<Range> ranges) {
  doings.push_back({kind, std::move(ranges), known[stream]});
  known[stream].insert(doings.size() - 1);
}

class Guard final : public c10::impl::DeviceGuardImplInterface {
 public:
  c10::DeviceType type() const override { return kType; }
  c10::Device exchangeDevice(c10::Device) const override { return kHere; }
  c10::Device getDevice() const override { return kHere; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return c10::Stream(c10::Stream::UNSAFE, kHere, 0); }
  c10::Stream getStreamFromGlobalPool(c10::Device, bool) const override { return c10::Stream(c10::Stream::UNSAFE, kHere, 1); }
  c10::Stream exchangeStream(c10::Stream) const override { return getStream(kHere); }
  void* getStreamNativeHandle(const c10::Stream stream) const override { return reinterpret_cast<void*>(stream.id()); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void** event, const c10::Stream& stream, const c10::DeviceIndex, const c10::EventFlag) const override {
    if (!*event) *event = new std::set<size_t>;
    *static_cast<std::set<size_t>*>(*event) = known[stream.id()];
  }
  void block(void* event, const c10::Stream& stream) const override { known[stream.id()].merge(std::set<size_t>(*static_cast<std::set<size_t>*>(event))); }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override { delete static_cast<std::set<size_t>*>(event); }
  void synchronizeEvent(void*) const override { ADD_FAILURE() << "the host waits"; }
  void synchronizeStream(const c10::Stream&) const override { ADD_FAILURE() << "the host waits"; }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

at::Tensor on_host(const at::Tensor& x) { return at::from_blob(x.data_ptr(), x.sizes(), x.strides(), x.options().device(at::kCPU)); }
at::Tensor on_device(const at::Tensor& host) {
  return at::for_blob(host.data_ptr(), host.sizes()).target_device(kHere).options(host.options().device(kHere)).make_tensor();
}
at::Tensor empty(at::IntArrayRef sizes, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>,
                 std::optional<at::MemoryFormat>) {
  auto* host = new at::Tensor(at::full(sizes, NAN, at::TensorOptions(c10::dtype_or_default(dtype))));
  return at::for_blob(host->data_ptr(), sizes).deleter([host](void*) { delete host; }).target_device(kHere).options(host->options().device(kHere)).make_tensor();
}
at::Tensor empty_strided(at::IntArrayRef sizes, at::IntArrayRef strides, std::optional<at::ScalarType> dtype, std::optional<at::Layout> layout, std::optional<at::Device> device,
                         std::optional<bool> pinned) {
  const at::Tensor x = empty(sizes, dtype, layout, device, pinned, {});
  TRIREME_CHECK(x.strides() == strides, strides);
  return x;
}
at::Tensor& zero(at::Tensor& x) {
  on_host(x).zero_();
  return x;
}
at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool) {
  on_host(to).copy_(on_host(from));
  return to;
}
TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("as_strided", at::native::as_strided_tensorimpl);
  library.impl("view", static_cast<at::Tensor (*)(const at::Tensor&, at::IntArrayRef)>(at::native::view));
  library.impl("zero_", zero);
  library.impl("_copy_from", copy_from);
}

bool is_paged(const char* data) {
  for (const auto& [block, size] : blocks)
    if (data >= block && data < static_cast<const char*>(block) + size) return true;
  return false;
}

kernels::Kernels table;
struct Device {
  Device() {
    doings.clear(), known.clear();
    table = kernels::emulated_kernels();
    table.update = [](const kernels::Update& p, kernels::Stream stream) {
      std::vector<Range> ranges;
      for (const kernels::UpdateTensor* t = p.tensors; t < p.tensors + p.num_tensors; ++t) {
        const int64_t size = p.rule == kernels::UpdateRule::kAdamW8Bit ? 1 : 4, scales = (t->size + kernels::k8BitBlock - 1) / kernels::k8BitBlock * 4;
        for (const auto& [data, bytes] : std::initializer_list<std::pair<const void*, int64_t>>{{t->m, t->size * size}, {t->v, t->size * size}, {t->master, t->size * 4}, {t->m_scale, scales}, {t->v_scale, scales}})
          if (data) ranges.push_back({static_cast<const char*>(data), static_cast<const char*>(data) + bytes});
      }
      for (const Range& range : ranges) EXPECT_TRUE(is_paged(range.begin));
      put(reinterpret_cast<c10::StreamId>(stream), Doing::kUpdate, ranges);
      kernels::emulated_kernels().update(p, nullptr);
    };
    set_kernels(kType, &table);
    set_paged_memory(kType, {[](size_t num_bytes, at::Device) {
                               void* data = std::aligned_alloc(4096, (num_bytes + 4095) / 4096 * 4096);
                               std::memset(data, 0xff, num_bytes);
                               blocks[data] = num_bytes;
                               return data;
                             },
                             [](void* data) { blocks.erase(data), std::free(data); },
                             [](const void* data, size_t num_bytes, at::Device, kernels::Stream stream) {
                               EXPECT_TRUE(is_paged(static_cast<const char*>(data)));
                               put(reinterpret_cast<c10::StreamId>(stream), Doing::kPrefetch, {{static_cast<const char*>(data), static_cast<const char*>(data) + num_bytes}});
                             }});
  }
  ~Device() { set_kernels(kType, nullptr); }
};

// --- paged state -------------------------------------------------------------------------------------------------------

constexpr int64_t kWindow = 1024;

struct Trained {
  std::vector<at::Tensor> weights, states;
};
Trained train(OptimizerKind kind, at::ScalarType dtype, bool masters, bool paged, int num_steps = 3) {
  Trained out;
  std::vector<at::Tensor> grads;
  std::vector<OptimTensor> tensors;
  for (int64_t size : {5000, 7, 300, 0, 1024, 41, 4999}) {
    out.weights.push_back(at::linspace(-1, 2, size).to(dtype)), grads.push_back(at::linspace(-2, 1, size).sin());
    tensors.push_back({str("w", tensors.size()), paged ? on_device(out.weights.back()) : out.weights.back(), paged ? on_device(grads.back()) : grads.back(), 0.1 * (size % 2)});
  }
  OptimizerOptions options{.kind = kind, .masters = masters, .seed = 5, .paged = paged};
  options.window_elements = kWindow;
  Optimizer optimizer(tensors, options);
  doings.clear(), known.clear();
  for (int t = 0; t < num_steps; ++t) {
    for (at::Tensor& g : grads) g.mul_(-0.7);
    optimizer.step(1e-2);
  }
  for (const OptimState& state : optimizer.state()) out.states.push_back(paged ? on_host(state.value).clone() : state.value);
  return out;
}

class Paged : public testing::TestWithParam<std::tuple<OptimizerKind, at::ScalarType, bool>> {};

TEST_P(Paged, ChangesNoBitAndIsThereAheadOfItsUpdate) {
  const auto [kind, dtype, masters] = GetParam();
  const Trained expected = [&] {
    const test::Emulated by_kernels;
    return train(kind, dtype, masters, false);
  }();
  const Device device;
  const Trained found = train(kind, dtype, masters, true);
  ASSERT_EQ(found.states.size(), expected.states.size());
  for (size_t i = 0; i < expected.weights.size(); ++i) EXPECT_TRUE(same_bits(found.weights[i], expected.weights[i])) << i;
  for (size_t i = 0; i < expected.states.size(); ++i) EXPECT_TRUE(same_bits(found.states[i], expected.states[i])) << i;

  std::vector<size_t> updates;
  for (size_t i = 0; i < doings.size(); ++i)
    if (doings[i].kind == Doing::kUpdate) updates.push_back(i);
  ASSERT_GT(updates.size(), 3 * 9u);
  for (const size_t u : updates)
    for (const Range& used : doings[u].ranges) {
      size_t used_before = 0;  // in the step before
      for (const size_t other : updates)
        if (other < u && std::any_of(doings[other].ranges.begin(), doings[other].ranges.end(), [&](const Range& range) { return used.within(range); })) used_before = other;
      EXPECT_TRUE(std::any_of(doings[u].behind.begin(), doings[u].behind.end(), [&](size_t before) {
        return before >= used_before && doings[before].kind == Doing::kPrefetch && used.within(doings[before].ranges[0]);
      })) << "nobody has brought what update " << u << " uses";
    }
  // A window is on its way while the one before it is updated, and the one after that is not yet.
  int64_t ahead = 0;
  for (size_t i = updates[0]; i < doings.size(); ++i) {
    if (doings[i].kind != Doing::kPrefetch) continue;
    const auto before = std::count_if(updates.begin(), updates.end(), [&](size_t u) { return u < i; }), waited = std::count_if(updates.begin(), updates.end(), [&](size_t u) { return doings[i].behind.count(u) > 0; });
    EXPECT_EQ(waited, before) << i;  // everything that the host has put before it
    ahead += std::any_of(updates.begin(), updates.end(), [&](size_t u) { return u > i && !doings[u].ranges.empty() && !doings[i].ranges[0].within(doings[u].ranges[0]); });
  }
  EXPECT_GT(ahead, 0);
}
INSTANTIATE_TEST_SUITE_P(Rules, Paged, testing::Values(std::tuple{OptimizerKind::kAdamW, at::kFloat, true}, std::tuple{OptimizerKind::kAdamW, at::kBFloat16, true},
                                                       std::tuple{OptimizerKind::kAdamW8Bit, at::kBFloat16, false}, std::tuple{OptimizerKind::kAdamW8Bit, at::kBFloat16, true},
                                                       std::tuple{OptimizerKind::kSgd, at::kFloat, true}, std::tuple{OptimizerKind::kLion, at::kHalf, true}));

TEST(Paged, TheCpuHasNone) {
  doings.clear();
  EXPECT_TRUE(same_bits([] {
    at::Tensor w = at::linspace(-1, 1, 3000), g = at::linspace(1, 2, 3000);
    Optimizer optimizer({{"w", w, g, 0}}, {.paged = true});
    optimizer.step(0.1);
    return w;
  }(), [] {
    at::Tensor w = at::linspace(-1, 1, 3000), g = at::linspace(1, 2, 3000);
    Optimizer optimizer({{"w", w, g, 0}}, {});
    optimizer.step(0.1);
    return w;
  }()));
  EXPECT_TRUE(doings.empty());
}

// --- Adafactor ---------------------------------------------------------------------------------------------------------

struct Shape {
  std::vector<int64_t> whole;
  std::vector<std::array<int64_t, 4>> slices;  // rows and columns, [begin, end)
  int64_t piece;                               // elements of a part
};

std::vector<at::Tensor> adafactor(const Shape& shape, at::ScalarType dtype, bool masters, bool on_a_device = false, float bad = 0) {
  const int64_t rows = shape.whole.size() > 1 ? shape.whole[0] : 1, width = shape.whole.back();
  const at::Tensor start = test::gaussian(rows * width, 3).view({rows, width}), g = test::gaussian(rows * width, 4).view({rows, width});
  std::vector<at::Tensor> weights, grads, all_grads;
  std::vector<OptimTensor> tensors;
  for (const auto& [top, bottom, left, right] : shape.slices) {
    const auto part = [&, t = top, b = bottom, l = left, r = right](const at::Tensor& x) { return x.slice(0, t, b).slice(1, l, r).contiguous().clone(); };
    weights.push_back(part(start).to(dtype)), all_grads.push_back(part(g));
    const at::Tensor weight = on_a_device ? on_device(weights.back().view({-1})) : weights.back().view({-1}), grad = on_a_device ? on_device(all_grads.back().view({-1})) : all_grads.back().view({-1});
    const std::vector<int64_t> sizes = shape.whole.size() > 1 ? std::vector<int64_t>{bottom - top, right - left} : std::vector<int64_t>{right - left},
                               offset = shape.whole.size() > 1 ? std::vector<int64_t>{top, left} : std::vector<int64_t>{left};
    for (int64_t i = 0; i < weight.numel(); i += shape.piece)
      tensors.push_back({"w", weight.slice(0, i, std::min(weight.numel(), i + shape.piece)), grad.slice(0, i, std::min(weight.numel(), i + shape.piece)), 0.1,
                         places_of(sizes, {shape.whole, offset, false}, i), shape.whole});
  }
  OptimizerOptions options{.kind = OptimizerKind::kAdafactor, .masters = masters, .seed = 7, .paged = on_a_device};
  options.window_elements = kWindow;
  Optimizer optimizer(tensors, options);
  for (int t = 0; t < 3; ++t) {
    for (at::Tensor& x : all_grads) x.mul_(-0.6);
    if (bad != 0) optimizer.step(0.9, at::full({}, bad));
    else if (on_a_device) optimizer.step(0.9);
    else optimizer.step(0.9, 0.5);
  }
  std::vector<at::Tensor> out = weights;
  for (const OptimState& s : optimizer.state()) out.push_back(on_a_device ? on_host(s.value).clone() : s.value);
  return out;
}

const std::vector<Shape> kShapes = {
    {{7}, {{0, 1, 0, 7}}, 100}, {{2000}, {{0, 1, 0, 2000}}, 700}, {{2500}, {{0, 1, 0, 2500}}, 5000}, {{1, 5}, {{0, 1, 0, 5}}, 100}, {{5, 1}, {{0, 5, 0, 1}}, 100}, {{130, 70}, {{0, 130, 0, 70}}, 100000}, {{3, 1100}, {{0, 3, 0, 1100}}, 100000},
    {{37, 50}, {{0, 37, 0, 50}}, 333},                                    // flat parts
    {{37, 50}, {{0, 11, 0, 50}, {11, 37, 0, 50}}, 100000},                // rows
    {{37, 1050}, {{0, 37, 0, 521}, {0, 37, 521, 1050}}, 777}};            // columns, in flat parts

TEST(AdafactorByKernels, IsTheCpus) {
  for (const auto& [dtype, masters] : {std::pair{at::kFloat, true}, {at::kBFloat16, true}, {at::kHalf, true}})
    for (const Shape& shape : kShapes) {
      const auto expected = adafactor(shape, dtype, masters);
      const auto found = [&, d = dtype, m = masters] {
        const test::Emulated by_kernels;
        auto all = adafactor(shape, d, m);
        EXPECT_GT(test::num_calls_of<&kernels::Kernels::adafactor_update>, 0);
        return all;
      }();
      ASSERT_EQ(found.size(), expected.size());
      for (size_t i = 0; i < found.size(); ++i) {
        const at::Tensor a = found[i].to(at::kDouble), b = expected[i].to(at::kDouble);
        // In fp32 some units of the last place of numbers of size 1; a weight of 16 bits may be the next one.
        const double unit = found[i].scalar_type() == at::kFloat ? 8 * 0x1p-24 : found[i].scalar_type() == at::kHalf ? 0x1p-10 : 0x1p-7;
        EXPECT_LE(((a - b).abs() / b.abs().clamp_min(1)).max().item<double>(), unit) << dtype << at::IntArrayRef(shape.whole) << shape.piece << " " << i;
      }
    }
}

// Of two tensors, and of one of them again, as a rank has it whose elements another rank counts.
TEST(AdafactorByKernels, TensorsHaveTheirOwnSums) {
  const auto train = [] {
    std::vector<at::Tensor> weights = {test::gaussian(1200, 1), test::gaussian(50, 2), test::gaussian(1200, 1)}, grads = {test::gaussian(1200, 3), test::gaussian(50, 4, 9), test::gaussian(1200, 3)};
    std::vector<OptimTensor> tensors;
    for (size_t i = 0; i < 3; ++i) {
      const std::vector<int64_t> shape = i == 1 ? std::vector<int64_t>{50} : std::vector<int64_t>{30, 40};
      tensors.push_back({i == 1 ? "v" : "w", weights[i], grads[i], 0.1, {}, shape, i != 2});
    }
    Optimizer optimizer(tensors, {.kind = OptimizerKind::kAdafactor});
    for (int t = 0; t < 2; ++t) optimizer.step(0.1);
    EXPECT_TRUE(same_bits(weights[2], weights[0]));
    return weights;
  };
  const auto expected = train();
  const test::Emulated by_kernels;
  const auto found = train();
  for (size_t i = 0; i < 3; ++i) EXPECT_TRUE(near(found[i], expected[i])) << i;
}

// Rounded by the same bits: but for what a last bit of the update turns.
TEST(AdafactorByKernels, RoundsByTheBitsOfItsElements) {
  for (const Shape& shape : kShapes) {
    const auto expected = adafactor(shape, at::kBFloat16, false);
    const test::Emulated by_kernels;
    const auto found = adafactor(shape, at::kBFloat16, false);
    for (size_t i = 0; i < shape.slices.size(); ++i) EXPECT_LE((found[i] != expected[i]).sum().item<int64_t>(), found[i].numel() / 100) << at::IntArrayRef(shape.whole);
  }
}

TEST(AdafactorByKernels, TakesNoStepWhereTheScaleIsNotFinite) {
  const test::Emulated by_kernels;
  for (const Shape& shape : kShapes) {
    const auto found = adafactor(shape, at::kBFloat16, true, false, NAN);
    const int64_t rows = shape.whole.size() > 1 ? shape.whole[0] : 1;
    const at::Tensor start = test::gaussian(rows * shape.whole.back(), 3).view({rows, shape.whole.back()}).to(at::kBFloat16);
    for (size_t i = 0; i < shape.slices.size(); ++i) {
      const auto& [top, bottom, left, right] = shape.slices[i];
      EXPECT_TRUE(same_bits(found[i], start.slice(0, top, bottom).slice(1, left, right).contiguous()));
    }
  }
}

// Masters in windows, which add up another order of pieces.
TEST(AdafactorByKernels, OnADeviceWithPagedMasters) {
  for (const Shape& shape : kShapes) {
    const auto expected = [&] {
      const test::Emulated by_kernels;
      return adafactor(shape, at::kBFloat16, true, false, 1);
    }();
    const Device device;
    const auto found = adafactor(shape, at::kBFloat16, true, true);
    for (size_t i = shape.slices.size(); i < found.size(); ++i) EXPECT_TRUE(near(found[i], expected[i])) << i;
  }
}

}  // namespace
}  // namespace trireme
