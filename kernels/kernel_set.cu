// The table of all operations; each file of kernels fills in its own.
#include <atomic>

#include "kernels/arch.h"
#include "kernels/architecture.h"
#include "kernels/kernels.h"

namespace trireme::kernels {

namespace TRIREME_ARCH {

void add_adafactor(Kernels& kernels);
void add_optimizer(Kernels& kernels);
void add_casts(Kernels& kernels);
void add_affine(Kernels& kernels);
void add_cross_entropy(Kernels& kernels);
void add_dropout(Kernels& kernels);
void add_elementwise(Kernels& kernels);
void add_embedding(Kernels& kernels);
void add_int8(Kernels& kernels);
void add_lora(Kernels& kernels);
void add_float8(Kernels& kernels);
void add_matmul(Kernels& kernels);
void add_norm(Kernels& kernels);
void add_quantize_blocks(Kernels& kernels);
void add_sums(Kernels& kernels);

namespace {
std::atomic<int> wanted_architecture = 0;
}
int architecture() {
  const int wanted = wanted_architecture;
  return wanted != 0 ? wanted : arch::device_architecture();
}
void set_architecture(int architecture) { wanted_architecture = architecture; }

namespace {

const Kernels& all() {
  static const Kernels kernels = [] {
    Kernels k{};
    add_adafactor(k);
    add_optimizer(k);
    k.attention_forward = attention_forward;
    k.attention_backward = attention_backward;
    k.decode_attention = decode_attention;
    add_affine(k);
    add_casts(k);
    add_cross_entropy(k);
    add_dropout(k);
    add_elementwise(k);
    add_embedding(k);
    add_int8(k);
    add_lora(k);
    add_float8(k);
    add_matmul(k);
    add_norm(k);
    add_quantize_blocks(k);
    add_sums(k);
    return k;
  }();
  return kernels;
}

}  // namespace
}  // namespace TRIREME_ARCH

#ifdef __CUDACC__
const Kernels& cuda_kernels() { return cuda::all(); }
#else
const Kernels& emulated_kernels() { return emulated::all(); }
#endif

}  // namespace trireme::kernels
