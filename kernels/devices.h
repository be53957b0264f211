// What CUDA says of devices beside a DeviceReport (kernels.h), without touching them.
#pragma once

#include <cstddef>
#include <string>

namespace trireme::kernels {

// Why the devices could not be counted, in CUDA's words; "" where they could, or where there is no driver, none that is new enough, or no device.
std::string counting_failure();

// 16 bytes, the same from whatever process and under whatever number the device is seen; "" where it does not say them.
std::string device_uuid(int index);

// Shared memory that a block may take where it asks for it; 0 where the device does not say.
size_t shared_bytes_per_block(int index);
// What kernels ask for on every device but those that have kernels of their own: all that an A100 has.
constexpr size_t kSharedBytesPerBlock = 163 << 10;

}  // namespace trireme::kernels
