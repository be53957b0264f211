// Which code computes an operation: the kernels of a tensor's device, where the program has given any. CPU tensors have code of
// their own here (ops/loops.h), but in tests, which may put the emulated kernels in its place.
#pragma once

#include "base/tensor.h"
#include "kernels/kernels.h"

namespace trireme {

// Before any operation; null: none. They stay for ever.
void set_kernels(at::DeviceType device, const kernels::Kernels* kernels);

// Null: the CPU code. InternalError of a tensor on a device without kernels, or of a dtype that they do not know (on the CPU
// these go to the CPU code).
const kernels::Kernels* kernels_of(const at::Tensor& x);

// What kernels may do to be faster.
struct KernelSettings {
  bool tf32 = false;          // products of float32 round their factors to TF32 (10 bits) first
  bool deterministic = true;  // every sum has one order: a step that is repeated has the same bits
};
void set_kernel_settings(const KernelSettings& settings);
KernelSettings kernel_settings();

kernels::Type kernel_type(const at::Tensor& x);      // of one that has kernels
kernels::Stream stream_of(const at::Tensor& x);      // the current one of its device; null on the CPU
// Numbers of the host as a tensor of `dtype` (int64 or int32) on a device, which is not waited for: to CUDA they go through
// pinned memory, which ATen keeps until they have arrived.
at::Tensor to_device(at::IntArrayRef values, at::Device device, at::ScalarType dtype = at::kLong);
inline void* data_of(const at::Tensor& x) { return x.defined() ? x.data_ptr() : nullptr; }  // null: undefined

}  // namespace trireme
