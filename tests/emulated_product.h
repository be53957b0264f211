// What tests of products share: matrices with gaps, a product of random ones, and tensors in eight bits.
#pragma once

#include "emulated.h"

namespace trireme::kernels::test {

inline const std::vector<Type> kTypes = {Type::kFloat32, Type::kBFloat16, Type::kFloat16}, kFloat8Types = {Type::kFloat8E4M3, Type::kFloat8E5M2};

template <typename F>
std::string refusal(const F& call) {
  try {
    call();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

// Rows that stand `stride` apart; between them, and before d is written, NaNs.
struct Matrix {
  Matrix(Type t, int64_t r, int64_t c, int64_t gap) : rows(r), columns(c), stride(c + gap), memory(t, r * stride - gap) {}
  Matrix(Type t, int64_t r, int64_t c, int64_t gap, const Values& values) : Matrix(t, r, c, gap) {
    Values all(static_cast<size_t>(memory.size), NAN);
    for (int64_t i = 0; i < r * c; ++i) all[static_cast<size_t>(i / c * stride + i % c)] = values[static_cast<size_t>(i)];
    const Tensor filled(t, all);
    std::memcpy(memory.data(), filled.memory.as(), memory.memory.num_bytes());
  }
  Values values(bool* gaps_are_nan = nullptr) {
    const Values all = memory.values();
    Values out;
    for (int64_t i = 0; i < memory.size; ++i)
      if (i % stride < columns) out.push_back(all[static_cast<size_t>(i)]);
      else if (gaps_are_nan && !std::isnan(all[static_cast<size_t>(i)])) *gaps_are_nan = false;
    return out;
  }
  int64_t rows, columns, stride;
  Tensor memory;
};

struct Product {
  Values a_values, b_values;
  Matrix a, b, d;
  MatMul p;

  Product(Type type, Type d_type, int64_t m, int64_t n, int64_t k, bool transpose_a, bool transpose_b, int64_t gap, const Values& before = {})
      : a_values(random_values(type, m * k, 1)),
        b_values(random_values(type, k * n, 2)),
        a(type, transpose_a ? k : m, transpose_a ? m : k, gap, a_values),
        b(type, transpose_b ? n : k, transpose_b ? k : n, gap, b_values),
        d(before.empty() ? Matrix(d_type, m, n, gap) : Matrix(d_type, m, n, gap, before)) {
    p = {type, type, d_type, m, n, k, transpose_a, transpose_b, a.memory.data(), b.memory.data(), a.stride, b.stride, d.memory.data(), d.stride,
         nullptr, 1, 0, false, nullptr, nullptr, nullptr, 0};
  }
  Values expected() const { return reference::matmul(p.m, p.n, p.k, a_values, p.transpose_a, b_values, p.transpose_b); }
};

inline void run(const MatMul& p) { emulated_kernels().matmul(p, nullptr); }

struct Float8 {
  Float8(Type type, Type from, const Values& values)
      : x(from, values), y(static_cast<int64_t>(values.size())), scale(Type::kFloat32, 1), workspace(kFloat8Partials * 4), to(type) {
    emulated_kernels().to_float8({from, to, x.size, x.data(), y.as(), scale.memory.as<float>(), workspace.as<float>()}, nullptr);
  }
  Values values() const {
    Values out;
    for (int64_t i = 0; i < x.size; ++i)
      out.push_back(to == Type::kFloat8E4M3 ? emulated::arch::to_float(y.as<emulated::arch::e4m3>()[i]) : emulated::arch::to_float(y.as<emulated::arch::e5m2>()[i]));
    return out;
  }
  double by() const { return *scale.memory.as<float>(); }
  Tensor x;
  Guarded y;
  Tensor scale;
  Guarded workspace;
  Type to;
};

}  // namespace trireme::kernels::test
