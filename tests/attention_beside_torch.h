// Attention of the kernels and of torch over the same packed tensors [T, H, D], as attention_torch_test compares and
// benchmarks/gpu_kernels.cpp times them. Each side keeps its results; nothing is allocated that a training step would not allocate.
#pragma once

#include "base/tensor.h"

#include <dlfcn.h>

#include "base/check.h"
#include "ops/device.h"

namespace trireme::test {

// Whether there is a device to compute on; then the CUDA half of libtorch is loaded.
inline bool loads_device() {
#ifdef TRIREME_CUDA
  if (kernels::num_devices() == 0) return false;
  if (!::dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_GLOBAL)) throw std::runtime_error(str("libtorch_cuda.so cannot be loaded: ", ::dlerror()));
  return true;
#else
  return false;
#endif
}

struct AttentionInput {
  at::Tensor q, k, v, grad_o;  // [T, H, D]; k and v [T, K, D]
  at::Tensor bounds;           // int32 [segments + 1]
  int64_t longest;
  bool causal;

  // Segments of these lengths; normal values.
  AttentionInput(const std::vector<int64_t>& lengths, int64_t heads, int64_t key_heads, int64_t head_dim, bool causal, at::TensorOptions options) : causal(causal) {
    std::vector<int64_t> ends{0};
    for (int64_t n : lengths) ends.push_back(ends.back() + n);
    longest = *std::max_element(lengths.begin(), lengths.end());
    bounds = at::tensor(ends, at::kInt).to(options.device());
    const auto random = [&](int64_t h) { return at::randn({ends.back(), h, head_dim}, options); };
    q = random(heads), k = random(key_heads), v = random(key_heads), grad_o = random(heads);
  }
  // As torch has it, where all segments are of one length: [B, H, S, D].
  at::Tensor as_batch(const at::Tensor& x) const { return x.view({-1, longest, x.size(1), x.size(2)}).transpose(1, 2); }
};

class KernelAttention {
 public:
  KernelAttention(const kernels::Kernels& kernels, const AttentionInput& in, bool deterministic) : kernels_(kernels), stream_(stream_of(in.q)) {
    o = at::empty_like(in.q), grad_q = at::empty_like(in.q), grad_k = at::empty_like(in.k), grad_v = at::empty_like(in.v);
    lse_ = at::empty({in.q.size(1), in.q.size(0)}, in.q.options().dtype(at::kFloat));
    forward_.shape = {kernel_type(in.q), static_cast<int>(in.q.size(2)), in.q.size(1), in.k.size(1), in.q.size(0), in.k.size(0), in.bounds.numel() - 1,
                      in.bounds.data_ptr<int32_t>(), in.bounds.data_ptr<int32_t>(), 0, -1, in.causal};
    forward_.q = read(in.q), forward_.k = read(in.k), forward_.v = read(in.v), forward_.o = written(o), forward_.lse = lse_.data_ptr<float>();
    backward_.shape = forward_.shape;
    backward_.q = forward_.q, backward_.k = forward_.k, backward_.v = forward_.v, backward_.o = read(o), backward_.grad_o = read(in.grad_o);
    backward_.lse = forward_.lse, backward_.grad_q = written(grad_q), backward_.grad_k = written(grad_k), backward_.grad_v = written(grad_v);
    backward_.deterministic = deterministic;
    backward_.workspace_bytes = kernels::attention_backward_workspace_bytes(forward_.shape, deterministic);
    workspace_ = at::empty({backward_.workspace_bytes}, in.q.options().dtype(at::kByte));
    backward_.workspace = workspace_.data_ptr();
  }
  void forward() { kernels_.attention_forward(forward_, stream_); }
  void backward() { kernels_.attention_backward(backward_, stream_); }

  at::Tensor o, grad_q, grad_k, grad_v;

 private:
  static kernels::ConstHeads read(const at::Tensor& x) { return {x.data_ptr(), x.stride(0), x.stride(1)}; }
  static kernels::Heads written(const at::Tensor& x) { return {x.data_ptr(), x.stride(0), x.stride(1)}; }

