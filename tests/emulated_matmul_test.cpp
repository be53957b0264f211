// The wrapper of cuBLASLt against plain loops, over the emulated library; that library's strictness; and what both take for granted
// against the header and the real library, where these are (neither needs a GPU).
#include "emulated_product.h"

#include <thread>

#include "kernels/cublaslt.h"
#if __has_include(<cublasLt.h>)
#include <cublasLt.h>
#endif

namespace trireme::kernels {
namespace {

using namespace test;

// Parts of a long sum stand in the workspace, where there is one, and are never rounded to 16 bits.
TEST(MatMulKernel, LongSumsAreRoundedOnce) {
  constexpr int64_t kBytes = 4096;
  Guarded memory(kBytes + 256);
  void* workspace = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory.as()) + 255) / 256 * 256);
  for (int64_t bytes : {int64_t{0}, kBytes}) {
    std::memset(workspace, 0, kBytes);
    Product product(Type::kBFloat16, Type::kBFloat16, 8, 24, 1000, true, false, 0);
    product.p.workspace = bytes ? workspace : nullptr, product.p.workspace_bytes = bytes;
    run(product.p);
    EXPECT_TRUE(near(product.d.values(), reference::round_to(Type::kBFloat16, product.expected()), 0x1p-40, 0x1p-40));
    EXPECT_EQ(*static_cast<uint8_t*>(workspace) == 0xff, bytes > 0);  // the emulation leaves it so
  }
}

TEST(MatMulKernel, Tf32IsASetting) {
  Product product(Type::kFloat32, Type::kFloat32, 5, 8, 64, false, true, 0);
  run(product.p);
  EXPECT_TRUE(near(product.d.values(), product.expected(), 0x1p-24, 0x1p-20));
  product.p.tf32 = true;
  run(product.p);
  for (Values* x : {&product.a_values, &product.b_values})
    for (double& value : *x) value = reference::round_to(Type::kFloat16, value * 256) / 256;  // 11 digits, by a type that has them of such numbers
  EXPECT_TRUE(near(product.d.values(), product.expected(), 0x1p-24, 0x1p-20));
  Product in_16_bits(Type::kBFloat16, Type::kFloat32, 5, 8, 64, false, true, 0);  // where it says nothing
  in_16_bits.p.tf32 = true;
  run(in_16_bits.p);
  EXPECT_TRUE(near(in_16_bits.d.values(), in_16_bits.expected(), 0x1p-24, 0x1p-20));
}

TEST(MatMulKernel, AsksOnceForEachKindOfProduct) {
  Product product(Type::kFloat32, Type::kFloat32, 3, 4, 71, false, true, 8);
  auto questions = [&] {
    const int64_t before = emulated_cublaslt_counts().questions;
    run(product.p);
    return emulated_cublaslt_counts().questions - before;
  };
  EXPECT_EQ(questions(), 1);
  EXPECT_EQ(questions(), 0);
  product.p.alpha = 2;
  EXPECT_EQ(questions(), 0);
  Tensor bias(Type::kFloat32, 5);
  for (auto change : std::vector<std::function<void(MatMul&)>>{
           [](MatMul& p) { p.m = 2; }, [](MatMul& p) { p.n = 3; }, [](MatMul& p) { p.k = 70; }, [](MatMul& p) { p.a_stride = 75; }, [](MatMul& p) { p.b_stride = 75; },
           [](MatMul& p) { p.d_stride = 9; }, [](MatMul& p) { p.tf32 = true; }, [&](MatMul& p) { p.bias = bias.data(); }, [&](MatMul& p) { p.bias = bias.memory.as<float>() + 1; },
           [](MatMul& p) { p.a = static_cast<const float*>(p.a) + 1, p.m = 2; }, [](MatMul& p) { p.b = static_cast<const float*>(p.b) + 1, p.n = 2; },
           [](MatMul& p) { p.d = static_cast<float*>(p.d) + 1, p.m = 2; }, [](MatMul& p) { p.a_type = p.b_type = Type::kFloat16; }, [](MatMul& p) { p.a_type = p.b_type = p.d_type = Type::kFloat16; },
           [](MatMul& p) { p.transpose_a = true, p.m = 1, p.k = 3; }, [](MatMul& p) { p.transpose_b = false, p.k = 2; }}) {
    const MatMul whole = product.p;
    change(product.p);
    EXPECT_EQ(questions(), 1);
    EXPECT_EQ(questions(), 0);
    product.p = whole;
  }
  Product small(Type::kFloat32, Type::kFloat32, 1, 1, 1, false, false, 0);
  for (small.p.a_stride = 1; small.p.a_stride <= 5000; ++small.p.a_stride) run(small.p);
  EXPECT_EQ(questions(), 1);  // what is kept is bounded
}

