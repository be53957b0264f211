// What the operations share: what their arguments must have in common, dtype dispatch, splitting rows over threads, and tensors
// that are kept for backward.
#pragma once

#include <ATen/Parallel.h>

#include <initializer_list>
#include <string_view>

#include "base/check.h"
#include "base/tensor.h"
#include "ops/loops.h"

namespace trireme {

struct NamedTensor {
  const char* name;
  const at::Tensor& tensor;
};
[[noreturn]] void refuse_unlike(std::string_view of, const NamedTensor& first, const NamedTensor& other, at::ScalarType wanted);

// InternalError, which names the operation, the tensor and what it is and has to be, where one of `others` is on another device than
// `first` or its dtype is not `dtype` (default: that of `first`). Undefined ones are left out. Loops and kernels are given bare
// pointers: nothing behind this would notice.
inline void check_alike(std::string_view of, const NamedTensor& first, std::initializer_list<NamedTensor> others, at::ScalarType dtype) {
  for (const NamedTensor& other : others)
    if (other.tensor.defined() && (other.tensor.scalar_type() != dtype || other.tensor.device() != first.tensor.device())) [[unlikely]]
      refuse_unlike(of, first, other, dtype);
}
inline void check_alike(std::string_view of, const NamedTensor& first, std::initializer_list<NamedTensor> others) {
  check_alike(of, first, others, first.tensor.scalar_type());
}

// f(T{}) with the C++ type of a floating dtype.
template <typename F>
void dispatch_floating(at::ScalarType dtype, F&& f) {
  switch (dtype) {
    case at::kFloat:
      return f(float{});
    case at::kDouble:
      return f(double{});
    case at::kBFloat16:
      return f(c10::BFloat16{});
    case at::kHalf:
      return f(c10::Half{});
    default:
      TRIREME_CHECK(false, "dtype ", c10::toString(dtype), " is not float32, float64, bfloat16 or float16");
  }
}

// What values of `dtype` are accumulated in.
inline at::ScalarType compute_dtype(at::ScalarType dtype) { return dtype == at::kDouble ? at::kDouble : at::kFloat; }

// f(begin, end) over the rows on all threads; small work stays on one. f may not depend on where it is cut.
template <typename F>
void for_rows(int64_t rows, int64_t row_size, const F& f) {
  at::parallel_for(0, rows, std::max<int64_t>(1, 16384 / std::max<int64_t>(1, row_size)), f);
}

// Sums over rows are taken per chunk and then over chunks; the cut is a function of the number of rows alone, so the
// result is the same on any number of threads.
struct RowChunks {
  explicit RowChunks(int64_t num_rows)
      : rows(num_rows), count(std::clamp<int64_t>(num_rows / 64, 1, 32)), size((num_rows + count - 1) / count) {}
  int64_t begin(int64_t chunk) const { return std::min(rows, chunk * size); }
  int64_t end(int64_t chunk) const { return std::min(rows, (chunk + 1) * size); }
  int64_t rows, count, size;
};

// f(chunk, partial) for every chunk, partial being a zeroed row of `size` values; returns the sum of the rows in order,
// as `dtype`.
template <typename T, typename F>
at::Tensor sum_chunks(const RowChunks& chunks, int64_t size, const F& f) {
  using A = typename ComputeType<T>::type;
  auto options = at::TensorOptions().dtype(c10::CppTypeToScalarType<A>::value);
  at::Tensor partial = at::zeros({chunks.count, size}, options);
  A* data = partial.data_ptr<A>();
  at::parallel_for(0, chunks.count, 1, [&](int64_t first, int64_t last) {
    for (int64_t chunk = first; chunk < last; ++chunk) f(chunk, data + chunk * size);
  });
  at::Tensor sum = at::zeros({size}, options);
  loops<A>().add_rows(chunks.count, size, data, sum.data_ptr<A>());
  return sum.to(c10::CppTypeToScalarType<T>::value);
}

// Sum over the rows of a contiguous [T, C], in its dtype.
at::Tensor sum_rows(const at::Tensor& x_TC);

// A value that can be computed again instead of being kept (SelectiveRecompute).
class Recipe {
 public:
  explicit Recipe(std::function<at::Tensor()> compute) : compute_(std::move(compute)) {}
  void add_user() { ++users_; }
  at::Tensor take();  // computed for the first user, dropped after the last

 private:
  std::function<at::Tensor()> compute_;
  at::Tensor value_;
  int users_ = 0, taken_ = 0;
};

// A tensor that an operation keeps for its backward: itself, or its recipe where it has one. take() ends the keeping;
// a second backward through the same graph is an InternalError.
class Kept : public torch::CustomClassHolder {
 public:
  explicit Kept(const at::Tensor& value);
  at::Tensor take();

 private:
  at::Tensor value_;
  std::shared_ptr<Recipe> recipe_;
};

bool selective_recompute();
// Says how `output` can be computed again; nothing where SelectiveRecompute is off. `compute` owns what it needs.
void register_recipe(const at::Tensor& output, std::function<at::Tensor()> compute);

inline void keep(torch::autograd::AutogradContext* ctx, const char* name, const at::Tensor& value) {
  ctx->saved_data[name] = c10::IValue::make_capsule(c10::make_intrusive<Kept>(value));
}
inline at::Tensor take(torch::autograd::AutogradContext* ctx, const char* name) {
  return c10::static_intrusive_pointer_cast<Kept>(ctx->saved_data.at(name).toCapsule())->take();
}

inline bool wants_gradient(const at::Tensor& t) {
  return t.defined() && t.requires_grad() && at::GradMode::is_enabled();
}

}  // namespace trireme
