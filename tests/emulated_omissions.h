// Tests of the tests: a kernel from which a barrier or a wait is missing is noticed.
#pragma once

#include "emulated.h"

#ifndef TRIREME_DEVICE_TESTS
namespace trireme::kernels::test {

// Leaves out each call of `op` (arch_emu.h) of run() in turn: a Fault, or another result than the right one, must show it under one of a few
// orders of the threads. Returns how many calls there are, of the first `most`.
template <typename F>
int leave_out_each(const char* op, const F& run, int most = 1000) {
  const auto right = run();
  for (int number = 0; number < most; ++number) {
    bool found = false, met = true;
    for (uint64_t seed = 1; seed <= 6 && met && !found; ++seed) {
      emulated::set_seed(seed);
      emulated::leave_out(op, number);
      try {
        found = run() != right;
      } catch (const emulated::Fault&) {
        found = true;
      }
      met = emulated::was_left_out();
      emulated::leave_out(nullptr);
    }
    if (!met) return number;
    EXPECT_TRUE(found) << "without " << op << " number " << number;
  }
  return most;
}

}  // namespace trireme::kernels::test
#endif
