#include "comm/mesh.h"

#include <algorithm>
#include <cmath>

#include "base/check.h"

namespace trireme {

const char* mesh_axis_name(MeshAxis axis) {
  switch (axis) {
    case MeshAxis::kPipeline: return "pipeline";
    case MeshAxis::kData: return "data";
    case MeshAxis::kTensor: return "tensor";
  }
  return "?";
}

MeshOrder parse_mesh_order(const std::string& text) {
  MeshOrder order = kTensorInnermost;  // sorted, as the first permutation is
  do {
    if (text == str(mesh_axis_name(order[0]), "-", mesh_axis_name(order[1]), "-", mesh_axis_name(order[2]))) return order;
  } while (std::next_permutation(order.begin(), order.end()));
  throw ConfigError(str("parallel.order=", text, ": allowed is pipeline-data-tensor, or these three axes in another order, the outermost first"));
}

int MeshCoords::on(MeshAxis axis) const { return const_cast<MeshCoords*>(this)->on(axis); }

int& MeshCoords::on(MeshAxis axis) {
  return axis == MeshAxis::kPipeline ? pipeline : axis == MeshAxis::kData ? data : tensor;
}

namespace {

std::string sizes_text(int data, int tensor, int pipeline) {
  return str(mesh_axis_name(MeshAxis::kData), " ", data, " x ", mesh_axis_name(MeshAxis::kTensor), " ", tensor, " x ",
             mesh_axis_name(MeshAxis::kPipeline), " ", pipeline);
}

// The meshes of so many ranks that a model can be cut for, those before all others that cut it about as often as asked.
std::string other_meshes(int num_ranks, int num_tensor, int num_pipeline, const Mesh::CanBeCut& can_be_cut) {
  constexpr size_t kMost = 6;
  struct Other {
    double distance;
    int tensor, pipeline;
  };
  std::vector<Other> others;
  auto far = [](int have, int asked) { return std::abs(std::log2(static_cast<double>(have) / asked)); };
  for (int tensor = 1; tensor <= num_ranks; ++tensor)
    for (int pipeline = 1; num_ranks % tensor == 0 && tensor * pipeline <= num_ranks; ++pipeline)
      if (num_ranks / tensor % pipeline == 0 && (!can_be_cut || can_be_cut(tensor, pipeline)))
        others.push_back({far(tensor, num_tensor) + far(pipeline, num_pipeline), tensor, pipeline});
  std::stable_sort(others.begin(), others.end(), [](const Other& a, const Other& b) { return a.distance < b.distance; });
  std::string text;
  for (size_t i = 0; i < std::min(kMost, others.size()); ++i)
    text += str(i == 0 ? "" : ", ", sizes_text(num_ranks / others[i].tensor / others[i].pipeline, others[i].tensor, others[i].pipeline));
  return text + (others.size() > kMost ? ", ..." : "");
}

}  // namespace

Mesh::Mesh(int num_ranks, int num_data, int num_tensor, int num_pipeline, const MeshOrder& order, const CanBeCut& can_be_cut)
    : num_data_(num_data), num_tensor_(num_tensor), num_pipeline_(num_pipeline), order_(order) {
  TRIREME_CHECK(num_ranks >= 1, num_ranks);
  if (num_tensor < 1) throw ConfigError(str("parallel.tensor=", num_tensor, ": must be at least 1"));
  if (num_pipeline < 1) throw ConfigError(str("parallel.pipeline=", num_pipeline, ": must be at least 1"));
  if (num_data < 0)
    throw ConfigError(str("parallel.data=", num_data, ": must be at least 1, or 0 for all ranks that are left"));
  const int64_t inner = static_cast<int64_t>(num_tensor) * num_pipeline, asked = inner * std::max(num_data, 1);
  if (num_ranks % inner == 0 && (num_data == 0 || asked == num_ranks)) {
    num_data_ = static_cast<int>(num_ranks / inner);
    return;
  }
  const bool fits = !can_be_cut || can_be_cut(num_tensor, num_pipeline);
  const std::string others = other_meshes(num_ranks, num_tensor, num_pipeline, can_be_cut);
  throw ConfigError(str(num_data > 0 ? str("parallel.data=", num_data, " x ") : "", "parallel.tensor=", num_tensor, " x parallel.pipeline=",
                        num_pipeline, " is ", asked, num_data > 0 ? "" : " or a multiple of it", ", but there ",
                        num_ranks == 1 ? "is 1 rank: " : str("are ", num_ranks, " ranks: "), fits ? str("start ", asked, " (mpirun -n ", asked, " ...)") : "",
                        others.empty() ? (fits ? ", for the model cannot be cut over these" : "the model cannot be cut so, nor otherwise over these")
                                       : str(fits ? ", or take" : "take", " one of these meshes: ", others)));
}

int Mesh::size(MeshAxis axis) const {
  return axis == MeshAxis::kPipeline ? num_pipeline_ : axis == MeshAxis::kData ? num_data_ : num_tensor_;
}

MeshCoords Mesh::coords(int rank) const {
  TRIREME_CHECK(rank >= 0 && rank < num_ranks(), rank, num_ranks());
  MeshCoords c;
  for (auto axis = order_.rbegin(); axis != order_.rend(); rank /= size(*axis++)) c.on(*axis) = rank % size(*axis);
  return c;
}

int Mesh::rank(const MeshCoords& c) const {
  int rank = 0;
  for (MeshAxis axis : order_) {
    TRIREME_CHECK(c.on(axis) >= 0 && c.on(axis) < size(axis), mesh_axis_name(axis), c.on(axis), size(axis));
    rank = rank * size(axis) + c.on(axis);
  }
  return rank;
}

std::vector<int> Mesh::group(int rank, MeshAxis axis) const {
  std::vector<int> ranks;
  for (int i = 0; i < size(axis); ++i) {
    MeshCoords c = coords(rank);
    c.on(axis) = i;
    ranks.push_back(this->rank(c));
  }
  return ranks;
}

std::string Mesh::text() const {
  return sizes_text(num_data_, num_tensor_, num_pipeline_);
}

namespace {

// The group along an axis: its members share their first rank, and are ordered by the coordinate.
Communicator along(const Mesh& mesh, const Communicator& world, MeshAxis axis) {
  return world.split(mesh.group(world.rank(), axis)[0], mesh.coords(world.rank()).on(axis), mesh_axis_name(axis));
}

const Communicator& checked(const Mesh& mesh, const Communicator& world) {
  TRIREME_CHECK(mesh.num_ranks() == world.size(), mesh.text(), " over ", world.size(), " ranks");
  return world;
}

}  // namespace

MeshComms::MeshComms(const Mesh& m, const Communicator& w)
    : mesh(m), coords(m.coords(checked(m, w).rank())), world(w), data(along(m, w, MeshAxis::kData)),
      tensor(along(m, w, MeshAxis::kTensor)), pipeline(along(m, w, MeshAxis::kPipeline)) {}

const Communicator& MeshComms::on(MeshAxis axis) const {
  return axis == MeshAxis::kPipeline ? pipeline : axis == MeshAxis::kData ? data : tensor;
}

}  // namespace trireme
