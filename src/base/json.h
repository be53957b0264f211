// JSON from untrusted files: nlohmann, but duplicate keys, deep nesting and invalid UTF-8 are errors that name the place.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

namespace trireme {

using Json = nlohmann::ordered_json;  // keeps the order of keys: what we write, diffs well

// Parses `text`. `source` (a file, or "file:line") begins every message. DataError: not JSON, a duplicate key, nesting
// beyond max_depth, bytes after the value (a NUL too).
Json parse_json(std::string_view text, const std::string& source, int max_depth = 100);

// Reads and parses a whole file. DataError also where it cannot be read or is larger than max_bytes.
Json read_json_file(const std::string& path, uint64_t max_bytes = 256ull << 20);

// `value[key]` as T with a DataError that names source and key where it is absent or of another type.
template <typename T>
T json_get(const Json& value, const char* key, const std::string& source);
template <typename T>
T json_get_or(const Json& value, const char* key, T fallback, const std::string& source);

// Valid JSON text however broken the UTF-8 of its strings is (each bad byte becomes U+FFFD). One line.
std::string dump_json(const Json& value);
// The same, indented by 2, ending in a newline.
std::string dump_json_pretty(const Json& value);

}  // namespace trireme
