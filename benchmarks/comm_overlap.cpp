// Communication of data parallelism, for mpirun -n 2 (or more): speed of the all-reduce beside MPI_Iallreduce and
// MPI_Allreduce, and the share of it that computation hides:
//   (sequential - overlapped) / (sequential - compute alone)
//   gradient buckets: sequential = compute, then all buckets; overlapped = the buckets are started at regular times while
//     computing
//   ZeRO-3: a forward and a backward over the blocks of ShardedWeights, whose first gather nothing can hide;
//     sequential = compute, then that without compute; overlapped = both together
//   rows of tensor parallelism: two blocks of a model cut over the ranks, forward and backward; sequential = products wait for
//     all rows (weight gradients fill waits of backward then, too); the share is of the messages alone. The messages go by MPI,
//     or over a link that is a timer: a rate, and no work for the cores.
// Compute is a sleep (the cores are free) or matrix products (they are not). Medians of 15. Prints one JSON object;
// with an argument of the rows alone, without one of the others.
#include <mpi.h>

#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdio>
#include <functional>
#include <thread>
#include <vector>

#include <ATen/Parallel.h>

#include "base/json.h"
#include "base/tensor.h"
#include "comm/communicator.h"
#include "comm/process.h"
#include "model/lora.h"
#include "ops/delayed_gradients.h"
#include "parallel/sharded_weights.h"
#include "parallel/tensor_parallel.h"

