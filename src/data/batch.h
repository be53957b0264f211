// The one sequence representation: a flat run of tokens cut into segments. Unpacked data is a batch of one-segment rows,
// packed data puts several samples into a row; neither has padding, so model and tasks know one shape only.
#pragma once

#include <cstdint>
#include <vector>

namespace trireme {

constexpr int64_t kIgnoreTarget = -100;  // a position whose prediction is not learnt

struct SequenceBatch {
  std::vector<int64_t> tokens;      // [T] ids
  std::vector<int64_t> targets;     // [T] targets[t] = id to predict at t (already shifted), or kIgnoreTarget
  std::vector<int64_t> positions;   // [T] position within its segment, from 0
  std::vector<int64_t> cu_seqlens;  // [S+1] segment s is tokens[cu_seqlens[s] .. cu_seqlens[s+1]); attention stays inside
  std::vector<int64_t> sample_ids;  // [S] global sample index of each segment; keys the dropout masks

  int64_t num_tokens() const { return static_cast<int64_t>(tokens.size()); }
  int64_t num_segments() const { return cu_seqlens.empty() ? 0 : static_cast<int64_t>(cu_seqlens.size()) - 1; }
};

}  // namespace trireme
