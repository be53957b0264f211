#pragma once
#include "base/tensor.h"
namespace trireme {
struct ClippedNorm { at::Tensor norm, factor; };
at::Tensor squares_on_device(const std::vector<at::Tensor>& tensors, at::Device device);
ClippedNorm clip_on_device(const at::Tensor& squares, double scale, double max_norm, at::Tensor& held);
}
