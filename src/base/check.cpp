#include "base/check.h"

#include <cerrno>
#include <cstring>

namespace trireme {

std::string errno_text() { return std::strerror(errno); }

void check_failed(const char* file, int line, const char* condition, const std::string& values) {
  throw InternalError(str("internal error at ", file, ":", line, ": ", condition, values.empty() ? "" : ": ", values,
                          "; please report it"));
}

}  // namespace trireme
