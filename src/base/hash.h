// Content hashes: XXH3-128, as 32 hex digits. Not for adversaries; for "is this the same data".
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace trireme {

std::string hash_bytes(const void* data, uint64_t size);
inline std::string hash_bytes(std::string_view bytes) { return hash_bytes(bytes.data(), bytes.size()); }
std::string hash_file(const std::string& path);  // streamed; DataError where it cannot be read

}  // namespace trireme
