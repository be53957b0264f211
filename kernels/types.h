// What the arguments of kernels are made of.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace trireme::kernels {

enum class Type { kFloat32, kBFloat16, kFloat16, kFloat8E4M3, kFloat8E5M2 };  // float8: of matrix products alone
constexpr int64_t size_of(Type type) { return type == Type::kFloat32 ? 4 : type == Type::kBFloat16 || type == Type::kFloat16 ? 2 : 1; }

using Stream = void*;  // cudaStream_t

// What a kernel refuses, in a sentence.
struct Refused : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

}  // namespace trireme::kernels