TEST(MatMulKernel, ThreadsMayCall) {
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t)
    threads.emplace_back([t] {
      for (int64_t k = 1; k < 200; ++k) {
        Product product(Type::kBFloat16, Type::kFloat32, 1 + k % 3, 2, k + 1000 * (t / 2), false, true, 1);
        run(product.p);
        EXPECT_TRUE(near(product.d.values(), product.expected(), 0x1p-24, 0x1p-40));
      }
    });
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(emulated_cublaslt_counts().objects, 0);
}

TEST(MatMulKernel, OfFloat8) {
  const int64_t m = 5, n = 32, k = 48;
  const Values a = random_values(Type::kBFloat16, m * k, 1), b = random_values(Type::kBFloat16, n * k, 2, 0.02);
  for (Type a_type : kFloat8Types)
    for (Type d_type : kTypes)
      for (bool with_bias : {false, true}) {
        if (with_bias && d_type == Type::kFloat32) continue;
        const Float8 x(a_type, Type::kBFloat16, a), w(Type::kFloat8E4M3, Type::kBFloat16, b);
        const Values bias_values = random_values(d_type, n, 3), before = random_values(d_type, m * n, 4);
        Tensor bias(d_type, bias_values), d(d_type, before);
        MatMul p{a_type, Type::kFloat8E4M3, d_type, m, n, k, false, true, x.y.as(), w.y.as(), k, k, d.data(), n, with_bias ? bias.data() : nullptr, 2, 1, false,
                 x.scale.memory.as<float>(), w.scale.memory.as<float>(), nullptr, 0};
        emulated_kernels().matmul(p, nullptr);
        Values expected = reference::matmul(m, n, k, x.values(), false, w.values(), true);
        for (size_t i = 0; i < expected.size(); ++i) expected[i] = 2 * x.by() * w.by() * expected[i] + before[i] + (with_bias ? bias_values[i % static_cast<size_t>(n)] : 0);
        EXPECT_TRUE(near(d.values(), expected, unit(d_type), 0x1p-30));
        // Within what eight bits say: three digits behind the point of a, or two, and three of b.
        Values exact = reference::matmul(m, n, k, a, false, b, true), got = d.values();
        double error = 0, square = 0;
        for (size_t i = 0; i < exact.size(); ++i) {
          const double rest = (got[i] - before[i] - (with_bias ? bias_values[i % static_cast<size_t>(n)] : 0)) / 2;
          error += (rest - exact[i]) * (rest - exact[i]), square += exact[i] * exact[i];
        }
        EXPECT_LT(std::sqrt(error / square), a_type == Type::kFloat8E4M3 ? 0x1p-4 : 0x1p-3);
        auto refused = [&](const std::function<void(MatMul&)>& change) {
          MatMul q = p;
          change(q);
          const std::string said = refusal([&] { emulated_kernels().matmul(q, nullptr); });
          return said.substr(said.find(": ") + 2);
        };
        EXPECT_EQ(refused([](MatMul& q) { q.b_type = Type::kFloat8E5M2, q.a_type = Type::kFloat8E5M2; }), "float8 goes with float8, one of them e4m3");
        EXPECT_EQ(refused([](MatMul& q) { q.b_type = Type::kBFloat16; }), "float8 goes with float8, one of them e4m3");
        EXPECT_EQ(refused([](MatMul& q) { q.d_type = Type::kFloat8E4M3; }), "its result is not float8");
        EXPECT_EQ(refused([](MatMul& q) { q.a_scale = nullptr; }), "float8 needs both scales");
        EXPECT_EQ(refused([](MatMul& q) { q.transpose_b = false; }), "of float8 a is not transposed and b is");
        EXPECT_EQ(refused([](MatMul& q) { q.k = 40; }), "sizes and strides of float8, but the rows of a, are multiples of 16");
        EXPECT_EQ(refused([](MatMul& q) { q.a = static_cast<const char*>(q.a) + 8; }), "float8 stands at multiples of 16 bytes");
        if (d_type == Type::kFloat32) {
          EXPECT_EQ(refused([&](MatMul& q) { q.bias = bias.data(); }), "float8 with a float32 result takes no bias");
        }
        set_emulated_capability(8, 0);
        p.n = 16;  // not asked for yet
        EXPECT_NE(refused([&](MatMul& q) { q.m = d_type == Type::kFloat32 ? 1 : d_type == Type::kFloat16 ? 2 : 3, q.m += with_bias ? 0 : 1; })
                      .find("does not have it on this device (not supported); float8 needs a card of compute capability 8.9 or later"),
                  std::string::npos);
        set_emulated_capability(9, 0);
      }
}

