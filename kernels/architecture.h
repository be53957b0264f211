// Which kernels are chosen: those for 80 (sm_80 and whatever has none of its own) or 90 (Hopper).
#pragma once

namespace trireme::kernels {

namespace cuda {
int architecture();
// From here on, of all devices, for tests and to time one family on another's device; 0: the current device's own, as at first.
void set_architecture(int architecture);
}  // namespace cuda
namespace emulated {
int architecture();
void set_architecture(int architecture);  // 0: 80
}  // namespace emulated

}  // namespace trireme::kernels
