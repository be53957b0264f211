// cuBLASLt on the host: products by loops in fp64, rounded once. It takes what the real one takes by its documentation (cublasLtMatmul:
// the table of types and float8's conditions; cublasLt.h: sizes of attributes, alignments) and refuses the rest. Where it has a
// choice it makes the unkind one:
//   - an algorithm serves the problem that it was chosen for alone, at addresses of the alignment that was promised
//   - long sums are cut into parts where that is allowed: in the workspace, which it overwrites, or rounded to the output's type
#include "kernels/cublaslt.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstring>
#include <functional>
#include <tuple>
#include <vector>

#include "kernels/arch.h"
#include "kernels/reference.h"

namespace trireme::kernels {

struct LtContext {};
struct LtLayoutOpaque {
  int type;
  uint64_t rows, columns;
  int64_t stride;
  auto operator<=>(const LtLayoutOpaque&) const = default;
};
struct LtProductOpaque {
  int compute = 0, scale = 0;
  int32_t transpose_a = 0, transpose_b = 0;
  uint32_t epilogue = kLtNoEpilogue;
  const void* bias = nullptr;
  const float *scale_a = nullptr, *scale_b = nullptr;
};
struct LtPreferenceOpaque {
  uint64_t max_workspace = 0;
  uint32_t schemes = 7, alignment[4] = {256, 256, 256, 256};  // of a, b, c, d
};

namespace {

namespace arch = emulated::arch;

std::atomic<int64_t> num_objects = 0, num_questions = 0;
std::atomic<int> capability = 90;

template <typename T>
int make(T** out, const T& object) {
  ++num_objects;
  *out = new T(object);
  return kLtSuccess;
}
template <typename T>
int destroy(T* object) {
  --num_objects;
  delete object;
  return kLtSuccess;
}
template <typename T>
int assign(T& field, const void* value, size_t num_bytes) {
  if (!value || num_bytes != sizeof(T)) return kLtInvalidValue;
  std::memcpy(&field, value, sizeof(T));
  return kLtSuccess;
}

int create(LtHandle* handle) {
  static LtContext context;
  *handle = &context;
  return kLtSuccess;
}
int product_create(LtProduct* product, int compute, int scale) { return make(product, {.compute = compute, .scale = scale}); }
int product_set(LtProduct p, int attribute, const void* value, size_t num_bytes) {
  switch (attribute) {
    case kLtTransposeA: return assign(p->transpose_a, value, num_bytes);
    case kLtTransposeB: return assign(p->transpose_b, value, num_bytes);
    case kLtEpilogue: return assign(p->epilogue, value, num_bytes);
    case kLtBiasPointer: return assign(p->bias, value, num_bytes);
    case kLtScalePointerA: return assign(p->scale_a, value, num_bytes);
    case kLtScalePointerB: return assign(p->scale_b, value, num_bytes);
  }
  return kLtInvalidValue;
}
int layout_create(LtLayout* layout, int type, uint64_t rows, uint64_t columns, int64_t stride) { return make(layout, {type, rows, columns, stride}); }
int preference_create(LtPreference* preference) { return make(preference, {}); }
int preference_set(LtPreference p, int attribute, const void* value, size_t num_bytes) {
  if (attribute == kLtMaxWorkspace) return assign(p->max_workspace, value, num_bytes);
  if (attribute == kLtReductionSchemes) return assign(p->schemes, value, num_bytes);
  if (attribute >= kLtAlignmentA && attribute <= kLtAlignmentD) return assign(p->alignment[attribute - kLtAlignmentA], value, num_bytes);
  return kLtInvalidValue;
}

uint64_t size_of_number(int type) { return type == kLtFloat32 ? 4 : type == kLtFloat16 || type == kLtBFloat16 ? 2 : 1; }
bool is_float8(int type) { return type == kLtFloat8E4M3 || type == kLtFloat8E5M2; }

template <typename T>
T at(const void* x, int64_t i) {
  T value;
  std::memcpy(&value, static_cast<const T*>(x) + i, sizeof(T));
  return value;
}
double read(int type, const void* x, int64_t i) {
  switch (type) {
    case kLtFloat32: return at<float>(x, i);
    case kLtFloat16: return arch::to_float(at<arch::fp16>(x, i));
    case kLtBFloat16: return arch::to_float(at<arch::bf16>(x, i));
    case kLtFloat8E4M3: return arch::to_float(at<arch::e4m3>(x, i));
  }
  return arch::to_float(at<arch::e5m2>(x, i));
}
double rounded(int type, double x) {
  return reference::round_to(type == kLtFloat32 ? Type::kFloat32 : type == kLtFloat16 ? Type::kFloat16 : Type::kBFloat16, x);
}
void write(int type, void* x, int64_t i, double value) {
  const float y = static_cast<float>(rounded(type, value));
  auto put = [&](auto number) { std::memcpy(static_cast<decltype(number)*>(x) + i, &number, sizeof number); };
  if (type == kLtFloat32) put(y);
  else if (type == kLtFloat16) put(arch::from_float<arch::fp16>(y));
  else put(arch::from_float<arch::bf16>(y));
}

struct Problem {
  LtProductOpaque product;
  LtLayoutOpaque a, b, c, d;

