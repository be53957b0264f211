// libFuzzer target: any bytes as a data file. Only DataError may come out of it. Its corpus, corpus/jsonl/, is replayed by
// data_records_test.
#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <string>

#include "base/check.h"
#include "data/records.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace trireme;
  int fd = ::memfd_create("jsonl", 0);
  if (fd < 0 || ::write(fd, data, size) != static_cast<ssize_t>(size)) return 0;
  std::string path = "/proc/self/fd/" + std::to_string(fd);
  try {
    RecordReader reader({path, -1});
    while (auto raw = reader.next()) {
      try {
        parse_record(raw->text, {}, "fuzz:" + std::to_string(raw->line));
      } catch (const DataError&) {
      }
    }
  } catch (const DataError&) {
  }
  ::close(fd);
  return 0;
}
