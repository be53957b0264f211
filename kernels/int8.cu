// Rows in eight bits (LLM.int8(), Dettmers et al. 2022).
#include "kernels/elements.h"
#include "kernels/kernels.h"

namespace trireme::kernels::TRIREME_ARCH {
namespace {

ARCH_FN float magnitude(float x) { return x < 0 ? -x : x; }
ARCH_FN int8_t nearest_code(float x) {
  const int code = arch::nearest(x);
  return static_cast<int8_t>(code > 127 ? 127 : code < -127 ? -127 : code);
}

// A block has a row: its largest magnitude below the threshold, and which columns have one that is not.
template <typename T, int kPer>
struct LargestOfRows {
  using Params = QuantizeRows;
  static constexpr int kThreads = 256, kSharedBytes = kThreads / arch::kWarp * 4;

  ARCH_FN static void run(const Params& p) {
    const int64_t row = arch::block_index().x;
    float largest = 0;
    for (int64_t c = arch::thread_index() * kPer; c < p.width; c += kThreads * kPer) {
      float x[kPer] = {};
      load_part<T, kPer>(static_cast<const T*>(p.x) + row * p.width + c, p.width - c, x);
      ARCH_UNROLL
      for (int e = 0; e < kPer; ++e) {
        const bool outlier = p.threshold > 0 && !(magnitude(x[e]) < p.threshold);  // NaNs, too
        if (outlier) p.outlier[c + e] = 1;  // by whoever sees one
        else largest = arch::max(largest, magnitude(x[e]));
      }
    }
    largest = arch::block_max<kThreads>(largest, arch::shared<float>(0, kThreads / arch::kWarp));
    if (arch::thread_index() == 0) p.absmax[row] = largest;
  }
};

struct NoOutliers {
  struct Params {
    uint8_t* outlier;
    int64_t width;
  };
  static constexpr int kThreads = 256;
  ARCH_FN static void run(const Params& p) {
    const int64_t c = int64_t{arch::block_index().x} * kThreads + arch::thread_index();
    if (c < p.width) p.outlier[c] = 0;
  }
};

template <typename T, int kPer>
struct QuantizedRows {
  struct Params : QuantizeRows {
    Parts parts;
  };
  static constexpr int kThreads = Parts::kThreads;

  ARCH_FN static void run(const Params& p) {
    with_part<kPer>(p.parts, [&](int64_t row, int64_t c, int64_t count) {
      float x[kPer] = {};
      load_part<T, kPer>(static_cast<const T*>(p.x) + row * p.width + c, count, x);
      const float scale = 127 / p.absmax[row];
      Several<int8_t, kPer> code;
      ARCH_UNROLL
      for (int e = 0; e < kPer; ++e) {
        const bool none = p.threshold > 0 && e < count && p.outlier[c + e] != 0;
        code.value[e] = none ? int8_t{0} : nearest_code(x[e] * scale);
      }
      int8_t* const to = p.codes + row * p.width + c;
      if (kPer > 1 && count >= kPer) {
        arch::store(to, code);
      } else {
        for (int e = 0; e < kPer && e < count; ++e) to[e] = code.value[e];
      }
    });
  }
};

void refuse_rows(const char* name, int64_t num_rows, int64_t width) {
  if (num_rows < 0 || width < 0) throw Refused(std::string(name) + " of " + std::to_string(num_rows) + " x " + std::to_string(width) + " values");
}

void refuse_outliers(const char* name, const QuantizeRows& p) {
  refuse_rows(name, p.num_rows, p.width);
  if (!(p.threshold >= 0) || (p.threshold > 0) != (p.outlier != nullptr)) throw Refused(std::string(name) + ": a threshold and where its columns are go together");
}

// f(kPer) with the values that are read at once.
template <typename F>
void with_several(const QuantizeRows& p, const F& f) {
  if (in_vectors(p.width, {p.x, p.codes})) f(Constant<16>());
  else f(Constant<1>());
}

void largest_of_rows(const QuantizeRows& p, Stream stream) {
  refuse_outliers("largest_of_rows", p);
  if (p.outlier && p.width > 0) arch::launch<NoOutliers>(blocks_of(p.width, NoOutliers::kThreads), 0, stream, {p.outlier, p.width});
  if (p.num_rows == 0 || p.width == 0) return;
  with_type(p.type, [&]<typename T>(T) {
    with_several(p, [&](auto per) {
      using Largest = LargestOfRows<T, per()>;
      arch::launch<Largest>(blocks_of(p.num_rows, 1), Largest::kSharedBytes, stream, p);
    });
  });
}

void quantize_rows(const QuantizeRows& p, Stream stream) {
  refuse_outliers("quantize_rows", p);
  if (p.num_rows == 0 || p.width == 0) return;
  with_type(p.type, [&]<typename T>(T) {
    with_several(p, [&](auto per) {
      const Parts parts = Parts::of(p.num_rows, p.width, false, per());
      arch::launch<QuantizedRows<T, per()>>(parts.grid(), 0, stream, {p, parts});
    });
  });
}

template <typename T, int kPer>
struct DequantizedRows {
  struct Params : DequantizeRows {
    Parts parts;
  };
  static constexpr int kThreads = Parts::kThreads;

