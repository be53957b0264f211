// Trains as `trireme train` does, with an allocator that counts the bytes of CPU tensors, and prints for each rank the most
// that were alive at once, what the plan says of it, and the process's resident memory beside what it had before the model.
//   mpirun -n 2 bench_memory_plan --model.config=... (keys of train; train.stop_after leaves the export out; full rows)
#include "base/tensor.h"

#include <fstream>
#include <iostream>

#include "base/json.h"
#include "tests/tensor_bytes.h"
#include "train/footprint.h"
#include "train/memory.h"
#include "train/trainer.h"

namespace trireme {
namespace {

uint64_t resident_bytes() {
  std::ifstream status("/proc/self/status");
  for (std::string word; status >> word;)
    if (uint64_t kib = 0; word == "VmRSS:" && status >> kib) return kib * 1024;
  return 0;
}

int run(int argc, char** argv) {
  const auto& counted = test::TensorBytes::install();
  Process process(&argc, &argv);
  std::vector<const char*> words = {argv[0], "train"};
  for (int i = 1; i < argc; ++i) words.push_back(argv[i]);
  Config config;
  const CommandLine line = parse_command_line(static_cast<int>(words.size()), words.data(), config);
  at::ones({256, 256}).mm(at::ones({256, 256}));  // loads what products need
  const uint64_t before = resident_bytes();
  run_training(config, line, process, false);

  const ModelSource source = find_model(config);
  const Mesh mesh = mesh_of(config, process.size());
  const int64_t tokens = config.train.micro_batch_size * config.data.max_length;
  const Footprint f = step_footprint(MeshModel(config, source.config, train_dtype(config, source), mesh), config, mesh.coords(process.rank()),
                                     {tokens, tokens}, config.train.accumulation, {config.eval.micro_batch_size * config.data.max_length, 0});
  const Json own = {{"rank", process.rank()}, {"tensor_bytes", counted.peak()}, {"planned_bytes", f.total()}, {"weights", f.weights},
                    {"gradients", f.gradients}, {"optimizer", f.optimizer}, {"activations", f.activations}, {"buffers", f.buffers},
                    {"resident_bytes", peak_resident_bytes() - before}};
  for (const auto& text : Communicator::world().gather_bytes(dump_json(own))) std::cout << text << "\n";
  return 0;
}

}  // namespace
}  // namespace trireme

int main(int argc, char** argv) {
  try {
    return trireme::run(argc, argv);
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
}
