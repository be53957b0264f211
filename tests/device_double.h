// Between the parts of the double of a device (device_double.cpp).
#pragma once

#include "base/tensor.h"

namespace trireme {

// The double's memory can be touched while one lives.
struct OpenDevice {
  OpenDevice();
  ~OpenDevice();
  OpenDevice(const OpenDevice&) = delete;
  OpenDevice& operator=(const OpenDevice&) = delete;
};

void install_nccl_of_double();

}  // namespace trireme
