// Random initial weights: an element is a function of (seed, parameter's name, its place), on any number of ranks.
#pragma once

#include "base/parameter.h"

namespace trireme {

// The value that training begins with, by the parameter's name: norms 1, biases 0, an adapter's A uniform(-1, 1) / sqrt(in)
// and B 0, every other matrix normal(0, initializer_range). A slice holds what it would hold in the whole.
void fill_initial(const Parameter& parameter, uint64_t seed, double initializer_range);

void fill_normal(const Parameter& parameter, uint64_t seed, double standard_deviation);
void fill_uniform(const Parameter& parameter, uint64_t seed, double bound);  // in [-bound, bound)

}  // namespace trireme
