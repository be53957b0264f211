// Which ranks hold a slice of a parameter. One rule carries all of parallelism: the gradient of a slice is the sum over
// all ranks that hold it: its data-parallel copies, the tensor ranks with the same slice (norms, biases behind a
// reduce-scatter, the replicated half of an adapter, replicated key heads), both ends of a pipeline with a tied embedding.
#pragma once

#include <string>
#include <vector>

#include "base/parameter.h"
#include "comm/mesh.h"

namespace trireme {

struct Holders {
  Communicator all;                  // every rank that takes part
  std::vector<Communicator> groups;  // the sets of ranks that this rank is in, in an order that all their members share
  std::vector<size_t> group_of;      // of each parameter: one of `groups`

  // Every rank holds everything: what one rank knows of gradients, all know.
  bool everywhere() const { return groups.size() == 1 && groups[0].size() == all.size(); }
};

// Collective. Every rank tells its parameters (name, slice, dtype, trained or not), and the sets of ranks with the same slice
// become groups, ordered along the data axis, then by rank: parts of that axis are runs of any group; the axis itself may be one.
// TRIREME_CHECK: slices of one name that overlap or do not make up the whole, or differ in dtype or in being trained; a
// name that one rank has twice; parameters of a group in another order on another of its ranks.
Holders find_holders(const std::vector<Parameter>& parameters, const MeshComms& comms);

// The same for ranks that all hold the same parameters. TRIREME_CHECK where they do not. Collective.
Holders same_holders(const std::vector<Parameter>& parameters, const Communicator& group);

// SystemError naming the first parameter whose bits differ from those of the first rank that holds it. Collective.
void check_parameters_equal(const std::vector<Parameter>& parameters, const Holders& holders);

}  // namespace trireme
