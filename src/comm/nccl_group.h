// The NCCL half of a Communicator: collectives and messages between device tensors of one group of ranks. Internal to
// comm/.
//
// Everything that ranks must agree on goes through the group's MPI half, so there is no port and nothing to configure.
//   collectives  one NCCL communicator a group, made by the first collective (so it is collective). Its unique id comes
//                from rank 0. A group made by split() gets an id of its own rather than ncclCommSplit: that would bind all
//                ranks of the parent, which may use no device, and their failures together.
//   messages     one communicator of two ranks for each ordered pair that talks, made by its first message: what goes
//                there never waits for what comes back. NCCL knows no tags and hangs where sizes differ, so the ends
//                agree over MPI first: the receiver says that it is ready, the sender answers with the message's number
//                in the pair's stream (or, where the sizes differ, that there is none: an error at both ends).
// Streams: an operation waits for what the caller's current stream held when it was started, in a stream of its
// communicator; Work::wait() makes the caller's current stream wait for it, not the host.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <utility>

#include "comm/nccl_comm.h"
#include "comm/operation.h"

namespace trireme {

struct NcclLink;
struct NcclChannel;

class NcclGroup {
 public:
  NcclGroup(std::string name, std::shared_ptr<MpiGroup> mpi, c10::Device device);
  // Waits for what is in the streams (aborts it where an exception passes by) and frees NCCL's communicators, unless
  // MPI has ended: then this process is about to.
  ~NcclGroup();

  c10::Device device() const { return device_; }
  // The ranks introduce themselves, in the background. `e`: of no other operation. ConfigError, in the first
  // collective, where two ranks share a device and may not.
  bool connected() const { return link_ != nullptr; }
  void connect(const Exchange& e);

  // As those of operation.h.
  std::shared_ptr<CommOperation> all_reduce(CommType type, ReduceOp op, void* data, int64_t num_elements);
  std::shared_ptr<CommOperation> reduce_scatter(CommType type, ReduceOp op, void* output, const void* input,
                                                int64_t num_part_elements);
  std::shared_ptr<CommOperation> all_gather(void* output, const void* input, int64_t num_part_bytes);
  std::shared_ptr<CommOperation> all_to_all(void* output, const void* input, int64_t num_part_bytes);
  std::shared_ptr<CommOperation> broadcast(void* data, int64_t num_bytes, int root);
  std::shared_ptr<CommOperation> send(const void* data, int64_t num_bytes, int to, int tag);
  std::shared_ptr<CommOperation> receive(void* data, int64_t num_bytes, int from, int tag);

 private:
  std::shared_ptr<CommOperation> collective(const char* op, int64_t size, NcclComm::Calls calls);
  std::shared_ptr<NcclChannel> channel(int peer, bool outgoing);

  const std::string name_;
  const std::shared_ptr<MpiGroup> mpi_;
  const c10::Device device_;
  std::shared_ptr<NcclLink> link_;
  std::map<std::pair<int, bool>, std::shared_ptr<NcclChannel>> channels_;
};

}  // namespace trireme
