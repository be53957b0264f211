// libFuzzer target: any bytes as a safetensors file are either read whole or refused with a DataError.
// Corpus: tests/fuzz/corpus/safetensors, replayed by the ordinary tests; how to build: tests/fuzz/CMakeLists.txt.
#include <sys/mman.h>
#include <unistd.h>

#include "base/check.h"
#include "checkpoint/safetensors.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  int fd = memfd_create("input", 0);
  if (fd < 0 || write(fd, data, size) != static_cast<ssize_t>(size)) return 0;
  try {
    trireme::SafetensorsFile file("/proc/self/fd/" + std::to_string(fd));
    for (const std::string& name : file.names()) {
      at::Tensor value = file.view(name);
      if (value.nbytes() > 0) {  // touch both ends
        volatile char sum = static_cast<const char*>(value.const_data_ptr())[0];
        sum = static_cast<const char*>(value.const_data_ptr())[value.nbytes() - 1];
        (void)sum;
      }
    }
  } catch (const trireme::DataError&) {
  }
  close(fd);
  return 0;
}
