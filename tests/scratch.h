// A new folder for the files of one test, below TMPDIR; its test removes it.
#pragma once

#include <stdlib.h>

#include <filesystem>
#include <stdexcept>
#include <string>

namespace trireme {

inline std::string scratch_folder() {
  std::string folder = (std::filesystem::temp_directory_path() / "trireme-XXXXXX").string();
  if (::mkdtemp(folder.data()) == nullptr) throw std::runtime_error("cannot make " + folder);
  return folder;
}

}  // namespace trireme
