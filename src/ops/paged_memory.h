// Memory of a device whose pages its driver moves: to the host's memory while the device is full, and back when they are touched there,
// or ahead of that where it is asked to (CUDA: managed memory). Nothing is asked of whoever computes with it.
#pragma once

#include "base/tensor.h"
#include "kernels/types.h"

namespace trireme {

struct PagedMemory {
  // Not on the device yet, and holding anything. ConfigError where a device's driver moves no pages; SystemError where the host has no room.
  void* (*allocate)(size_t num_bytes, at::Device device);
  void (*free)(void* data);
  // Moves to the device in the stream, which nobody waits for; others that have been there longest leave it where it is full.
  void (*prefetch)(const void* data, size_t num_bytes, at::Device device, kernels::Stream stream);
};

// Before any is taken.
void set_paged_memory(at::DeviceType type, const PagedMemory& memory);
// InternalError: a kind of device without.
const PagedMemory& paged_memory_of(at::Device device);

// uint8 [num_bytes] there.
at::Tensor paged_bytes(int64_t num_bytes, at::Device device);

}  // namespace trireme
