// The kernel of emulated_hopper_test.cpp for a GPU: kernels/arch_hopper.h has to compile, and to give the instructions that it says.
#include "hopper_gemm.h"

namespace trireme::kernels::cuda {
template void hopper_gemm(const arch::bf16*, const arch::bf16*, arch::bf16*, int, int, int, int, int, void*);
template void hopper_gemm(const arch::fp16*, const arch::fp16*, arch::fp16*, int, int, int, int, int, void*);
}  // namespace trireme::kernels::cuda
