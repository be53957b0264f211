// The mesh of ranks: three axes. Unless told otherwise pipeline is outermost and tensor innermost (neighbours in rank are on
// one host, and tensor parallelism talks most):  rank = (pipeline * num_data + data) * num_tensor + tensor.
#pragma once

#include <array>
#include <functional>
#include <string>
#include <vector>

#include "comm/communicator.h"

namespace trireme {

enum class MeshAxis { kPipeline, kData, kTensor };
const char* mesh_axis_name(MeshAxis axis);  // pipeline, data, tensor

using MeshOrder = std::array<MeshAxis, 3>;  // the outermost axis first
inline constexpr MeshOrder kTensorInnermost = {MeshAxis::kPipeline, MeshAxis::kData, MeshAxis::kTensor};
// "pipeline-data-tensor" and the other five. ConfigError names parallel.order.
MeshOrder parse_mesh_order(const std::string& text);

struct MeshCoords {
  int pipeline = 0, data = 0, tensor = 0;
  bool operator==(const MeshCoords&) const = default;
  int on(MeshAxis axis) const;
  int& on(MeshAxis axis);
};

// Pure arithmetic.
class Mesh {
 public:
  Mesh() = default;  // 1 x 1 x 1
  // Sizes of the axes; 0 for num_data means: what is left of num_ranks. ConfigError where the product is not num_ranks;
  // it names the keys parallel.data, parallel.tensor, parallel.pipeline and of the meshes that would do those that are
  // nearest to what was asked. `can_be_cut` (asked then only): whether a model allows these numbers; empty: any.
  using CanBeCut = std::function<bool(int num_tensor, int num_pipeline)>;
  Mesh(int num_ranks, int num_data, int num_tensor, int num_pipeline, const MeshOrder& order = kTensorInnermost,
       const CanBeCut& can_be_cut = {});

  int num_data() const { return num_data_; }
  int num_tensor() const { return num_tensor_; }
  int num_pipeline() const { return num_pipeline_; }
  int num_ranks() const { return num_data_ * num_tensor_ * num_pipeline_; }
  int size(MeshAxis axis) const;

  MeshCoords coords(int rank) const;
  int rank(const MeshCoords& coords) const;
  // All ranks that differ from `rank` in this axis only, in the order of the axis; `rank` itself among them.
  std::vector<int> group(int rank, MeshAxis axis) const;
  std::string text() const;  // "data 2 x tensor 2 x pipeline 1"

 private:
  int num_data_ = 1, num_tensor_ = 1, num_pipeline_ = 1;
  MeshOrder order_ = kTensorInnermost;
};

// The communicators of one rank: one an axis, and the whole mesh. rank() of an axis' communicator is the coordinate.
// Collective over `world`, whose size is the mesh's.
struct MeshComms {
  MeshComms(const Mesh& mesh, const Communicator& world);

  Mesh mesh;
  MeshCoords coords;
  Communicator world, data, tensor, pipeline;
  const Communicator& on(MeshAxis axis) const;
};

}  // namespace trireme
