// What a device does again and again at the same addresses: recorded once, and then launched as one, which costs the host one call.
#pragma once

#include "base/tensor.h"

namespace trireme {

class StepGraph {
 public:
  virtual ~StepGraph() = default;
  // Runs `step` on the host; what it gives the device to do is kept and not done. Memory that it takes on the device stays the graph's, so
  // tensors that it makes hold, while the graph lives, what the last replay has left there. A step that ran before has prepared whatever
  // is prepared at a first use. It may not wait for the device, nor read or write memory of the host; who launches other work, on another
  // stream, waits by themselves. Errors: SystemError.
  virtual void record(const std::function<void()>& step) = 0;
  // In the current stream.
  virtual void replay() = 0;
};

// Before any is made; a kind of device without has none, as the CPU.
using StepGraphMaker = std::unique_ptr<StepGraph> (*)(at::Device);
void set_step_graphs(at::DeviceType type, StepGraphMaker make);
// Null: there are none on such a device.
std::unique_ptr<StepGraph> new_step_graph(at::Device device);

}  // namespace trireme
