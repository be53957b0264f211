// What a run or a model leaves behind for others: a Hugging Face model folder or a PEFT adapter folder. Tensors go to the file one
// at a time. With data.chat_template, the product has that template, and its end of turn among its end tokens.
#pragma once

#include "checkpoint/checkpoint.h"
#include "checkpoint/safetensors.h"
#include "train/build.h"

namespace trireme {

// Writes the weights of a trained model, or its adapter. Collective over `world`, whose ranks may each hold a part of the model;
// its rank 0 writes.
using HoldWeight = std::function<void(const std::string& name)>;  // see whole_tensors()
void export_model(const std::string& folder, const Chunks& model, const Config& config, const ModelSource& source,
                  const Communicator& world = Communicator::self(), const HoldWeight& hold = {});
void export_adapter(const std::string& folder, const Chunks& model, const Config& config, const ModelSource& source,
                    const Communicator& world = Communicator::self(), const HoldWeight& hold = {});

// Of the weights that export_stored() writes.
at::ScalarType exported_dtype(const Config& config, const ModelSource& source, const std::optional<Checkpoint>& checkpoint);

// Of the update D that an adapter adds to a layer, whose codes stood for W before and for R after:
struct UpdateLeft {
  std::string layer;
  double left = 1;   // <R - W, D> / <D, D>: 0 where every weight is back at its old code
  double error = 0;  // |R - (W + D)| / |D|
};

// Writes what files hold: the model's weights, those that `checkpoint` has from there, with adapters merged (lora.merge), or the
// adapters alone. This process alone reads and writes, and has one weight in memory at a time (with its update, where an adapter is
// merged). With quant.base=nf4, fp4 or int8 the weights are what those codes stand for, in fp32 until they are rounded once. ConfigError where the checkpoint holds adapters and the configuration none; DataError where it is of another model.
// With lora.requantize the sum is in that form again, as trireme quantize writes it, and what became of the adapter's updates is returned.
std::vector<UpdateLeft> export_stored(const std::string& folder, const Config& config, const ModelSource& source,
                                      const std::optional<Checkpoint>& checkpoint, uint64_t max_shard_bytes = kMaxShardBytes);

// The model whose weights are what export_stored() writes without lora.requantize. They have no memory: `fill` gives the values of whole ones, for as
// long as the arguments live.
std::unique_ptr<Transformer> merged_model(const Config& config, const ModelSource& source, const std::optional<Checkpoint>& checkpoint, WeightFill& fill);

}  // namespace trireme
