// parallel_tensor_mpi_test as a debug build runs it: how values lie is looked at, at every seam.
#include "parallel_tensor_mpi_test.cpp"

namespace trireme {
namespace {

static_assert(kChecksPlacements);

template <typename F>
std::string refusal(const F& f) {
  try {
    f();
  } catch (const InternalError& error) {
    return error.what();
  }
  return "";
}

// Left to itself it would train on a mixture of two batches, whose loss looks like any other.
TEST(DebugBuild, NamesTheRankThatHasAnotherBatch) {
  at::set_num_threads(1);
  auto model = build({"llama", small_config("llama")}, at::kDouble, world());
  ModelInput input = packed();
  if (world().size() == 1) GTEST_SKIP() << "one rank has nobody to differ from";
  if (world().rank() == 1) input.tokens_T = input.tokens_T.roll(1);
  EXPECT_EQ(refusal([&] { model->forward(input); }).rfind("the batch is not the same on all ranks of its axis: rank 1 has Long [36] of bits ", 0), 0u);
}

TEST(DebugBuild, NamesTheRankWhosePartHasAnotherShape) {
  if (world().size() == 1) GTEST_SKIP() << "one rank has nobody to differ from";
  const at::Tensor part = at::zeros({world().rank() == 1 ? 3 : 2, 4});
  const TensorAxis axis{world()};
  EXPECT_EQ(refusal([&] { all_gather(Placed<Shard<0>>{part}, axis); }),
            "a part to gather has not the same shape on all ranks of its axis: rank 1 has Float [3, 4], rank 0 Float [2, 4]");
}

}  // namespace
}  // namespace trireme
