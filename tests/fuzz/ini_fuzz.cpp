// libFuzzer target: any bytes as a configuration file are read, or refused with a ConfigError; what is read and printed
// reads back the same. Corpus: tests/fuzz/corpus/ini, replayed by fuzz_corpus_test.
#include "base/check.h"
#include "config/config.h"
#include "tests/fuzz/scratch.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace trireme;
  static const fuzz::Scratch scratch;
  auto read = [](const std::string& path) {
    Config config;
    const char* arguments[] = {"trireme", "train", path.c_str()};
    parse_command_line(3, arguments, config);
    return config_to_ini(config, false);
  };
  std::string printed;
  try {
    printed = read(scratch.write("c.ini", data, size));
  } catch (const ConfigError&) {
    return 0;
  }
  std::string again = read(scratch.write("printed.ini", printed.data(), printed.size()));
  TRIREME_CHECK(again == printed, printed, again);
  return 0;
}