// --- the emulated library ----------------------------------------------------------------------------------------------

// A product asked of it without the wrapper, after `change`; the first status that is not success.
struct Raw {
  LtHandle handle{};
  LtProduct product{};
  LtLayout a{}, b{}, d{};
  LtPreference preference{};
  LtHeuristic found{};
  alignas(256) char x[1024] = {}, y[1024] = {}, z[1024] = {};
  float one = 1, zero = 0;

  int ask() {
    int num_found = 0;
    return emulated_cublaslt().heuristic(handle, product, a, b, d, d, preference, 1, &found, &num_found);
  }
  int multiply(int64_t offset = 0) {
    return emulated_cublaslt().matmul(handle, product, &one, x + offset, a, y, b, &zero, z, d, z, d, &found.algorithm, nullptr, 0, nullptr);
  }
};

TEST(EmulatedCublasLt, IsStrict) {
  const CublasLt& lt = emulated_cublaslt();
  Raw raw;
  lt.create(&raw.handle);
  lt.product_create(&raw.product, kLtCompute32, kLtFloat32);
  lt.preference_create(&raw.preference);
  auto lay_out = [&](LtLayout& layout, int type, uint64_t rows, uint64_t columns, int64_t stride) {
    if (layout) lt.layout_destroy(layout);
    lt.layout_create(&layout, type, rows, columns, stride);
  };
  auto good = [&] { lay_out(raw.a, kLtFloat32, 4, 3, 4), lay_out(raw.b, kLtFloat32, 3, 5, 3), lay_out(raw.d, kLtFloat32, 4, 5, 4); };
  good();
  EXPECT_EQ(raw.ask(), kLtSuccess);
  EXPECT_EQ(raw.multiply(), kLtSuccess);
  EXPECT_EQ(raw.multiply(64), kLtInvalidValue);  // 256 was promised
  lay_out(raw.a, kLtFloat32, 4, 3, 5);
  EXPECT_EQ(raw.multiply(), kLtInvalidValue);    // chosen for another problem
  lay_out(raw.a, kLtFloat32, 4, 3, 3);
  EXPECT_EQ(raw.ask(), kLtInvalidValue);
  lay_out(raw.a, kLtFloat32, 4, 2, 4);
  EXPECT_EQ(raw.ask(), kLtInvalidValue);
  lay_out(raw.a, kLtFloat32, 4, 0, 4);
  EXPECT_EQ(raw.ask(), kLtInvalidValue);
  lay_out(raw.a, kLtBFloat16, 4, 3, 4);
  EXPECT_EQ(raw.ask(), kLtNotSupported);
  good();
  const int32_t transposed = kLtTransposed, plain = kLtPlain;
  EXPECT_EQ(lt.product_set(raw.product, kLtTransposeA, &transposed, 1), kLtInvalidValue);
  EXPECT_EQ(lt.product_set(raw.product, kLtTransposeA, &transposed, 4), kLtSuccess);
  EXPECT_EQ(raw.ask(), kLtInvalidValue);
  lt.product_set(raw.product, kLtTransposeA, &plain, 4);
  const uint32_t bias = kLtBias, odd = 3;
  lt.product_set(raw.product, kLtEpilogue, &bias, 4);
  EXPECT_EQ(raw.ask(), kLtInvalidValue);  // without a pointer
  EXPECT_EQ(lt.preference_set(raw.preference, kLtAlignmentA, &odd, 4), kLtSuccess);
  EXPECT_EQ(lt.preference_set(raw.preference, 99, &odd, 4), kLtInvalidValue);
  lt.layout_destroy(raw.a), lt.layout_destroy(raw.b), lt.layout_destroy(raw.d), lt.preference_destroy(raw.preference), lt.product_destroy(raw.product);
  EXPECT_EQ(emulated_cublaslt_counts().objects, 0);
}

// --- the real one ------------------------------------------------------------------------------------------------------

TEST(CublasLtLibrary, WhatIsMissingIsSaid) {
  const std::string way_out = "; cuBLASLt 13 comes with libtorch's CUDA libraries (launch/setup.sh); TRIREME_TORCH may name the torch folder";
  EXPECT_EQ(refusal([] { load_cublaslt("libnone.so.13"); }),
            "cuBLASLt, which matrix products on a GPU need, is not there: libnone.so.13: cannot open shared object file: No such file or directory" + way_out);
  EXPECT_EQ(refusal([] { load_cublaslt("libm.so.6"); }), "libm.so.6 has no cublasLtGetVersion" + way_out);
  CublasLt lt = emulated_cublaslt();
  lt.get_version = [] { return size_t{120805}; };
  EXPECT_EQ(refusal([&] { check_cublaslt_version(lt, "libold.so"); }), "libold.so is version 120805; 130000 (13.0) or later is needed: " + way_out.substr(2));
}

