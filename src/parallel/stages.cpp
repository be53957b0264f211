#include "parallel/stages.h"

namespace trireme {

Stages make_stages(const ModelConfig& c, PipelineKind kind, int num_stages, int virtual_stages) {
  Stages stages;
  if (num_stages == 1) {
    stages.shape.actions.resize(1);
    stages.layers = {{0, c.num_layers}};
    return stages;
  }
  stages.shape = make_forward_schedule(kind, num_stages, virtual_stages, 1);
  const int64_t layer = c.hidden_size * ((2 * c.num_heads + 2 * c.num_kv_heads) * c.head_dim + 3 * c.intermediate_size);
  const double head = static_cast<double>(c.vocab_size * c.hidden_size) / static_cast<double>(layer);
  // The embedding is a lookup, nothing beside a layer's products.
  stages.layers = split_layers(c.num_layers, stages.shape.num_chunks(), 0.0, head);
  return stages;
}

void keep_chunk(Transformer& model, const Stages& stages, int chunk) {
  const LayerRange& range = stages.layers[static_cast<size_t>(chunk)];
  model.keep_layers(range.begin, range.end, chunk == 0, chunk + 1 == stages.shape.num_chunks());
}

void join_stages(Transformer& part, const Communicator& pipeline) {
  if (pipeline.size() == 1) return;
  const int stage = pipeline.rank(), last = pipeline.size() - 1;
  ModelSeams seams = part.seams();
  if (stage > 0)
    seams.receive = [pipeline, stage, &part](int64_t rows) {  // its device is known when it has memory
      at::Tensor hidden = at::empty({rows, part.config().hidden_size}, at::TensorOptions().dtype(part.dtype()).device(part.device()));
      pipeline.receive(hidden, stage - 1);
      return hidden;
    };
  if (stage < last) seams.send = [pipeline, stage](const at::Tensor& x_TC) { pipeline.send(x_TC.contiguous(), stage + 1); };
  seams.from_last_stage = [pipeline, last](const at::Tensor& logits) { pipeline.broadcast(logits, last); };
  part.set_seams(std::move(seams));
}

}  // namespace trireme
