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

  // One token that counts nothing, for a rank that must compute because others do.
  static SequenceBatch of_nothing() {
    return {.tokens = {0}, .targets = {kIgnoreTarget}, .positions = {0}, .cu_seqlens = {0, 1}, .sample_ids = {0}};
  }

  // Adds the segments of another batch.
  void append(const SequenceBatch& other) {
    if (cu_seqlens.empty()) cu_seqlens.push_back(0);
    for (size_t s = 1; s < other.cu_seqlens.size(); ++s) cu_seqlens.push_back(num_tokens() + other.cu_seqlens[s]);
    auto add = [](auto& to, const auto& from) { to.insert(to.end(), from.begin(), from.end()); };
    add(tokens, other.tokens), add(targets, other.targets), add(positions, other.positions), add(sample_ids, other.sample_ids);
  }

  // Fills up to a multiple of `multiple` tokens with one more segment, in which nothing is learnt. It adds zero to every
  // sum and every gradient. What it is for: matrix kernels that are compiled anew for each number of rows.
  void fill_up(int64_t multiple) {
    const int64_t missing = (multiple - num_tokens() % multiple) % multiple;
    if (missing == 0 || tokens.empty()) return;
    tokens.insert(tokens.end(), static_cast<size_t>(missing), tokens.back());  // an id that the batch has anyway
    targets.insert(targets.end(), static_cast<size_t>(missing), kIgnoreTarget);
    for (int64_t i = 0; i < missing; ++i) positions.push_back(i);
    cu_seqlens.push_back(num_tokens());
    sample_ids.push_back(-1);
  }
};

}  // namespace trireme
