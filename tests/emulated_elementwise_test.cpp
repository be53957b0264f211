// Rotary embedding and gated activations, emulated, against the loops that define them.
#include "emulated.h"

namespace trireme::kernels {
namespace {

using namespace test;

const std::vector<Type> kTypes = {Type::kFloat32, Type::kBFloat16, Type::kFloat16};

Values angles(int64_t n, uint64_t seed) { return random_values(Type::kFloat32, n, seed, 0.7); }

// Rows of `width` values, every `stride` of them, `first` into the memory.
Values rows_of(const Values& x, int64_t num_rows, int64_t width, int64_t stride, int64_t first) {
  Values out;
  for (int64_t row = 0; row < num_rows; ++row) out.insert(out.end(), x.begin() + first + row * stride, x.begin() + first + row * stride + width);
  return out;
}

struct RopeCase {
  int64_t num_tokens, num_heads, head_dim, rotary_dims, gap;  // gap: between tokens, and before the first
};

TEST(RopeKernels, AreTheLoops) {
  for (Type type : kTypes)
    for (const auto& [tokens, heads, dim, rotary, gap] : std::vector<RopeCase>{
             {1, 1, 2, 2, 0}, {5, 3, 16, 16, 0}, {3, 5, 64, 64, 0}, {17, 9, 128, 128, 0}, {2, 2, 256, 64, 0}, {3, 4, 80, 32, 0}, {4, 3, 18, 6, 0},
             {3, 33, 128, 128, 0}, {127, 1, 16, 16, 0}, {3, 2, 64, 64, 32}, {3, 2, 64, 48, 1}, {2, 1, 15, 14, 0}, {3, 2, 8, 0, 0}}) {
      SCOPED_TRACE(testing::Message() << name_of(type) << " " << tokens << " tokens, " << heads << " x " << dim << " of which " << rotary << ", gap " << gap);
      const int64_t stride = heads * dim + gap;
      Tensor x(type, random_values(type, tokens * stride + gap, 1)), cos(Type::kFloat32, angles(tokens * rotary, 2)), sin(Type::kFloat32, angles(tokens * rotary, 3));
      const Values in = rows_of(x.values(), tokens, heads * dim, stride, gap);
      for (bool inverse : {false, true}) {
        Tensor y(type, tokens * heads * dim);
        Rope p{type, tokens, heads, dim, rotary, x.memory.as<char>() + gap * size_of(type), stride, cos.memory.as<float>(), sin.memory.as<float>(), y.data(), heads * dim, inverse};
        emulated_kernels().rope(p, nullptr);
        const Values expected = reference::rope(in, heads, dim, cos.values(), sin.values(), inverse);
        // Two products and their sum, of values below 6 and tables below 4, rounded in fp32; then once to the type.
        EXPECT_TRUE(near(y.values(), expected, unit(type), 2 * 24 * 2 * 0x1p-24 + smallest_unit(type)));
        Tensor place(type, in);  // in place, in another order of threads: the same bits
        p.x = p.y = place.data(), p.x_stride = p.y_stride = heads * dim;
        emulated_kernels().rope(p, nullptr);
        EXPECT_EQ(place.memory.bits(), y.memory.bits());
      }
    }
}

TEST(RopeKernels, LeaveWhatStandsBetweenTokens) {
  Tensor x(Type::kFloat32, random_values(Type::kFloat32, 3 * 12, 1)), cos(Type::kFloat32, angles(3 * 8, 2)), sin(Type::kFloat32, angles(3 * 8, 3));
  const Values before = x.values();
  emulated_kernels().rope({Type::kFloat32, 3, 1, 8, 8, x.data(), 12, cos.memory.as<float>(), sin.memory.as<float>(), x.data(), 12, false}, nullptr);
  EXPECT_EQ(rows_of(x.values(), 3, 4, 12, 8), rows_of(before, 3, 4, 12, 8));
  EXPECT_NE(rows_of(x.values(), 3, 8, 12, 0), rows_of(before, 3, 8, 12, 0));
}

struct GluCase {
  int64_t num_rows, width, stride;
};

TEST(GluKernels, AreTheLoops) {
  for (Type type : kTypes)
    for (Gate activation : {Gate::kSilu, Gate::kGelu, Gate::kGeluTanh})
      for (const auto& [rows, width, stride] : std::vector<GluCase>{
               {1, 1, 1}, {1, 15, 15}, {1, 16, 16}, {3, 17, 17}, {5, 127, 127}, {2, 128, 256}, {3, 129, 258}, {2, 2056, 4112}, {1, 4099, 4099}, {3, 8, 9}}) {
        SCOPED_TRACE(testing::Message() << name_of(type) << " " << rows << " x " << width << " of " << stride << ", activation " << static_cast<int>(activation));
        const bool packed = stride == 2 * width;  // `up` follows the gate in each row
        Tensor first(type, random_values(type, rows * stride, 1, 3)), second(type, random_values(type, rows * stride, 2, 3));
        auto up_of = [&](Tensor& one, Tensor& other) { return packed ? one.memory.as<char>() + width * size_of(type) : other.data(); };
        auto gates = [&](Tensor& one) { return rows_of(one.values(), rows, width, stride, 0); };
        auto ups = [&](Tensor& one, Tensor& other) { return packed ? rows_of(one.values(), rows, width, stride, width) : gates(other); };
        const Values g = gates(first), u = ups(first, second);
        Tensor grad_y(type, random_values(type, rows * width, 3)), y(type, rows * width);
        const Values gy = grad_y.values();
        Values expected, expected_gate, expected_up;
        for (size_t i = 0; i < g.size(); ++i) {
          expected.push_back(reference::activate(activation, g[i]) * u[i]);
          expected_gate.push_back(gy[i] * u[i] * reference::activate_slope(activation, g[i]));
          expected_up.push_back(gy[i] * reference::activate(activation, g[i]));
        }
        // Half a dozen operations in fp32; the exponential's argument, below 15 where its value counts, is wrong by 2^-24 of
        // itself. 1 + erf and the slope's two terms cancel: of values below 15 times factors below 15 and 6.
        const double relative = unit(type) + 64 * 0x1p-24, absolute = 15 * 15 * 2 * 0x1p-24 + smallest_unit(type);
        emulated_kernels().glu_forward({type, activation, rows, width, stride, first.data(), up_of(first, second), y.data()}, nullptr);
        EXPECT_TRUE(near(y.values(), expected, relative, absolute));

        const Values untouched(static_cast<size_t>(rows * stride), 7);
        Tensor grads(type, untouched), others(type, untouched);
        GluBackward p{type, activation, rows, width, stride, grad_y.data(), first.data(), up_of(first, second), grads.data(), up_of(grads, others)};
        emulated_kernels().glu_backward(p, nullptr);
        EXPECT_TRUE(near(gates(grads), expected_gate, relative, absolute * 6));
        EXPECT_TRUE(near(ups(grads, others), expected_up, relative, absolute));
        if (!packed) {
          EXPECT_EQ(rows_of(grads.values(), rows, stride - width, stride, width), Values(static_cast<size_t>(rows * (stride - width)), 7));
        }
        p.grad_gate = first.data(), p.grad_up = up_of(first, second);  // in place, in another order of threads: the same bits
        emulated_kernels().glu_backward(p, nullptr);
        EXPECT_EQ(gates(first), gates(grads));
        EXPECT_EQ(ups(first, second), ups(grads, others));
      }
}

TEST(GluKernels, AreFiniteWhereTheExponentialIsNot) {
  Tensor gate(Type::kFloat32, {-1000, -90, 90, 1000}), up(Type::kFloat32, Values(4, 2)), y(Type::kFloat32, 4), grad(Type::kFloat32, Values(4, 1));
  Tensor grad_gate(Type::kFloat32, 4), grad_up(Type::kFloat32, 4);
  for (Gate activation : {Gate::kSilu, Gate::kGelu, Gate::kGeluTanh}) {
    emulated_kernels().glu_forward({Type::kFloat32, activation, 1, 4, 4, gate.data(), up.data(), y.data()}, nullptr);
    EXPECT_TRUE(near(y.values(), {0, 0, 180, 2000}, 1e-6, 1e-35));
    emulated_kernels().glu_backward({Type::kFloat32, activation, 1, 4, 4, grad.data(), gate.data(), up.data(), grad_gate.data(), grad_up.data()}, nullptr);
    EXPECT_TRUE(near(grad_gate.values(), {0, 0, 2, 2}, 1e-6, 1e-35));
  }
}

TEST(ElementwiseKernels, WorkAtOddAddresses) {
  Tensor x(Type::kBFloat16, random_values(Type::kBFloat16, 65, 1)), cos(Type::kFloat32, angles(64, 2)), sin(Type::kFloat32, angles(64, 3)), y(Type::kBFloat16, 64);
  const Values all = x.values(), in = {all.begin() + 1, all.end()};
  emulated_kernels().rope({Type::kBFloat16, 2, 1, 32, 32, x.memory.as<uint16_t>() + 1, 32, cos.memory.as<float>(), sin.memory.as<float>(), y.data(), 32, false}, nullptr);
  EXPECT_TRUE(near(y.values(), reference::rope(in, 1, 32, cos.values(), sin.values(), false), unit(Type::kBFloat16), 96 * 0x1p-24));
  Values expected;
  for (double g : in) expected.push_back(reference::activate(Gate::kSilu, g) * g);
  emulated_kernels().glu_forward({Type::kBFloat16, Gate::kSilu, 2, 32, 32, x.memory.as<uint16_t>() + 1, x.memory.as<uint16_t>() + 1, y.data()}, nullptr);
  EXPECT_TRUE(near(y.values(), expected, unit(Type::kBFloat16) + 64 * 0x1p-24, 0));
}

TEST(ElementwiseKernels, DoNothingForNothing) {
  emulated_kernels().rope({Type::kFloat32, 0, 1, 8, 8, nullptr, 8, nullptr, nullptr, nullptr, 8, false}, nullptr);
  emulated_kernels().glu_forward({Type::kFloat32, Gate::kSilu, 0, 8, 8, nullptr, nullptr, nullptr}, nullptr);
}

std::string refusal(const std::function<void()>& call) {
  try {
    call();
  } catch (const Refused& error) {
    return error.what();
  }
  return "";
}

TEST(ElementwiseKernels, RefuseWhatOverlaps) {
  EXPECT_EQ(refusal([] { emulated_kernels().rope({Type::kFloat32, 1, 2, 8, 3, nullptr, 16, nullptr, nullptr, nullptr, 15, false}, nullptr); }),
            "rope of 3 dims of 2 heads of 8, tokens 16 and 15 values apart: an even number of dims, at most a head's, and heads that do not overlap");
  EXPECT_EQ(refusal([] { emulated_kernels().glu_forward({Type::kFloat32, Gate::kSilu, 2, 8, 7, nullptr, nullptr, nullptr}, nullptr); }),
            "glu_forward of 2 rows of 8 values, 7 apart: rows must not overlap");
}

}  // namespace
}  // namespace trireme::kernels
