// How a model folder holds the weight of a linear layer in fewer bits (checkpoint/bitsandbytes.h).
#pragma once

#include <cstdint>
#include <string>

namespace trireme {

struct StoredFormat {
  std::string kind;          // nf4, fp4, int8
  int64_t block_size = 64;   // values that share a scale, in 4 bits
  bool is_double = false;    // scales in 8 bits too
  int64_t rows = 0, columns = 0;
};

}  // namespace trireme