namespace {

using namespace trireme;

constexpr int kRepeats = 15;
constexpr int kNumBuckets = 8;
constexpr int64_t kBucketBytes = 4 << 20;

double seconds_of(const std::function<void()>& run) {
  const auto begin = std::chrono::steady_clock::now();
  run();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

// For each of the runs, taken in turn: the median over the repeats of the slowest rank's time.
std::vector<double> median_seconds(const Communicator& world, const std::vector<std::function<void()>>& runs) {
  std::vector<std::vector<double>> times(runs.size());
  for (int i = 0; i < kRepeats + 2; ++i)
    for (size_t r = 0; r < runs.size(); ++r) {
      world.barrier();
      const double seconds = world.max(seconds_of(runs[r]));
      if (i >= 2) times[r].push_back(seconds);
    }
  std::vector<double> medians;
  for (auto& list : times) {
    std::sort(list.begin(), list.end());
    medians.push_back(list[list.size() / 2]);
  }
  return medians;
}

Json all_reduce_times(const Communicator& world) {
  Json rows = Json::array();
  for (int64_t bytes :
       {int64_t{64}, int64_t{4} << 10, int64_t{64} << 10, int64_t{1} << 20, int64_t{8} << 20, int64_t{32} << 20}) {
    at::Tensor x = at::zeros({bytes / 4});
    const int count = static_cast<int>(x.numel());
    const int calls = bytes <= (64 << 10) ? 50 : 1;  // the clock is coarse against a small one
    auto repeated = [&](std::function<void()> run) -> std::function<void()> {
      return [run, calls] { for (int i = 0; i < calls; ++i) run(); };
    };
    const std::vector<double> medians = median_seconds(world, {
        repeated([&] { world.all_reduce(x); }),
        repeated([&] {
          MPI_Request request;
          MPI_Iallreduce(MPI_IN_PLACE, x.data_ptr(), count, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD, &request);
          MPI_Wait(&request, MPI_STATUS_IGNORE);
        })});
    Json row;
    row["bytes"] = bytes;
    size_t column = 0;
    for (const char* name : {"trireme_us", "mpi_iallreduce_us"})
      row[name] = medians[column++] / calls * 1e6;
    rows.push_back(row);
  }
  return rows;
}

Json share_row(const char* what, const char* compute, int64_t bytes, const std::vector<double>& medians) {
  const double computing = medians[0], sequential = medians[1], overlapped = medians[2];
  return {{"what", what},
          {"compute", compute},
          {"bytes", bytes},
          {"compute_ms", computing * 1e3},
          {"sequential_ms", sequential * 1e3},
          {"overlapped_ms", overlapped * 1e3},
          {"hidden_share", (sequential - overlapped) / (sequential - computing)}};
}

Json hidden_buckets(const Communicator& world, const char* compute, const std::function<void()>& piece) {
  std::vector<at::Tensor> buckets;
  for (int b = 0; b < kNumBuckets; ++b) buckets.push_back(at::zeros({kBucketBytes / 4}));
  std::vector<Work> works(kNumBuckets);
  auto start_all = [&] { for (int b = 0; b < kNumBuckets; ++b) works[b] = world.start_all_reduce(buckets[b]); };
  auto wait_all = [&] { for (Work& work : works) work.wait(); };
  // Taken in turn, so that whatever else the machine does falls on all alike. The computation goes on for as long again
  // after the last bucket, as a first layer's backward does.
  const std::vector<double> medians = median_seconds(world, {
      [&] { for (int b = 0; b < 2 * kNumBuckets; ++b) piece(); },
      [&] {
        for (int b = 0; b < 2 * kNumBuckets; ++b) piece();
        start_all();
        wait_all();
      },
      [&] {
        for (int b = 0; b < 2 * kNumBuckets; ++b) {
          piece();
          if (b < kNumBuckets) works[b] = world.start_all_reduce(buckets[b]);
          for (Work& work : works) work.test();
        }
        wait_all();
      }});
  return share_row("gradient buckets", compute, kNumBuckets * kBucketBytes, medians);
}

Json hidden_prefetch(const Communicator& world, const char* compute, const std::function<void()>& piece) {
  constexpr int kNumBlocks = 12;
  std::vector<Parameter> parameters;
  for (int b = 0; b < kNumBlocks; ++b) {
    at::Tensor w = at::zeros({kBucketBytes / 4}).requires_grad_();
    parameters.push_back({"model.layers." + std::to_string(b) + ".weight", w, ShardSpec::whole(w)});
  }
  const Holders holders = same_holders(parameters, world);
  const GradientReducer reducer(parameters, holders, {.bucket_bytes = kBucketBytes, .zero = 3});
  ShardedWeights weights(parameters, holders, reducer, 3, kBucketBytes);
  auto pass = [&](const std::function<void()>& each) {
    for (int b = 0; b < kNumBlocks; ++b) {
      weights.acquire(b, false);
      each();
      weights.release(b, false);
    }
    for (int b = kNumBlocks - 1; b >= 0; --b) {
      weights.acquire(b, true);
      each();
      weights.release(b, true);
    }
    weights.release_all();
  };
  const std::vector<double> medians = median_seconds(world, {
      [&] { for (int b = 0; b < 2 * kNumBlocks; ++b) piece(); },
      [&] {
        for (int b = 0; b < 2 * kNumBlocks; ++b) piece();
        pass([] {});
      },
      [&] { pass(piece); }});
  return share_row("ZeRO-3 prefetch", compute, (2 * kNumBlocks - 1) * kBucketBytes, medians);
}

// Rows that a rank sends itself, in as many copies as there are ranks: the work of a product's seams without a message. A message
// takes its bytes / rate, 0: none.
struct Timer {
  double rate = 0;
  std::chrono::steady_clock::time_point free = {};  // when the messages before have gone

  std::function<void()> start(const at::Tensor& whole, int num_ranks) {
    if (rate == 0) return [] { compute_waiting_gradient(); };  // when it would be computed otherwise
    const double seconds = static_cast<double>(whole.nbytes()) / num_ranks * (num_ranks - 1) / rate;
    free = std::max(free, std::chrono::steady_clock::now()) +
           std::chrono::duration_cast<std::chrono::steady_clock::duration>(std::chrono::duration<double>(seconds));
    return [until = free] {
      while (std::chrono::steady_clock::now() < until && compute_waiting_gradient()) {}
      std::this_thread::sleep_until(until);
    };
  }
};

struct Copied : torch::autograd::Function<Copied> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x, int64_t num_ranks, Timer* timer) {
    ctx->saved_data["timer"] = static_cast<int64_t>(reinterpret_cast<intptr_t>(timer));
    ctx->saved_data["ranks"] = num_ranks;
    return x.repeat({num_ranks, 1});
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx, const torch::autograd::variable_list& grads) {
    const int64_t n = ctx->saved_data["ranks"].toInt();
    reinterpret_cast<Timer*>(static_cast<intptr_t>(ctx->saved_data["timer"].toInt()))->start(grads[0], static_cast<int>(n))();
    return {grads[0].narrow(0, 0, grads[0].size(0) / n).contiguous(), at::Tensor(), at::Tensor()};
  }
};

