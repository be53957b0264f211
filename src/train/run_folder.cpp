#include "train/run_folder.h"

#include <fcntl.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

#include "base/check.h"
#include "base/file.h"

namespace trireme {
namespace fs = std::filesystem;

namespace {

[[noreturn]] void cannot_create(const std::string& path, const std::string& why) {
  throw SystemError(str("cannot create the run folder ", path, ": ", why, "; set run.dir to a folder that can be written"));
}

std::string created(const std::string& path) {
  std::error_code error;
  const bool is_new = fs::create_directories(path, error);
  if (error) cannot_create(path, error.message());
  if (is_new) fsync_path(fs::canonical(path).parent_path().string());
  return path;
}

}  // namespace

void check_run_folder(const std::string& path, bool fresh) {
  fs::path there = fs::absolute(path);
  std::error_code error;
  while (!fs::exists(there, error) && there.has_relative_path()) there = there.parent_path();
  if (!fs::is_directory(there, error)) cannot_create(path, "Not a directory");
  if (access(there.c_str(), W_OK | X_OK) != 0) cannot_create(path, errno_text());
  if (!fs::exists(path + "/run.lock", error))
    for (const char* ours : {"config.ini", "metrics.jsonl", "log.txt", "finished.json", "checkpoints", "model", "adapter", "config.json"})
      if (fs::exists(path + "/" + ours, error))
        throw ConfigError(str("run.dir=", path, " is no run folder (it has no run.lock), and the run would overwrite the ", ours,
                              " that is in it; name a new folder"));
  if (!fresh) return;
  bool used = fs::exists(path + "/finished.json", error);
  for (const auto& entry : fs::directory_iterator(path + "/checkpoints", error))
    used |= entry.path().filename().string().starts_with("step-") && !entry.path().has_extension();
  if (used) throw ConfigError(str("the run folder ", path, " holds a run and run.resume is never; set another run.dir"));
}

RunFolder::RunFolder(const std::string& path) : path_(created(path)), lock_(path_) {}

std::optional<Json> RunFolder::finished() const {
  std::string file = path_ + "/finished.json";
  if (!fs::exists(file)) return std::nullopt;
  return read_json_file(file);
}

void RunFolder::set_finished(const Json& state) const { write_file_atomic(path_ + "/finished.json", dump_json_pretty(state)); }
void RunFolder::clear_finished() const { fs::remove(path_ + "/finished.json"); }
void RunFolder::write_config(const std::string& ini) const { write_file_atomic(path_ + "/config.ini", ini); }

std::string default_run_dir(const std::string& config_file) {
  return "runs/" + (config_file.empty() ? std::string("run") : fs::path(config_file).stem().string());
}

MetricsLog::MetricsLog(const std::string& path, int64_t step, const std::string& before) : path_(path) {
  std::string kept;
  std::ifstream in(fs::exists(path) ? path : before);
  for (std::string line; std::getline(in, line) && !in.eof();) {  // a last line without its newline was torn
    Json json = Json::parse(line, nullptr, false);
    if (json.is_object() && json.contains("step") && json["step"].is_number_integer() && json["step"].get<int64_t>() <= step)
      kept += line + "\n";
  }
  write_file_atomic(path, kept);
  fd_ = ::open(path.c_str(), O_WRONLY | O_APPEND | O_CLOEXEC);
  if (fd_ < 0) throw SystemError(str("cannot write ", path, ": ", errno_text()));
}

MetricsLog::~MetricsLog() {
  if (fd_ >= 0) ::close(fd_);
}

void MetricsLog::write(const Json& line) {
  std::string text = dump_json(line) + "\n";
  for (size_t done = 0; done < text.size();) {
    ssize_t n = ::write(fd_, text.data() + done, text.size() - done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) throw SystemError(str("cannot write ", path_, ": ", errno_text()));
    done += static_cast<size_t>(n);
  }
}

void MetricsLog::sync() {
  if (::fdatasync(fd_) != 0) throw SystemError(str("cannot sync ", path_, ": ", errno_text()));
}

}  // namespace trireme
