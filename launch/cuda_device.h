#pragma once

namespace trireme {

// Makes CUDA known to run.device, where this build has kernels for it. Loads nothing yet.
void offer_cuda();

}  // namespace trireme
