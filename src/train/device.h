// The device that a rank computes on: the CPU, or of the devices that this process sees the one with its number among the
// ranks of its host.
#pragma once

#include "base/parameter.h"
#include "base/tensor.h"

#include "comm/mesh.h"
#include "comm/communicator.h"
#include "config/config.h"
#include "model/hf_config.h"
#include "ops/device.h"

namespace trireme {

// What the program knows of devices that are not the CPU.
struct DeviceKind {
  at::DeviceType type;
  std::string name;  // in run.device
  // Of the devices that this process sees. `problem`: why those that are there cannot be used, such as a driver that is too old.
  struct Found {
    std::vector<std::string> uuids;  // of each; "" where unknown
    std::string problem;
  };
  std::function<Found()> find;
  std::function<void(int index)> load;  // before the first tensor there; ConfigError where this one cannot be used
  std::function<int(int index)> capability;  // compute capability, 89: 8.9
  const kernels::Kernels* kernels = nullptr;
};
void set_device_kind(DeviceKind kind);  // the last one counts

// run.device: `auto` is a device where there is one that can be used, and else the CPU; one that is there but cannot be used is
// nobody's choice. After it tensors may be made there. `ranks` call it together: what those of a host see says who takes which
// (device_choice.h). ConfigError: no device, or fewer than this host has ranks (but with comm.share_device).
at::Device choose_device(const Config& config, const Communicator& ranks);

// What a run of this configuration would compute on, without touching it: a device where run.device says so, or `auto` sees one or the
// plan is for memory that is not this host's (plan.memory_gb).
at::DeviceType planned_device(const Config& config);
// Bytes that a rank may use there: plan.memory_gb, or what is free, of a host shared by `num_local_ranks`. Null: a device that is not here.
// Collective, as choose_device() of all ranks.
std::optional<uint64_t> planned_room(const Config& config, int num_local_ranks);

// ConfigError where there are no kernels for this dtype, or none for quant.base in it.
void check_dtype(const Config& config, at::ScalarType dtype, at::DeviceType device, const char* key = "train.dtype");

// What the kernels of a device do not serve of a model, and what computes it instead: a sentence each. ConfigError where nothing does.
std::vector<std::string> kernel_gaps(const ModelConfig& model, at::ScalarType dtype);
// The same of training, with its adapters as the mesh cuts their layers. Where it leaves a layer to other code than one rank
// takes, that is said.
std::vector<std::string> kernel_gaps(const Config& config, const ModelConfig& model, at::ScalarType dtype, const Mesh& mesh);
// Logs them on rank 0. The operations will not say them again.
void say_kernel_gaps(const std::vector<std::string>& gaps);

using NamedBytes = std::pair<std::string, uint64_t>;
std::vector<NamedBytes> bytes_of(const std::vector<Parameter>& parameters);

// Does `part`. SystemError where the device's memory does not suffice for it: with the largest of what `held` names (in bytes), and
// `advice`, the keys to change.
void name_out_of_memory(at::Device device, const std::function<std::vector<NamedBytes>()>& held, const std::string& advice,
                        const std::function<void()>& part);

// Of tensors, at most so far; of the CPU all that this process holds.
uint64_t peak_bytes(at::Device device);
// That tensors of this process may still take.
uint64_t free_bytes(at::Device device);

}  // namespace trireme
