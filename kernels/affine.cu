// Integers of 8 and 4 bits with a scale and maybe a zero point a group: the extents of parts of groups, of groups, and codes.
#include "kernels/elements.h"
#include "kernels/kernels.h"

namespace trireme::kernels::TRIREME_ARCH {
namespace {

constexpr int kThreads = 256;

ARCH_FN int kept_within(int code, int least, int largest) { return code < least ? least : code > largest ? largest : code; }

// A block has a part of a group: its least and largest value, 0 among them, NaNs left out.
template <typename T, int kPer>
struct Extents {
  struct Params {
    const T* x;
    float* extent;  // [groups, parts, 2]: -least, largest
    int64_t count, group_size, part_size;
    int parts;
  };
  static constexpr int kThreads = trireme::kernels::TRIREME_ARCH::kThreads, kSharedBytes = kThreads / arch::kWarp * 8;

  ARCH_FN static void run(const Params& p) {
    const int block = arch::block_index().x, group = block / p.parts, part = block - group * p.parts;
    const int64_t first = group * p.group_size, begin = first + part * p.part_size;
    int64_t end = begin + p.part_size;
    if (end > first + p.group_size) end = first + p.group_size;
    if (end > p.count) end = p.count;
    float low = 0, high = 0;
    for (int64_t i = begin + arch::thread_index() * kPer; i < end; i += kThreads * kPer) {
      float x[kPer] = {};
      load_part<T, kPer>(p.x + i, end - i, x);
      ARCH_UNROLL
      for (int e = 0; e < kPer; ++e) low = arch::max(low, -x[e]), high = arch::max(high, x[e]);
    }
    low = arch::block_max<kThreads>(low, arch::shared<float>(0, kThreads / arch::kWarp));
    high = arch::block_max<kThreads>(high, arch::shared<float>(kThreads / arch::kWarp * 4, kThreads / arch::kWarp));
    if (arch::thread_index() == 0) p.extent[2 * int64_t{block}] = low, p.extent[2 * int64_t{block} + 1] = high;
  }
};

struct Groups {
  struct Params {
    AffineFormat format;
    const float* extent;
    float* scale;
    int8_t* zero;
    float* group;  // [groups, 2]: what values are multiplied with, the zero point
    int64_t num_groups;
    int parts;
  };
  static constexpr int kThreads = trireme::kernels::TRIREME_ARCH::kThreads;

  ARCH_FN static void run(const Params& p) {
    const int64_t g = int64_t{arch::block_index().x} * kThreads + arch::thread_index();
    if (g >= p.num_groups) return;
    float low = 0, high = 0;
    for (int64_t part = g * p.parts; part < (g + 1) * p.parts; ++part) low = arch::max(low, p.extent[2 * part]), high = arch::max(high, p.extent[2 * part + 1]);
    const bool is_byte = p.format.bits == 8, asymmetric = p.format.zero_point;
    const float steps = !is_byte ? 15 : asymmetric ? 255 : 127;
    const float range = asymmetric ? high + low : arch::max(low, high) * (is_byte ? 1 : 2);
    const float inverse = steps / range;
    const int least = is_byte ? -128 : 0;
    const int zero = asymmetric ? kept_within(arch::nearest(arch::product(low, inverse)), 0, is_byte ? 255 : 15) + least : is_byte ? 0 : 8;
    p.scale[g] = range / steps;
    if (p.zero) p.zero[g] = static_cast<int8_t>(zero);
    p.group[2 * g] = inverse, p.group[2 * g + 1] = static_cast<float>(zero);
  }
};

// kPer values of a group at once: one, or 2 or 8 where groups are of multiples.
template <typename T, int kBits, int kPer>
struct Codes {
  static_assert(kBits == 8 || kPer > 1);
  struct Params {
    const T* x;
    uint8_t* codes;
    const float* group;
    int64_t group_size;
    int least, largest;
    Parts parts;
  };
  static constexpr int kThreads = Parts::kThreads, kBytes = kPer * kBits / 8;

  ARCH_FN static void run(const Params& p) {
    with_part<kPer>(p.parts, [&](int64_t, int64_t i, int64_t count) {
      float x[kPer] = {};
      load_part<T, kPer>(p.x + i, count, x);
      const int64_t g = i / p.group_size;
      const float inverse = p.group[2 * g];
      const int zero = static_cast<int>(p.group[2 * g + 1]);
      Several<uint8_t, kBytes> bytes = {};
      ARCH_UNROLL
      for (int e = 0; e < kPer; ++e) {
        const int nearest = kept_within(arch::nearest(arch::product(x[e], inverse)), -256, 256);
        const uint32_t code = static_cast<uint32_t>(kept_within(nearest + zero, p.least, p.largest)) & ((1u << kBits) - 1);
        if (e < count) bytes.value[e * kBits / 8] = static_cast<uint8_t>(bytes.value[e * kBits / 8] | code << (e * kBits % 8));
      }
      uint8_t* const to = p.codes + i * kBits / 8;
      if (count >= kPer) {
        arch::store(to, bytes);
      } else {
        for (int b = 0; b < (static_cast<int>(count) * kBits + 7) / 8; ++b) to[b] = bytes.value[b];
      }
    });
  }
};

template <typename T, int kBits, int kPer>
struct Values {
  static_assert(kBits == 8 || kPer > 1);
  struct Params {
    T* y;
    const uint8_t* codes;
    const float* scale;
    const int8_t* zero;
    int64_t group_size;
    int symmetric;
    Parts parts;
  };
  static constexpr int kThreads = Parts::kThreads, kBytes = kPer * kBits / 8;

