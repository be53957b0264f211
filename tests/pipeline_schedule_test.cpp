// Pipeline schedules over stages 1..8, micro-batches 1..16, virtual stages 1..4: complete, free of deadlock without any
// buffering, idle time and activations as published; broken schedules are refused; layers are cut by cost.
#include "parallel/pipeline_schedule.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <functional>

#include "base/check.h"

namespace trireme {
namespace {

constexpr PipelineKind kKinds[] = {PipelineKind::kGpipe, PipelineKind::k1F1B, PipelineKind::kInterleaved,
                                   PipelineKind::kZbH1, PipelineKind::kZbV};

void for_all(const std::function<void(const PipelineSchedule&)>& f) {
  int count = 0;
  for (PipelineKind kind : kKinds)
    for (int p = 1; p <= 8; ++p)
      for (int m = 1; m <= 16; ++m)
        for (int v = 1; v <= 4; ++v) {
          const bool interleaved = kind == PipelineKind::kInterleaved;
          if (kind == PipelineKind::kZbV ? v != 2 : interleaved ? v > 1 && m % p != 0 : v != 1) continue;
          SCOPED_TRACE(str(pipeline_kind_name(kind), ": stages ", p, ", micro-batches ", m, ", virtual stages ", v));
          f(make_pipeline_schedule(kind, p, v, m));
          if (testing::Test::HasFailure()) return;
          ++count;
        }
  EXPECT_EQ(count, 4 * 8 * 16 + 8 * 16 + 3 * (16 + 8 + 5 + 4 + 3 + 2 + 2 + 2));
}

TEST(PipelineSchedule, CompleteAndFreeOfDeadlockWithoutBuffers) {
  for_all([](const PipelineSchedule& s) { EXPECT_EQ(check_schedule(s), ""); });
}

TEST(PipelineSchedule, ForwardsOnly) {
  for (PipelineKind kind : kKinds)
    for (int p = 1; p <= 8; ++p)
      for (int m = 1; m <= 16; ++m) {
        PipelineSchedule s = make_forward_schedule(kind, p, 0, m);
        EXPECT_EQ(check_schedule(s), "") << pipeline_kind_name(kind) << " " << p << " " << m;
        s.trains = true;
        EXPECT_NE(check_schedule(s), "");
        for (int stage = 0; stage < p; ++stage)
          EXPECT_EQ(s.chunks_of(stage), make_pipeline_schedule(kind, p, 0, p).chunks_of(stage));
      }
}

// Narayanan et al. 2021, section 2.2: (p-1)(t_f + t_b) for GPipe and 1F1B, that over v interleaved. Qi et al. 2024,
// table 2 and section 6: (p-1)(T_F + T_B - T_W) for ZB-H1; for ZB-V none inside of a stage's span with equal times, the
// stages starting one chunk's forward after the other. Where there are fewer micro-batches than the papers assume,
// nothing is published: ZB-H1 then misses p - m weight gradients to wait with, ZB-V two actions for each micro-batch
// that lacks.
TEST(PipelineSchedule, IdleTimeAsPublished) {
  for_all([](const PipelineSchedule& s) {
    const int p = s.stages, m = s.micro_batches, v = s.virtual_stages;
    const Simulation r = simulate(s, {1, 1, 1, 0});
    double idle = 3 * (p - 1);
    if (s.kind == PipelineKind::kZbH1) idle = p - 1 + std::max(0, p - m);
    if (s.kind == PipelineKind::kZbV) idle = std::max(p - 1, 2 * (2 * p - 1 - m));
    EXPECT_EQ(r.seconds, 3 * m * v + idle);  // a chunk's action takes 1, so that a stage's takes v
    EXPECT_NEAR(r.bubble(), idle / (3 * m * v + idle), 1e-15);
    for (size_t i = 0; s.kind == PipelineKind::kZbV && m >= 2 * p - 1 && i < r.busy.size(); ++i)
      EXPECT_EQ(r.end[i] - r.begin[i], r.busy[i]);
  });
}

// Without the split nothing depends on how forward and backward compare: the usual backward of twice the time.
TEST(PipelineSchedule, IdleTimeOfUnevenActions) {
  for_all([](const PipelineSchedule& s) {
    if (s.kind == PipelineKind::kZbH1 || s.kind == PipelineKind::kZbV) return;
    const Simulation r = simulate(s, {1, 1.5, 0.75, 0});
    EXPECT_DOUBLE_EQ(r.seconds, 3.25 * (s.micro_batches * s.virtual_stages + s.stages - 1));
  });
}

// A micro-batch's activations of one chunk count 1. Narayanan et al. 2021, section 2.2; Qi et al. 2024, table 2 (p M_B
// for 1F1B and ZB-H1, here on every stage) and section 6 (2 p chunks for ZB-V).
TEST(PipelineSchedule, ActivationsAsPublished) {
  for_all([](const PipelineSchedule& s) {
    const int p = s.stages, m = s.micro_batches, v = s.virtual_stages;
    const std::vector<int> peaks = simulate(s, {}).peak_in_flight;
    for (int r = 0; r < p; ++r) {
      const int peak = peaks[static_cast<size_t>(r)];
      switch (s.kind) {
        case PipelineKind::kGpipe:
          EXPECT_EQ(peak, m);
          break;
        case PipelineKind::kZbH1:
          EXPECT_EQ(peak, std::min(m, p));
          break;
        case PipelineKind::kZbV:
          EXPECT_LE(peak, std::min(2 * m, 2 * p)) << r;
          EXPECT_TRUE(peak == 2 * p || m < 2 * p - 1) << r << ": " << peak;
          break;
        default:
          EXPECT_EQ(peak, v == 1 ? std::min(m, p - r) : std::min(m * v, 2 * (p - r - 1) + (v - 1) * p + 1)) << r;
      }
    }
  });
}

// 4 forwards and 4 backwards one after the other, and 3 + 3 transfers
TEST(PipelineSchedule, TransfersCostWhereTheyAre) {
  EXPECT_EQ(simulate(make_pipeline_schedule(PipelineKind::k1F1B, 4, 1, 1), {1, 1, 1, 0.25}).seconds, 4 * 3 + 6 * 0.25);
  // In the V two chunks meet on the last stage: 3 + 3 transfers each way. In the way: the weight gradient of chunk 4
  // there.
  EXPECT_EQ(simulate(make_pipeline_schedule(PipelineKind::kZbV, 4, 2, 1), {1, 1, 1, 0.25}).seconds,
            8 * 2 + 2 + 12 * 0.25);
}

TEST(PipelineSchedule, ChunksOfStages) {
  const PipelineSchedule round = make_pipeline_schedule(PipelineKind::kInterleaved, 4, 3, 4),
                         v = make_pipeline_schedule(PipelineKind::kZbV, 4, 0, 1);
  EXPECT_EQ(round.chunks_of(1), (std::vector{1, 5, 9}));
  EXPECT_EQ(v.chunks_of(0), (std::vector{0, 7}));
  EXPECT_EQ(v.chunks_of(3), (std::vector{3, 4}));
  EXPECT_EQ(v.source({ActionKind::kForward, 0, 4}), -1);
  EXPECT_EQ(v.source({ActionKind::kBackwardInput, 0, 6}), 0);
}

// The two-stage schedule written down by hand.
TEST(PipelineSchedule, OneForwardOneBackward) {
  using enum ActionKind;
  const PipelineSchedule s = make_pipeline_schedule(PipelineKind::k1F1B, 2, 0, 2);
  EXPECT_EQ(s.actions[0],
            (std::vector<Action>{{kForward, 0, 0}, {kForward, 1, 0}, {kBackward, 0, 0}, {kBackward, 1, 0}}));
  EXPECT_EQ(s.actions[1],
            (std::vector<Action>{{kForward, 0, 1}, {kBackward, 0, 1}, {kForward, 1, 1}, {kBackward, 1, 1}}));
}

// Any action left out, doubled, or moved to another stage is found; so is any swap that breaks an order.
TEST(PipelineSchedule, BrokenOnesAreFound) {
  for (PipelineKind kind : kKinds) {
    const PipelineSchedule good = make_pipeline_schedule(kind, 3, 0, 6);
    int num_stuck = 0;
    for (size_t stage = 0; stage < good.actions.size(); ++stage)
      for (size_t i = 0; i < good.actions[stage].size(); ++i) {
        PipelineSchedule bad = good;
        bad.actions[stage].erase(bad.actions[stage].begin() + static_cast<int64_t>(i));
        EXPECT_NE(check_schedule(bad), "") << "without " << action_text(good.actions[stage][i]);
        bad = good;
        bad.actions[stage].insert(bad.actions[stage].begin(), bad.actions[stage][i]);
        EXPECT_NE(check_schedule(bad), "") << "twice " << action_text(good.actions[stage][i]);
        bad = good;
        std::swap(bad.actions[stage][i], bad.actions[(stage + 1) % 3][i]);
        EXPECT_NE(check_schedule(bad), "") << "elsewhere " << action_text(good.actions[stage][i]);
        for (size_t j = i + 1; j < good.actions[stage].size(); ++j) {
          const Action &a = good.actions[stage][i], &b = good.actions[stage][j];
          bad = good;
          std::swap(bad.actions[stage][i], bad.actions[stage][j]);
          const std::string said = check_schedule(bad);
          if (a.micro_batch == b.micro_batch && a.chunk == b.chunk) {
            EXPECT_NE(said, "") << action_text(a);
          }
          num_stuck += said.find("waits for ever") != std::string::npos;
        }
      }
    EXPECT_GT(num_stuck, 0) << pipeline_kind_name(kind);  // legal on each stage, but the stages wait for each other
  }
  PipelineSchedule crossed =
      make_pipeline_schedule(PipelineKind::kGpipe, 2, 1, 2);  // stage 1 wants the second micro-batch first
  std::swap(crossed.actions[1][0], crossed.actions[1][1]);
  EXPECT_EQ(check_schedule(crossed), "stage 0 waits for ever to send after forward of micro-batch 0 on chunk 0");
  EXPECT_THROW(simulate(PipelineSchedule{PipelineKind::kGpipe, 2, 1, 1, true, {{}, {{ActionKind::kForward, 0, 1}}}}, {}),
               InternalError);
}

std::string refusal(const std::function<void()>& f) {
  try {
    f();
  } catch (const ConfigError& e) {
    return e.what();
  }
  return "accepted";
}

TEST(PipelineSchedule, Refusals) {
  EXPECT_EQ(refusal([] { parse_pipeline_kind("zb"); }),
            "parallel.schedule=zb: must be gpipe, 1f1b, interleaved, zb-h1 or zb-v");
  EXPECT_EQ(refusal([] { make_pipeline_schedule(PipelineKind::kInterleaved, 4, 2, 2); }),
            "train.accumulation=2 with parallel.schedule=interleaved on 4 pipeline ranks: micro-batches go round in "
            "groups of 4; set train.accumulation=4, or another parallel.schedule");
  EXPECT_EQ(
      refusal([] { make_pipeline_schedule(PipelineKind::kZbV, 4, 3, 8); }),
      "parallel.virtual_stages=3 with parallel.schedule=zb-v: a V has exactly 2 chunks a rank; leave the key out or "
      "set 2");
  EXPECT_EQ(refusal([] { make_pipeline_schedule(PipelineKind::k1F1B, 4, 2, 8); }),
            "parallel.virtual_stages=2 with parallel.schedule=1f1b: this schedule has 1 chunk a rank; set "
            "parallel.schedule=interleaved, or leave the key out");
  for (PipelineKind kind : kKinds) EXPECT_EQ(parse_pipeline_kind(pipeline_kind_name(kind)), kind);
}

TEST(SplitLayers, ByCost) {
  EXPECT_EQ(split_layers(4, 2, 0, 0), (std::vector<LayerRange>{{0, 2}, {2, 4}}));
  EXPECT_EQ(split_layers(8, 4, 0.1, 2.4), (std::vector<LayerRange>{{0, 2}, {2, 4}, {4, 7}, {7, 8}}));
  EXPECT_EQ(
      refusal([] { split_layers(3, 4, 0, 0); }),
      "parallel.pipeline x parallel.virtual_stages = 4 chunks, but the model has only 3 layers: at most 3 chunks, "
      "of one layer or more, fit; lower parallel.pipeline (interleaved and zb-v have 2 chunks a rank, unless told otherwise)");
}

// The dearest chunk is as cheap as the best of all cuts.
TEST(SplitLayers, BestOfAllCuts) {
  for (int layers = 1; layers <= 9; ++layers)
    for (int chunks = 1; chunks <= std::min(layers, 4); ++chunks)
      for (double embedding : {0.0, 0.4, 1.7})
        for (double head : {0.0, 0.8, 3.1}) {
          auto dearest = [&](const std::vector<LayerRange>& ranges) {
            double most = 0;
            for (size_t i = 0; i < ranges.size(); ++i)
              most = std::max(most, static_cast<double>(ranges[i].end - ranges[i].begin) + (i == 0 ? embedding : 0) +
                                        (i + 1 == ranges.size() ? head : 0));
            return most;
          };
          double best = 1e9;
          std::function<void(std::vector<LayerRange>)> cut = [&](std::vector<LayerRange> ranges) {
            const int64_t begin = ranges.empty() ? 0 : ranges.back().end;
            if (static_cast<int>(ranges.size()) == chunks) {
              if (begin == layers) best = std::min(best, dearest(ranges));
              return;
            }
            for (int64_t end = begin + 1; end <= layers; ++end) {
              ranges.push_back({begin, end});
              cut(ranges);
              ranges.pop_back();
            }
          };
          cut({});
          const auto ranges = split_layers(layers, chunks, embedding, head);
          EXPECT_EQ(dearest(ranges), best)
              << layers << " layers, " << chunks << " chunks, " << embedding << ", " << head;
          EXPECT_EQ(ranges.back().end, layers);
        }
}

}  // namespace
}  // namespace trireme
