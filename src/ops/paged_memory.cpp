#include "base/tensor.h"

#include "ops/paged_memory.h"

#include <array>

#include "base/check.h"

namespace trireme {
namespace {

std::array<PagedMemory, static_cast<size_t>(at::DeviceType::COMPILE_TIME_MAX_DEVICE_TYPES)> memories{};

}  // namespace

void set_paged_memory(at::DeviceType type, const PagedMemory& memory) { memories.at(static_cast<size_t>(type)) = memory; }

const PagedMemory& paged_memory_of(at::Device device) {
  const PagedMemory& memory = memories.at(static_cast<size_t>(device.type()));
  TRIREME_CHECK(memory.allocate, "no paged memory on ", device.str());
  return memory;
}

at::Tensor paged_bytes(int64_t num_bytes, at::Device device) {
  const PagedMemory& memory = paged_memory_of(device);
  return at::for_blob(memory.allocate(static_cast<size_t>(num_bytes), device), {num_bytes}).deleter(memory.free).target_device(device)
      .options(at::TensorOptions(at::kByte).device(device)).make_tensor();
}

}  // namespace trireme
