// Tensor parallelism with sequence parallelism (Shoeybi et al. 2019; Korthikanti et al. 2022): every rank of the tensor
// axis has a part of each matrix, and between the matrices a part of the rows.
//
//   q, k, v, gate, up  column-parallel: weight Shard<0> (whole heads), bias Shard<0>, lora A Replicate, lora B and magnitude Shard<0>
//   o, down            row-parallel:    weight Shard<1>, bias Replicate, lora A Shard<1>, lora B and magnitude Replicate
//   embedding, head    Shard<0>: ids [V r / n, V (r + 1) / n) on rank r of n; V need not be divisible
//   norms              Replicate
//   hidden states      Shard<0>: rows [T r / n, T (r + 1) / n); gathered before column-parallel layers, summed and
//                      scattered behind row-parallel ones; products go on with the rows that are here meanwhile
//
// Where there are fewer key heads than ranks, neighbouring ranks share one (its k and v are Replicate among them). The
// gradient of what several ranks hold is Partial: this rank's share of a sum over all that hold it (parallel/holders.h).
#pragma once

#include "comm/communicator.h"
#include "model/transformer.h"
#include "parallel/placement.h"

namespace trireme {

// ConfigError, naming parallel.tensor and sizes that would do: heads, key heads, the MLP or the vocabulary cannot be shared out.
void check_tensor_parallel(const ModelConfig& config, int64_t num_tensor);

// Cuts a model on the meta device (adapters attached) to what rank `rank` of `size` holds.
void keep_tensor_part(Transformer& model, int rank, int size);

// The same for this rank of `tensor`, and sets the model's seams. forward() and backward
// are then collective over `tensor`, with inputs alike on its ranks. A group of one: nothing is done.
void apply_tensor_parallel(Transformer& model, const Communicator& tensor, RowOverlap overlap = {});

}  // namespace trireme
