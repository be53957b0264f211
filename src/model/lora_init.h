// Adapters that begin with the strongest directions of a layer's weight, or of what its 4 bits lose: PiSSA (Meng et al. 2024) and LoftQ
// (Li et al. 2023). All is computed on the CPU in float64, by one thread, from the values alone: the same bits on every mesh and with
// any number of threads.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <string>

namespace trireme {

// What a layer begins with: base + scale * B A is about the weight.
struct LoraStart {
  at::Tensor base_OI;     // what the base holds, or is encoded from
  at::Tensor a_RI, b_OR;  // in the weight's dtype
};

// base = W - scale B A in the weight's dtype, scale B A being the sum of the `rank` largest singular directions of W: A = sqrt(S / scale) V^T,
// B = U sqrt(S / scale). A direction's sign makes the largest element of its u positive (the SVD leaves it open). `rank` is at most
// the smaller size of W. iterations > 0: U is of the subspace that so many power iterations of rank + 8 random vectors find (Halko et al.
// 2011, algorithm 4.4), which the largest directions are in the more, the more they stand out; PEFT's pissa_niter_N has no such surplus.
LoraStart pissa_start(const at::Tensor& weight_OI, int64_t rank, double scale, int64_t iterations = 0);

// Alternates Q = quantized(base), scale B A = the largest singular directions of W - Q, base = W - scale B A, `iterations` times from base = W.
// base_OI is the last that was quantized, in float32. PEFT leaves the scale out: its numbers are those of alpha = rank.
LoraStart loftq_start(const at::Tensor& weight_OI, int64_t rank, double scale, int64_t iterations,
                      const std::function<at::Tensor(const at::Tensor& base_OI)>& quantized);

// Memory of the host that either takes for a weight of this size, at most.
int64_t lora_start_bytes(int64_t out_features, int64_t in_features, bool is_loftq);

// Layers of which some take seconds, one after another: what is to be said of them, and when.
class StartProgress {
 public:
  StartProgress(std::string name, int64_t num_layers) : name_(std::move(name)), num_layers_(num_layers) {}  // name: of lora.init
  // After `done` layers and so many seconds: a line, or nothing. The first after ten seconds, the next half a minute later and more.
  std::string line(int64_t done, double seconds);

 private:
  std::string name_;
  int64_t num_layers_;
  double next_ = 10;
};

}  // namespace trireme
