#include "data/tok_unicode.h"

#include <algorithm>
#include <iterator>
#include <vector>

namespace trireme::tok {
namespace {

struct ClassRun {
  uint32_t first;
  uint16_t classes;
};
struct CaseRun {
  uint32_t first, last, stride;
  int32_t difference;
};
#include "data/tok_unicode.inc"

}  // namespace

const uint16_t* detail::low_classes() {
  static const std::vector<uint16_t> table = [] {
    std::vector<uint16_t> out(0x10000);
    for (const ClassRun* run = std::begin(kClassRuns); run != std::end(kClassRuns) && run->first < out.size(); ++run) {
      const ClassRun* next = run + 1;
      uint32_t end = next == std::end(kClassRuns) ? 0x10000 : std::min(next->first, 0x10000u);
      std::fill(out.begin() + run->first, out.begin() + end, run->classes);
    }
    return out;
  }();
  return table.data();
}

uint16_t detail::high_class(uint32_t c) {
  auto after = [](uint32_t value, const ClassRun& run) { return value < run.first; };
  return std::prev(std::upper_bound(std::begin(kClassRuns), std::end(kClassRuns), c, after))->classes;
}

uint32_t lower_case(uint32_t c) {
  if (c < 0x80) return c >= 'A' && c <= 'Z' ? c + 32 : c;
  auto before = [](const CaseRun& run, uint32_t value) { return run.last < value; };
  const CaseRun* run = std::lower_bound(std::begin(kLowerRuns), std::end(kLowerRuns), c, before);
  bool inside = run != std::end(kLowerRuns) && run->first <= c && (c - run->first) % run->stride == 0;
  return inside ? static_cast<uint32_t>(static_cast<int64_t>(c) + run->difference) : c;
}

}  // namespace trireme::tok