  ARCH_FN static void run(const Params& p) {
    with_part<kPer>(p.parts, [&](int64_t, int64_t i, int64_t count) {
      const uint8_t* const from = p.codes + i * kBits / 8;
      Several<uint8_t, kBytes> bytes = {};
      if (count >= kPer) {
        bytes = arch::load<Several<uint8_t, kBytes>>(from);
      } else {
        for (int b = 0; b < (static_cast<int>(count) * kBits + 7) / 8; ++b) bytes.value[b] = from[b];
      }
      const int64_t g = i / p.group_size;
      const float scale = p.scale[g];
      const int zero = p.zero ? p.zero[g] : p.symmetric;
      float y[kPer];
      ARCH_UNROLL
      for (int e = 0; e < kPer; ++e) {
        const uint8_t byte = bytes.value[e * kBits / 8];
        const int code = kBits == 8 ? static_cast<int8_t>(byte) : byte >> (e * kBits % 8) & 15;
        y[e] = static_cast<float>(code - zero) * scale;
      }
      store_part<T, kPer>(p.y + i, count, y);
    });
  }
};

void refuse_groups(const char* name, const AffineFormat& format, int64_t count, int64_t group_size) {
  const bool fits = format.bits == 8 || (format.bits == 4 && (group_size % 2 == 0 || count <= group_size));
  if (count < 0 || group_size <= 0 || !fits)
    throw Refused(std::string(name) + " of " + std::to_string(count) + " values in groups of " + std::to_string(group_size) + " and " + std::to_string(format.bits) + " bits");
}

// f(Constant of the bits, Constant of the values at once)
template <typename F>
void with_bits(const AffineFormat& format, int64_t count, int64_t group_size, bool aligned, const F& f) {
  const bool eights = aligned && (group_size % 8 == 0 || count <= group_size);
  if (format.bits == 4) eights ? f(Constant<4>(), Constant<8>()) : f(Constant<4>(), Constant<2>());
  else eights ? f(Constant<8>(), Constant<8>()) : f(Constant<8>(), Constant<1>());
}

void quantize_groups(const QuantizeGroups& p, Stream stream) {
  refuse_groups("quantize_groups", p.format, p.count, p.group_size);
  if (p.format.zero_point != (p.zero != nullptr)) throw Refused("quantize_groups: zero points are of formats that have them");
  if (p.count == 0) return;
  if (p.format.bits == 4 && reinterpret_cast<uintptr_t>(p.x) % static_cast<uintptr_t>(2 * size_of(p.type)) != 0) throw Refused("quantize_groups: pairs of values do not begin at a multiple of their size");
  const int64_t num_groups = groups_of(p.count, p.group_size), parts = parts_of_group(p.group_size), part_size = ((p.group_size + parts - 1) / parts + 15) / 16 * 16;
  float *const group = p.workspace, *const extent = p.workspace + 2 * num_groups;
  with_type(p.type, [&]<typename T>(T) {
    const T* const x = static_cast<const T*>(p.x);
    const bool aligned = in_vectors(0, {p.x, p.codes});
    const auto run = [&](auto per) {
      using Kernel = Extents<T, per()>;
      arch::launch<Kernel>(blocks_of(num_groups * parts, 1), Kernel::kSharedBytes, stream, {x, extent, p.count, p.group_size, part_size, static_cast<int>(parts)});
    };
    if (aligned && (p.group_size % 8 == 0 || num_groups == 1)) run(Constant<8>());
    else run(Constant<1>());
    arch::launch<Groups>(blocks_of(num_groups, Groups::kThreads), 0, stream, {p.format, extent, p.scale, p.zero, group, num_groups, static_cast<int>(parts)});
    with_bits(p.format, p.count, p.group_size, aligned, [&](auto bits, auto per) {
      const Parts all = Parts::of(1, p.count, true, per());
      arch::launch<Codes<T, bits(), per()>>(all.grid(), 0, stream, {x, p.codes, group, p.group_size, least_code(p.format), largest_code(p.format), all});
    });
  });
}

void dequantize_groups(const DequantizeGroups& p, Stream stream) {
  refuse_groups("dequantize_groups", p.format, p.count, p.group_size);
  if (p.format.zero_point != (p.zero != nullptr)) throw Refused("dequantize_groups: zero points are of formats that have them");
  if (p.count == 0) return;
  if (p.format.bits == 4 && reinterpret_cast<uintptr_t>(p.y) % static_cast<uintptr_t>(2 * size_of(p.type)) != 0) throw Refused("dequantize_groups: pairs of values do not begin at a multiple of their size");
  with_type(p.type, [&]<typename T>(T) {
    with_bits(p.format, p.count, p.group_size, in_vectors(0, {p.y, p.codes}), [&](auto bits, auto per) {
      const Parts all = Parts::of(1, p.count, true, per());
      arch::launch<Values<T, bits(), per()>>(all.grid(), 0, stream, {static_cast<T*>(p.y), p.codes, p.scale, p.zero, p.group_size, symmetric_zero(p.format), all});
    });
  });
}

}  // namespace

void add_affine(Kernels& kernels) {
  kernels.quantize_groups = quantize_groups;
  kernels.dequantize_groups = dequantize_groups;
}

}  // namespace trireme::kernels::TRIREME_ARCH
