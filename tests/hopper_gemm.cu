// The kernel of emulated_hopper_test.cpp for a GPU: kernels/arch_hopper.h has to compile, to give the instructions that it says, and to
// multiply where there is a device.
#include "hopper_gemm.h"

namespace trireme::kernels::cuda {
namespace {

template <typename T>
void multiply(const void* a, const void* b, void* c, int m, int n, int k, int stride_k, int stride_n) {
  hopper_gemm(static_cast<const T*>(a), static_cast<const T*>(b), static_cast<T*>(c), m, n, k, stride_k, stride_n, nullptr);
}

}  // namespace

void hopper_gemm(bool of_bf16, const void* a, const void* b, void* c, int m, int n, int k, int stride_k, int stride_n) {
  of_bf16 ? multiply<arch::bf16>(a, b, c, m, n, k, stride_k, stride_n) : multiply<arch::fp16>(a, b, c, m, n, k, stride_k, stride_n);
}

}  // namespace trireme::kernels::cuda
