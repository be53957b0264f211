// Guarded of emulated.h for device_kernels_test: memory that the device and the host read at the same addresses.
#pragma once

#include <cstdint>
#include <string>

namespace trireme::kernels::test {

// `num_bytes` at an address that is a multiple of 16 and of no more, between guards; NaNs at first. A byte of a guard that changes fails
// the test, at the latest when the memory goes. With TRIREME_NO_GUARDS in the environment nothing stands behind: compute-sanitizer then
// sees reads, too, that go over the end.
class Guarded {
 public:
  explicit Guarded(int64_t num_bytes);
  ~Guarded();
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  template <typename T = void>
  T* as() const {
    settle();
    return reinterpret_cast<T*>(data_);
  }
  size_t num_bytes() const { return num_bytes_; }
  std::string bits() const {
    settle();
    return {data_, num_bytes_};
  }

 private:
  void settle() const;  // all that was launched has ended; throws what went wrong

  size_t num_bytes_, behind_;
  char* data_ = nullptr;
};

}  // namespace trireme::kernels::test
