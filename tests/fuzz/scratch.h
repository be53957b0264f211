// A folder of this process for inputs that are read from files, gone when it ends.
#pragma once

#include <unistd.h>

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <string>
#include <string_view>

namespace fuzz {

class Scratch {
 public:
  Scratch() : folder_(std::filesystem::temp_directory_path() / ("trireme-fuzz-" + std::to_string(getpid()))) {
    std::filesystem::create_directories(folder_);
  }
  ~Scratch() {
    std::error_code ignored;
    std::filesystem::remove_all(folder_, ignored);
  }
  std::string folder() const { return folder_.string(); }
  std::string write(const std::string& name, const void* data, size_t size) const {
    std::ofstream file(folder_ / name, std::ios::binary | std::ios::trunc);
    file.write(static_cast<const char*>(data), static_cast<std::streamsize>(size));
    return (folder_ / name).string();
  }

 private:
  std::filesystem::path folder_;
};

}  // namespace fuzz
