#include "kernels/reference/quantize.h"

#include <algorithm>
#include <cmath>

namespace trireme::kernels::reference {
namespace {

// f(b, begin, end) for every block
template <typename F>
void for_blocks(size_t count, int64_t block_size, const F& f) {
  const size_t size = static_cast<size_t>(block_size);
  for (size_t begin = 0; begin < count; begin += size) f(begin / size, begin, std::min(count, begin + size));
}

float largest_of(const std::vector<float>& x, size_t begin, size_t end, float offset) {
  float largest = 0;
  for (size_t i = begin; i < end; ++i) largest = std::fmax(largest, std::abs(x[i] - offset));  // fmax leaves NaNs out
  return largest;
}

}  // namespace

int four_bit_code(FourBit kind, float x) {
  if (kind == FourBit::kNf4) {
    const float thresholds[] = {-0.8480964004993439f, -0.6106329262256622f, -0.4599952697753906f, -0.33967943489551544f, -0.23460740596055984f,
                                -0.13791173323988914f, -0.045525018125772476f, 0.03979014977812767f, 0.1202552504837513f, 0.2035212516784668f,
                                0.2920137718319893f, 0.3893125355243683f, 0.5016634166240692f, 0.6427869200706482f, 0.8614784181118011f};
    int code = 0;
    while (code < 15 && x > thresholds[code]) ++code;
    return code;
  }
  const int sign = x < 0 ? 8 : 0;
  const float size = std::abs(x);
  if (size > 0.8333333f) return sign + 3;
  if (size > 0.583333f) return sign + 2;
  if (size > 0.4166667f) return sign + 5;
  if (size > 0.29166667f) return sign + 4;
  if (size > 0.20833333f) return sign + 7;
  if (size > 0.0859375f) return sign + 6;
  if (size > 0.00260417f) return sign + 1;
  return sign;
}

float four_bit_number(FourBit kind, int code) {
  const float nf4[] = {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
                       0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};
  const float fp4[] = {0.0f, 1.0f / 192, 2.0f / 3, 1.0f, 1.0f / 3, 0.5f, 1.0f / 6, 0.25f};
  if (kind == FourBit::kNf4) return nf4[code];
  return code & 8 ? -fp4[code & 7] : fp4[code];
}

int map_code(const float* map, float x) {
  int pivot = 127, upper = 255, lower = 0;
  for (int step = 64; step > 0; step /= 2)
    if (x > map[pivot]) lower = pivot, pivot += step;
    else upper = pivot, pivot -= step;
  if (x > map[pivot]) return x > (map[upper] + map[pivot]) * 0.5f ? upper : pivot;
  return x < (map[lower] + map[pivot]) * 0.5f ? lower : pivot;
}

BlockCodes quantize_4(FourBit kind, const std::vector<float>& x, int64_t block_size) {
  BlockCodes out{std::vector<uint8_t>((x.size() + 1) / 2), {}};
  for_blocks(x.size(), block_size, [&](size_t, size_t begin, size_t end) {
    out.absmax.push_back(largest_of(x, begin, end, 0));
    const float inverse = 1 / out.absmax.back();
    for (size_t i = begin; i < end + end % 2; ++i) {
      const int code = four_bit_code(kind, (i < end ? x[i] : 0.0f) * inverse);
      out.codes[i / 2] = static_cast<uint8_t>(out.codes[i / 2] | (i % 2 == 0 ? code << 4 : code));
    }
  });
  return out;
}

BlockCodes quantize_blocks(const float* map, const std::vector<float>& x, float offset, int64_t block_size) {
  BlockCodes out;
  for_blocks(x.size(), block_size, [&](size_t, size_t begin, size_t end) {
    out.absmax.push_back(largest_of(x, begin, end, offset));
    const float inverse = 1 / out.absmax.back();
    for (size_t i = begin; i < end; ++i) out.codes.push_back(static_cast<uint8_t>(map_code(map, (x[i] - offset) * inverse)));
  });
  return out;
}

std::vector<float> nested_scales(const std::vector<uint8_t>& codes, const std::vector<float>& nested, const float* map, int64_t nested_block_size, float offset, const BlockSlice& slice) {
  std::vector<float> out;
  for (size_t b = 0; b < codes.size(); ++b) {
    volatile float product = map[codes[b]] * nested[static_cast<size_t>(slice.whole(static_cast<int64_t>(b)) / nested_block_size)];  // rounded by itself
    out.push_back(product + offset);
  }
  return out;
}

std::vector<float> dequantize_4(FourBit kind, const std::vector<uint8_t>& codes, const std::vector<float>& scales, int64_t count, int64_t block_size) {
  std::vector<float> out;
  for_blocks(static_cast<size_t>(count), block_size, [&](size_t b, size_t begin, size_t end) {
    for (size_t i = begin; i < end; ++i) out.push_back(four_bit_number(kind, i % 2 == 0 ? codes[i / 2] >> 4 : codes[i / 2] & 15) * scales[b]);
  });
  return out;
}

std::vector<float> dequantize_blocks(const float* map, const BlockCodes& q, int64_t block_size) {
  std::vector<float> out;
  for_blocks(q.codes.size(), block_size, [&](size_t b, size_t begin, size_t end) {
    for (size_t i = begin; i < end; ++i) out.push_back(map[q.codes[i]] * q.absmax[b]);
  });
  return out;
}

RowCodes quantize_rows(const std::vector<float>& x, int64_t row_width, float threshold) {
  const size_t width = static_cast<size_t>(row_width);
  RowCodes out{{}, {}, std::vector<uint8_t>(width)};
  for (size_t i = 0; i < x.size(); ++i)
    if (threshold > 0 && !(std::abs(x[i]) < threshold)) out.outlier[i % width] = 1;
  for (size_t begin = 0; begin < x.size(); begin += width) {
    float largest = 0;
    for (size_t c = 0; c < width; ++c)
      if (threshold <= 0 || std::abs(x[begin + c]) < threshold) largest = std::fmax(largest, std::abs(x[begin + c]));
    out.absmax.push_back(largest);
    const float scale = 127 / largest;
    for (size_t c = 0; c < width; ++c) {
      const float code = x[begin + c] * scale;
      out.codes.push_back(out.outlier[c] != 0 || code != code ? int8_t{0} : static_cast<int8_t>(std::nearbyint(std::clamp(code, -127.0f, 127.0f))));
    }
  }
  return out;
}

std::vector<float> dequantize_rows(const RowCodes& q, int64_t width) {
  std::vector<float> out;
  for (size_t i = 0; i < q.codes.size(); ++i) out.push_back(static_cast<float>(q.codes[i]) * q.absmax[i / static_cast<size_t>(width)] * (1.0f / 127));
  return out;
}

GroupCodes quantize_groups(const AffineFormat& format, const std::vector<float>& x, int64_t group_size) {
  GroupCodes out;
  const auto nearest = [](float value, float inverse) {
    const float product = value * inverse;
    return product != product ? 0 : static_cast<int>(std::nearbyint(std::clamp(product, -1000.0f, 1000.0f)));
  };
  for_blocks(x.size(), group_size, [&](size_t, size_t begin, size_t end) {
    float low = 0, high = 0;
    for (size_t i = begin; i < end; ++i) low = std::fmin(low, x[i]), high = std::fmax(high, x[i]);
    const float steps = format.bits == 4 ? 15 : format.zero_point ? 255 : 127;
    const float range = format.zero_point ? high - low : std::max(high, -low) * (format.bits == 4 ? 2 : 1), inverse = steps / range;
    const int least = format.bits == 4 ? 0 : format.zero_point ? -128 : -127, largest = format.bits == 4 ? 15 : 127;
    const int zero = !format.zero_point ? format.bits == 4 ? 8 : 0 : least + std::clamp(nearest(-low, inverse), 0, largest - least);
    out.scale.push_back(range / steps), out.zero.push_back(zero);
    for (size_t i = begin; i < end; ++i) out.codes.push_back(std::clamp(nearest(x[i], inverse) + zero, least, largest));
  });
  return out;
}

std::vector<float> dequantize_groups(const GroupCodes& q, int64_t group_size) {
  std::vector<float> out;
  for_blocks(q.codes.size(), group_size, [&](size_t g, size_t begin, size_t end) {
    for (size_t i = begin; i < end; ++i) out.push_back(static_cast<float>(q.codes[i] - q.zero[g]) * q.scale[g]);
  });
  return out;
}

std::vector<uint8_t> packed(const AffineFormat& format, const std::vector<int>& codes) {
  if (format.bits == 8) return {codes.begin(), codes.end()};
  std::vector<uint8_t> out((codes.size() + 1) / 2);
  for (size_t i = 0; i < codes.size(); ++i) out[i / 2] = static_cast<uint8_t>(out[i / 2] | codes[i] << (i % 2 * 4));
  return out;
}

std::vector<float> scale_products(const std::vector<int32_t>& products, const std::vector<float>& row, const std::vector<float>& column, const std::vector<float>& bias) {
  std::vector<float> out;
  for (size_t i = 0; i < products.size(); ++i) {
    volatile float product = static_cast<float>(products[i]) * row[i / column.size()] * column[i % column.size()] * (1.0f / 16129);
    out.push_back(product + (bias.empty() ? 0.0f : bias[i % column.size()]));
  }
  return out;
}

}  // namespace trireme::kernels::reference
