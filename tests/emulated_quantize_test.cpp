// Number formats of 4 and 8 bits, emulated: the bits of the plain loops.
#include "emulated_product.h"
#include "kernels/reference/quantize.h"

namespace trireme::kernels {
namespace {

using namespace test;

std::vector<float> floats(const Values& x) { return {x.begin(), x.end()}; }

// Those of the type: ordinary blocks, zeros, subnormals, outliers, infinities and NaNs.
Values unusual_values(Type type, int64_t count, int64_t block_size, uint64_t seed) {
  Values x = random_values(type, count, seed);
  for (int64_t i = 0; i < count; ++i) {
    double& value = x[static_cast<size_t>(i)];
    switch (i / block_size % 7) {
      case 1:
        value = i % 3 == 0 ? -0.0 : 0;
        break;
      case 2:
        value = reference::round_to(type, value * (type == Type::kFloat16 ? 1e-6 : 1e-40));
        break;
      case 3:
        if (i % 11 == 5) value = reference::round_to(type, 500 * value);
        break;
      case 4:
        if (i % 29 == 7) value = i % 2 == 0 ? INFINITY : -INFINITY;
        break;
      case 5:
        if (i % 5 == 2) value = NAN;
        break;
    }
  }
  return x;
}

std::vector<uint8_t> bytes_of(const Guarded& memory) { return {memory.as<uint8_t>(), memory.as<uint8_t>() + memory.num_bytes()}; }

// Equal, NaN equal to NaN.
testing::AssertionResult same(const Values& actual, const std::vector<float>& expected, Type type) {
  if (actual.size() != expected.size()) return testing::AssertionFailure() << actual.size() << " values, expected " << expected.size();
  for (size_t i = 0; i < actual.size(); ++i) {
    const double wanted = reference::round_to(type, static_cast<double>(expected[i]));
    if (actual[i] != wanted && !(std::isnan(actual[i]) && std::isnan(wanted)))
      return testing::AssertionFailure() << "value " << i << " is " << actual[i] << ", expected " << wanted;
  }
  return testing::AssertionSuccess();
}

// A map that is not that of src/quant: ascending in [-1, 1].
std::vector<float> some_map() {
  std::vector<float> map;
  for (int i = 0; i < 256; ++i) map.push_back(static_cast<float>(std::pow((i - 127) / 128.0, 3)));
  return map;
}

TEST(QuantizeKernels, FourBits) {
  for (FourBit kind : {FourBit::kNf4, FourBit::kFp4})
    for (Type type : kTypes)
      for (const auto& [size, count] : std::vector<std::pair<int64_t, int64_t>>{{32, 1}, {32, 7}, {32, 33}, {32, 2100}, {64, 64}, {64, 63}, {64, 2049}, {128, 1000}, {256, 256}, {256, 2305},
                                                                               {512, 511}, {512, 5000}, {1024, 1025}, {4096, 4096}, {4096, 4097 * 2}}) {
        SCOPED_TRACE(testing::Message() << (kind == FourBit::kNf4 ? "nf4 " : "fp4 ") << name_of(type) << " " << count << " in blocks of " << size);
        const Values in = unusual_values(type, count, size, static_cast<uint64_t>(count));
        const auto expected = reference::quantize_4(kind, floats(in), size);
        Tensor x(type, in), y(type, count), absmax(Type::kFloat32, (count + size - 1) / size);
        Guarded codes((count + 1) / 2);
        emulated_kernels().quantize_4({type, kind, count, size, x.data(), codes.as<uint8_t>(), absmax.memory.as<float>()}, nullptr);
        EXPECT_TRUE(same(absmax.values(), expected.absmax, Type::kFloat32));
        EXPECT_EQ(bytes_of(codes), expected.codes);
        emulated_kernels().dequantize_4({type, kind, count, size, codes.as<uint8_t>(), {absmax.memory.as<float>(), nullptr, nullptr, nullptr, 0, nullptr, {}}, y.data()}, nullptr);
        EXPECT_TRUE(same(y.values(), reference::dequantize_4(kind, expected.codes, expected.absmax, count, size), type));

        Guarded shifted((count + 1) / 2 + 3);  // codes may be anywhere, as in a buffer of many weights
        std::copy(expected.codes.begin(), expected.codes.end(), shifted.as<uint8_t>() + 3);
        Tensor again(type, count);
        emulated_kernels().dequantize_4({type, kind, count, size, shifted.as<uint8_t>() + 3, {absmax.memory.as<float>(), nullptr, nullptr, nullptr, 0, nullptr, {}}, again.data()}, nullptr);
        EXPECT_EQ(again.memory.bits(), y.memory.bits());
      }
}

// Each code and each number: thresholds and what is beside them.
TEST(QuantizeKernels, FourBitsAtTheThresholds) {
  for (FourBit kind : {FourBit::kNf4, FourBit::kFp4}) {
    Values in;
    for (float x : {-0.8480964004993439f, -0.6106329262256622f, -0.4599952697753906f, -0.33967943489551544f, -0.23460740596055984f, -0.13791173323988914f, -0.045525018125772476f,
                    0.03979014977812767f, 0.1202552504837513f, 0.2035212516784668f, 0.2920137718319893f, 0.3893125355243683f, 0.5016634166240692f, 0.6427869200706482f, 0.8614784181118011f,
                    0.00260417f, 0.0859375f, 0.20833333f, 0.29166667f, 0.4166667f, 0.583333f, 0.8333333f, 0.0f})
      for (float y : {x, std::nextafter(x, 2.0f), std::nextafter(x, -2.0f)}) in.push_back(static_cast<double>(y)), in.push_back(-static_cast<double>(y));
    in.push_back(1);  // the scale
    const int64_t count = static_cast<int64_t>(in.size());
    const auto expected = reference::quantize_4(kind, floats(in), 256);
    Tensor x(Type::kFloat32, in), absmax(Type::kFloat32, 1);
    Guarded codes((count + 1) / 2);
    emulated_kernels().quantize_4({Type::kFloat32, kind, count, 256, x.data(), codes.as<uint8_t>(), absmax.memory.as<float>()}, nullptr);
    EXPECT_EQ(bytes_of(codes), expected.codes);
    bool seen[16] = {};
    for (uint8_t byte : expected.codes) seen[byte >> 4] = seen[byte & 15] = true;
    for (int code = 0; code < 16; ++code) EXPECT_TRUE(seen[code]) << code;
  }
}

TEST(QuantizeKernels, NestedScalesOfTheWholeAndOfSlices) {
  const std::vector<float> numbers = some_map();
  const OnDevice<float> map(numbers);
  std::mt19937_64 random(3);
  struct Case {
    int64_t size, count, nested_size;
    BlockSlice slice;
  };
  for (const Case& c : std::vector<Case>{{64, 64 * 700 + 3, 256, {}}, {32, 32 * 40, 16, {100, 0, 0}}, {64, 64 * 60, 256, {5, 3, 200}}, {128, 128 * 35, 64, {0, 7, 28}}, {64, 8, 1, {}}})
    for (Type type : kTypes) {
      SCOPED_TRACE(testing::Message() << name_of(type) << " " << c.count << " in blocks of " << c.size << " from " << c.slice.first);
      const int64_t blocks = (c.count + c.size - 1) / c.size;
      std::vector<uint8_t> bytes(static_cast<size_t>(c.count + 1) / 2), scale_bytes(static_cast<size_t>(blocks));
      for (uint8_t& b : bytes) b = static_cast<uint8_t>(random());
      for (uint8_t& b : scale_bytes) b = static_cast<uint8_t>(random());
      const std::vector<float> nested_values = floats(random_values(Type::kFloat32, c.slice.whole(blocks - 1) / c.nested_size + 1, 4));
      const OnDevice<uint8_t> codes(bytes), scale_codes(scale_bytes);
      const OnDevice<float> nested(nested_values);
      Tensor y(type, c.count);
      const OnDevice<float> offset(0.7f);
      emulated_kernels().dequantize_4({type, FourBit::kNf4, c.count, c.size, codes.data(), {nullptr, scale_codes.data(), nested.data(), map.data(), c.nested_size, offset.data(), c.slice}, y.data()}, nullptr);
      const auto scales = reference::nested_scales(scale_bytes, nested_values, numbers.data(), c.nested_size, *offset, c.slice);
      EXPECT_TRUE(same(y.values(), reference::dequantize_4(FourBit::kNf4, bytes, scales, c.count, c.size), type));
    }
}

TEST(QuantizeKernels, EightBitsOfAMap) {
  const std::vector<float> numbers = some_map();
  const OnDevice<float> map(numbers);
  for (Type type : kTypes)
    for (float offset : {0.0f, 0.25f})
      for (const auto& [size, count] : std::vector<std::pair<int64_t, int64_t>>{{32, 1}, {64, 1003}, {256, 256}, {256, 2049}, {2048, 2047}, {4096, 9000}}) {
        SCOPED_TRACE(testing::Message() << name_of(type) << " " << count << " in blocks of " << size << " from " << offset);
        const Values in = unusual_values(type, count, size, static_cast<uint64_t>(count));
        const auto expected = reference::quantize_blocks(numbers.data(), floats(in), offset, size);
        Tensor x(type, in), y(type, count), absmax(Type::kFloat32, (count + size - 1) / size);
        Guarded codes(count);
        emulated_kernels().quantize_blocks({type, count, size, x.data(), offset, map.data(), codes.as<uint8_t>(), absmax.memory.as<float>()}, nullptr);
        EXPECT_TRUE(same(absmax.values(), expected.absmax, Type::kFloat32));
        EXPECT_EQ(bytes_of(codes), expected.codes);
        emulated_kernels().dequantize_blocks({type, count, size, codes.as<uint8_t>(), absmax.memory.as<float>(), map.data(), y.data()}, nullptr);
        EXPECT_TRUE(same(y.values(), reference::dequantize_blocks(numbers.data(), expected, size), type));
      }
}

TEST(QuantizeKernels, EightBitsAtTheMidpoints) {
  const std::vector<float> numbers = some_map();
  const OnDevice<float> map(numbers);
  Values in;
  for (size_t i = 0; i < 255; ++i)
    for (float x : {numbers[i], (numbers[i] + numbers[i + 1]) * 0.5f})
      for (float y : {x, std::nextafter(x, 2.0f), std::nextafter(x, -2.0f)}) in.push_back(static_cast<double>(y));
  in.push_back(-1);
  const auto expected = reference::quantize_blocks(numbers.data(), floats(in), 0, 4096);
  const int64_t count = static_cast<int64_t>(in.size());
  Tensor x(Type::kFloat32, in), absmax(Type::kFloat32, 1);
  Guarded codes(count);
  emulated_kernels().quantize_blocks({Type::kFloat32, count, 4096, x.data(), 0, map.data(), codes.as<uint8_t>(), absmax.memory.as<float>()}, nullptr);
  EXPECT_EQ(bytes_of(codes), expected.codes);
}

TEST(QuantizeKernels, Rows) {
  for (Type type : kTypes)
    for (float threshold : {0.0f, 2.5f})
      for (const auto& [rows, width] : std::vector<std::pair<int64_t, int64_t>>{{1, 1}, {3, 17}, {5, 64}, {7, 4100}, {9, 4112}, {300, 16}}) {
        SCOPED_TRACE(testing::Message() << name_of(type) << " " << rows << " x " << width << " below " << threshold);
        const Values in = unusual_values(type, rows * width, width, static_cast<uint64_t>(width));
        const auto expected = reference::quantize_rows(floats(in), width, threshold);
        Tensor x(type, in), y(type, rows * width), absmax(Type::kFloat32, rows);
        Guarded codes(rows * width), outlier(width);
        const QuantizeRows call{type, rows, width, x.data(), threshold, codes.as<int8_t>(), absmax.memory.as<float>(), threshold > 0 ? outlier.as<uint8_t>() : nullptr};
        emulated_kernels().largest_of_rows(call, nullptr);
        emulated_kernels().quantize_rows(call, nullptr);
        EXPECT_TRUE(same(absmax.values(), expected.absmax, Type::kFloat32));
        const std::vector<int8_t> actual(codes.as<int8_t>(), codes.as<int8_t>() + rows * width);
        EXPECT_EQ(actual, expected.codes);
        if (threshold > 0) { EXPECT_EQ(bytes_of(outlier), expected.outlier); }
        emulated_kernels().dequantize_rows({type, rows, width, codes.as<int8_t>(), absmax.memory.as<float>(), y.data()}, nullptr);
        EXPECT_TRUE(same(y.values(), reference::dequantize_rows(expected, width), type));
      }
}

TEST(QuantizeKernels, ProductsOfCodes) {
  std::mt19937_64 random(8);
  for (Type type : kTypes)
    for (bool with_bias : {false, true})
      for (const auto& [rows, width] : std::vector<std::pair<int64_t, int64_t>>{{1, 1}, {3, 17}, {5, 64}, {2, 4104}}) {
        std::vector<int32_t> numbers;
        for (int64_t i = 0; i < rows * width; ++i) numbers.push_back(static_cast<int32_t>(random() % 100000000) - 50000000);
        const OnDevice<int32_t> products(numbers);
        const Values row_values = random_values(Type::kFloat32, rows, 1), column_values = random_values(Type::kFloat32, width, 2), bias_values = random_values(type, width, 3);
        Tensor row(Type::kFloat32, row_values), column(Type::kFloat32, column_values), bias(type, bias_values), y(type, rows * width);
        emulated_kernels().scale_products({type, rows, width, products.data(), row.memory.as<float>(), column.memory.as<float>(), with_bias ? bias.data() : nullptr, y.data()}, nullptr);
        const auto expected = reference::scale_products(numbers, floats(row_values), floats(column_values), with_bias ? floats(bias_values) : std::vector<float>());
        EXPECT_TRUE(same(y.values(), expected, type)) << name_of(type) << " " << rows << " x " << width;
      }
}

TEST(QuantizeKernels, GroupsOfIntegers) {
  for (const AffineFormat& format : {AffineFormat{8, false}, AffineFormat{8, true}, AffineFormat{4, false}, AffineFormat{4, true}})
    for (Type type : kTypes)
      for (const auto& [size, count] : std::vector<std::pair<int64_t, int64_t>>{{32, 1}, {32, 2100}, {64, 65}, {128, 1280}, {10, 2007}, {1003, 1003}, {70000, 70000}, {70000, 70001}, {8192, 16385}}) {
        SCOPED_TRACE(testing::Message() << name_of(type) << " " << format.bits << " bits, zero point " << format.zero_point << ", " << count << " in groups of " << size);
        Values in = unusual_values(type, count, size, static_cast<uint64_t>(count));
        for (double& x : in) x = reference::round_to(type, x + (format.zero_point ? 0.5 : 0));
        const auto expected = reference::quantize_groups(format, floats(in), size);
        const int64_t groups = groups_of(count, size);
        Tensor x(type, in), y(type, count), scale(Type::kFloat32, groups);
        Guarded codes((count * format.bits + 7) / 8), zero(groups), workspace(quantize_groups_workspace(count, size) * 4);
        int8_t* const zeros = format.zero_point ? zero.as<int8_t>() : nullptr;
        emulated_kernels().quantize_groups({type, format, count, size, x.data(), codes.as<uint8_t>(), scale.memory.as<float>(), zeros, workspace.as<float>()}, nullptr);
        EXPECT_TRUE(same(scale.values(), expected.scale, Type::kFloat32));
        EXPECT_EQ(bytes_of(codes), reference::packed(format, expected.codes));
        if (zeros) { EXPECT_EQ(std::vector<int>(zeros, zero.as<int8_t>() + groups), expected.zero); }
        emulated_kernels().dequantize_groups({type, format, count, size, codes.as<uint8_t>(), scale.memory.as<float>(), zeros, y.data()}, nullptr);
        EXPECT_TRUE(same(y.values(), reference::dequantize_groups(expected, size), type));
      }
}

TEST(QuantizeKernels, RefuseWhatTheyDoNotKnow) {
  const Kernels& k = emulated_kernels();
  Guarded memory(256);
  uint8_t* const codes = memory.as<uint8_t>();
  float* const scale = memory.as<float>();
  EXPECT_EQ(refusal([&] { k.quantize_4({Type::kFloat32, FourBit::kNf4, 8, 48, codes, codes, scale}, nullptr); }), "quantize_4 of 8 values in blocks of 48: 32, 64, ... 4096");
  EXPECT_EQ(refusal([&] { k.quantize_4({Type::kFloat32, FourBit::kNf4, 8, 8192, codes, codes, scale}, nullptr); }), "quantize_4 of 8 values in blocks of 8192: 32, 64, ... 4096");
  EXPECT_EQ(refusal([&] { k.quantize_4({Type::kFloat32, FourBit::kNf4, 8, 64, codes + 4, codes, scale}, nullptr); }), "quantize_4: a tensor does not begin at a multiple of 16 bytes");
  EXPECT_EQ(refusal([&] { k.dequantize_4({Type::kFloat32, FourBit::kNf4, 8, 64, codes, {scale, nullptr, nullptr, nullptr, 0, nullptr, {}}, scale + 1}, nullptr); }),
            "dequantize_4: a tensor does not begin at a multiple of 16 bytes");
  EXPECT_EQ(refusal([&] { k.dequantize_4({Type::kFloat32, FourBit::kNf4, 8, 64, codes, {nullptr, codes, scale, scale, 100, scale, {}}, scale}, nullptr); }),
            "dequantize_4: nested blocks of 100 scales are no power of two");
  EXPECT_EQ(refusal([&] { k.quantize_blocks({Type::kFloat32, int64_t{1} << 40, 64, codes, 0, scale, codes, scale}, nullptr); }),
            "quantize_blocks of 17179869184 blocks: they are numbered in 31 bits");
  EXPECT_EQ(refusal([&] { k.dequantize_blocks({Type::kFloat8E4M3, 8, 64, codes, scale, scale, scale}, nullptr); }), "float8 is for matrix products alone");
  EXPECT_EQ(refusal([&] { k.quantize_rows({Type::kFloat32, 1, 8, codes, 6, memory.as<int8_t>(), scale, nullptr}, nullptr); }),
            "quantize_rows: a threshold and where its columns are go together");
  EXPECT_EQ(refusal([&] { k.dequantize_rows({Type::kFloat32, -1, 8, memory.as<int8_t>(), scale, codes}, nullptr); }), "dequantize_rows of -1 x 8 values");
  EXPECT_EQ(refusal([&] { k.quantize_groups({Type::kFloat32, {4, false}, 8, 3, codes, codes, scale, nullptr, scale}, nullptr); }), "quantize_groups of 8 values in groups of 3 and 4 bits");
  EXPECT_EQ(refusal([&] { k.quantize_groups({Type::kFloat32, {5, false}, 8, 8, codes, codes, scale, nullptr, scale}, nullptr); }), "quantize_groups of 8 values in groups of 8 and 5 bits");
  EXPECT_EQ(refusal([&] { k.dequantize_groups({Type::kFloat32, {8, true}, 8, 8, codes, scale, nullptr, scale}, nullptr); }),
            "dequantize_groups: zero points are of formats that have them");
  k.quantize_4({Type::kFloat32, FourBit::kNf4, 0, 64, nullptr, nullptr, nullptr}, nullptr);
}

}  // namespace
}  // namespace trireme::kernels
