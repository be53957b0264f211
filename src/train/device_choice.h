// Which device a rank takes, and what is said of devices that cannot be used: functions of what was found, for which no device is needed.
#pragma once

#include <string>
#include <vector>

#include "ops/device.h"

namespace trireme {

// Why CUDA has no device to use, where `count` were found; "" where none is missed. `failure`: what CUDA said instead of a count.
std::string missing_devices_text(int count, const kernels::Versions& versions, const std::string& failure);

// ConfigError where the device is too old for the kernels, lets a block have less shared memory (0: unknown) than they need, or has not
// run one.
void check_device_report(int index, const kernels::DeviceReport& report, size_t shared_bytes, size_t needed_shared_bytes);

// `seen[r]`: the UUIDs of the devices that rank r sees, in its order, of the ranks of one host that use devices; a UUID may be "": unknown.
// Returns each rank's index into its own. Of the ranks that see the same devices, the k-th takes number k: a rank alone in what it sees
// takes its first. `share`: more ranks than devices go round. Else ConfigError, which begins with `key`, where they are more, or where
// ranks that see different devices would both take one.
std::vector<int> device_of_ranks(const std::vector<std::vector<std::string>>& seen, bool share, const std::string& key);

}  // namespace trireme
