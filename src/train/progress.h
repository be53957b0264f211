// One live line on a terminal, plain lines in a log. Under mpirun isatty lies both ways, so TRIREME_PROGRESS=live|plain,
// set by launch/run_local.sh, decides; without it a single process asks isatty, and several ranks are plain.
#pragma once

#include <chrono>
#include <string>

namespace trireme {

class Progress {
 public:
  Progress(bool prints, bool alone);
  // The line of step `step`. Every `every` steps, and for `last`, it goes to the log; live: also to the terminal's live
  // line, at most ten times a second.
  void show(const std::string& line, int64_t step, int64_t every, bool last);

 private:
  bool prints_, live_;
  std::chrono::steady_clock::time_point shown_{};
};

std::string bytes_text(double bytes);      // "1.5 GiB"
std::string count_text(double count);      // "12.3 M"
std::string duration_text(double seconds); // "1:02:03"

}  // namespace trireme
