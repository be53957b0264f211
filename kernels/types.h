// What the arguments of kernels are made of.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace trireme::kernels {

enum class Type { kFloat32, kBFloat16, kFloat16 };
constexpr int64_t size_of(Type type) { return type == Type::kFloat32 ? 4 : 2; }

using Stream = void*;  // cudaStream_t

// What a kernel refuses, in a sentence.
struct Refused : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

}  // namespace trireme::kernels
