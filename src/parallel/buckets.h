// Parameters in flat buckets, and the equal parts of a bucket that ZeRO gives to the ranks of its group. Pure arithmetic.
#pragma once

#include "base/parameter.h"
#include "parallel/holders.h"

namespace trireme {

struct Bucket {
  size_t group = 0;                 // of Holders::groups
  int64_t unit = -1;                // the block of the model whose parameters it has, where buckets were cut by unit
  std::vector<size_t> parameters;   // the last of them first: the order in which backward produces gradients
  std::vector<int64_t> offsets;     // of each, in elements
  int64_t num_elements = 0;         // zero-padded to a multiple of the group's size times `align`, as is each parameter to one of `align`
  at::TensorOptions options;        // of the weights
};

// The block of a parameter, by its name (model.layers.3.mlp.up_proj.weight: 3); -1: outside of the blocks.
int64_t block_of(const std::string& name);

// Cuts chosen parameters of each group apart from all others, so that every rank of a group cuts alike whatever else it
// holds. A bucket has one dtype, at most bucket_bytes of fp32 gradients (fp64 for fp64; codes of a byte as they are; a larger parameter is alone) and,
// `by_unit`, one block, however dtypes take turns in it. A group that would fit into a few buckets gets more, of 64 KiB at least: all but the last travel
// during backward. In the order of groups, last parameters first.
// `group_of`: of each parameter its group, `group_sizes`: the number of ranks of each. `align`: elements of a parameter that no part
// may cut, from its first on.
std::vector<Bucket> cut_buckets(const std::vector<Parameter>& parameters, const std::vector<size_t>& chosen,
                                const std::vector<size_t>& group_of, const std::vector<int>& group_sizes, int64_t bucket_bytes, bool by_unit,
                                int64_t align = 1);
std::vector<Bucket> cut_buckets(const std::vector<Parameter>& parameters, const std::vector<size_t>& chosen,
                                const Holders& holders, int64_t bucket_bytes, bool by_unit, int64_t align = 1);

// The dtype in which gradients of a weight are summed.
inline at::ScalarType gradient_type(at::ScalarType weight) { return weight == at::kDouble ? at::kDouble : at::kFloat; }

// Elements of a parameter, in row-major order of its local slice, that lie in one part of a bucket.
struct PartRange {
  size_t parameter = 0;
  int64_t begin = 0, end = 0;
  int64_t offset = 0;  // of `begin` in the part
};
// Part `part` of `num_parts` equal ones.
std::vector<PartRange> ranges_of_part(const Bucket& bucket, const std::vector<Parameter>& parameters, int part, int num_parts);

// Elements [begin, end) of a row-major slice as rectangles: of a matrix the rest of a row, whole rows, the start of a row.
// `flat` has the values; the results are views of it, under `name` and with their place in the global tensor.
//
// With `block` a value of `flat` is of so many elements, which neither slice nor range cuts; where they fill the rows of the global
// tensor it has one for each of these, else it is flat.
std::vector<Parameter> rectangles(const std::string& name, const at::Tensor& flat, at::IntArrayRef slice_shape,
                                  const ShardSpec& slice, int64_t begin, int64_t end, int64_t block = 1);

}  // namespace trireme
