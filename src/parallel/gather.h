// Whole tensors from the slices that ranks hold, one at a time: no rank ever holds a whole model.
#pragma once

#include "base/parameter.h"
#include "checkpoint/safetensors.h"
#include "comm/communicator.h"

namespace trireme {

// The tensors of all ranks, whole, for a writer on rank 0. Collective, and so is every get(): all ranks call them in the
// same order (write_safetensors_folder() with `writes` false does). On rank 0 get() returns the tensor, elsewhere an
// undefined one. What rank 0 holds whole is not sent. The order: as rank 0 has them, then what further ranks add.
// `hold`: on every rank that has a slice, before it is read, where values are not always in memory.
std::vector<TensorSource> whole_tensors(const std::vector<Parameter>& slices, const Communicator& world,
                                        const std::function<void(const std::string& name)>& hold = {});

}  // namespace trireme
