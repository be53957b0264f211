#include "comm/nccl_api.h"

#include <dlfcn.h>

#include <atomic>
#include <cstdlib>
#include <map>
#include <mutex>

#include "base/check.h"
#include "comm/communicator.h"
#include "comm/process.h"

namespace trireme {

namespace {

constexpr int kOldestVersion = 21800;         // the configuration's layout
constexpr int kSharedDeviceVersion = 23000;   // NCCL_MULTI_RANK_GPU_ENABLE

std::atomic<const NcclApi*> replaced = nullptr;
std::atomic<bool> share_device = false;

template <typename Function>
void find(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(::dlsym(library, name));
  if (!function) throw SystemError(str("libnccl.so.2 has no ", name, "; NCCL 2.18 or later is needed"));
}

// From the driver, which is loaded where there is a device; its numbers follow CUDA_VISIBLE_DEVICES as libtorch's do.
std::string cuda_device_uuid(int device) {
  void* driver = ::dlopen("libcuda.so.1", RTLD_NOW);
  auto get_device = driver ? reinterpret_cast<int (*)(int*, int)>(::dlsym(driver, "cuDeviceGet")) : nullptr;
  auto get_uuid = driver ? reinterpret_cast<int (*)(char*, int)>(::dlsym(driver, "cuDeviceGetUuid_v2")) : nullptr;
  std::string uuid(16, '\0');
  int handle = 0;
  if (!get_device || !get_uuid || get_device(&handle, device) != 0 || get_uuid(uuid.data(), handle) != 0)
    throw SystemError(str("the CUDA driver (libcuda.so.1) does not tell the UUID of device ", device));
  return uuid;
}

NcclApi load() {
  void* library = ::dlopen("libnccl.so.2", RTLD_NOW);
  if (!library)
    throw SystemError(str("NCCL, which CUDA tensors of several ranks need, is not there: ", ::dlerror(),
                          "; it comes with libtorch's CUDA libraries (launch/setup.sh)"));
  NcclApi api{};
  find(library, "ncclGetVersion", api.get_version);
  find(library, "ncclGetErrorString", api.get_error_string);
  find(library, "ncclGetLastError", api.get_last_error);
  find(library, "ncclGetUniqueId", api.get_unique_id);
  find(library, "ncclCommInitRankConfig", api.comm_init_rank_config);
  find(library, "ncclCommGetAsyncError", api.comm_get_async_error);
  find(library, "ncclCommFinalize", api.comm_finalize);
  find(library, "ncclCommDestroy", api.comm_destroy);
  find(library, "ncclCommAbort", api.comm_abort);
  find(library, "ncclAllReduce", api.all_reduce);
  find(library, "ncclReduceScatter", api.reduce_scatter);
  find(library, "ncclAllGather", api.all_gather);
  find(library, "ncclBroadcast", api.broadcast);
  find(library, "ncclSend", api.send);
  find(library, "ncclRecv", api.receive);
  find(library, "ncclGroupStart", api.group_start);
  find(library, "ncclGroupEnd", api.group_end);
  api.device_type = c10::kCUDA;
  api.device_uuid = cuda_device_uuid;
  int version = 0;
  if (api.get_version(&version) != kNcclSuccess || version < kOldestVersion)
    throw SystemError(str("libnccl.so.2 is version ", version, "; 2.18 (", kOldestVersion, ") or later is needed"));
  return api;
}

}  // namespace

const NcclApi& nccl_api() {
  if (const NcclApi* api = replaced) return *api;
  static const NcclApi api = load();
  return api;
}

c10::DeviceType nccl_device_type() {
  const NcclApi* api = replaced;
  return api ? api->device_type : c10::kCUDA;
}

void set_nccl_api(const NcclApi* api) { replaced = api; }

int nccl_type(CommType type) {
  switch (type) {
    case CommType::kInt8: return 0;
    case CommType::kUint8: return 1;
    case CommType::kInt32: return 2;
    case CommType::kInt64: return 4;
    case CommType::kFloat16: return 6;
    case CommType::kFloat32: return 7;
    case CommType::kFloat64: return 8;
    case CommType::kBfloat16: return 9;
  }
  return -1;
}

int nccl_op(ReduceOp op) { return op == ReduceOp::kSum ? 0 : op == ReduceOp::kMax ? 2 : 3; }

void set_share_device(bool share) { share_device = share; }
bool shares_device() { return share_device; }

void prepare_shared_device(int rank) {
  if (!share_device) return;
  int version = 0;
  nccl_api().get_version(&version);
  if (version >= kSharedDeviceVersion) {
    setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1", 0);
  } else {
    setenv("NCCL_HOSTID", str(host_name(), "-", rank).c_str(), 0);
    setenv("NCCL_SOCKET_IFNAME", "lo", 0);
  }
}

std::string shared_device_problem(const std::vector<std::string>& uuids, const std::string& group, bool share) {
  if (share) return "";
  std::map<std::string, size_t> first;
  for (size_t rank = 0; rank < uuids.size(); ++rank)
    if (const auto [other, is_new] = first.emplace(uuids[rank], rank); !is_new)
      return str("ranks ", other->second, " and ", rank, " of group ", group,
                 " use the same GPU; start as many ranks on a host as it has GPUs, or say comm.share_device=true, "
                 "which is for tests: ranks that share a GPU are slow");
  return "";
}

}  // namespace trireme