  const kernels::Kernels& kernels_;
  kernels::Stream stream_;
  kernels::AttentionForward forward_;
  kernels::AttentionBackward backward_;
  at::Tensor lse_, workspace_;
};

enum class TorchBackend { kFlash, kCudnn };

// One head for each key head; on the CPU, and of cuDNN, segments of one length only.
class TorchAttention {
 public:
  TorchAttention(TorchBackend backend, const AttentionInput& in) : backend_(backend), in_(in) {
    packed_ = in.q.is_cuda() && in.q.size(0) != (in.bounds.numel() - 1) * in.longest;
    TRIREME_CHECK(!packed_ || backend == TorchBackend::kFlash, "cuDNN is given segments of one length");
    if (!packed_) q_ = in.as_batch(in.q), k_ = in.as_batch(in.k), v_ = in.as_batch(in.v), grad_o_ = in.as_batch(in.grad_o);
  }
  void forward() {
    if (in_.q.is_cpu()) {
      std::tie(o_, lse_) = at::_scaled_dot_product_flash_attention_for_cpu(q_, k_, v_, 0, in_.causal);
    } else if (packed_) {
      at::Tensor debug;
      std::tie(o_, lse_, seed_, offset_, debug) = at::_flash_attention_forward(in_.q, in_.k, in_.v, in_.bounds, in_.bounds, in_.longest, in_.longest, 0, in_.causal, false);
    } else {
      auto keep = [&](auto&& result) {
        o_ = std::get<0>(result), lse_ = std::get<1>(result), ends_q_ = std::get<2>(result), ends_k_ = std::get<3>(result), seed_ = std::get<6>(result), offset_ = std::get<7>(result);
        longest_q_ = std::get<4>(result).guard_int(__FILE__, __LINE__), longest_k_ = std::get<5>(result).guard_int(__FILE__, __LINE__);
      };
      if (backend_ == TorchBackend::kFlash) keep(at::_scaled_dot_product_flash_attention(q_, k_, v_, 0.0, in_.causal, false));
      else keep(at::_scaled_dot_product_cudnn_attention(q_, k_, v_, std::nullopt, true, 0.0, in_.causal, false));
    }
  }
  void backward() {
    if (in_.q.is_cpu())
      std::tie(grad_q_, grad_k_, grad_v_) = at::_scaled_dot_product_flash_attention_for_cpu_backward(grad_o_, q_, k_, v_, o_, lse_, 0, in_.causal);
    else if (packed_)
      std::tie(grad_q_, grad_k_, grad_v_) = at::_flash_attention_backward(in_.grad_o, in_.q, in_.k, in_.v, o_, lse_, in_.bounds, in_.bounds, in_.longest, in_.longest, 0,
                                                                          in_.causal, seed_, offset_);
    else if (backend_ == TorchBackend::kFlash)
      std::tie(grad_q_, grad_k_, grad_v_) = at::_scaled_dot_product_flash_attention_backward(grad_o_, q_, k_, v_, o_, lse_, ends_q_, ends_k_, longest_q_, longest_k_, 0,
                                                                                             in_.causal, seed_, offset_);
    else
      std::tie(grad_q_, grad_k_, grad_v_) = at::_scaled_dot_product_cudnn_attention_backward(grad_o_, q_, k_, v_, o_, lse_, seed_, offset_, at::Tensor(), ends_q_, ends_k_,
                                                                                             longest_q_, longest_k_, 0, in_.causal);
  }
  // o, grad_q, grad_k, grad_v as [T, H, D].
  std::vector<at::Tensor> results() const {
    std::vector<at::Tensor> all{o_, grad_q_, grad_k_, grad_v_};
    if (!packed_)
      for (at::Tensor& x : all) x = x.transpose(1, 2).reshape({-1, x.size(1), x.size(3)});
    return all;
  }

 private:
  TorchBackend backend_;
  const AttentionInput& in_;
  bool packed_;
  at::Tensor q_, k_, v_, grad_o_, o_, lse_, ends_q_, ends_k_, seed_, offset_, grad_q_, grad_k_, grad_v_;
  int64_t longest_q_ = 0, longest_k_ = 0;
};

}  // namespace trireme::test
