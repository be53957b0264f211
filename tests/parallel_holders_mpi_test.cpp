// On every mesh the gradient of a slice is the sum over the ranks that hold it, and the norm counts each slice once. With
// parameters as they lie under tensor and pipeline parallelism; on 1, 2 and 4 ranks.
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include "base/check.h"
#include "comm/process.h"
#include "parallel/data_parallel.h"

namespace trireme {
namespace {

const Communicator& world() {
  static Process process;
  static Communicator world = Communicator::world();
  return world;
}

std::vector<Mesh> meshes() {
  std::vector<Mesh> all;
  for (int tensor : {1, 2, 4})
    for (int pipeline : {1, 2, 4})
      if (world().size() % (tensor * pipeline) == 0) all.emplace_back(world().size(), 0, tensor, pipeline);
  return all;
}

Parameter slice_of(const std::string& name, std::vector<int64_t> whole, int64_t part, int64_t num_parts) {
  std::vector<int64_t> shape = whole, offset(whole.size(), 0);
  shape[0] /= num_parts;
  offset[0] = part * shape[0];
  return {name, at::zeros(shape, at::kDouble).requires_grad_(true), {std::move(whole), offset, false}};
}

// A tied embedding at both ends of the pipeline; a matrix, a norm and a key head that two tensor ranks share in each layer.
std::vector<Parameter> parameters_of(const Mesh& mesh, int rank) {
  const MeshCoords at = mesh.coords(rank);
  const int t = mesh.num_tensor(), pairs = std::max(1, t / 2);
  std::vector<Parameter> out;
  if (at.pipeline == 0 || at.pipeline + 1 == mesh.num_pipeline()) out.push_back(slice_of("embedding", {8, 2}, at.tensor, t));
  const std::string layer = str("model.layers.", at.pipeline, ".");
  out.push_back(slice_of(layer + "matrix", {8, 3}, at.tensor, t));
  out.push_back(slice_of(layer + "key", {4, 3}, at.tensor / 2, pairs));
  out.push_back(slice_of(layer + "norm", {5}, 0, 1));
  out.push_back(slice_of(layer + "frozen", {7}, 0, 1));
  out.back().value.requires_grad_(false);
  return out;
}

// Trains a step or two on every rank's own gradients and compares with what every rank gives to each of its slices, by plain loops.
// What differs; "" where nothing does.
std::string difference(const Mesh& mesh, const std::vector<Parameter>& parameters, const Holders& holders,
                       const GradientReducerOptions& options, int num_steps) {
  std::map<std::pair<std::string, std::vector<int64_t>>, std::pair<double, int64_t>> sums;  // and elements
  for (int r = 0; r < world().size(); ++r)
    for (const Parameter& p : parameters_of(mesh, r)) {
      if (!p.value.requires_grad()) continue;
      auto& [sum, count] = sums[{p.name, p.shard.offset}];
      sum += r + 1, count = p.value.numel();
    }
  double norm = 0;
  for (const auto& [slice, sum] : sums) norm += sum.first * sum.first * static_cast<double>(sum.second);

  std::string found;
  GradientReducer reducer(parameters, holders, options);
  for (int step = 0; step < num_steps; ++step) {
    reducer.begin_step();
    reducer.before_backward(true);
    at::Tensor loss = at::zeros({}, at::kDouble);
    for (const Parameter& p : parameters)
      if (p.value.requires_grad()) loss = loss + p.value.sum() * (world().rank() + 1);
    torch::autograd::backward({loss}, {});
    reducer.finish();
    EXPECT_EQ(reducer.gathered().size(), parameters.size() - 1);
    for (const GradientSlice& s : reducer.gathered())
      if (!(s.gradient == sums.at({s.name, s.shard.offset}).first).all().item<bool>()) found += s.name + " ";
    if (reducer.squared_norm() != norm) found += "norm";
  }
  return found;
}

TEST(Holders, SumOverAllThatHoldASliceAndCountItOnce) {
  for (const Mesh& mesh : meshes())
    for (int zero : {0, 1, 2, 3})
      for (int64_t bucket_bytes : {64, 1 << 20}) {
        SCOPED_TRACE(str(mesh.text(), ", zero ", zero, ", bucket ", bucket_bytes));
        const MeshComms comms(mesh, world());
        const std::vector<Parameter> parameters = parameters_of(mesh, world().rank());
        const Holders holders = find_holders(parameters, comms);
        GradientReducerOptions options;
        options.bucket_bytes = bucket_bytes, options.zero = zero;
        EXPECT_EQ(difference(mesh, parameters, holders, options, 2), "");
        if (mesh.num_ranks() == mesh.num_data()) {
          EXPECT_TRUE(holders.everywhere());
        }
        EXPECT_LE(holders.groups.size(), 4u);
        check_parameters_equal(parameters, holders);
      }
}

// The negative control: a parameter whose gradient is summed over the ranks of its place in the model alone, and not with
// those of another place that hold the same slice.
TEST(Holders, AWrongGroupIsSeen) {
  if (world().size() < 2) GTEST_SKIP() << "one rank";
  struct Wrong {
    const char* name;
    int tensor, pipeline;
  };
  for (const Wrong& wrong : {Wrong{"norm", 2, 1}, {"embedding", 1, 2}, {"key", 4, 1}}) {
    if (world().size() % (wrong.tensor * wrong.pipeline) != 0) continue;
    for (int zero : {0, 1, 3}) {
      SCOPED_TRACE(str(wrong.name, ", zero ", zero));
      const Mesh mesh(world().size(), 0, wrong.tensor, wrong.pipeline);
      const MeshComms comms(mesh, world());
      const std::vector<Parameter> parameters = parameters_of(mesh, world().rank());
      Holders holders = find_holders(parameters, comms);
      GradientReducerOptions options;
      options.zero = zero;
      EXPECT_EQ(difference(mesh, parameters, holders, options, 1), "");
      std::string expected;
      for (size_t i = 0; i < parameters.size(); ++i)
        if (parameters[i].name.ends_with(wrong.name)) {
          holders.group_of[i] = holders.groups.size();
          expected = parameters[i].name + " ";
        }
      holders.groups.push_back(comms.data);
      const std::string found = difference(mesh, parameters, holders, options, 1);
      EXPECT_TRUE(found.starts_with(expected)) << found;
    }
  }
}

// parallel.shard_within: whoever shares out a slice has the same part of the data axis, at whatever place in the model.
TEST(Holders, RunsOfAGroupAreRunsOfTheDataAxis) {
  if (world().size() < 4) GTEST_SKIP() << "two copies of two parts need four ranks";
  for (const char* order : {"pipeline-data-tensor", "data-pipeline-tensor", "tensor-data-pipeline"})
    for (auto [tensor, pipeline] : {std::pair(1, 2), {2, 1}}) {
      SCOPED_TRACE(str(order, ", tensor ", tensor));
      const Mesh mesh(world().size(), 2, tensor, pipeline, parse_mesh_order(order));
      const MeshComms comms(mesh, world());
      const std::vector<Parameter> parameters = parameters_of(mesh, world().rank());
      const Holders holders = find_holders(parameters, comms);
      GradientReducerOptions options;
      options.zero = 1, options.num_replicas = 2;
      EXPECT_EQ(difference(mesh, parameters, holders, options, 1), "");
      const GradientReducer reducer(parameters, holders, options);
      bool any_pair = false;
      for (const Communicator& run : reducer.groups()) {
        EXPECT_EQ(run.sum(int64_t{comms.coords.data}), int64_t{run.size()} * comms.coords.data);
        any_pair = any_pair || run.size() == 2;
      }
      EXPECT_TRUE(any_pair);
    }
}

TEST(Holders, ADifferenceIsNamedByThoseWhoHoldTheSlice) {
  if (world().size() < 2) GTEST_SKIP() << "one rank";
  const MeshComms comms(Mesh(world().size(), 0, 2, 1), world());
  const std::vector<Parameter> parameters = parameters_of(comms.mesh, world().rank());
  const Holders holders = find_holders(parameters, comms);
  if (world().rank() == 1) parameters[3].value.detach().add_(1);  // the matrices of two tensor ranks may differ, norms not
  parameters[1].value.detach().add_(comms.coords.tensor);
  try {
    check_parameters_equal(parameters, holders);
    ADD_FAILURE() << "accepted";
  } catch (const SystemError& error) {
    EXPECT_NE(std::string(error.what()).find(world().rank() == 1 ? "model.layers.0.norm differs" : "another rank"), std::string::npos)
        << error.what();
  }
}

TEST(Holders, SlicesThatDoNotMakeUpTheWholeAreRefused) {
  if (world().size() < 2) GTEST_SKIP() << "one rank";
  const MeshComms comms(Mesh(world().size(), 1, world().size(), 1), world());
  Parameter p = slice_of("w", {8, 2}, world().rank(), world().size());
  find_holders({p}, comms);
  if (world().rank() == 0) p.shard.offset[0] = 8 / world().size();  // the same as rank 1's: something is missing
  EXPECT_THROW(find_holders({p}, comms), InternalError);
}

}  // namespace
}  // namespace trireme
