// From a configuration to the model of a run: where it is, its dtype and adapters, how a mesh cuts it, its values.
#pragma once

#include <optional>

#include "comm/mesh.h"
#include "config/config.h"
#include "model/frozen_base.h"
#include "model/lora.h"
#include "model/transformer.h"
#include "optim/optimizer.h"
#include "parallel/stages.h"

namespace trireme {

struct ModelSource {
  std::string folder;            // Hugging Face folder of the weights; "" for random weights
  std::string name, revision;    // of the base in an adapter: the hub name as given, or the folder's absolute path
  std::string tokenizer_folder;  // "" where there is none
  ModelConfig config;
  Json identity;                 // what a run that goes on must share: config.json, and what the weights are "of"
};

// The mesh of parallel.*; ConfigError where it does not fit the ranks.
Mesh mesh_of(const Config& config, int num_ranks);

// What the stages of parallel.pipeline do in a step of so many micro-batches (0: train.accumulation); ConfigError.
PipelineSchedule schedule_of(const Config& config, int64_t micro_batches = 0);

// How parallel.* deals the layers out; ConfigError.
Stages stages_of(const Config& config, const ModelConfig& model);

// ConfigError: neither or both of model.path and model.config; DataError: what the files have wrong.
ModelSource find_model(const Config& config);

// Of the whole files of weights and adapter. Reading them takes as long as loading does: once, for it is remembered beside the
// token files for as long as they stay untouched.
std::string hash_of_weights(const Config& config, const ModelSource& source);

// DataError: `path`, of lora.path, is set, but no PEFT adapter.
void check_adapter(const std::string& path);

// The dtype that weights have in this run.
at::ScalarType weight_dtype(const Config& config, const ModelSource& source);
// Of training: train.dtype, else weight_dtype(), but bfloat16 for weights that happen to be stored in float16.
at::ScalarType train_dtype(const Config& config, const ModelSource& source);

// The rule of the update by optim.*; ConfigError where weights of this dtype cannot be trained so.
OptimizerOptions optimizer_options(const Config& config, at::ScalarType dtype);

// The shapes of the whole model, on the meta device, with the adapter of lora.path, or (`attach`) new adapters by lora.*.
std::unique_ptr<Transformer> model_shapes(const Config& config, const ModelConfig& model, at::ScalarType dtype, bool attach);

// The model on `device`, with weights read or random, then the adapter of lora.path, or (`attach`) new adapters by lora.*.
// `shapes_only`: nothing is allocated or read but headers; every file and key is checked all the same. `cut`: leaves of the
// model, which has no memory yet, what this rank is to hold; no more than that is allocated and read.
// `fill`: the leaves have no memory (each is given some by set_data()). The function put there writes the values of any slices of
// any of the whole model's parameters.
using ModelCut = std::function<void(Transformer& model)>;
std::unique_ptr<Transformer> build_model(const Config& config, const ModelSource& source, at::ScalarType dtype,
                                         bool attach, at::Device device = at::kCPU, bool shapes_only = false, const ModelCut& cut = {}, WeightFill* fill = nullptr);

// The cut of a model that only runs forward: this rank's part of each layer of its stage, joined to the other stages. ConfigError
// where the model cannot be cut so.
ModelCut forward_cut(const ModelConfig& model, const MeshComms& comms);

// Of the adapter in lora.path, else of the lora.* keys. DataError: what the adapter's files have wrong.
LoraConfig lora_config(const Config& config);
FrozenBase frozen_base(const Config& config);
// With what the model's files hold in fewer bits. DataError: what its quantization_config has wrong.
FrozenBase frozen_base(const Config& config, const ModelConfig& model);
// The form of the weights beside adapters, in words: "nf4, blocks of 64, scales in 8 bits", "int8"; empty: 16 bits or more.
std::string quantized_base(const Config& config, const ModelConfig& model);

using Chunks = std::vector<std::unique_ptr<Transformer>>;
std::vector<Parameter> parameters_of(const Chunks& chunks);  // each name once: a tied embedding may be in two chunks
bool is_adapter(const Parameter& parameter);                 // by its name

}  // namespace trireme
