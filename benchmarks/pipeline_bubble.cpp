// Idle time of each pipeline schedule, as the runner measures it, beside the simulation; for mpirun -n N, one stage a
// rank. The compute is a sleep of known length (forward, input gradient and weight gradient as long each, a stage and
// micro-batch; a chunk of half a stage takes half), so that more stages than cores can be measured: what is seen is the
// schedule and the runner's transfers, not the speed of a model.
// bench_pipeline_bubble [micro-batches] [repeats] [milliseconds]: default 8, 5 and 50. The schedules take turns; medians. JSON.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <thread>

#include "base/json.h"
#include "comm/process.h"
#include "parallel/pipeline_runner.h"

namespace {

using namespace trireme;

const std::vector<int64_t> kShape{64, 256};

void sleep(double seconds) { std::this_thread::sleep_for(std::chrono::duration<double>(seconds)); }

// Sleeps forward, in backward, and for the weight gradient.
struct Sleeper : torch::autograd::Function<Sleeper> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x, const at::Tensor& w,
                            double seconds) {
    ctx->save_for_backward({w});
    ctx->saved_data["seconds"] = seconds;
    sleep(seconds);
    return x.clone();
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    const at::Tensor w = ctx->get_saved_variables()[0];
    const double seconds = ctx->saved_data.at("seconds").toDouble();
    sleep(seconds);
    const at::Tensor grad_w = weight_gradient(w, [w, seconds] {
      sleep(seconds);
      return at::zeros_like(w);
    });
    return {grads[0], grad_w, {}};
  }
};

struct Measured {
  double seconds = 0, idle = 0;  // a step; share of all stages' time without an action
};

Measured run(const PipelineSchedule& schedule, const Communicator& world, double seconds) {
  at::Tensor w = at::zeros({1}).requires_grad_();
  double busy = 0;
  PipelineStep step;
  for (int c : schedule.chunks_of(world.rank()))
    step.chunks.push_back({[&, c](int, const at::Tensor& hidden) {
                             at::Tensor y = Sleeper::apply(c == 0 ? at::zeros(kShape) : hidden, w, seconds);
                             return c + 1 == schedule.num_chunks() ? y.sum() : y;
                           },
                           [](const at::Tensor&, const at::Tensor&) {}});
  step.hidden_shape = [](int) { return kShape; };
  step.hidden_options = at::TensorOptions().dtype(at::kFloat);
  step.observe = [&](const PipelineEvent& e) { busy += std::chrono::duration<double>(e.end - e.begin).count(); };
  world.barrier();
  const auto begin = std::chrono::steady_clock::now();
  run_pipeline(schedule, world, step);
  Measured result;
  result.seconds = world.max(std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
  result.idle = 1 - world.sum(busy) / (result.seconds * world.size());
  return result;
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

}  // namespace

int main(int argc, char** argv) {
  Process process(&argc, &argv);
  Process::start_mpi();
  const int micro_batches = argc > 1 ? std::atoi(argv[1]) : 8, repeats = argc > 2 ? std::atoi(argv[2]) : 5;
  const double action_s = (argc > 3 ? std::atoi(argv[3]) : 50) * 1e-3;  // of a stage with one chunk
  const Communicator world = Communicator::world();
  const char* names[] = {"gpipe", "1f1b", "interleaved", "zb-h1", "zb-v"};
  std::vector<double> seconds[5], idle[5];
  std::vector<PipelineSchedule> schedules;
  for (const char* name : names)
    schedules.push_back(make_pipeline_schedule(parse_pipeline_kind(name), world.size(), 0, micro_batches));
  for (int repeat = -1; repeat < repeats; ++repeat)  // the first one warms up
    for (size_t i = 0; i < schedules.size(); ++i) {
      const Measured m = run(schedules[i], world, action_s / schedules[i].virtual_stages);
      if (repeat < 0) continue;
      seconds[i].push_back(m.seconds);
      idle[i].push_back(m.idle);
    }
  if (world.rank() == 0) {
    Json result = {{"benchmark", "pipeline_bubble"}, {"stages", world.size()}, {"micro_batches", micro_batches}};
    for (size_t i = 0; i < schedules.size(); ++i) {
      const double cost = action_s / schedules[i].virtual_stages;
      const Simulation theory = simulate(schedules[i], {cost, cost, cost, 0});
      result["schedules"].push_back({{"name", names[i]},
                                     {"virtual_stages", schedules[i].virtual_stages},
                                     {"seconds", median(seconds[i])},
                                     {"seconds_in_theory", theory.seconds},
                                     {"idle_share", median(idle[i])},
                                     {"idle_share_in_theory", theory.bubble()},
                                     {"idle_ratio", median(idle[i]) / theory.bubble()}});
    }
    std::printf("%s\n", result.dump(2).c_str());
  }
  return 0;
}
