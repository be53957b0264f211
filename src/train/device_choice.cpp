#include "base/tensor.h"

#include "train/device_choice.h"

#include <map>

#include "base/check.h"
#include "base/counted.h"

namespace trireme {
namespace {

constexpr int kOldest = 8;  // compute capability: A100

std::string number(int version) { return str(version / 1000, ".", version % 1000 / 10); }

}  // namespace

std::string missing_devices_text(int count, const kernels::Versions& v, const std::string& failure) {
  if (count > 0) return "";
  if (v.driver > 0 && v.driver / 1000 < v.runtime / 1000)
    return str("the driver is for CUDA ", number(v.driver), " at most, this build is of CUDA ", number(v.runtime), ": update the driver");
  if (!failure.empty()) return str("CUDA cannot say which devices are here (", failure, "): look at nvidia-smi");
  return "";
}

void check_device_report(int index, const kernels::DeviceReport& report, size_t shared_bytes, size_t needed_shared_bytes) {
  const std::string device = str("run.device: CUDA device ", index, report.name.empty() ? "" : " (" + report.name + ")");
  const char* const way_out = "take another with CUDA_VISIBLE_DEVICES, or set run.device=cpu";
  if (report.compute_major > 0 && report.compute_major < kOldest)
    throw ConfigError(str(device, " has compute capability ", report.compute_major, ".", report.compute_minor, ", the kernels need ", kOldest, ".0 (A100) or newer: ", way_out));
  if (shared_bytes > 0 && shared_bytes < needed_shared_bytes)
    throw ConfigError(str(device, " lets a block have ", shared_bytes >> 10, " KiB of shared memory, the kernels need ",
                          needed_shared_bytes >> 10, " KiB, as A100, H100 and newer cards of data centers have: ", way_out));
  if (!report.failure.empty()) throw ConfigError(str(device, " cannot be used: ", report.failure, ". Look at nvidia-smi, ", way_out));
}

std::vector<int> device_of_ranks(const std::vector<std::vector<std::string>>& seen, bool share, const std::string& key) {
  std::map<std::vector<std::string>, int> num_ranks;
  std::map<std::string, size_t> taken_by;
  std::vector<int> indices;
  for (size_t rank = 0; rank < seen.size(); ++rank) indices.push_back(num_ranks[seen[rank]]++);
  for (size_t rank = 0; rank < seen.size(); ++rank) {
    const int count = static_cast<int>(seen[rank].size());
    if (count == 0) continue;  // it says so itself
    if (share) indices[rank] %= count;
    else if (num_ranks[seen[rank]] > count)
      throw ConfigError(str(key, ": this host has ", counted(num_ranks[seen[rank]], "rank"), " but sees ", counted(count, "device"),
                            ": start one rank a device, set run.device=cpu, or for tests comm.share_device=true"));
  }
  for (size_t rank = 0; rank < seen.size() && !share; ++rank) {
    if (seen[rank].empty()) continue;
    const std::string& uuid = seen[rank][static_cast<size_t>(indices[rank])];
    if (uuid.empty()) continue;
    if (const auto [other, is_new] = taken_by.emplace(uuid, rank); !is_new)
      throw ConfigError(str(key, ": ranks ", other->second, " and ", rank, " of this host see different devices and would both take one of them: let each "
                                 "see those alone that are its own (CUDA_VISIBLE_DEVICES, srun --gpus-per-task), or all ranks the same"));
  }
  return indices;
}

}  // namespace trireme
