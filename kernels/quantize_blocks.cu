// Blocks of values that share a scale, in 4 bits and in 8 bits of a map.
#include "kernels/elements.h"
#include "kernels/kernels.h"
#include "kernels/map_code.h"

namespace trireme::kernels::TRIREME_ARCH {
namespace {

constexpr int kPer = 8;  // values of a thread at once: 4 bytes of codes in 4 bits, and 16 bytes of 16-bit values
constexpr int kThreads = 256;

constexpr int log2_of(int64_t power) {
  int log = 0;
  while (int64_t{1} << log < power) ++log;
  return log;
}

int64_t blocks_of_scales(const char* name, int64_t count, int64_t block_size, std::initializer_list<const void*> tensors) {
  if (count < 0 || block_size < 32 || block_size > 4096 || (block_size & (block_size - 1)) != 0)
    throw Refused(std::string(name) + " of " + std::to_string(count) + " values in blocks of " + std::to_string(block_size) + ": 32, 64, ... 4096");
  if (!in_vectors(0, tensors)) throw Refused(std::string(name) + ": a tensor does not begin at a multiple of 16 bytes");
  const int64_t blocks = (count + block_size - 1) / block_size;
  if (blocks > std::numeric_limits<int>::max()) throw Refused(std::string(name) + " of " + std::to_string(blocks) + " blocks: they are numbered in 31 bits");
  return blocks;
}

// The numbers of the codes, in the order of the codes.
ARCH_FN float four_bit_number(FourBit kind, int code) {
  constexpr float kNf4[] = {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
                            0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};
  constexpr float kFp4[] = {0.0f, 0.005208333333f, 0.66666667f, 1.0f, 0.33333333f, 0.5f, 0.16666667f, 0.25f};
  if (kind == FourBit::kNf4) return kNf4[code];
  return code & 8 ? -kFp4[code & 7] : kFp4[code];
}

template <FourBit kKind>
ARCH_FN uint32_t four_bit_code(float x) {
  constexpr float kNf4[] = {-0.8480964004993439f, -0.6106329262256622f, -0.4599952697753906f, -0.33967943489551544f, -0.23460740596055984f,
                            -0.13791173323988914f, -0.045525018125772476f, 0.03979014977812767f, 0.1202552504837513f, 0.2035212516784668f,
                            0.2920137718319893f, 0.3893125355243683f, 0.5016634166240692f, 0.6427869200706482f, 0.8614784181118011f};
  constexpr float kFp4[] = {0.00260417f, 0.0859375f, 0.20833333f, 0.29166667f, 0.4166667f, 0.583333f, 0.8333333f};
  uint32_t code = 0;
  if constexpr (kKind == FourBit::kNf4) {
    ARCH_UNROLL
    for (int t = 0; t < 15; ++t) code += x > kNf4[t];
    return code;
  } else {
    const float size = x < 0 ? -x : x;
    ARCH_UNROLL
    for (int t = 0; t < 7; ++t) code += size > kFp4[t];
    return (code ^ (code & 2) << 1) | (x < 0 ? 8 : 0);  // FP4's order of magnitudes: 0 1 6 7 4 5 2 3
  }
}

struct EncodeNf4 {
  static constexpr int kBits = 4;
  ARCH_FN static uint32_t code(const arch::Shared<float>&, float x) { return four_bit_code<FourBit::kNf4>(x); }
};
struct EncodeFp4 {
  static constexpr int kBits = 4;
  ARCH_FN static uint32_t code(const arch::Shared<float>&, float x) { return four_bit_code<FourBit::kFp4>(x); }
};
struct EncodeMap {
  static constexpr int kBits = 8;
  ARCH_FN static uint32_t code(const arch::Shared<float>& map, float x) { return map_code(map, x); }
};

// A warp has a block of 256 values or more, which it reads twice, or several smaller ones side by side.
template <typename T, typename Encode>
struct QuantizedBlocks {
  struct Params {
    const T* x;
    uint8_t* codes;
    float* absmax;
    const float* map;
    float offset;
    int64_t count;
    int block_size;
  };
  static constexpr int kThreads = trireme::kernels::TRIREME_ARCH::kThreads, kAtOnce = arch::kWarp * kPer;
  static constexpr int kSharedBytes = Encode::kBits == 8 ? 256 * 4 : 4;

  ARCH_FN static void load(const Params& p, int64_t i, float (&x)[kPer]) {
    ARCH_UNROLL
    for (int e = 0; e < kPer; ++e) x[e] = p.offset;  // behind the end: 0
    if (i < p.count) load_part<T, kPer>(p.x + i, p.count - i, x);
    ARCH_UNROLL
    for (int e = 0; e < kPer; ++e) x[e] -= p.offset;
  }

