// A model on a mesh, by shapes alone: what each rank holds, and which ranks hold the same. The same cuts as a run makes,
// on the meta device and without processes, for any number of ranks.
#pragma once

#include "base/tensor.h"

#include "comm/mesh.h"
#include "config/config.h"
#include "parallel/buckets.h"
#include "parallel/stages.h"
#include "train/build.h"

namespace trireme {

inline bool trained(const at::Tensor& t) { return t.defined() && t.requires_grad(); }
// Keeps its input, for the gradient of its weight or adapter.
inline bool keeps_input(const Linear& l) { return l.lora || trained(l.weight_OI); }
inline bool trained(const Linear& l) { return keeps_input(l) || trained(l.bias_O); }

struct RankModel {
  Chunks chunks;                      // on the meta device, in the order of the layers
  std::vector<Parameter> parameters;  // of all of them, each once
  std::vector<size_t> group_of;       // of each parameter: one of the sets of ranks that hold the same slices
  std::vector<int> group_sizes;       // ranks of each set
};

class MeshModel {
 public:
  // ConfigError where the model cannot be cut so.
  MeshModel(const Config& config, const ModelConfig& model, at::ScalarType dtype, const Mesh& mesh);

  const RankModel& at(int pipeline, int tensor) const {
    return ranks_[static_cast<size_t>(pipeline * mesh_.num_tensor() + tensor)];
  }
  const Mesh& mesh() const { return mesh_; }
  const ModelConfig& config() const { return config_; }
  at::ScalarType dtype() const { return dtype_; }
  int64_t num_trained() const { return num_trained_; }  // of the whole model
  uint64_t state_bytes(const OptimizerOptions& options) const;  // of the optimizer, of the whole model
  uint64_t sums_bytes() const;                                  // of adafactor's over the whole model
  // Ranks of one of a RankModel's groups among which ZeRO shares out, and how many such sets have the same again.
  static std::pair<int, int> shared_out(int group_size, const Config& config, const Mesh& mesh);
  // Buckets of a rank's trained or frozen parameters as a run cuts them; `parameters` are numbers of RankModel::parameters.
  std::vector<Bucket> buckets(const RankModel& rank, const Config& config, bool trained) const;

 private:
  ModelConfig config_;
  at::ScalarType dtype_;
  Mesh mesh_;
  int64_t num_trained_ = 0;
  std::vector<std::vector<int64_t>> trained_shapes_;  // of the parameters of the whole model
  std::vector<RankModel> ranks_;  // by pipeline, then tensor coordinate
};

}  // namespace trireme
