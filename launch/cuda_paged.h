#pragma once

namespace trireme {

// Makes CUDA's managed memory known to ops/paged_memory.h, where this build has CUDA.
void offer_cuda_paged_memory();

}  // namespace trireme
