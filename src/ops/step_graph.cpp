#include "base/tensor.h"

#include "ops/step_graph.h"

#include <array>

namespace trireme {
namespace {

std::array<StepGraphMaker, static_cast<size_t>(at::DeviceType::COMPILE_TIME_MAX_DEVICE_TYPES)> makers{};

}  // namespace

void set_step_graphs(at::DeviceType type, StepGraphMaker make) { makers.at(static_cast<size_t>(type)) = make; }

std::unique_ptr<StepGraph> new_step_graph(at::Device device) {
  const StepGraphMaker make = makers.at(static_cast<size_t>(device.type()));
  return make ? make(device) : nullptr;
}

}  // namespace trireme