  ARCH_FN static void run(const Params& p) {
    with_part<kPer>(p.parts, [&](int64_t row, int64_t c, int64_t count) {
      const int8_t* const from = p.codes + row * p.width + c;
      Several<int8_t, kPer> code = {};
      if (kPer > 1 && count >= kPer) {
        code = arch::load<Several<int8_t, kPer>>(from);
      } else {
        for (int e = 0; e < kPer && e < count; ++e) code.value[e] = from[e];
      }
      const float scale = p.absmax[row];
      float y[kPer];
      ARCH_UNROLL
      for (int e = 0; e < kPer; ++e) y[e] = static_cast<float>(code.value[e]) * scale * (1.0f / 127);
      store_part<T, kPer>(static_cast<T*>(p.y) + row * p.width + c, count, y);
    });
  }
};

void dequantize_rows(const DequantizeRows& p, Stream stream) {
  refuse_rows("dequantize_rows", p.num_rows, p.width);
  if (p.num_rows == 0 || p.width == 0) return;
  with_type(p.type, [&]<typename T>(T) {
    const auto run = [&](auto per) {
      const Parts parts = Parts::of(p.num_rows, p.width, false, per());
      arch::launch<DequantizedRows<T, per()>>(parts.grid(), 0, stream, {p, parts});
    };
    if (in_vectors(p.width, {p.codes, p.y})) run(Constant<16>());
    else run(Constant<1>());
  });
}

template <typename T, int kPer>
struct ScaledProducts {
  struct Params : ScaleProducts {
    Parts parts;
  };
  static constexpr int kThreads = Parts::kThreads;

  ARCH_FN static void run(const Params& p) {
    with_part<kPer>(p.parts, [&](int64_t row, int64_t c, int64_t count) {
      const int32_t* const from = p.products + row * p.width + c;
      Several<int32_t, kPer> product = {};
      if (kPer > 1 && count >= kPer) {
        product = arch::load<Several<int32_t, kPer>>(from);
      } else {
        for (int e = 0; e < kPer && e < count; ++e) product.value[e] = from[e];
      }
      float y[kPer] = {}, bias[kPer] = {}, column[kPer] = {};
      load_part<float, kPer>(p.column + c, count, column);
      if (p.bias) load_part<T, kPer>(static_cast<const T*>(p.bias) + c, count, bias);
      const float row_scale = p.row[row];
      ARCH_UNROLL
      for (int e = 0; e < kPer; ++e) y[e] = arch::product(static_cast<float>(product.value[e]) * row_scale * column[e], 1.0f / 16129) + bias[e];
      store_part<T, kPer>(static_cast<T*>(p.y) + row * p.width + c, count, y);
    });
  }
};

void scale_products(const ScaleProducts& p, Stream stream) {
  refuse_rows("scale_products", p.num_rows, p.width);
  if (p.num_rows == 0 || p.width == 0) return;
  with_type(p.type, [&]<typename T>(T) {
    const auto run = [&](auto per) {
      const Parts parts = Parts::of(p.num_rows, p.width, false, per());
      arch::launch<ScaledProducts<T, per()>>(parts.grid(), 0, stream, {p, parts});
    };
    if (in_vectors(p.width * size_of(p.type), {p.products, p.column, p.bias, p.y})) run(Constant<8>());
    else run(Constant<1>());
  });
}

}  // namespace

void add_int8(Kernels& kernels) {
  kernels.largest_of_rows = largest_of_rows;
  kernels.quantize_rows = quantize_rows;
  kernels.dequantize_rows = dequantize_rows;
  kernels.scale_products = scale_products;
}

}  // namespace trireme::kernels::TRIREME_ARCH
