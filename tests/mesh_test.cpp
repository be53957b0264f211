// Mesh arithmetic for every mesh of up to 16 ranks, and the words of its refusals; the reading of the environment;
// the watchdog.
#include "comm/mesh.h"

#include <gtest/gtest.h>

#include <unistd.h>

#include <chrono>
#include <map>
#include <set>
#include <thread>

#include "base/check.h"
#include "comm/process.h"
#include "comm/verdict.h"
#include "comm/watchdog.h"

namespace trireme {
namespace {

template <typename Visit>
void for_all_meshes(Visit visit) {
  for (int ranks = 1; ranks <= 16; ++ranks)
    for (int tensor = 1; tensor <= ranks; ++tensor)
      for (int pipeline = 1; pipeline * tensor <= ranks; ++pipeline)
        if (ranks % (tensor * pipeline) == 0) visit(Mesh(ranks, 0, tensor, pipeline), ranks);
}

TEST(Mesh, RankAndCoordsAreInverse) {
  int num_meshes = 0;
  for_all_meshes([&](const Mesh& mesh, int ranks) {
    ++num_meshes;
    ASSERT_EQ(mesh.num_ranks(), ranks);
    for (int r = 0; r < ranks; ++r) {
      const MeshCoords c = mesh.coords(r);
      EXPECT_EQ(mesh.rank(c), r);
      EXPECT_TRUE(c.data >= 0 && c.data < mesh.num_data() && c.tensor >= 0 && c.tensor < mesh.num_tensor() &&
                  c.pipeline >= 0 && c.pipeline < mesh.num_pipeline());
    }
  });
  EXPECT_EQ(num_meshes, 110);  // sum over n <= 16 of the ordered factorizations of n into three
}

TEST(Mesh, TensorIsInnermostAndPipelineOutermost) {
  const Mesh mesh(12, 3, 2, 2);
  EXPECT_EQ(mesh.coords(1), (MeshCoords{0, 0, 1}));
  EXPECT_EQ(mesh.coords(2), (MeshCoords{0, 1, 0}));
  EXPECT_EQ(mesh.coords(6), (MeshCoords{1, 0, 0}));
  EXPECT_EQ(mesh.coords(11), (MeshCoords{1, 2, 1}));
}

TEST(Mesh, AnyAxisMayBeInnermost) {
  const Mesh mesh(12, 3, 2, 2, parse_mesh_order("tensor-pipeline-data"));
  EXPECT_EQ(mesh.coords(1), (MeshCoords{0, 1, 0}));
  EXPECT_EQ(mesh.coords(3), (MeshCoords{1, 0, 0}));
  EXPECT_EQ(mesh.coords(6), (MeshCoords{0, 0, 1}));
  EXPECT_EQ(mesh.group(4, MeshAxis::kTensor), (std::vector<int>{4, 10}));
  for (int r = 0; r < 12; ++r) EXPECT_EQ(mesh.rank(mesh.coords(r)), r);
  EXPECT_THROW(parse_mesh_order("tensor-data"), ConfigError);
  EXPECT_THROW(parse_mesh_order("tensor-data-data"), ConfigError);
}

TEST(Mesh, GroupsOfAnAxisPartTheRanks) {
  for_all_meshes([&](const Mesh& mesh, int ranks) {
    for (MeshAxis axis : {MeshAxis::kPipeline, MeshAxis::kData, MeshAxis::kTensor}) {
      std::set<std::vector<int>> groups;
      std::map<int, int> times;
      for (int r = 0; r < ranks; ++r) {
        const std::vector<int> group = mesh.group(r, axis);
        ASSERT_EQ(static_cast<int>(group.size()), mesh.size(axis));
        EXPECT_EQ(group[static_cast<size_t>(mesh.coords(r).on(axis))], r);
        if (groups.insert(group).second)
          for (int member : group) ++times[member];
      }
      EXPECT_EQ(static_cast<int>(times.size()), ranks);
      for (const auto& [member, count] : times) EXPECT_EQ(count, 1) << member;
    }
  });
}

std::string refusal(int ranks, int data, int tensor, int pipeline, const Mesh::CanBeCut& can_be_cut = {}) {
  try {
    Mesh mesh(ranks, data, tensor, pipeline, kTensorInnermost, can_be_cut);
  } catch (const ConfigError& e) {
    return e.what();
  }
  return "accepted";
}

TEST(Mesh, RefusalsNameKeysAndWayOut) {
  EXPECT_EQ(refusal(4, 0, 3, 1),
            "parallel.tensor=3 x parallel.pipeline=1 is 3 or a multiple of it, but there are 4 ranks: start 3 (mpirun -n 3 ...), or "
            "take one of these meshes: data 1 x tensor 4 x pipeline 1, data 2 x tensor 2 x pipeline 1, data 4 x tensor 1 x pipeline 1, "
            "data 1 x tensor 2 x pipeline 2, data 2 x tensor 1 x pipeline 2, data 1 x tensor 1 x pipeline 4");
  EXPECT_EQ(refusal(4, 3, 2, 1),
            "parallel.data=3 x parallel.tensor=2 x parallel.pipeline=1 is 6, but there are 4 ranks: start 6 (mpirun -n 6 ...), or take "
            "one of these meshes: data 2 x tensor 2 x pipeline 1, data 4 x tensor 1 x pipeline 1, data 1 x tensor 2 x pipeline 2, "
            "data 1 x tensor 4 x pipeline 1, data 2 x tensor 1 x pipeline 2, data 1 x tensor 1 x pipeline 4");
  EXPECT_EQ(refusal(1, 2, 1, 1),
            "parallel.data=2 x parallel.tensor=1 x parallel.pipeline=1 is 2, but there is 1 rank: start 2 (mpirun -n 2 ...), or take "
            "one of these meshes: data 1 x tensor 1 x pipeline 1");
  EXPECT_EQ(refusal(4, 0, 0, 1), "parallel.tensor=0: must be at least 1");
  EXPECT_EQ(refusal(4, 0, 1, -1), "parallel.pipeline=-1: must be at least 1");
  EXPECT_EQ(refusal(4, -2, 1, 1), "parallel.data=-2: must be at least 1, or 0 for all ranks that are left");
  EXPECT_NE(refusal(2, 0, 1 << 20, 1 << 20).find("but there are 2 ranks: "), std::string::npos);
  EXPECT_NE(refusal(48, 0, 5, 2).find(", ..."), std::string::npos);  // six of many
}

TEST(Mesh, OnlyMeshesThatTheModelAllowsAreNamed) {
  EXPECT_TRUE(refusal(4, 0, 3, 1, [](int tensor, int pipeline) { return tensor <= 2 && pipeline == 1; })
                  .ends_with(": take one of these meshes: data 2 x tensor 2 x pipeline 1, data 4 x tensor 1 x "
                             "pipeline 1"));
  EXPECT_TRUE(refusal(4, 0, 3, 1, [](int, int) { return false; }).ends_with(": the model cannot be cut so, nor otherwise over these"));
}

std::string launch(const std::map<std::string, std::string>& environment) {
  return launch_problem([&](const char* name) -> const char* {
    auto found = environment.find(name);
    return found == environment.end() ? nullptr : found->second.c_str();
  });
}

TEST(Launch, ALoneProcessIsTold) {
  EXPECT_EQ(launch({}), "");
  EXPECT_EQ(launch({{"SLURM_NTASKS", "1"}}), "");
  EXPECT_EQ(launch({{"SLURM_NTASKS", "4"}, {"SLURM_STEP_NUM_TASKS", "1"}}), "");  // srun -n 1
  EXPECT_EQ(launch({{"SLURM_NTASKS", "4"}, {"OMPI_COMM_WORLD_SIZE", "1"}}), "");  // mpirun -n 1
  EXPECT_EQ(launch({{"SLURM_NTASKS", "4"}, {"SLURM_STEP_NUM_TASKS", "4"}}),
            "srun started 4 tasks (SLURM_STEP_NUM_TASKS=4) but each is alone in its MPI world; use: srun --mpi=pmix -n "
            "4 trireme ..., or "
            "inside the allocation: mpirun -n 4 trireme ...");
  EXPECT_EQ(launch({{"SLURM_NTASKS", "4"}}),
            "Slurm has allocated 4 tasks (SLURM_NTASKS=4) but trireme was started as one process; use: mpirun -n 4 "
            "trireme ..., or for "
            "one process: srun -n 1 trireme ...");
  EXPECT_EQ(launch({{"PMI_SIZE", "3"}}),
            "the launcher started 3 processes (PMI_SIZE=3) but it belongs to another MPI than the Open MPI that "
            "trireme was built with; "
            "use Open MPI's: mpirun -n 3 trireme ... (`trireme doctor` prints its version)");
}

TEST(Launch, MoreBusyThreadsThanCoresIsOversubscribed) {
  const CoreMask four = 0b1111;
  EXPECT_FALSE(host_load({four, four}, 2).oversubscribed());
  EXPECT_TRUE(host_load({four, four, four}, 2).oversubscribed());
  EXPECT_FALSE(host_load({0b0011, 0b1100}, 2).oversubscribed());
  EXPECT_TRUE(host_load({0b0001, 0b1110}, 2).oversubscribed());
}

TEST(Launch, ThreadsOfRanksThatAreBoundAreTheirOwnCores) {
  HostLoad load = host_load({0b0011, 0b0011, 0b1100, 0b1100}, 0);  // two sockets
  EXPECT_EQ(load.num_local_ranks, 4);
  EXPECT_EQ(load.num_cores, 4);
  EXPECT_EQ(load.threads_per_rank, 1);
  EXPECT_TRUE(load.bound);
  load = host_load({0b00001111, 0b11110000}, 0);
  EXPECT_EQ(load.num_cores, 8);
  EXPECT_EQ(load.threads_per_rank, 4);
  EXPECT_FALSE(load.oversubscribed());
  load = host_load({0b111, 0b111}, 0);  // one and a half each
  EXPECT_EQ(load.threads_per_rank, 1);
  EXPECT_FALSE(load.bound);
  load = host_load({0b1, 0b1, 0b1}, 0);  // one core for three
  EXPECT_EQ(load.threads_per_rank, 1);
  EXPECT_TRUE(load.oversubscribed());
}

HostLoad guess(const CoreMask& mine, const std::map<std::string, std::string>& environment) {
  return guess_host_load(mine, [&](const char* name) -> const char* {
    auto found = environment.find(name);
    return found == environment.end() ? nullptr : found->second.c_str();
  });
}

// mpirun binds each of two ranks to a core of its own: neither has to give it away.
TEST(Launch, BeforeMpiStartsTheEnvironmentTellsWhatIsBound) {
  EXPECT_EQ(guess(0b1111, {}).threads_per_rank, 4);
  EXPECT_EQ(guess(0b1111, {{"OMPI_COMM_WORLD_LOCAL_SIZE", "2"}}).threads_per_rank, 2);
  EXPECT_EQ(guess(0b1111, {{"SLURM_STEP_TASKS_PER_NODE", "4(x2),1"}}).threads_per_rank, 1);
  EXPECT_TRUE(guess(0b1, {{"OMPI_COMM_WORLD_LOCAL_SIZE", "2"}}).oversubscribed());
  HostLoad load = guess(0b1, {{"OMPI_COMM_WORLD_LOCAL_SIZE", "2"}, {"OMPI_MCA_orte_bound_at_launch", "1"}});
  EXPECT_FALSE(load.oversubscribed());
  EXPECT_EQ(load.num_local_ranks, 2);
  load = guess(0b1, {{"OMPI_COMM_WORLD_LOCAL_SIZE", "2"}, {"OMPI_MCA_orte_bound_at_launch", "1"}, {"OMP_NUM_THREADS", "2"}});
  EXPECT_TRUE(load.oversubscribed());
}

// In a process of its own, which the watchdog ends.
TEST(Watchdog, ACollectiveThatHangsEndsTheJobAndIsNamed) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(
      {
        flight_end(flight_begin(job_group(), {"barrier", 0, 1}));
        flight_begin(job_group(), {"all_reduce", 4096, 2, "float32"});
        set_comm_timeout(0.3);
        std::this_thread::sleep_for(std::chrono::seconds(20));
      },
      testing::ExitedWithCode(1),
      "warning: the last operations of this rank:\nbarrier #1 of group world, 0 bytes, took 0(.|\n)*error: rank 0 has waited for [0-9]+\\.[0-9] s in "
      "all_reduce #2 of group world, 4096 bytes \\(float32\\), more than comm.timeout_s=0\\.3\\. All ranks are ended.*again\n");
}

TEST(Watchdog, FinishedCollectivesAndNoTimeoutAreLeftAlone) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(
      {
        flight_end(flight_begin(job_group(), {"barrier"}));
        set_comm_timeout(0.1);
        std::this_thread::sleep_for(std::chrono::milliseconds(400));
        {
          CommTimeoutPause saving;
          const uint64_t agreement = flight_begin(job_group(), {"agree", 4});
          std::this_thread::sleep_for(std::chrono::milliseconds(400));
          flight_end(agreement);
        }
        set_comm_timeout(0);
        flight_begin(job_group(), {"all_reduce", 4096});
        std::this_thread::sleep_for(std::chrono::milliseconds(400));
        _exit(7);
      },
      testing::ExitedWithCode(7), "");
}

