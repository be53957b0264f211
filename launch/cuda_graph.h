#pragma once

namespace trireme {

// Makes CUDA graphs known to ops/step_graph.h, where this build has CUDA.
void offer_cuda_graphs();

}  // namespace trireme
