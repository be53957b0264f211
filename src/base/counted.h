// Numbers of things in messages.
#pragma once

#include "base/check.h"

namespace trireme {

// "1 rank", "2 ranks".
template <typename Integer>
std::string counted(Integer number, const char* noun) {
  return str(number, " ", noun, number == 1 ? "" : "s");
}

}  // namespace trireme
