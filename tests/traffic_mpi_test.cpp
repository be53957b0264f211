// The bytes that a step exchanges: what the Communicators of a worker counted is what shapes say, to the byte, on every rank,
// for every way of sharing out on 1, 2 and 4 ranks. And the bytes of tensors until the first step: at most those of a step.
#include "base/tensor.h"

#include "data_fixture.h"
#include "scratch.h"
#include "tensor_bytes.h"
#include "tiny_model.h"

#include "comm/process.h"
#include "parallel/tensor_parallel.h"
#include "train/footprint.h"
#include "train/worker.h"

namespace trireme {
namespace {

const Communicator& world() {
  static Process process;
  static Communicator world = Communicator::world();
  return world;
}

struct Case {
  int ranks;
  std::vector<std::string> keys;
};

// Two layers would not tell the first block, the last and those between apart.
const Json kShape = {{"num_hidden_layers", 4}, {"vocab_size", 101}, {"intermediate_size", 44}, {"max_position_embeddings", 256}};

const std::vector<Case> kCases = {
    {1, {}},
    {1, {"train.accumulation=2", "parallel.zero=3"}},
    {2, {}},
    {2, {"parallel.zero=1", "train.accumulation=2"}},
    {2, {"parallel.zero=2", "train.accumulation=3", "parallel.reduce=micro_batch"}},
    {2, {"parallel.zero=3", "train.accumulation=2"}},
    {2, {"parallel.zero=3", "train.accumulation=2", "lora.rank=4"}},
    {2, {"parallel.zero=3", "train.dtype=bfloat16", "train.recompute=full"}},
    {2, {"parallel.zero=3", "lora.rank=4", "model.embedding=host"}},
    {2, {"parallel.tensor=2"}},
    {2, {"parallel.tensor=2", "train.recompute=selective", "train.dtype=bfloat16"}},
    {2, {"parallel.tensor=2", "train.recompute=full", "train.accumulation=2"}},
    {2, {"parallel.tensor=2", "lora.rank=4", "train.recompute=selective"}},
    {2, {"parallel.tensor=2", "lora.rank=4", "lora.targets=down_proj", "parallel.zero=2"}},
    {2, {"parallel.tensor=2", "lora.rank=4", "train.recompute=full", "train.mlp_tokens=16"}},
    {2, {"parallel.tensor=2", "lora.rank=4", "lora.targets=q_proj", "train.recompute=selective", "train.mlp_tokens=16"}},
    {2, {"parallel.pipeline=2", "train.accumulation=3"}},
    {2, {"parallel.pipeline=2", "train.accumulation=4", "parallel.schedule=interleaved"}},
    {2, {"parallel.pipeline=2", "train.accumulation=2", "parallel.schedule=zb-v", "lora.rank=4"}},
    {4, {"parallel.zero=2", "parallel.shard_within=2"}},
    {4, {"parallel.pipeline=2", "parallel.zero=3", "train.accumulation=3"}},
    {4, {"parallel.pipeline=2", "parallel.zero=3", "train.accumulation=4", "parallel.schedule=interleaved", "lora.rank=4"}},
    {4, {"parallel.pipeline=2", "parallel.zero=3", "train.accumulation=2", "parallel.schedule=zb-v"}},
    {4, {"parallel.tensor=4"}},
    {4, {"parallel.tensor=2"}},
    {4, {"parallel.tensor=2", "parallel.zero=1", "lora.rank=4"}},
    {4, {"parallel.tensor=2", "parallel.zero=3", "train.accumulation=2"}},
    {4, {"parallel.tensor=2", "parallel.pipeline=2", "train.accumulation=2", "parallel.schedule=zb-h1"}},
    {4, {"parallel.pipeline=2", "parallel.zero=1", "train.accumulation=2"}},
    {4, {"parallel.pipeline=4", "train.accumulation=4", "parallel.schedule=gpipe", "parallel.order=data-tensor-pipeline"}},
};

class TrafficOf : public testing::TestWithParam<std::tuple<Case, bool>> {};

TEST_P(TrafficOf, AStepIsWhatTheShapesSay) {
  const auto& [given, tied] = GetParam();
  if (tied && std::find(given.keys.begin(), given.keys.end(), "model.embedding=host") != given.keys.end()) return;  // refused
  ASSERT_EQ(given.ranks, world().size());
  Config config;
  for (Field& field : fields(config))
    for (const std::string& key : given.keys)
      if (key.starts_with(field.key + "=")) {
        EXPECT_EQ(field.set(key.substr(key.find('=') + 1)), "") << key;
      }
  config.comm.bucket_mb = 0.02;
  config.optim.lr = 1e-3;
  Json shape = kShape;
  shape["tie_word_embeddings"] = tied;
  ModelSource source;
  source.config = test::config_of(test::small_config(tied ? "qwen3" : "qwen2", shape));
  const at::ScalarType dtype = train_dtype(config, source);
  const MeshComms comms(mesh_of(config, world().size()), world());

  // Rows of many lengths, of which a part is learnt.
  std::string folder = world().broadcast_bytes(world().rank() == 0 ? scratch_folder() : "");
  DataOptions options;
  options.train = {folder + "/rows.jsonl"};
  options.cache = folder + "/cache";
  options.eos_id = kTestEos, options.bos_id = kTestBos;
  options.num_threads = 1;
  std::string file;
  if (world().rank() == 0) {
    std::ofstream rows(options.train[0]);
    for (int i = 0; i < 40; ++i) rows << "{\"prompt\": \"p" << i << "\", \"completion\": \"" << std::string(static_cast<size_t>(5 + i * 7 % 31), 'c') << "\"}\n";
    rows.close();
    file = Dataset::prepare(options, Split::kTrain, character_tokenizer(), nullptr);
  }
  file = world().broadcast_bytes(file);
  const BatchShape batches{2, config.train.accumulation, comms.coords.data, comms.mesh.num_data()};
  Loader loader(Dataset::open(options, Split::kTrain, file), batches, false, 0);

  const Stages stages = stages_of(config, source.config);
  std::optional<Worker> started;
  const int64_t grown = test::TensorBytes::install().grown([&] {
    Chunks chunks;
    WeightFill fill;
    for (int chunk : stages.shape.chunks_of(comms.coords.pipeline)) {
      chunks.push_back(build_model(config, source, dtype, true, at::kCPU, false, [&](Transformer& whole) {
        keep_chunk(whole, stages, chunk);
        apply_tensor_parallel(whole, comms.tensor);
      }, config.parallel.zero == 3 ? &fill : nullptr));
      chunks.back()->share_tied_embedding(*chunks[0]);
    }
    started.emplace(config, std::move(chunks), make_task("sft"), loader, Schedule(ScheduleKind::kConstant, 1e-3, 10, 0, 0),
                    config.train.accumulation, comms, fill);
  });
  Worker& worker = *started;
  const MeshModel model(config, source.config, dtype, comms.mesh);
  const Footprint f = step_footprint(model, config, comms.coords, {8, 8}, config.train.accumulation);
  const auto frequencies = static_cast<int64_t>(worker.chunks().size()) * source.config.head_dim / 2 * 4;  // of positions: in no plan
  EXPECT_LE(grown, static_cast<int64_t>(f.weights + f.gradients + f.optimizer) + frequencies);
  EXPECT_GE(grown, static_cast<int64_t>(f.optimizer));
  Traffic before = worker.exchanged();
  for (int step = 1; step <= 3; ++step) {  // the first counts contributions, the next ones overlap
    std::vector<MicroBatch> micro_batches;
    for (int64_t m = 0; m < config.train.accumulation; ++m) {
      const SequenceBatch batch = loader.batch(m);
      micro_batches.push_back({batch.num_tokens(), std::count_if(batch.targets.begin(), batch.targets.end(), [](int64_t t) { return t != kIgnoreTarget; })});
    }
    worker.run(step, false, true);
    loader.advance();
    const Traffic after = worker.exchanged(), said = step_traffic(model, config, comms.coords, micro_batches);
    EXPECT_EQ(after.gradients - before.gradients, said.gradients) << step;
    EXPECT_EQ(after.weights - before.weights, said.weights) << step;
    EXPECT_EQ(after.tensor - before.tensor, said.tensor) << step;
    EXPECT_EQ(after.pipeline - before.pipeline, said.pipeline) << step;
    EXPECT_EQ(after.other - before.other, said.other) << step;
    EXPECT_EQ(said.total() > 0, world().size() > 1);
    before = after;
  }
  world().barrier();
  if (world().rank() == 0) std::filesystem::remove_all(folder);
}

std::vector<Case> cases_of_these_ranks() {
  const char* size = std::getenv("OMPI_COMM_WORLD_SIZE");
  std::vector<Case> cases = kCases;
  std::erase_if(cases, [ranks = size ? std::atoi(size) : 1](const Case& c) { return c.ranks != ranks; });
  return cases;
}
INSTANTIATE_TEST_SUITE_P(Meshes, TrafficOf, testing::Combine(testing::ValuesIn(cases_of_these_ranks()), testing::Bool()), [](const auto& info) {
  std::string name = str(std::get<0>(info.param).ranks, "_ranks");
  for (const std::string& key : std::get<0>(info.param).keys) name += "_" + key.substr(key.find('.') + 1);
  for (char& c : name) c = std::isalnum(static_cast<unsigned char>(c)) ? c : '_';
  return name + (std::get<1>(info.param) ? "_tied" : "_untied");
});

}  // namespace
}  // namespace trireme
