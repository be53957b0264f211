// Random initial weights: an element is a function of (seed, parameter's name, its place), on any number of ranks.
#pragma once

#include "base/tensor.h"

namespace trireme {

void fill_normal(at::Tensor weight, uint64_t seed, const std::string& name, double standard_deviation);
void fill_uniform(at::Tensor weight, uint64_t seed, const std::string& name, double bound);  // in [-bound, bound)

}  // namespace trireme
