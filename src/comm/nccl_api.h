// NCCL's C interface as a table of functions: filled at the first use from the library that libtorch's CUDA half has
// loaded, so that a build needs neither NCCL's header nor a CUDA toolkit, and replaced by a double in the tests. Numbers
// and layouts are those of nccl.h 2.18 and later (a test compares them where that header is). Internal to comm/.
#pragma once

#include <c10/core/Device.h>

#include <climits>
#include <cstddef>
#include <string>
#include <vector>

#include "comm/reduce_parts.h"

namespace trireme {

enum NcclResult : int { kNcclSuccess = 0, kNcclInvalidUsage = 5, kNcclRemoteError = 6, kNcclInProgress = 7 };

struct NcclUniqueId {
  char bytes[128];
};

// ncclConfig_t as of 2.18; newer versions take it, with their defaults for what it lacks.
struct NcclConfig {
  size_t size = sizeof(NcclConfig);
  unsigned int magic = 0xcafebeef, version = 21800;
  int blocking = 0;  // calls return at once: a host that waits inside NCCL could not react to a lost peer
  int cga_cluster_size = INT_MIN, min_ctas = INT_MIN, max_ctas = INT_MIN;  // INT_MIN: NCCL's default
  const char* net_name = nullptr;
  int split_share = INT_MIN;
};

using NcclHandle = struct NcclOpaque*;  // ncclComm_t

int nccl_type(CommType type);
int nccl_op(ReduceOp op);

// Every function as nccl.h says; int: ncclResult_t, data type or operation; stream: cudaStream_t.
struct NcclApi {
  int (*get_version)(int* version);
  const char* (*get_error_string)(int result);
  const char* (*get_last_error)(NcclHandle comm);
  int (*get_unique_id)(NcclUniqueId* id);
  int (*comm_init_rank_config)(NcclHandle* comm, int num_ranks, NcclUniqueId id, int rank, NcclConfig* config);
  int (*comm_get_async_error)(NcclHandle comm, int* result);
  int (*comm_finalize)(NcclHandle comm);
  int (*comm_destroy)(NcclHandle comm);
  int (*comm_abort)(NcclHandle comm);
  int (*all_reduce)(const void* input, void* output, size_t count, int type, int op, NcclHandle comm, void* stream);
  int (*reduce_scatter)(const void* input, void* output, size_t part, int type, int op, NcclHandle comm, void* stream);
  int (*all_gather)(const void* input, void* output, size_t part, int type, NcclHandle comm, void* stream);
  int (*broadcast)(const void* input, void* output, size_t count, int type, int root, NcclHandle comm, void* stream);
  int (*send)(const void* data, size_t count, int type, int peer, NcclHandle comm, void* stream);
  int (*receive)(void* data, size_t count, int type, int peer, NcclHandle comm, void* stream);
  int (*group_start)();
  int (*group_end)();

  c10::DeviceType device_type;             // of the tensors that it takes
  std::string (*device_uuid)(int device);  // 16 bytes that no other device in the world has
};

// SystemError where libnccl.so.2 cannot be loaded, lacks a function or is older than 2.18.
const NcclApi& nccl_api();
c10::DeviceType nccl_device_type();       // CUDA, unless a test has said otherwise; loads nothing
void set_nccl_api(const NcclApi* api);    // for tests, before the first use; null: the real one again

// Several ranks on one device. NCCL refuses that unless it is told otherwise before its first call: from 2.30 by
// NCCL_MULTI_RANK_GPU_ENABLE=1, before by a NCCL_HOSTID a rank, so that they seem to be on different hosts and talk
// through the loopback interface (one host only; right, but slow). Variables that are set stay.
bool shares_device();  // as set_share_device() of communicator.h says
// Sets those variables where sharing is on. `rank`: of the world.
void prepare_shared_device(int rank);
// What to say where two of the ranks' devices are the same and sharing is off; empty where all is well.
std::string shared_device_problem(const std::vector<std::string>& uuids, const std::string& group, bool share);

}  // namespace trireme