TEST(FlightRecorder, KeepsTheLast256AndWhatIsStillInFlight) {
  const auto group = std::make_shared<FlightGroup>(FlightGroup{"kept", "kept", {0}});
  const uint64_t open = flight_begin(group, {"send", 10, 0, "uint8", 3});
  for (int i = 1; i <= 300; ++i) flight_end(flight_begin(group, {"barrier", 0, i}));
  std::vector<Flight> kept = flights(kNumFlights, true);
  ASSERT_EQ(kept.size(), kNumFlights + 1);
  EXPECT_EQ(kept[0].name(), "send with rank 3 of group kept, 10 bytes (uint8)");
  EXPECT_EQ(kept[0].awaited, std::vector<int>{3});
  EXPECT_FALSE(kept[0].done);
  EXPECT_EQ(kept[1].name(), "barrier #45 of group kept, 0 bytes");
  const RankReport again = report_of(to_text({7, kept}));
  EXPECT_EQ(again.rank, 7);
  EXPECT_EQ(again.flights[0].text(), kept[0].text());
  EXPECT_EQ(again.flights[0].awaited, kept[0].awaited);
  EXPECT_EQ(again.flights[1].group_id, "kept");
  flight_end(open);
  kept = flights(1, false);
  ASSERT_EQ(kept.size(), 1u);
  EXPECT_EQ(kept[0].number, 300);
}

