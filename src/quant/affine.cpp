#include "quant/affine.h"

#include "ops/device.h"
#include "ops/op_support.h"
#include "quant/quant_loops.h"

namespace trireme {
namespace {

// Groups in pieces, so that one large group is the work of several threads.
struct Pieces {
  static constexpr int64_t kSize = 1 << 16;
  Pieces(int64_t num_values, int64_t group_size)
      : count(num_values), group(std::max<int64_t>(1, group_size == 0 ? num_values : group_size)), per_group((group + kSize - 1) / kSize), num_groups((count + group - 1) / group) {}

  // f(piece, group, first value, number of them)
  template <typename F>
  void for_all(const F& f) const {
    for_rows(num_groups * per_group, std::min(group, kSize), [&](int64_t first, int64_t last) {
      for (int64_t p = first; p < last; ++p) {
        const int64_t g = p / per_group, begin = std::min(count, g * group + p % per_group * kSize);
        f(p, g, begin, std::min({kSize, count - begin, (g + 1) * group - begin}));
      }
    });
  }
  int64_t count, group, per_group, num_groups;
};

void check_format(const AffineFormat& format, int64_t group_size) {
  TRIREME_CHECK((format.bits == 4 || format.bits == 8) && group_size >= 0 && !(format.bits == 4 && group_size % 2 != 0), format.bits, " bits in groups of ", group_size);
}

int64_t code_bytes(const AffineFormat& format, int64_t count) { return format.bits == 8 ? count : (count + 1) / 2; }

}  // namespace

AffineTensor quantize_affine(const at::Tensor& any, const AffineFormat& format, int64_t group_size) {
  check_format(format, group_size);
  const at::Tensor x = quantizable(any);
  const Pieces pieces(x.numel(), group_size);
  AffineTensor q{format, group_size, at::empty({code_bytes(format, pieces.count)}, x.options().dtype(format.bits == 8 ? at::kChar : at::kByte)),
                 at::empty({pieces.num_groups}, x.options().dtype(at::kFloat)), {}};
  if (format.zero_point) q.zero = at::empty({pieces.num_groups}, x.options().dtype(at::kChar));
  uint8_t* const codes = static_cast<uint8_t*>(q.codes.data_ptr());
  float* const scale = q.scale.data_ptr<float>();
  int8_t* const zero = static_cast<int8_t*>(data_of(q.zero));
  if (const kernels::Kernels* k = kernels_of(x)) {
    const at::Tensor workspace = at::empty({kernels::quantize_groups_workspace(pieces.count, pieces.group)}, q.scale.options());
    k->quantize_groups({kernel_type(x), format, pieces.count, pieces.group, data_of(x), codes, scale, zero, workspace.data_ptr<float>()}, stream_of(x));
    return q;
  }
  with_quant_loops(x.scalar_type(), [&](const auto& loops, auto scalar) {
    const auto* values = x.data_ptr<decltype(scalar)>();
    std::vector<Extent> extents(static_cast<size_t>(pieces.num_groups * pieces.per_group));
    pieces.for_all([&](int64_t piece, int64_t, int64_t begin, int64_t size) { extents[static_cast<size_t>(piece)] = loops.extent(size, values + begin); });
    std::vector<AffineGroup> groups;
    for (int64_t g = 0; g < pieces.num_groups; ++g) {
      Extent all;
      for (int64_t p = g * pieces.per_group; p < (g + 1) * pieces.per_group; ++p) {
        all.low = std::min(all.low, extents[static_cast<size_t>(p)].low);
        all.high = std::max(all.high, extents[static_cast<size_t>(p)].high);
      }
      groups.push_back(affine_group(format, all));
      scale[g] = groups.back().scale;
      if (zero) zero[g] = static_cast<int8_t>(groups.back().zero);
    }
    pieces.for_all([&](int64_t, int64_t g, int64_t begin, int64_t size) {
      loops.quantize_affine(format, groups[static_cast<size_t>(g)], size, values + begin, codes + begin * format.bits / 8);
    });
  });
  return q;
}

void dequantize_affine(const AffineTensor& q, const at::Tensor& out) {
  check_format(q.format, q.group_size);
  const Pieces pieces(out.numel(), q.group_size);
  check_alike("dequantize_affine", {"result", out}, {{"codes", q.codes}}, q.format.bits == 8 ? at::kChar : at::kByte);
  check_alike("dequantize_affine", {"result", out}, {{"scales", q.scale}}, at::kFloat);
  check_alike("dequantize_affine", {"result", out}, {{"zero points", q.zero}}, at::kChar);
  TRIREME_CHECK(q.zero.defined() == q.format.zero_point && q.codes.numel() == code_bytes(q.format, pieces.count) && q.scale.numel() == pieces.num_groups &&
                    (!q.zero.defined() || q.zero.numel() == pieces.num_groups),
                q.codes.sizes(), q.scale.sizes(), out.sizes());
  TRIREME_CHECK(out.is_contiguous() && q.codes.is_contiguous() && q.scale.is_contiguous() && (!q.zero.defined() || q.zero.is_contiguous()), out.strides());
  const uint8_t* const codes = static_cast<const uint8_t*>(q.codes.data_ptr());
  const float* const scale = q.scale.data_ptr<float>();
  const int8_t* const zero = static_cast<const int8_t*>(data_of(q.zero));
  if (const kernels::Kernels* k = kernels_of(out))
    return k->dequantize_groups({kernel_type(out), q.format, pieces.count, pieces.group, codes, scale, zero, data_of(out)}, stream_of(out));
  with_quant_loops(out.scalar_type(), [&](const auto& loops, auto scalar) {
    auto* values = out.data_ptr<decltype(scalar)>();
    pieces.for_all([&](int64_t, int64_t g, int64_t begin, int64_t size) {
      loops.dequantize_affine(q.format, scale[g], zero ? zero[g] : kernels::symmetric_zero(q.format), size, codes + begin * q.format.bits / 8, values + begin);
    });
  });
}

}  // namespace trireme
