#include "train/progress.h"

#include <unistd.h>

#include <cstdio>
#include <cstdlib>

#include "base/check.h"
#include "base/log.h"

namespace trireme {

Progress::Progress(bool prints, bool alone) : prints_(prints) {
  const char* told = std::getenv("TRIREME_PROGRESS");
  live_ = told ? std::string(told) == "live" : alone && ::isatty(2) == 1;
}

void Progress::show(const std::string& line, int64_t step, int64_t every, bool last) {
  if (!prints_) return;
  const bool logs = step % every == 0 || last;
  if (logs && (!live_ || last)) return log_info(line);
  if (logs) log_quietly(line);
  const auto now = std::chrono::steady_clock::now();
  if (!live_ || now - shown_ < std::chrono::milliseconds(100)) return;
  shown_ = now;
  log_live(line);
}

std::string bytes_text(double bytes) {
  char text[32];
  const char* unit = bytes >= 1 << 30 ? "GiB" : "MiB";
  std::snprintf(text, sizeof text, "%.2f %s", bytes / (bytes >= 1 << 30 ? 1 << 30 : 1 << 20), unit);
  return text;
}

std::string count_text(double count) {
  char text[32];
  if (count >= 1e9) std::snprintf(text, sizeof text, "%.2f B", count / 1e9);
  else if (count >= 1e6) std::snprintf(text, sizeof text, "%.2f M", count / 1e6);
  else if (count >= 1e3) std::snprintf(text, sizeof text, "%.1f k", count / 1e3);
  else std::snprintf(text, sizeof text, "%.0f", count);
  return text;
}

std::string duration_text(double seconds) {
  auto s = static_cast<long long>(seconds + 0.5);
  char text[32];
  if (s >= 3600) std::snprintf(text, sizeof text, "%lld:%02lld:%02lld", s / 3600, s / 60 % 60, s % 60);
  else std::snprintf(text, sizeof text, "%lld:%02lld", s / 60, s % 60);
  return text;
}

}  // namespace trireme