Flight flight(const char* op, const char* group, int64_t number, std::vector<int> awaited = {}, int64_t num_bytes = 32) {
  Flight f;
  f.op = op, f.detail = "float32", f.group_id = f.group = group;
  f.num_bytes = num_bytes, f.number = number, f.age_s = f.seconds = 4;
  f.done = awaited.empty(), f.awaited = awaited;
  if (f.done) f.seconds = 1;
  return f;
}

Testimony testimony(const std::vector<std::vector<Flight>>& flights) {
  Testimony known;
  known.hosts.clear();
  for (const auto& of_rank : flights) {
    const int rank = static_cast<int>(known.reports.size());
    known.hosts.push_back(str("host", rank));
    known.reports[rank] = {rank, of_rank};
  }
  return known;
}

TEST(Verdict, FollowsThoseWhoWaitToTheOneWhoDoesNot) {
  const Flight sum = flight("all_reduce", "data", 5, {1}), gather = flight("all_gather", "tensor", 9, {2});
  Testimony known = testimony({{sum}, {gather}, {flight("all_gather", "tensor", 8)}});
  EXPECT_EQ(culprit(known, 0, sum),
            "rank 2 on host2 has not come to all_gather #9 of group tensor, 32 bytes (float32), where rank 1 waits for it; it is in no operation since "
            "all_gather #8 of group tensor, 32 bytes (float32) ended, 3.0 s before");
  known.reports[2].flights = {flight("barrier", "pipeline", 1, {0})};
  EXPECT_EQ(culprit(known, 0, sum),
            "ranks wait for one another: rank 0 for rank 1 in all_reduce #5 of group data, 32 bytes (float32); rank 1 for rank 2 in all_gather #9 of "
            "group tensor, 32 bytes (float32); rank 2 for rank 0 in barrier #1 of group pipeline, 32 bytes (float32)");
  known.reports[2].flights = {flight("all_gather", "tensor", 9, {1})};  // all have come
  known.reports[1].flights.push_back(flight("all_reduce", "data", 5, {0}));
  EXPECT_EQ(culprit(known, 0, sum), "rank 0 has waited for 4.0 s in all_reduce #5 of group data, 32 bytes (float32), to which all ranks have come: a "
                                    "network or a device does not go on");
  known.reports.erase(2);
  EXPECT_EQ(culprit(known, 0, sum), "rank 2 on host2 does not answer: it is stopped or gone; rank 0 has waited for 4.0 s in all_reduce #5 of group data, 32 bytes "
                                    "(float32)");
  known.last_words[2] = {{2, {}}, 1.5};
  known.reports.erase(1);
  EXPECT_EQ(culprit(known, 0, sum), "rank 1 on host1 does not answer: it is stopped or gone, and so does rank 2; rank 0 has waited for 4.0 s in all_reduce #5 of "
                                    "group data, 32 bytes (float32)");
}

TEST(Verdict, ComparesTheSameOperationOfTheSameGroup) {
  const Flight sum = flight("all_reduce", "data", 5, {1});
  EXPECT_EQ(mismatch(testimony({{sum}, {flight("all_gather", "data", 6, {0})}, {flight("all_gather", "tensor", 5, {0})}, {sum}})), "");
  EXPECT_EQ(mismatch(testimony({{flight("all_reduce", "data", 5, {1}, 64)}, {sum}, {sum}})),
            "rank 0 on host0 is in all_reduce #5 of group data, 64 bytes (float32), where ranks 1, 2 are in all_reduce #5 of group data, 32 bytes "
            "(float32): the ranks do not do the same operations");
  Flight message = flight("send", "data", 0, {1}), other = flight("send", "data", 0, {1}, 64);
  EXPECT_EQ(mismatch(testimony({{message}, {other}})), "");
}

}  // namespace
}  // namespace trireme
