// The run folder: config.ini, metrics.jsonl, log.txt, checkpoints/, model/ or adapter/, and finished.json once done.
#pragma once

#include <optional>
#include <string>

#include "base/json.h"
#include "checkpoint/run_lock.h"

namespace trireme {

// Can it be made or written, does it hold nothing of somebody else that a run would overwrite, and with `fresh`: does it hold
// no run yet? Changes nothing. SystemError, ConfigError.
void check_run_folder(const std::string& path, bool fresh);

// Rank 0's view of the folder.
class RunFolder {
 public:
  // Creates it and takes its lock. SystemError where it cannot be written; ConfigError where a living run holds it.
  explicit RunFolder(const std::string& path);

  const std::string& path() const { return path_; }
  std::optional<Json> finished() const;
  void set_finished(const Json& state) const;
  void clear_finished() const;
  void write_config(const std::string& ini) const;

 private:
  std::string path_;
  RunLock lock_;
};

// runs/<name of the configuration file without .ini>, or runs/run without a file.
std::string default_run_dir(const std::string& config_file);

// metrics.jsonl: one object a line, whole lines only. Opened for going on after `step`: later lines are dropped. A run that
// goes on in another folder takes the lines of `before`, where there are any.
class MetricsLog {
 public:
  MetricsLog(const std::string& path, int64_t step, const std::string& before = "");
  ~MetricsLog();
  MetricsLog(const MetricsLog&) = delete;
  MetricsLog& operator=(const MetricsLog&) = delete;
  void write(const Json& line);
  void sync();  // to disk; before a checkpoint that counts on these lines

 private:
  int fd_ = -1;
  std::string path_;
};

}  // namespace trireme