#if __has_include(<cublasLt.h>)
constexpr bool same(int ours, int theirs) { return ours == theirs; }
static_assert(same(kLtSuccess, CUBLAS_STATUS_SUCCESS) && same(kLtInvalidValue, CUBLAS_STATUS_INVALID_VALUE) && same(kLtNotSupported, CUBLAS_STATUS_NOT_SUPPORTED));
static_assert(same(kLtFloat32, CUDA_R_32F) && same(kLtFloat16, CUDA_R_16F) && same(kLtBFloat16, CUDA_R_16BF) && same(kLtFloat8E4M3, CUDA_R_8F_E4M3) && same(kLtFloat8E5M2, CUDA_R_8F_E5M2));
static_assert(same(kLtCompute32, CUBLAS_COMPUTE_32F) && same(kLtComputeTf32, CUBLAS_COMPUTE_32F_FAST_TF32) && same(kLtPlain, CUBLAS_OP_N) && same(kLtTransposed, CUBLAS_OP_T));
static_assert(same(kLtNoEpilogue, CUBLASLT_EPILOGUE_DEFAULT) && same(kLtBias, CUBLASLT_EPILOGUE_BIAS));
static_assert(same(kLtOneSum, CUBLASLT_REDUCTION_SCHEME_NONE) && same(kLtSumsInFp32, CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE));
static_assert(same(kLtTransposeA, CUBLASLT_MATMUL_DESC_TRANSA) && same(kLtTransposeB, CUBLASLT_MATMUL_DESC_TRANSB) && same(kLtEpilogue, CUBLASLT_MATMUL_DESC_EPILOGUE) &&
              same(kLtBiasPointer, CUBLASLT_MATMUL_DESC_BIAS_POINTER) && same(kLtScalePointerA, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER) &&
              same(kLtScalePointerB, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER));
static_assert(same(kLtMaxWorkspace, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES) && same(kLtReductionSchemes, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK) &&
              same(kLtAlignmentA, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES) && same(kLtAlignmentB, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES) &&
              same(kLtAlignmentC, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES) && same(kLtAlignmentD, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES));
static_assert(sizeof(LtAlgorithm) == sizeof(cublasLtMatmulAlgo_t) && sizeof(LtHeuristic) == sizeof(cublasLtMatmulHeuristicResult_t) &&
              offsetof(LtHeuristic, workspace_bytes) == offsetof(cublasLtMatmulHeuristicResult_t, workspaceSize) &&
              offsetof(LtHeuristic, status) == offsetof(cublasLtMatmulHeuristicResult_t, state));

TEST(CublasLtLibrary, DescriptorsTakeWhatWeGive) {
  CublasLt lt;
  try {
    lt = load_cublaslt(TRIREME_CUBLASLT);
  } catch (const std::runtime_error& error) {
    GTEST_SKIP() << error.what();
  }
  LtProduct product{};
  LtLayout layout{};
  LtPreference preference{};
  ASSERT_EQ(lt.product_create(&product, kLtCompute32, kLtFloat32), kLtSuccess);
  ASSERT_EQ(lt.layout_create(&layout, kLtBFloat16, 3, 4, 5), kLtSuccess);
  ASSERT_EQ(lt.preference_create(&preference), kLtSuccess);
  const uint64_t value = 0;
  for (const auto& [attribute, size] : std::vector<std::pair<int, size_t>>{{kLtTransposeA, 4}, {kLtTransposeB, 4}, {kLtEpilogue, 4}, {kLtBiasPointer, 8}, {kLtScalePointerA, 8}, {kLtScalePointerB, 8}})
    for (size_t num_bytes : {4, 8}) EXPECT_EQ(lt.product_set(product, attribute, &value, num_bytes) == kLtSuccess, num_bytes == size) << attribute;
  for (const auto& [attribute, size] : std::vector<std::pair<int, size_t>>{{kLtMaxWorkspace, 8}, {kLtReductionSchemes, 4}, {kLtAlignmentA, 4}, {kLtAlignmentB, 4}, {kLtAlignmentC, 4}, {kLtAlignmentD, 4}})
    for (size_t num_bytes : {4, 8}) EXPECT_EQ(lt.preference_set(preference, attribute, &value, num_bytes) == kLtSuccess, num_bytes == size) << attribute;
  EXPECT_EQ(lt.product_destroy(product), kLtSuccess);
  EXPECT_EQ(lt.layout_destroy(layout), kLtSuccess);
  EXPECT_EQ(lt.preference_destroy(preference), kLtSuccess);
}
#endif

}  // namespace
}  // namespace trireme::kernels
