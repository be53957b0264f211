// The arithmetic of reductions: the parts of all ranks, joined in the order of the ranks.
#pragma once

#include <cstdint>
#include <vector>

namespace trireme {

enum class CommType { kFloat32, kFloat64, kBfloat16, kFloat16, kInt64, kInt32, kInt8, kUint8 };
enum class ReduceOp { kSum, kMax, kMin };

int64_t comm_type_bytes(CommType type);

// output[i] = (((parts[0][i] op parts[1][i]) op parts[2][i]) ...), i < num_elements. 16-bit floats are joined in fp32
// and rounded once (to nearest even); integers wrap around; max and min of a NaN and anything is NaN. output may be one
// of the parts; the parts may not overlap otherwise.
void reduce_parts(CommType type, ReduceOp op, const std::vector<const void*>& parts, void* output,
                  int64_t num_elements);

}  // namespace trireme