  ARCH_FN static void run(const Params& p) {
    const auto map = arch::shared<float>(0, kSharedBytes / 4);
    if constexpr (Encode::kBits == 8) {
      map[arch::thread_index()] = p.map[arch::thread_index()];
      arch::sync_threads();
    }
    const int extent = p.block_size > kAtOnce ? p.block_size : kAtOnce, lanes = p.block_size < kAtOnce ? p.block_size / kPer : arch::kWarp;
    const int64_t begin = (int64_t{arch::block_index().x} * (kThreads / arch::kWarp) + arch::warp_index()) * extent + arch::lane_index() * kPer;
    float x[kPer], largest = 0;
    for (int step = 0; step < extent; step += kAtOnce) {
      load(p, begin + step, x);
      ARCH_UNROLL
      for (int e = 0; e < kPer; ++e) largest = arch::max(largest, x[e] < 0 ? -x[e] : x[e]);
    }
    for (int mask = 1; mask < lanes; mask *= 2) largest = arch::max(largest, arch::shuffle_xor(largest, mask));
    if (begin < p.count && arch::lane_index() % lanes == 0) p.absmax[begin / p.block_size] = largest;
    const float inverse = 1 / largest;
    for (int step = 0; step < extent; step += kAtOnce) {
      const int64_t i = begin + step, left = p.count - i;
      if (left <= 0) return;
      if (extent > kAtOnce) load(p, i, x);
      uint32_t word[Encode::kBits / 4] = {};
      ARCH_UNROLL
      for (int e = 0; e < kPer; ++e) {
        const uint32_t code = Encode::code(map, x[e] * inverse);
        if constexpr (Encode::kBits == 4) word[0] |= code << (4 * (e ^ 1));
        else word[e / 4] |= code << (8 * (e % 4));
      }
      uint8_t* const to = p.codes + i * Encode::kBits / 8;
      if (left >= kPer) {
        ARCH_UNROLL
        for (int w = 0; w < Encode::kBits / 4; ++w) arch::store(to + 4 * w, word[w]);
      } else {
        for (int b = 0; b < (static_cast<int>(left) * Encode::kBits + 7) / 8; ++b) to[b] = static_cast<uint8_t>(word[b / 4] >> (8 * (b % 4)));
      }
    }
  }
};

template <typename T, typename Encode>
void quantize(int64_t count, int64_t block_size, const void* x, float offset, const float* map, uint8_t* codes, float* absmax, Stream stream) {
  using Kernel = QuantizedBlocks<T, Encode>;
  const int64_t extent = std::max<int64_t>(block_size, Kernel::kAtOnce), warps = (count + extent - 1) / extent;
  arch::launch<Kernel>(blocks_of(warps, Kernel::kThreads / arch::kWarp), Kernel::kSharedBytes, stream,
                       {static_cast<const T*>(x), codes, absmax, map, offset, count, static_cast<int>(block_size)});
}

void quantize_4(const Quantize4& p, Stream stream) {
  if (blocks_of_scales("quantize_4", p.count, p.block_size, {p.x, p.codes}) == 0) return;
  with_type(p.type, [&]<typename T>(T) {
    if (p.kind == FourBit::kNf4) quantize<T, EncodeNf4>(p.count, p.block_size, p.x, 0, nullptr, p.codes, p.absmax, stream);
    else quantize<T, EncodeFp4>(p.count, p.block_size, p.x, 0, nullptr, p.codes, p.absmax, stream);
  });
}

void quantize_blocks(const QuantizeBlocks& p, Stream stream) {
  if (blocks_of_scales("quantize_blocks", p.count, p.block_size, {p.x, p.codes}) == 0) return;
  with_type(p.type, [&]<typename T>(T) { quantize<T, EncodeMap>(p.count, p.block_size, p.x, p.offset, p.map, p.codes, p.absmax, stream); });
}

// kNested: the scales have 8 bits. Each thread has kPieces times 8 values; those of its warp are side by side, so that codes and values
// travel in whole lines. 16 numbers in shared memory lie in as many banks: no two lanes wait for one another.
template <typename T, bool kNested>
struct Dequantized4 {
  struct Params {
    Dequantize4 p;
    int block_shift, nested_shift;
    bool codes_in_words;
  };
  static constexpr int kThreads = trireme::kernels::TRIREME_ARCH::kThreads, kPieces = 4, kChunk = kThreads * kPer * kPieces;
  static constexpr int kSharedBytes = 16 * 4 + (kNested ? 256 * 4 : 0);

  ARCH_FN static float scale_of(const Params& params, const arch::Shared<float>& map, int64_t i) {
    const ScalesOfBlocks& s = params.p.scales;
    const uint32_t block = static_cast<uint32_t>(i >> params.block_shift);
    if constexpr (!kNested) {
      return s.plain[block];
    } else {
      const uint32_t per_row = static_cast<uint32_t>(s.slice.per_row);
      const int64_t whole = s.slice.first + (per_row == 0 ? block : int64_t{block / per_row} * s.slice.whole_per_row + block % per_row);
      return arch::product(map[s.codes[block]], s.nested[whole >> params.nested_shift]) + *s.offset;
    }
  }

