#include "train/mesh_model.h"

#include <map>

#include "base/check.h"
#include "optim/adafactor.h"
#include "parallel/tensor_parallel.h"

namespace trireme {

MeshModel::MeshModel(const Config& config, const ModelConfig& model, at::ScalarType dtype, const Mesh& mesh)
    : config_(model), dtype_(dtype), mesh_(mesh) {
  check_tensor_parallel(model, mesh.num_tensor());
  const Stages stages = stages_of(config, model);
  for (const Parameter& p : model_shapes(config, model, dtype, true)->parameters()) {
    if (!p.value.requires_grad()) continue;
    num_trained_ += p.value.numel();
    trained_shapes_.push_back(p.value.sizes().vec());
  }
  using Slice = std::tuple<std::string, std::vector<int64_t>, std::vector<int64_t>>;  // name, offset, shape
  auto slice_of = [](const Parameter& p) { return Slice{p.name, p.shard.offset, p.value.sizes().vec()}; };
  std::map<Slice, std::vector<size_t>> holders;
  for (int pipeline = 0; pipeline < mesh.num_pipeline(); ++pipeline)
    for (int tensor = 0; tensor < mesh.num_tensor(); ++tensor) {
      RankModel rank;
      for (int chunk : stages.shape.chunks_of(pipeline)) {
        rank.chunks.push_back(model_shapes(config, model, dtype, true));
        keep_chunk(*rank.chunks.back(), stages, chunk);
        keep_tensor_part(*rank.chunks.back(), tensor, mesh.num_tensor());
      }
      rank.parameters = parameters_of(rank.chunks);
      for (const Parameter& p : rank.parameters) {
        holders[slice_of(p)].push_back(ranks_.size());
        if (p.value.requires_grad() && cuts_blocks(parse_optimizer_kind(config.optim.kind), p.value.sizes(), p.shard))
          throw ConfigError(trireme::str("optim.kind=", config.optim.kind, " keeps ", state_block(parse_optimizer_kind(config.optim.kind)), " elements of a tensor together, but parallel.tensor=",
                                mesh.num_tensor(), " cuts ", p.name, " ", at::IntArrayRef(p.shard.global_shape), " into slices like ", p.value.sizes(), ": take a parallel.tensor that leaves whole rows "
                                "of blocks, or optim.kind=adamw"));
      }
      ranks_.push_back(std::move(rank));
    }
  for (RankModel& rank : ranks_) {
    std::map<std::vector<size_t>, size_t> numbers;
    for (const Parameter& p : rank.parameters) {
      const std::vector<size_t>& same = holders.at(slice_of(p));
      const auto [found, is_first] = numbers.emplace(same, numbers.size());
      if (is_first) rank.group_sizes.push_back(static_cast<int>(same.size()) * mesh.num_data());
      rank.group_of.push_back(found->second);
    }
  }
}

uint64_t MeshModel::state_bytes(const OptimizerOptions& options) const {
  uint64_t bytes = 0;
  for (const auto& shape : trained_shapes_) bytes += Optimizer::state_bytes(dtype_, options, c10::multiply_integers(shape), shape);
  return bytes;
}

uint64_t MeshModel::sums_bytes() const {
  uint64_t bytes = 0;
  for (const auto& shape : trained_shapes_) bytes += Adafactor::sums_bytes(shape);
  return bytes;
}

std::pair<int, int> MeshModel::shared_out(int group_size, const Config& config, const Mesh& mesh) {
  const auto within = static_cast<int>(config.parallel.shard_within);
  const int replicas = within > 0 ? mesh.num_data() / within : 1;
  return {group_size / replicas, replicas};
}

std::vector<Bucket> MeshModel::buckets(const RankModel& rank, const Config& config, bool trained) const {
  std::vector<size_t> chosen;
  for (size_t i = 0; i < rank.parameters.size(); ++i)
    if (rank.parameters[i].value.requires_grad() == trained && !rank.parameters[i].on_host) chosen.push_back(i);
  std::vector<int> sizes;
  for (int size : rank.group_sizes) sizes.push_back(shared_out(size, config, mesh_).first);
  return cut_buckets(rank.parameters, chosen, rank.group_of, sizes, static_cast<int64_t>(config.comm.bucket_mb * (1 << 20)),
                     config.parallel.zero == 3, trained ? state_block(parse_optimizer_kind(config.optim.kind)) : 1);
}

}  // namespace trireme