constexpr int64_t kTokens = 512, kHidden = 512, kBlocks = 2, kMessages = 4 * kBlocks;  // of a forward, or a backward

// A model whose rows travel by MPI, or by `timer`.
std::unique_ptr<Transformer> cut_model(const Communicator& world, bool lora, const RowOverlap& overlap, Timer* timer) {
  const Json shape = {{"model_type", "llama"}, {"vocab_size", 64}, {"hidden_size", kHidden}, {"intermediate_size", kHidden},
                      {"num_hidden_layers", kBlocks}, {"num_attention_heads", 8}, {"num_key_value_heads", 8}, {"head_dim", 64},
                      {"rms_norm_eps", 1e-5}, {"max_position_embeddings", kTokens}};
  auto model = std::make_unique<Transformer>(model_config_from_json(shape, "shape"), at::kFloat, 1, Weights::kRandom, at::kMeta);
  if (lora) attach_lora(*model, {8, 16.0, 0.0, false, {"all-linear"}}, 1);
  if (timer) keep_tensor_part(*model, world.rank(), world.size());
  else apply_tensor_parallel(*model, world, overlap);
  model->materialize(at::kCPU, 1, [](const std::string&) { return true; });
  model->set_training(true);
  if (!timer) return model;
  const int n = world.size();
  RowSum sum;
  sum.num_ranks = n;
  sum.num_pieces = [overlap](int64_t rows, bool) { return overlap.applies(rows, false) ? overlap.num_pieces : 1; };
  sum.start = [timer, n](const at::Tensor& part, const at::Tensor& partial) {
    part.copy_(partial.narrow(0, 0, part.size(0)));
    return timer->start(partial, n);
  };
  auto arriving = [timer, n, overlap](const at::Tensor& all, const at::Tensor& here) {
    ArrivingRows rows(all, here, 0, timer->start(all, n));
    if (!overlap.applies(here.size(0), false)) rows.wait();
    return rows;
  };
  sum.gather = [arriving, n](const at::Tensor& part) { return arriving(part.repeat({n, 1}), part); };
  for (Linear* l : model->linears())
    if (l->path.ends_with("o_proj") || l->path.ends_with("down_proj")) l->after = std::make_shared<RowSum>(sum);
  ModelSeams seams;
  seams.row_multiple = n;
  seams.embed = [n](const at::Tensor& w, const at::Tensor& ids) { return trireme::embedding(w, ids.narrow(0, 0, ids.size(0) / n) % w.size(0)); };
  seams.all_rows = [arriving, timer, n](const at::Tensor& x) { return arriving(Copied::apply(x, int64_t{n}, timer), x.detach()); };
  model->set_seams(std::move(seams));
  return model;
}

// Seconds of forward and of backward.
using Phases = std::array<double, 2>;
Phases pass(Transformer& model) {
  ModelInput input;
  input.tokens_T = at::arange(kTokens).remainder(64);
  input.positions_T = at::arange(kTokens);
  input.cu_seqlens = {0, kTokens};
  input.sample_ids = {0};
  at::Tensor sum;
  const double forward = seconds_of([&] { sum = model.forward(input).sum(); });
  const double backward = seconds_of([&] {
    WeightGradientQueue waiting;
    const WeightGradientQueue::Sink sink = [](const at::Tensor&, const at::Tensor&) {};
    {
      DelayWeightGradients delay(&waiting, sink);  // as Worker does
      torch::autograd::backward({sum}, {});
    }
    waiting.run(sink);
  });
  for (const auto& p : model.parameters()) p.value.mutable_grad() = at::Tensor();
  return {forward, backward};
}

