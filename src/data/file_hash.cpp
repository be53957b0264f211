#include "data/file_hash.h"

#include <sys/stat.h>

#include <chrono>
#include <filesystem>

#include "base/check.h"
#include "base/file.h"
#include "base/hash.h"
#include "base/json.h"

namespace trireme {

std::string remembered_hash(const std::string& path, const std::string& folder) {
  struct stat info;
  if (::stat(path.c_str(), &info) != 0) return hash_file(path);  // tells what is wrong
  std::error_code error;
  std::string whole = std::filesystem::absolute(path, error).lexically_normal().string();
  int64_t changed = info.st_mtim.tv_sec * 1'000'000'000 + info.st_mtim.tv_nsec;
  Json now = {{"path", whole}, {"inode", info.st_ino}, {"bytes", info.st_size}, {"changed_ns", changed}};
  std::string memory = folder + "/" + hash_bytes(whole) + ".hash";
  try {
    if (std::filesystem::exists(memory, error)) {
      Json then = read_json_file(memory, 1 << 16);
      std::string hash = json_get<std::string>(then, "hash", memory);
      then.erase("hash");
      if (then == now) return hash;
    }
  } catch (const DataError&) {  // half written by another process: made again
  }
  std::string hash = hash_file(path);
  auto clock = std::chrono::system_clock::now().time_since_epoch();
  if (std::chrono::duration_cast<std::chrono::nanoseconds>(clock).count() - changed < 2'000'000'000) return hash;
  now["hash"] = hash;
  try {
    write_file_atomic(memory, dump_json(now));
  } catch (const SystemError&) {
  }
  return hash;
}

}  // namespace trireme
