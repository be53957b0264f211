// Dynamic loss scaling for training in float16 (Micikevicius et al. 2018), whose smallest normal value is 6e-5: the loss, and
// with it every gradient, is multiplied by a power of two on its way back, and divided by it once gradients are in fp32.
#pragma once

#include <cstdint>

namespace trireme {

// A step whose gradient overflows is computed again, from the same rows, with half the scale; after kPatience steps in a
// row that did not, the scale doubles. So no rows are lost, and the same state gives the same run.
struct LossScale {
  static constexpr double kFirst = 1024, kSmallest = 1.0 / 1024, kLargest = 32768;  // of a loss summed over tokens
  static constexpr int64_t kPatience = 500;

  double value = 1;  // stays 1 where the dtype needs no scaling
  int64_t clean_steps = 0;
  bool dynamic = false;

  static LossScale of(bool is_float16) { return is_float16 ? LossScale{kFirst, 0, true} : LossScale{}; }
  // After an overflow. False: it cannot be lower, so scaling is not what is wrong.
  bool lower() {
    if (!dynamic || value <= kSmallest) return false;
    value /= 2;
    clean_steps = 0;
    return true;
  }
  void count_clean_step() {
    if (!dynamic || ++clean_steps < kPatience) return;
    clean_steps = 0;
    if (value < kLargest) value *= 2;
  }
};

}  // namespace trireme
