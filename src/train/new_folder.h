// A folder that a verb writes, which has its name only when it is whole.
#pragma once

#include <functional>
#include <string>

namespace trireme {

// ConfigError: `folder`, of run.dir, is there and not empty, is no folder, a disk's own, or is `model`, the folder that is read.
void check_new_folder(const std::string& folder, const std::string& model);

// `write` writes into the folder that it is given, FOLDER.tmp, which then becomes `folder`. Where it throws nothing is left; what a killed
// writer has left is written over. ConfigError: as above, a living writer of the same folder, FOLDER.tmp of somebody else.
// SystemError: it cannot be written.
void write_new_folder(const std::string& folder, const std::string& model, const std::function<void(const std::string& made)>& write);

}  // namespace trireme
