#include "train/new_folder.h"

#include <sys/stat.h>

#include <filesystem>

#include "base/check.h"
#include "base/file.h"
#include "checkpoint/run_lock.h"

namespace trireme {
namespace {

namespace fs = std::filesystem;

constexpr const char* kLock = "run.lock";

// Its lock tells what a killed writer has left from what is somebody else's.
void make_room(const std::string& made) {
  if (fs::exists(made) && !fs::is_empty(made) && !fs::exists(made + "/" + kLock))
    throw ConfigError(str(made, " is in the way, and no unfinished folder of trireme: move it, or name another run.dir"));
  fs::create_directories(made);
}

// No folder can be given the name of such a one.
bool is_mounted(const std::string& folder) {
  struct stat here, above;
  return stat(folder.c_str(), &here) == 0 && stat((folder + "/..").c_str(), &above) == 0 && here.st_dev != above.st_dev;
}

void clear(const std::string& made) {
  for (const auto& entry : fs::directory_iterator(made))
    if (entry.path().filename() != kLock) fs::remove_all(entry.path());
}

}  // namespace

void check_new_folder(const std::string& folder, const std::string& model) {
  std::error_code none;
  if (fs::is_symlink(folder) && !fs::exists(folder)) throw ConfigError(str("run.dir=", folder, " is a link to nothing; name a new folder"));
  if (!fs::exists(folder)) return;
  if (fs::equivalent(folder, model, none)) throw ConfigError(str("run.dir=", folder, " is the folder of the model itself; name a new folder"));
  if (!fs::is_directory(folder)) throw ConfigError(str("run.dir=", folder, " is a file; name a new folder"));
  if (is_mounted(folder)) throw ConfigError(str("run.dir=", folder, " is where a disk is mounted; name a new folder in it"));
  if (!fs::is_empty(folder)) throw ConfigError(str("run.dir=", folder, " is not empty; name a new folder"));
}

void write_new_folder(const std::string& folder, const std::string& model, const std::function<void(const std::string&)>& write) {
  try {
    check_new_folder(folder, model);
    const std::string whole = (fs::exists(folder) ? fs::canonical(folder) : fs::absolute(folder + "/").lexically_normal().parent_path()).string(), made = whole + ".tmp";
    make_room(made);
    const RunLock lock(made);
    try {
      check_new_folder(folder, model);  // another writer may have been faster
      clear(made);
      write(made);
      fs::remove(made + "/" + kLock);
      fsync_path(made);
      fs::rename(made, whole);
      fsync_path(fs::path(whole).parent_path().string());
    } catch (...) {
      std::error_code ignored;
      fs::remove_all(made, ignored);
      throw;
    }
  } catch (const fs::filesystem_error& error) {
    throw SystemError(str("run.dir=", folder, " cannot be written (", error.code().message(), ": ", error.path1().string(), "); name a folder where there is room and leave to write"));
  }
}

}  // namespace trireme
