// Hashes of large files that are the same at every start.
#pragma once

#include <string>

namespace trireme {

// hash_file(path), remembered in `folder` (a token cache): a file whose path, inode, size and time of change (ns) are as they
// were has the content that it had. A file changed within the last two seconds is not remembered: a later change could leave
// its time the same. DataError where it cannot be read; a folder that cannot be written is no error.
std::string remembered_hash(const std::string& path, const std::string& folder);

}  // namespace trireme
