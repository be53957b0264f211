#include "checkpoint/huge_pages.h"

#include <sys/mman.h>

namespace trireme {

void ask_for_huge_pages(const at::Tensor& value) {
  constexpr uintptr_t kHugePage = 2 << 20;
  if (!value.is_cpu() || value.nbytes() < 2 * kHugePage) return;
  uintptr_t begin = reinterpret_cast<uintptr_t>(value.data_ptr()), end = begin + value.nbytes();
  begin = (begin + kHugePage - 1) / kHugePage * kHugePage, end = end / kHugePage * kHugePage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // may fail: then it is only slower
}

}  // namespace trireme
