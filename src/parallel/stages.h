// Which layers of a model each pipeline stage holds.
#pragma once

#include "comm/communicator.h"
#include "model/transformer.h"
#include "parallel/pipeline_schedule.h"

namespace trireme {

// The chunks of a model: chunk c has layers[c], the first the embedding, the last the final norm and the head.
struct Stages {
  PipelineSchedule shape;          // which stage has which chunk; forwards of one micro-batch
  std::vector<LayerRange> layers;  // by chunk
};

// Cut by cost: the head counts as many layers as it costs to multiply with. virtual_stages 0: what the schedule takes by itself.
// ConfigError names parallel.pipeline, parallel.schedule, parallel.virtual_stages.
Stages make_stages(const ModelConfig& config, PipelineKind kind, int num_stages, int virtual_stages);

// Leaves of a model on the meta device the chunk's part.
void keep_chunk(Transformer& model, const Stages& stages, int chunk);

// Lets forward() and logits() of a model that is dealt out over `pipeline`, one chunk a stage, be called as those of a whole
// one, by all stages in the same order. Without gradients only.
void join_stages(Transformer& part, const Communicator& pipeline);

}  // namespace trireme
