// Rules of the update over flat contiguous tensors (whole parameters or the shards of a rank), element by element, in fp32 (fp64 for
// fp64 weights). With g the gradient:
//   adamw (Loshchilov & Hutter 2019), the arithmetic of torch.optim.AdamW: Adam with decoupled weight decay
//     w -= lr * weight_decay * w
//     m += (1 - beta1) * (g - m);  v = beta2 * v + (1 - beta2) * g^2
//     w -= lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + epsilon)
//   adamw8bit (Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization"): adamw whose m and v are kept as codes of the dynamic
//     8-bit map (quant/dynamic_map.h) in blocks of 256 elements of the whole tensor, which no rank's part may cut; of parameters of
//     fewer than 4,096 elements in fp32, as bitsandbytes has it. An m below 0 is never kept as 0. Not for fp64 weights.
//     Weights decay before the update, as above and in bitsandbytes' CPU code; its CUDA code lets them decay behind it, which differs by lr * weight_decay
//     of the update.
//   sgd, the arithmetic of torch.optim.SGD with momentum; weight decay is added to the gradient
//     m = momentum * m + g + weight_decay * w;  w -= lr * m
//   lion (Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms"), for learning rates of a third to a tenth of AdamW's
//     w -= lr * (weight_decay * w + sign(beta1 * m + (1 - beta1) * g));  m = beta2 * m + (1 - beta2) * g
//   adafactor: optim/adafactor.h
// bf16 and fp16 weights have an fp32 master, which is updated and then rounded to the weight. Without masters a bf16 weight is rounded
// to one of its two neighbours at random, the nearer one more often, so that small updates are kept in the mean (kernels/kernels.h
// has the rule): by bits of the step, the name and the element's place in the whole tensor, so they are the same on every mesh.
// With `offload` the state is in host memory and the update is computed there, with the bits of weights on the CPU
// (optim/offload.h). Else state is where the weights are, and a device updates all tensors of one dtype and weight decay at once; with
// `paged` in memory that may leave a device while it is full (optim/paged.h), and a window of it at once.
#pragma once

#include <string>
#include <vector>

#include "base/parameter.h"
#include "base/tensor.h"
#include "kernels/kernels.h"

namespace trireme {

enum class OptimizerKind { kAdamW, kAdamW8Bit, kSgd, kLion, kAdafactor };
OptimizerKind parse_optimizer_kind(const std::string& name);  // of optim.kind; ConfigError

// Elements of a parameter that have to stay together, from its first on: a rank's part begins and ends at a multiple of so many, or
// where the parameter ends.
int64_t state_block(OptimizerKind kind);
// Whether a slice with these sizes does not.
bool cuts_blocks(OptimizerKind kind, at::IntArrayRef slice_sizes, const ShardSpec& slice);
using Places = kernels::Places;

// Of the elements from `begin` on of a slice with these sizes. One dimension may be cut, or the first and another.
Places places_of(at::IntArrayRef slice_sizes, const ShardSpec& slice, int64_t begin);

struct OptimTensor {
  std::string name;           // of the parameter
  at::Tensor weight;          // flat [N], contiguous, the model's dtype; updated in place
  at::Tensor grad;            // flat [N], contiguous, fp32 (fp64 for fp64 weights); read at every step
  double weight_decay = 0.0;  // 1/step at learning rate 1
  Places places = {};         // of the elements in the whole parameter; of use without masters alone
  std::vector<int64_t> whole_shape = {};  // of the whole parameter; empty: these elements alone
  bool counts = true;         // in sums over all ranks: one of those that have the same elements does
};

// One tensor of the optimizer's state; shares storage with the optimizer: read it to save, fill it to load.
struct OptimState {
  size_t tensor = 0;      // number of the OptimTensor
  std::string parameter;  // its name
  // adamw: exp_avg, exp_avg_sq; adamw8bit: these in uint8, exp_avg_scale, exp_avg_sq_scale; sgd with momentum: momentum_buffer;
  // lion: exp_avg; adafactor: row_var and col_var of a matrix, variance of a vector; and master (low-precision weights only)
  std::string kind;
  at::Tensor value;       // flat [ceil(N / block)], fp32 (fp64 for fp64 weights), or uint8
  int64_t block = 1;      // elements that a value is of
  bool is_whole = false;  // every rank with some of the parameter has all of this
};

struct OptimizerOptions {
  OptimizerKind kind = OptimizerKind::kAdamW;
  double beta1 = 0.9, beta2 = 0.999, epsilon = 1e-8;
  double momentum = 0.9;
  bool offload = false;
  bool masters = true;  // of bf16; fp16 weights have them
  uint64_t seed = 0;    // of the random rounding
  bool paged = false;   // of no effect where weights are on the CPU
  int64_t window_elements = int64_t{1} << 22;  // of paged state, updated at once; 48 MiB of AdamW's and masters
};

// Whether weights of `dtype` have a master beside them; else they are their own.
bool has_master(at::ScalarType dtype, bool masters);

// Of parameters that several ranks have parts of, for what is measured over all of them.
struct AcrossRanks {
  std::map<std::string, std::vector<int64_t>> tensors;  // the whole shapes of all ranks' parameters; empty: this rank's are all
  std::function<void(const at::Tensor&)> sum;           // of fp64, in place, over all ranks; empty: there are no others
  at::Device device = at::kCPU;                         // that all ranks' weights are on
};

struct StatePiece {  // elements of a tensor
  size_t tensor;
  int64_t begin, end;
};

class Adafactor;
class HostStaging;
class PagedState;

class Optimizer {
 public:
  // The masters start as the weights are now. InternalError: a tensor is not flat and contiguous, or grad's dtype or
  // length is another, or weights are fp16 without masters, or, without offload, a device has no kernels (ops/device.h).
  // `ranks`: of use to adafactor, whose steps are collective then; it goes without offload.
  Optimizer(std::vector<OptimTensor> tensors, const OptimizerOptions& options, const AcrossRanks& ranks = {});

