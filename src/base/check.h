// Errors: three kinds, no fourth (README, "Errors").
//   theirs       ConfigError (exit status 2), DataError (exit status 3): the user can mend it; the message names the
//                file, line or key, the value, what is allowed and the way out
//   ours         TRIREME_CHECK(condition, values...): a bug of Trireme; on in every build
//   the machine  SystemError: a call of the operating system, MPI, HDF5 or CUDA failed
// All throw; only main() catches, prints once and chooses the exit status.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace trireme {

enum ExitStatus { kExitDone = 0, kExitFailure = 1, kExitConfig = 2, kExitData = 3, kExitStopped = 75 };

class Error : public std::runtime_error {
 public:
  Error(ExitStatus status, const std::string& message) : std::runtime_error(message), status_(status) {}
  ExitStatus status() const { return status_; }

 private:
  ExitStatus status_;
};

// The command line or the configuration is wrong.
struct ConfigError : Error {
  explicit ConfigError(const std::string& message) : Error(kExitConfig, message) {}
};

// A data, model, tokenizer or checkpoint file is wrong.
struct DataError : Error {
  explicit DataError(const std::string& message) : Error(kExitData, message) {}
};

// The machine failed us: disk, memory, network, a lost rank.
struct SystemError : Error {
  explicit SystemError(const std::string& message) : Error(kExitFailure, message) {}
};

// A condition that the program itself guarantees does not hold.
struct InternalError : Error {
  explicit InternalError(const std::string& message) : Error(kExitFailure, message) {}
};

// The concatenation of all arguments as operator<< prints them.
template <typename... Args>
std::string str(const Args&... args) {
  std::ostringstream out;
  (out << ... << args);
  return out.str();
}

// "no such file" and friends for the present errno.
std::string errno_text();

[[noreturn]] void check_failed(const char* file, int line, const char* condition, const std::string& values);

}  // namespace trireme

#define TRIREME_CHECK(condition, ...)                                                                       \
  do {                                                                                                      \
    if (!(condition)) [[unlikely]]                                                                          \
      ::trireme::check_failed(__FILE__, __LINE__, #condition, ::trireme::str("" __VA_OPT__(, ) __VA_ARGS__)); \
  } while (false)
