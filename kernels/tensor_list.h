// Many tensors in one launch: block b works on chunk b of all of them. The list travels as the launch's parameter, so that nothing
// has to be copied to the device or waited for; tensors that do not fit go into another launch.
#pragma once

#include <algorithm>

#include "kernels/arch.h"
#include "kernels/launch.h"

namespace trireme::kernels::TRIREME_ARCH {

inline constexpr int kListBytes = 30 << 10;  // of the 32,764 that parameters may have

// Tensor has `size`, in elements.
template <typename Tensor, int64_t kChunk>
struct TensorList {
  static constexpr int kMost = kListBytes / static_cast<int>(sizeof(Tensor) + sizeof(int));
  int num_tensors = 0, num_chunks = 0;
  int first_chunk[kMost];
  Tensor tensor[kMost];

  // f(tensor, begin, end) with the chunk's tensor and its elements of it.
  template <typename F>
  ARCH_FN void with_chunk(int chunk, const F& f) const {
    int low = 0;
    for (int high = num_tensors; high - low > 1;) {
      const int middle = (low + high) / 2;
      (first_chunk[middle] <= chunk ? low : high) = middle;
    }
    const int64_t begin = (chunk - first_chunk[low]) * kChunk, size = tensor[low].size;
    f(tensor[low], begin, begin + kChunk < size ? begin + kChunk : size);
  }
};

// f(number of chunks before) with the list filled, until all tensors have been in it. Empty ones never are.
template <int64_t kChunk, typename Tensor, typename F>
void for_lists(const char* name, const Tensor* tensors, int64_t num_tensors, TensorList<Tensor, kChunk>& list, const F& f) {
  int64_t chunks_before = 0;
  auto flush = [&] {
    if (list.num_tensors > 0) f(chunks_before);
    chunks_before += list.num_chunks;
    list.num_tensors = list.num_chunks = 0;
  };
  for (int64_t i = 0; i < num_tensors; ++i) {
    const int64_t chunks = (tensors[i].size + kChunk - 1) / kChunk;
    if (tensors[i].size < 0 || chunks > std::numeric_limits<int>::max())
      throw Refused(std::string(name) + " of a tensor of " + std::to_string(tensors[i].size) + " values");
    if (chunks == 0) continue;
    if (list.num_tensors == list.kMost || list.num_chunks + chunks > std::numeric_limits<int>::max()) flush();
    list.first_chunk[list.num_tensors] = list.num_chunks;
    list.tensor[list.num_tensors++] = tensors[i];
    list.num_chunks += static_cast<int>(chunks);
  }
  flush();
}

}  // namespace trireme::kernels::TRIREME_ARCH
