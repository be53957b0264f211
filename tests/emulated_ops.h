// Tensors of the host through the emulated kernels, whose calls are counted.
#pragma once

#include "kernels/kernels.h"
#include "ops/device.h"

namespace trireme::test {

inline int num_calls = 0;  // of all kernels, since the last Emulated
template <auto kOperation>
inline int num_calls_of = 0;

template <auto kOperation>
struct Counted;
template <typename Args, void (*kernels::Kernels::*kOperation)(const Args&, kernels::Stream)>
struct Counted<kOperation> {
  static void call(const Args& args, kernels::Stream stream) {
    ++num_calls, ++num_calls_of<kOperation>;
    (kernels::emulated_kernels().*kOperation)(args, stream);
  }
};

// While one lives, CPU tensors go to the emulated kernels.
class Emulated {
 public:
  Emulated() {
    using K = kernels::Kernels;
    count<&K::attention_forward, &K::attention_backward, &K::decode_attention, &K::rms_norm_forward, &K::rms_norm_backward, &K::layer_norm_forward, &K::layer_norm_backward, &K::dropout, &K::rope, &K::glu_forward, &K::glu_backward, &K::cross_entropy,
          &K::cross_entropy_part, &K::cross_entropy_finish, &K::update, &K::gradient_norm, &K::clip_factor, &K::adafactor_sums, &K::adafactor_means, &K::adafactor_norm, &K::adafactor_update, &K::embedding, &K::embedding_gradient, &K::convert, &K::sum_rows, &K::lora_down,
          &K::lora_up, &K::lora_gradient,
          &K::quantize_4, &K::dequantize_4, &K::quantize_blocks, &K::dequantize_blocks, &K::largest_of_rows, &K::quantize_rows, &K::dequantize_rows, &K::scale_products, &K::quantize_groups,
          &K::dequantize_groups>();
    num_calls = 0;
    set_kernels(at::kCPU, &all);
  }
  ~Emulated() { set_kernels(at::kCPU, nullptr); }
  Emulated(const Emulated&) = delete;
  Emulated& operator=(const Emulated&) = delete;

 private:
  template <auto... kOperations>
  static void count() {
    ((all.*kOperations = Counted<kOperations>::call, num_calls_of<kOperations> = 0), ...);
  }
  static inline kernels::Kernels all{};
};

}  // namespace trireme::test
