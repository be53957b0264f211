// ATen tensors and autograd, as the numeric rooms use them. This is the precompiled header of every target that links
// libtorch; rooms below ops/ that need no tensors do not include it.
#pragma once

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/variable.h>

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>