Json hidden_rows(const Communicator& world, bool lora, double rate) {
  const RowOverlap waits, gathers{.over_mpi = true, .num_pieces = 1}, pieces{.over_mpi = true};
  Timer none, link{rate, {}};
  Timer* timer = rate > 0 ? &link : nullptr;
  at::Tensor part = at::zeros({kTokens / world.size(), kHidden}), whole = at::zeros({kTokens, kHidden});
  std::vector<std::function<Phases()>> runs;
  std::vector<std::unique_ptr<Transformer>> models;
  models.push_back(cut_model(world, lora, waits, &none));
  for (const RowOverlap& overlap : {waits, gathers, pieces}) models.push_back(cut_model(world, lora, overlap, timer));
  for (const auto& model : models) runs.push_back([&model] { return pass(*model); });
  runs.push_back([&] {
    const double seconds = seconds_of([&] {
      for (int64_t i = 0; i < kMessages; ++i) {
        if (timer) timer->start(whole, world.size())();
        else if (i % 2 == 0) world.start_all_gather(whole, part).wait();
        else world.start_reduce_scatter(part, whole).wait();
      }
    });
    // Below the first adapters nothing is trained: one message less comes back.
    return Phases{seconds, lora ? seconds * (kMessages - 1) / kMessages : seconds};
  });
  // What is compared is run by turns, and differences are of neighbours: whatever else the machine does falls on both.
  constexpr int kTurns = 3 * kRepeats;
  std::vector<std::array<std::vector<double>, 2>> times(runs.size());
  for (int i = 0; i < kTurns + 2; ++i)
    for (size_t r = 0; r < runs.size(); ++r) {
      world.barrier();
      const Phases seconds = runs[r]();
      for (size_t phase = 0; phase < 2; ++phase)
        if (const double slowest = world.max(seconds[phase]); i >= 2) times[r][phase].push_back(slowest);
    }
  auto median = [](std::vector<double> list) {
    std::sort(list.begin(), list.end());
    return list[list.size() / 2];
  };
  Json rows = Json::array();
  for (size_t phase = 0; phase < 2; ++phase) {
    const double messages = median(times[4][phase]);
    Json row = {{"phase", phase == 0 ? "forward" : "backward"}, {"lora", lora}, {"link", rate > 0 ? "timer" : "MPI"}, {"rate", rate},
                {"compute_ms", median(times[0][phase]) * 1e3}, {"messages_ms", messages * 1e3}};
    for (const auto& [name, run] : {std::pair<std::string, size_t>{"waits", 1}, {"gathers", 2}, {"pieces", 3}}) {
      std::vector<double> saved;
      for (size_t i = 0; i < kTurns; ++i) saved.push_back(times[1][phase][i] - times[run][phase][i]);
      row[name + "_ms"] = median(times[run][phase]) * 1e3;
      row[name + "_saved"] = median(saved) / messages;
    }
    rows.push_back(row);
  }
  return rows;
}

}  // namespace

int main(int argc, char** argv) {
  Process process(&argc, &argv);
  Process::start_mpi();
  at::set_num_threads(process.load().threads_per_rank);
  Communicator world = Communicator::world();
  Json result;
  result["benchmark"] = "comm_overlap";
  result["ranks"] = process.size();
  result["threads"] = at::get_num_threads();
  result["cores"] = process.load().num_cores;
  result["yield_when_idle"] = process.load().oversubscribed();
  result["mpi"] = mpi_version();
  if (argc == 1) {
    result["all_reduce"] = all_reduce_times(world);
    at::Tensor a = at::randn({384, 384}), b = at::randn({384, 384}), c = at::empty({384, 384});
    // Longer than a piece's communication takes: what is measured is whether it is hidden, not whether it could be.
    auto sleep = [] { std::this_thread::sleep_for(std::chrono::milliseconds(12)); };
    auto multiply = [&] { for (int i = 0; i < 6; ++i) at::mm_out(c, a, b); };
    result["overlap"] = Json::array();
    for (const auto& [name, piece] :
         std::vector<std::pair<const char*, std::function<void()>>>{{"sleep", sleep}, {"matrix products", multiply}})
      for (auto* hidden : {&hidden_buckets, &hidden_prefetch}) result["overlap"].push_back(hidden(world, name, piece));
  } else {  // "rows"
    result["rows"] = Json::array();
    constexpr double kRate = 1e9;  // of the link that is a timer: bytes a second; a message takes less than what there is to hide it
    for (const bool lora : {false, true})
      for (const double rate : {kRate, 0.0})
        for (const Json& row : hidden_rows(world, lora, rate)) result["rows"].push_back(row);
  }
  if (process.rank() == 0) std::printf("%s\n", result.dump(2).c_str());
  return 0;
}