  uint64_t depth() const { return product.transpose_a ? a.rows : a.columns; }
  // Of the value of no pointer but the bias's, whose alignment counts.
  uint64_t hash() const {
    uint64_t h = 1;
    auto add = [&](uint64_t x) { h = std::rotl((h ^ x) * 0x9e3779b97f4a7c15u, 29); };
    for (const LtLayoutOpaque& m : {a, b, c, d})
      for (uint64_t x : {static_cast<uint64_t>(m.type), m.rows, m.columns, static_cast<uint64_t>(m.stride)}) add(x);
    for (int x : {product.compute, product.scale, product.transpose_a, product.transpose_b, static_cast<int>(product.epilogue)}) add(static_cast<uint64_t>(x));
    add(std::countr_zero(reinterpret_cast<uintptr_t>(product.bias) | 256)), add(product.scale_a != nullptr), add(product.scale_b != nullptr);
    return h;
  }

  int status() const {
    for (const LtLayoutOpaque& m : {a, b, c, d})
      if (m.rows < 1 || m.columns < 1 || m.rows >> 31 || m.columns >> 31 || m.stride < static_cast<int64_t>(m.rows)) return kLtInvalidValue;
    if ((product.transpose_a ? a.columns : a.rows) != d.rows || (product.transpose_b ? b.rows : b.columns) != d.columns ||
        (product.transpose_b ? b.columns : b.rows) != depth() || c != d)
      return kLtInvalidValue;
    if (product.epilogue != kLtNoEpilogue && (product.epilogue != kLtBias || !product.bias)) return kLtInvalidValue;
    if (product.scale != kLtFloat32) return kLtNotSupported;
    const bool to_16_bits = d.type == kLtBFloat16 || d.type == kLtFloat16;
    if (is_float8(a.type) || is_float8(b.type)) return is_float8(a.type) && is_float8(b.type) ? float8_status(to_16_bits) : kLtNotSupported;
    if (product.scale_a || product.scale_b) return kLtInvalidValue;
    if (a.type != b.type || (d.type != a.type && d.type != kLtFloat32)) return kLtNotSupported;
    return product.compute == kLtCompute32 || (product.compute == kLtComputeTf32 && a.type == kLtFloat32) ? kLtSuccess : kLtNotSupported;
  }
  int float8_status(bool to_16_bits) const {
    if (capability < 89 || product.compute != kLtCompute32 || (a.type == kLtFloat8E5M2 && b.type == kLtFloat8E5M2) || (!to_16_bits && d.type != kLtFloat32)) return kLtNotSupported;
    if (!product.transpose_a || product.transpose_b) return kLtNotSupported;
    if (product.epilogue == kLtBias && !to_16_bits) return kLtNotSupported;  // its bias would be bfloat16, which has to be said
    for (const LtLayoutOpaque& m : {a, b, d})
      if (m.rows * size_of_number(m.type) % 16 || static_cast<uint64_t>(m.stride) * size_of_number(m.type) % 16) return kLtNotSupported;
    return a.columns % 16 == 0 ? kLtSuccess : kLtNotSupported;
  }
};

enum Sum : uint64_t { kWhole, kInWorkspace, kInOutput };

int heuristic(LtHandle handle, LtProduct product, LtLayout a, LtLayout b, LtLayout c, LtLayout d, LtPreference preference, int count, LtHeuristic* found, int* num_found) {
  ++num_questions;
  *num_found = 0;
  if (!handle || !product || !a || !b || !c || !d || !preference || count < 1) return kLtInvalidValue;
  const Problem problem{*product, *a, *b, *c, *d};
  if (const int status = problem.status(); status != kLtSuccess) return status;
  const uint32_t least = is_float8(a->type) ? 16 : 1;
  for (uint32_t alignment : preference->alignment)
    if (!std::has_single_bit(alignment) || alignment < least) return kLtNotSupported;
  constexpr uint64_t kLong = 256;
  const uint64_t workspace = 2 * d->rows * d->columns * 4;
  Sum sum = kWhole;
  if (problem.depth() >= kLong && preference->schemes & 5) sum = kInOutput;
  else if (problem.depth() >= kLong && preference->schemes & kLtSumsInFp32 && workspace <= preference->max_workspace) sum = kInWorkspace;
  const uint32_t* alignment = preference->alignment;
  *found = {{{problem.hash(), sum, alignment[0], alignment[1], alignment[2], alignment[3]}}, sum == kInWorkspace ? workspace : 0, kLtSuccess, 1, {}};
  *num_found = 1;
  return kLtSuccess;
}

float to_tf32(double x) {  // 10 bits behind the point
  const uint32_t bits = std::bit_cast<uint32_t>(static_cast<float>(x));
  return std::bit_cast<float>((bits + 0xfff + (bits >> 13 & 1)) & ~0x1fffu);
}

// [rows, columns] of op(x), row by row.
std::vector<double> values(const LtLayoutOpaque& m, bool transpose, bool tf32, const void* x) {
  const uint64_t rows = transpose ? m.columns : m.rows, columns = transpose ? m.rows : m.columns;
  std::vector<double> out(rows * columns);
  for (uint64_t r = 0; r < rows; ++r)
    for (uint64_t c = 0; c < columns; ++c) {
      const double value = read(m.type, x, transpose ? static_cast<int64_t>(r) * m.stride + static_cast<int64_t>(c) : static_cast<int64_t>(c) * m.stride + static_cast<int64_t>(r));
      out[r * columns + c] = tf32 ? to_tf32(value) : value;
    }
  return out;
}

int matmul(LtHandle handle, LtProduct product, const void* alpha, const void* a, LtLayout a_layout, const void* b, LtLayout b_layout, const void* beta, const void* c,
           LtLayout c_layout, void* d, LtLayout d_layout, const LtAlgorithm* algorithm, void* workspace, size_t workspace_bytes, void*) {
  if (!handle || !product || !alpha || !beta || !a || !b || !c || !d || !a_layout || !b_layout || !c_layout || !d_layout || !algorithm) return kLtInvalidValue;
  const Problem problem{*product, *a_layout, *b_layout, *c_layout, *d_layout};
  if (const int status = problem.status(); status != kLtSuccess) return status;
  if (algorithm->data[0] != problem.hash()) return kLtInvalidValue;
  const void* addresses[] = {a, b, c, d};
  const LtLayoutOpaque* layouts[] = {a_layout, b_layout, c_layout, d_layout};
  for (size_t i = 0; i < 4; ++i)
    if (reinterpret_cast<uintptr_t>(addresses[i]) % std::max(algorithm->data[2 + i], size_of_number(layouts[i]->type))) return kLtInvalidValue;
  const uint64_t rows = d_layout->rows, columns = d_layout->columns, depth = problem.depth();
  const Sum sum = static_cast<Sum>(algorithm->data[1]);
  if (sum == kInWorkspace) {
    if (!workspace || reinterpret_cast<uintptr_t>(workspace) % 256 || workspace_bytes < 2 * rows * columns * 4) return kLtInvalidValue;
    std::memset(workspace, 0xff, 2 * rows * columns * 4);
  }
  const bool tf32 = product->compute == kLtComputeTf32;
  const std::vector<double> left = values(*b_layout, !product->transpose_b, tf32, b), right = values(*a_layout, !product->transpose_a, tf32, a);  // [columns, depth], [depth, rows]
  const double scale = double{at<float>(alpha, 0)} * (product->scale_a ? *product->scale_a : 1) * (product->scale_b ? *product->scale_b : 1), keep = at<float>(beta, 0);
  const uint64_t part = sum == kInOutput ? (depth + 1) / 2 : depth;
  std::vector<double> row(rows), total(rows);
  for (uint64_t j = 0; j < columns; ++j) {  // a column of theirs, a row of ours
    std::fill(total.begin(), total.end(), 0);
    for (uint64_t first = 0; first < depth; first += part) {
      std::fill(row.begin(), row.end(), 0);
      for (uint64_t k = first; k < std::min(depth, first + part); ++k)
        for (uint64_t i = 0; i < rows; ++i) row[i] += left[j * depth + k] * right[k * rows + i];
      for (uint64_t i = 0; i < rows; ++i) total[i] += sum == kInOutput ? rounded(d_layout->type, row[i]) : row[i];
    }
    for (uint64_t i = 0; i < rows; ++i) {
      const int64_t at_d = static_cast<int64_t>(j) * d_layout->stride + static_cast<int64_t>(i);
      double value = scale * total[i];
      if (keep != 0) value += keep * read(d_layout->type, c, at_d);
      if (product->epilogue == kLtBias) value += read(d_layout->type, product->bias, static_cast<int64_t>(i));
      write(d_layout->type, d, at_d, value);
    }
  }
  return kLtSuccess;
}

}  // namespace

const CublasLt& emulated_cublaslt() {
  static const CublasLt lt = {
      .get_version = [] { return size_t{130100}; },
      .get_status_string = [](int status) { return status == kLtSuccess ? "success" : status == kLtNotSupported ? "not supported" : "an unsupported value or parameter"; },
      .create = create,
      .product_create = product_create,
      .product_destroy = destroy<LtProductOpaque>,
      .product_set = product_set,
      .layout_create = layout_create,
      .layout_destroy = destroy<LtLayoutOpaque>,
      .preference_create = preference_create,
      .preference_destroy = destroy<LtPreferenceOpaque>,
      .preference_set = preference_set,
      .heuristic = heuristic,
      .matmul = matmul,
  };
  return lt;
}

LtCounts emulated_cublaslt_counts() { return {num_objects, num_questions}; }
void set_emulated_capability(int major, int minor) { capability = 10 * major + minor; }

}  // namespace trireme::kernels
