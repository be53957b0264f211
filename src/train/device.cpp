#include "base/tensor.h"

#include "train/device.h"

#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>

#include "base/check.h"
#include "base/hash.h"
#include "base/json.h"
#include "base/log.h"
#include "comm/process.h"
#include "model/transformer.h"
#include "ops/attention_device.h"
#include "ops/device.h"
#include "ops/dropout_mask.h"
#include "train/device_choice.h"
#include "train/memory.h"
#include "train/mesh_model.h"
#include "train/progress.h"

namespace trireme {
namespace {

std::optional<DeviceKind>& kind() {
  static std::optional<DeviceKind> kind;
  return kind;
}

struct RankDevices {
  std::string host;
  std::vector<std::string> uuids;
};

// What each of these ranks sees, by rank. Collective.
std::vector<RankDevices> devices_of_all(const std::vector<std::string>& uuids, const Communicator& ranks) {
  if (ranks.size() == 1) return {{host_name(), uuids}};
  Json mine = {{"host", host_name()}, {"uuids", Json::array()}};
  for (const std::string& uuid : uuids) mine["uuids"].push_back(uuid.empty() ? "" : hash_bytes(uuid));
  std::string all;
  for (const std::string& rank : ranks.gather_bytes(dump_json(mine))) all += str(all.empty() ? "[" : ",", rank);
  std::vector<RankDevices> seen;
  for (const Json& rank : parse_json(ranks.broadcast_bytes(all.empty() ? all : all + "]"), "the devices of all ranks"))
    seen.push_back({rank["host"].get<std::string>(), rank["uuids"].get<std::vector<std::string>>()});
  return seen;
}

}  // namespace

void set_device_kind(DeviceKind given) { kind() = std::move(given); }

at::Device choose_device(const Config& config, const Communicator& ranks) {
  const std::string& wanted = config.run.device;
  if (wanted == "cpu") return at::kCPU;
  const std::string key = str("run.device=", wanted);
  if (!kind()) {
    if (wanted == "auto") return at::kCPU;
    throw ConfigError(str(key, ", but this build has no CUDA kernels: build with nvcc (launch/setup.sh), or set run.device=cpu"));
  }
  const DeviceKind::Found found = kind()->find();
  const std::vector<RankDevices> seen = devices_of_all(found.uuids, ranks);  // before anything that may fail on one rank alone
  if (!found.problem.empty()) throw ConfigError(str(key, ": ", found.problem, ", or set run.device=cpu"));
  const bool anywhere = std::any_of(seen.begin(), seen.end(), [](const RankDevices& rank) { return !rank.uuids.empty(); });
  if (!anywhere && wanted == "auto") return at::kCPU;
  if (found.uuids.empty())
    throw ConfigError(str(key, ", but this process sees no device", anywhere ? " and others do" : "", ": `trireme doctor` says what is here; look at CUDA_VISIBLE_DEVICES and the batch "
                               "job's request (--gpus), or set run.device=cpu"));
  std::vector<std::vector<std::string>> of_host;
  size_t mine = 0;
  for (size_t rank = 0; rank < seen.size(); ++rank) {
    if (rank == static_cast<size_t>(ranks.rank())) mine = of_host.size();
    if (seen[rank].host == host_name()) of_host.push_back(seen[rank].uuids);
  }
  const int index = device_of_ranks(of_host, config.comm.share_device, key)[mine];
  kind()->load(index);
  if (const int capability = config.quant.base == "fp8" ? kind()->capability(index) : 89; capability < 89)
    throw ConfigError(str("quant.base=fp8 needs a device of compute capability 8.9 or newer, but device ", index, " has ", capability / 10, ".", capability % 10, ": leave quant.base out"));
  set_kernels(kind()->type, kind()->kernels);
  set_kernel_settings({.tf32 = config.train.tf32, .deterministic = config.train.deterministic});
  const c10::Device device(kind()->type, static_cast<c10::DeviceIndex>(index));
  c10::impl::VirtualGuardImpl(device.type()).setDevice(device);
  return device;
}

at::DeviceType planned_device(const Config& config) {
  const at::DeviceType type = kind() ? kind()->type : at::kCUDA;
  if (config.run.device != "auto") return config.run.device == "cpu" ? at::kCPU : type;
  return config.plan.memory_gb > 0 || (kind() && !kind()->find().uuids.empty()) ? type : at::kCPU;
}

std::optional<uint64_t> planned_room(const Config& config, int num_local_ranks) {
  if (config.plan.memory_gb > 0) return static_cast<uint64_t>(config.plan.memory_gb * 1e9);
  if (planned_device(config) == at::kCPU) return available_bytes() / static_cast<uint64_t>(num_local_ranks);
  if (!kind() || kind()->find().uuids.empty()) return std::nullopt;
  return free_bytes(choose_device(config, Communicator::world()));
}

void check_dtype(const Config& config, at::ScalarType dtype, at::DeviceType device, const char* key) {
  if (config.quant.base == "fp8") {
    if (device == at::kCPU) throw ConfigError("quant.base=fp8 needs a device of compute capability 8.9 or newer, and the CPU computes this: leave quant.base out, or run where there is one; plans for one have run.device=cuda or plan.memory_gb set");
    if (c10::elementSize(dtype) != 2) throw ConfigError(str("quant.base=fp8 goes with 16 bits, but ", key, " is ", dtype_name(dtype), ": set ", key, "=bfloat16"));
  }
  if (dtype == at::kDouble && config.quant.base == "int8") throw ConfigError(str("quant.base=int8 goes with float32 or 16 bits, but ", key, " is float64: set ", key, "=float32, or leave quant.base out"));
  if (dtype == at::kDouble && device != at::kCPU) throw ConfigError(str(key, "=float64 is computed by the CPU alone: set run.device=cpu, or ", key, "=float32"));
}

std::vector<std::string> kernel_gaps(const ModelConfig& model, at::ScalarType dtype) {
  const int64_t widest = kernels::rms_norm_widest(model.hidden_size * static_cast<int64_t>(c10::elementSize(dtype)));
  if (model.hidden_size > widest)
    throw ConfigError(str(model.source, ": hidden_size ", model.hidden_size, " is more than the ", widest, " values of a row that the kernels of RMSNorm hold: set run.device=cpu"));
  if (has_attention_kernels(dtype, model.head_dim)) return {};
  return {str("attention has no kernel for head_dim ", model.head_dim, " in ", dtype_name(dtype), " (but for 64, 96, 128 and 256 in bfloat16 and float16): whole matrices of "
              "scores are computed instead, in float32, with more time and memory than planned")};
}

std::vector<std::string> kernel_gaps(const Config& config, const ModelConfig& model, at::ScalarType dtype, const Mesh& mesh) {
  std::vector<std::string> gaps = kernel_gaps(model, dtype);
  const bool adapts = !config.lora.path.empty() || config.lora.rank > 0;
  if (!adapts || lora_config(config).dropout == 0) return gaps;
  struct Gap {
    std::string path;       // of the layer, the first rank's part of it that has a gap
    LoraDropoutShape part;
    bool by_cut;            // the whole layer has none
  };
  std::vector<Gap> found;
  const MeshModel cut(config, model, dtype, mesh);
  for (int stage = 0; stage < mesh.num_pipeline(); ++stage)
    for (int rank = 0; rank < mesh.num_tensor(); ++rank)
      for (const Parameter& a : cut.at(stage, rank).parameters) {
        const size_t begin = a.name.find("model.layers."), end = a.name.find(".lora_A.");
        if (end == std::string::npos) continue;
        const std::string path = a.name.substr(begin, end - begin);
        const LoraDropoutShape part{dtype, a.value.size(0), a.value.size(1), a.shard.offset[1]}, whole{dtype, a.value.size(0), a.shard.global_shape[1], 0};
        if (!has_lora_dropout_kernels(part) && std::none_of(found.begin(), found.end(), [&](const Gap& gap) { return gap.path == path; }))
          found.push_back({path, part, has_lora_dropout_kernels(whole)});
      }
  for (const bool by_cut : {false, true}) {
    const auto is_so = [&](const Gap& gap) { return gap.by_cut == by_cut; };
    const auto first = std::find_if(found.begin(), found.end(), is_so);
    if (first == found.end()) continue;
    const auto others = std::count_if(found.begin(), found.end(), is_so) - 1;
    gaps.push_back(str(lora_dropout_gap(first->part), " (", first->path, others > 0 ? str(" and ", others, " more") : "", ")",
                       by_cut ? str("; parallel.tensor=", mesh.num_tensor(), " cuts it so, and one rank would take the kernels, whose last bits are others: take a number that leaves "
                                    "eights, or lora.dropout=0") : ""));
  }
  return gaps;
}

void say_kernel_gaps(const std::vector<std::string>& gaps) {
  set_lora_dropout_gap_said();
  if (log_rank() != 0) return;
  for (const std::string& gap : gaps) log_warn(gap);
}

std::vector<NamedBytes> bytes_of(const std::vector<Parameter>& parameters) {
  std::vector<NamedBytes> all;
  for (const Parameter& p : parameters)
    if (!p.on_host) all.emplace_back(p.name, p.value.nbytes());
  return all;
}

void name_out_of_memory(at::Device device, const std::function<std::vector<NamedBytes>()>& held, const std::string& advice,
                        const std::function<void()>& part) try {
  part();
} catch (const c10::OutOfMemoryError& error) {
  constexpr size_t kShown = 5;
  auto largest = held();
  std::stable_sort(largest.begin(), largest.end(), [](const auto& x, const auto& y) { return x.second > y.second; });
  largest.resize(std::min(largest.size(), kShown));
  std::string names;
  for (const auto& [name, bytes] : largest) names += str(names.empty() ? "" : ", ", name, " ", bytes_text(static_cast<double>(bytes)));
  std::string asked = error.what_without_backtrace();
  asked.resize(std::min(asked.find('\n'), asked.size()));
  throw SystemError(str(device.str(), " is out of memory (", asked, "), with ", bytes_text(static_cast<double>(peak_bytes(device))), " of tensors at most",
                        names.empty() ? "" : str("; the largest: ", names), ". ", advice));
}

uint64_t peak_bytes(at::Device device) {
  if (device.is_cpu()) return peak_resident_bytes();
  return static_cast<uint64_t>(c10::getDeviceAllocator(device.type())->getDeviceStats(device.index()).allocated_bytes[0].peak);
}

uint64_t free_bytes(at::Device device) {
  if (device.is_cpu()) return available_bytes();
  return c10::getDeviceAllocator(device.type())->getMemoryInfo(device.index()).first;
}

}  // namespace trireme
