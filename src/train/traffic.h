// Bytes that ranks exchange in a step: as counted by the Communicators of a run, and as computed from shapes. The two are
// the same integers, for every mesh (tests/traffic_mpi_test.cpp).
#pragma once

#include <cstdint>
#include <string>

#include "train/mesh_model.h"

namespace trireme {

// Of one rank and step, by purpose. Payloads, in the Communicator's way of counting: an all-reduce its tensor, a reduce-scatter
// its input, an all-gather its output, a transfer the message (with the sender). On the wire a ring sends (n-1)/n of the
// payload of a gather or scatter over n ranks, and twice that for an all-reduce. Groups of one count nothing.
struct Traffic {
  int64_t gradients = 0;  // summed over all who hold a slice: data-parallel copies, tensor ranks, both ends of a tied pipeline
  int64_t weights = 0;    // gathered: ZeRO 1 and 2 what was updated, ZeRO 3 blocks before they are used
  int64_t tensor = 0;     // rows and losses between tensor ranks
  int64_t pipeline = 0;   // hidden states and their gradients, sent to other stages
  int64_t other = 0;      // sums for the loss, the norm and the end
  bool operator==(const Traffic&) const = default;
  int64_t total() const { return gradients + weights + tensor + pipeline + other; }
  std::string text() const;  // "gradients 6.85 MiB, other 48 bytes"
};

struct MicroBatch {
  int64_t tokens = 0;  // of all its rows
  int64_t learnt = 0;
};

// ZeRO 3: what ShardedWeights gathers of whole weights in a step of so many micro-batches, by the same rules: a block before it is
// used, with its neighbour; the last one stays between forward and backward; one whose input nobody asks a gradient for, to the end.
struct Gathers {
  int64_t bytes_exchanged = 0;  // payload, of groups of more than one rank
  int64_t peak_bytes = 0;       // of what is there at once, beside this rank's parts
};
Gathers gathered_blocks(const MeshModel& model, const Config& config, const MeshCoords& coords, int64_t num_batches);

// What the rank at `coords` exchanges in a step of these micro-batches, of which its stage sees all. No gradient overflows.
Traffic step_traffic(const MeshModel& model, const Config& config, const MeshCoords& coords, const std::vector<MicroBatch>& batches);

}  // namespace trireme
