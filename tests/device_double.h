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

std::vector<std::string> uuids_of_double();  // of the devices that this rank sees
void install_nccl_of_double();
std::shared_ptr<bool> last_call_in(c10::StreamId stream);  // set when NCCL's calls there so far are done; null where none waits
void advance_nccl_of_double();

}  // namespace trireme
