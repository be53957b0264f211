#include "base/log.h"

#include <atomic>
#include <cstdio>
#include <ctime>
#include <mutex>

#include "base/check.h"

namespace trireme {
namespace {

struct LogState {
  std::mutex mutex;
  int rank = 0, size = 1;
  LogLevel level = LogLevel::kInfo;
  FILE* file = nullptr;
  bool live = false;  // the terminal's last line is a live one
};

constexpr char kEraseLine[] = "\r\x1b[K";

void write_file(LogState& s, const std::string& line) {
  if (!s.file) return;
  char when[32];
  std::time_t now = std::time(nullptr);
  std::tm parts{};
  ::localtime_r(&now, &parts);
  std::strftime(when, sizeof when, "%F %T ", &parts);
  std::fputs(when, s.file);
  std::fwrite(line.data(), 1, line.size(), s.file);
  std::fflush(s.file);
}

LogState& state() {
  static LogState* instance = new LogState;  // never destroyed: threads may log while the program ends
  return *instance;
}

}  // namespace

void set_log_rank(int rank, int size) {
  state().rank = rank;
  state().size = size;
}
int log_rank() { return state().rank; }
void set_log_level(LogLevel level) { state().level = level; }

void set_log_file(const std::string& path) {
  FILE* file = std::fopen(path.c_str(), "ae");
  if (!file) throw SystemError(str("cannot write the log ", path, ": ", errno_text()));
  std::lock_guard lock(state().mutex);
  if (state().file) std::fclose(state().file);
  state().file = file;
}

void log_message(LogLevel level, const std::string& text) {
  LogState& s = state();
  if (level < s.level || (s.rank != 0 && level < LogLevel::kWarn)) return;
  std::string line = level == LogLevel::kWarn ? "warning: " : level == LogLevel::kError ? "error: " : "";
  if (s.rank != 0) line = str("[rank ", s.rank, "] ", line);
  line += text + "\n";
  std::lock_guard lock(s.mutex);
  if (s.live) line.insert(0, kEraseLine);
  std::fwrite(line.data(), 1, line.size(), stderr);
  write_file(s, s.live ? line.substr(std::size(kEraseLine) - 1) : line);
  s.live = false;
}

void log_live(const std::string& text) {
  if (state().level > LogLevel::kInfo) return;
  std::lock_guard lock(state().mutex);
  // Without line wrap for the moment: a line that is longer than the terminal is wide could not be erased.
  std::fprintf(stderr, "%s\x1b[?7l%s\x1b[?7h", kEraseLine, text.c_str());
  std::fflush(stderr);
  state().live = true;
}

void log_quietly(const std::string& text) {
  if (state().level > LogLevel::kInfo) return;
  std::lock_guard lock(state().mutex);
  write_file(state(), text + "\n");
}

}  // namespace trireme
