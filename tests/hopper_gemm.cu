// The kernels of emulated_hopper_test.cpp for a GPU: kernels/arch_hopper.h has to compile, to give the instructions that it says, and to
// multiply where there is a device.
#include "hopper_gemm.h"

#include <iterator>
#include <utility>

namespace trireme::kernels::cuda {
namespace {

template <typename T, size_t... kForms>
void multiply(size_t form, std::index_sequence<kForms...>, const void* a, const void* b, void* c, int m, int n, int k, int stride_a, int stride_b, int stride_c) {
  (void)((form == kForms && (hopper_gemm<T, kGemmForms[kForms]>(static_cast<const T*>(a), static_cast<const T*>(b), static_cast<T*>(c), m, n, k, stride_a, stride_b, stride_c, nullptr), true)) || ...);
}

}  // namespace

void hopper_gemm(bool of_bf16, size_t form, const void* a, const void* b, void* c, int m, int n, int k, int stride_a, int stride_b, int stride_c) {
  constexpr auto kAll = std::make_index_sequence<std::size(kGemmForms)>();
  of_bf16 ? multiply<arch::bf16>(form, kAll, a, b, c, m, n, k, stride_a, stride_b, stride_c) : multiply<arch::fp16>(form, kAll, a, b, c, m, n, k, stride_a, stride_b, stride_c);
}

}  // namespace trireme::kernels::cuda
