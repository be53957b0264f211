// The CUDA code of Trireme, as the rest of the program sees it: raw pointers, sizes and streams, no torch and no CUDA
// header, so that every room compiles without a CUDA compiler. Built where TRIREME_CUDA is ON.
#pragma once

#include <cstddef>
#include <string>

namespace trireme::kernels {

// Devices that the driver shows (CUDA_VISIBLE_DEVICES applies); 0 where there is none, or no driver.
int num_devices();

// CUDA's numbers: 13020 is 13.2. `driver`: the newest that the driver supports; 0 without a driver.
struct Versions {
  int driver = 0, runtime = 0;
};
Versions versions();

struct DeviceReport {
  std::string name;
  int compute_major = 0, compute_minor = 0;
  int num_multiprocessors = 0;
  size_t free_bytes = 0, total_bytes = 0;
  std::string failure;  // empty: the device ran a kernel of this build and gave the right numbers
};

// Facts of device `index` (0 .. num_devices() - 1), and a kernel run on it whose 64 Ki results are compared with the
// host's: proves that driver, device and this build's machine code fit together. Leaves nothing allocated.
DeviceReport probe_device(int index);

}  // namespace trireme::kernels