  // One update with gradients grad * grad_scale (clipping and averaging). Elements do not depend on threads or on how
  // parameters are cut into shards.
  void step(double lr, double grad_scale = 1.0);
  // The same with a scale that the host need not know: a scalar in fp32 where the weights are (DeviceNorm::factor, optim/clip.h).
  // Where it is not finite nothing is written, though the step is counted. Nothing waits for a device, but with offload.
  void step(double lr, const at::Tensor& grad_scale);

  int64_t num_steps() const { return num_steps_; }
  void set_num_steps(int64_t steps) { num_steps_ = steps; }
  std::vector<OptimState> state() const;
  const std::vector<OptimTensor>& tensors() const { return tensors_; }

  int64_t bytes_fetched() const;  // with offload: of gradients and weights that came to the host's buffers, since the start

  // Bytes of state for so many elements of a parameter of `dtype`; for plans before anything is allocated.
  static uint64_t state_bytes(at::ScalarType dtype, const OptimizerOptions& options, int64_t elements, at::IntArrayRef whole_shape);
  // What of `state` bytes of paged state (of adafactor: masters) a device has to hold, at most: two windows.
  static uint64_t paged_bytes_there(uint64_t state, at::ScalarType dtype, const OptimizerOptions& options);

 private:
  void update(double lr, double grad_scale, const at::Tensor& device_scale);
  void update_on_device(double lr, double correction1, double correction2, const at::Tensor& scale, const std::vector<StatePiece>& pieces);

  struct State {
    at::Tensor m, v, master;      // undefined where there is none
    at::Tensor m_scale, v_scale;  // of codes
    uint32_t id = 0;              // of the whole parameter
    kernels::UpdateRule rule = kernels::UpdateRule::kAdamW;
  };
  // f(pieces) of all tensors on the device, together or in windows.
  using InWindows = std::function<void(const std::function<void(const std::vector<StatePiece>&)>& f)>;
  void adafactor_on_device(double lr, const at::Tensor& scale, const InWindows& in_windows);
  const at::Tensor& maps(at::Device device);
  std::vector<at::Tensor> parts_of(const StatePiece& piece) const;  // of its state
  std::vector<OptimTensor> tensors_;
  std::vector<State> states_;
  OptimizerOptions options_;
  std::shared_ptr<HostStaging> staging_;  // with offload
  std::shared_ptr<PagedState> paged_;     // with paged, on a device
  std::shared_ptr<Adafactor> adafactor_;
  at::Tensor maps_;                       // of codes on a device
  int64_t num_steps_ = 0;
};

}  // namespace trireme