  ARCH_FN static void run(const Params& params) {
    const Dequantize4& p = params.p;
    const auto number = arch::shared<float>(0, 16), map = arch::shared<float>(16 * 4, kNested ? 256 : 0);
    if (arch::thread_index() < 16) number[arch::thread_index()] = four_bit_number(p.kind, arch::thread_index());
    if constexpr (kNested) map[arch::thread_index()] = p.scales.map[arch::thread_index()];
    arch::sync_threads();
    const int64_t first = int64_t{arch::block_index().x} * kChunk + arch::thread_index() * kPer;
    uint32_t code[kPieces];
    float scale[kPieces];
    ARCH_UNROLL
    for (int piece = 0; piece < kPieces; ++piece) {  // all that is read, before any of it is needed
      const int64_t i = first + piece * (kThreads * kPer), left = p.count - i;
      code[piece] = 0, scale[piece] = 0;
      if (left >= kPer && params.codes_in_words) code[piece] = arch::load<uint32_t>(p.codes + i / 2);
      else
        for (int b = 0; b < kPer / 2 && 2 * b < left; ++b) code[piece] |= uint32_t{p.codes[i / 2 + b]} << (8 * b);
      if (left > 0) scale[piece] = scale_of(params, map, i);
    }
    ARCH_UNROLL
    for (int piece = 0; piece < kPieces; ++piece) {
      const int64_t i = first + piece * (kThreads * kPer), left = p.count - i;
      float y[kPer];
      ARCH_UNROLL
      for (int e = 0; e < kPer; ++e) y[e] = number[static_cast<int>(code[piece] >> (4 * (e ^ 1)) & 15)] * scale[piece];
      if (left > 0) store_part<T, kPer>(static_cast<T*>(p.y) + i, left, y);
    }
  }
};

void dequantize_4(const Dequantize4& p, Stream stream) {
  if (blocks_of_scales("dequantize_4", p.count, p.block_size, {p.y}) == 0) return;
  const bool nested = !p.scales.plain;
  const int64_t nested_size = p.scales.nested_block_size;
  if (nested && (nested_size <= 0 || (nested_size & (nested_size - 1)) != 0)) throw Refused("dequantize_4: nested blocks of " + std::to_string(nested_size) + " scales are no power of two");
  with_type(p.type, [&]<typename T>(T) {
    const auto run = [&](auto kernel) {
      using Kernel = decltype(kernel);
      arch::launch<Kernel>(blocks_of(p.count, Kernel::kChunk), Kernel::kSharedBytes, stream, {p, log2_of(p.block_size), nested ? log2_of(nested_size) : 0, reinterpret_cast<uintptr_t>(p.codes) % 4 == 0});
    };
    if (nested) run(Dequantized4<T, true>());
    else run(Dequantized4<T, false>());
  });
}

template <typename T>
struct DequantizedBlocks {
  struct Params {
    DequantizeBlocks p;
    int block_shift;
  };
  static constexpr int kThreads = trireme::kernels::TRIREME_ARCH::kThreads, kPieces = 4, kChunk = kThreads * kPer * kPieces, kSharedBytes = 256 * 4;

  ARCH_FN static void run(const Params& params) {
    const DequantizeBlocks& p = params.p;
    const auto map = arch::shared<float>(0, 256);
    map[arch::thread_index()] = p.map[arch::thread_index()];
    arch::sync_threads();
    for (int piece = 0; piece < kPieces; ++piece) {
      const int64_t i = int64_t{arch::block_index().x} * kChunk + piece * (kThreads * kPer) + arch::thread_index() * kPer, left = p.count - i;
      if (left <= 0) return;
      Several<uint8_t, kPer> code = {};
      if (left >= kPer) code = arch::load<Several<uint8_t, kPer>>(p.codes + i);
      else
        for (int e = 0; e < left; ++e) code.value[e] = p.codes[i + e];
      const float scale = p.absmax[i >> params.block_shift];
      float y[kPer];
      ARCH_UNROLL
      for (int e = 0; e < kPer; ++e) y[e] = map[code.value[e]] * scale;
      store_part<T, kPer>(static_cast<T*>(p.y) + i, left, y);
    }
  }
};

void dequantize_blocks(const DequantizeBlocks& p, Stream stream) {
  if (blocks_of_scales("dequantize_blocks", p.count, p.block_size, {p.codes, p.y}) == 0) return;
  with_type(p.type, [&]<typename T>(T) {
    using Kernel = DequantizedBlocks<T>;
    arch::launch<Kernel>(blocks_of(p.count, Kernel::kChunk), Kernel::kSharedBytes, stream, {p, log2_of(p.block_size)});
  });
}

}  // namespace

void add_quantize_blocks(Kernels& kernels) {
  kernels.quantize_4 = quantize_4;
  kernels.dequantize_4 = dequantize_4;
  kernels.quantize_blocks = quantize_blocks;
  kernels.dequantize_blocks = dequantize_blocks;
}

}  // namespace trireme::kernels::TRIREME_ARCH
