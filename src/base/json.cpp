#include "base/json.h"

#include <algorithm>
#include <cstdio>
#include <set>

#include "base/check.h"
#include "base/file.h"

namespace trireme {
namespace {

// The library quotes what it read last: where a quote is missing, the rest of the file.
std::string shortened(const std::string& text) {
  constexpr size_t kBegin = 200, kEnd = 60;
  if (text.size() <= kBegin + kEnd) return text;
  auto within_character = [&](size_t at) { return (text[at] & 0xC0) == 0x80; };
  size_t begin = kBegin, end = text.size() - kEnd;
  while (begin > 0 && within_character(begin)) --begin;
  while (end < text.size() && within_character(end)) ++end;
  return text.substr(0, begin) + " ... " + text.substr(end);
}

// Bytes of the UTF-8 character at `at`; 0 where there is none.
size_t character_bytes(std::string_view text, size_t at) {
  const auto byte = [&](size_t i) { return static_cast<unsigned char>(i < text.size() ? text[i] : 0); };
  const unsigned first = byte(at), second = byte(at + 1);
  const size_t bytes = first < 0x80 ? 1 : first >= 0xC2 && first < 0xE0 ? 2 : first >= 0xE0 && first < 0xF0 ? 3 : first >= 0xF0 && first < 0xF5 ? 4 : 0;
  for (size_t i = 1; i < bytes; ++i)
    if ((byte(at + i) & 0xC0) != 0x80) return 0;
  const bool other = (first == 0xE0 && second < 0xA0) || (first == 0xED && second >= 0xA0) || (first == 0xF0 && second < 0x90) || (first == 0xF4 && second >= 0x90);
  return other ? 0 : bytes;  // too long, a surrogate, or beyond U+10FFFF
}

// For a terminal: each byte that is part of no UTF-8 character as \xNN.
std::string printable(std::string_view text) {
  std::string out;
  for (size_t at = 0; at < text.size();) {
    const size_t bytes = character_bytes(text, at);
    char escaped[8];
    if (bytes == 0) std::snprintf(escaped, sizeof escaped, "\\x%02x", static_cast<unsigned char>(text[at]));
    out += bytes == 0 ? std::string_view(escaped) : text.substr(at, bytes);
    at += std::max<size_t>(bytes, 1);
  }
  return out;
}

// nlohmann keeps the last of two equal keys and nests without limit; this builder refuses both. It also appends members
// without looking for their key among those that are there, which the library's own does: a vocabulary of 128,000 tokens would
// take it many seconds.
class StrictBuilder : public nlohmann::json_sax<Json> {
 public:
  StrictBuilder(Json& result, const std::string& source, int max_depth) : result_(result), source_(source), max_depth_(max_depth) {}

  bool null() override { return put(nullptr); }
  bool boolean(bool value) override { return put(value); }
  bool number_integer(int64_t value) override { return put(value); }
  bool number_unsigned(uint64_t value) override { return put(value); }
  bool number_float(double value, const std::string&) override { return put(value); }
  bool string(std::string& value) override { return put(std::move(value)); }
  bool binary(Json::binary_t& value) override { return put(std::move(value)); }
  bool start_object(std::size_t) override {
    keys_.emplace_back();
    return open(Json::object());
  }
  bool start_array(std::size_t) override { return open(Json::array()); }
  bool key(std::string& name) override {
    if (!keys_.back().insert(name).second)
      throw DataError(str(source_, ": the key \"", shortened(name), "\" stands twice in one object"));
    auto& members = *open_.back()->get_ptr<Json::object_t*>();
    members.emplace_back(name, nullptr);
    member_ = &members.back().second;
    return true;
  }
  bool end_object() override {
    keys_.pop_back();
    return end_array();
  }
  bool end_array() override {
    open_.pop_back();
    return true;
  }
  bool parse_error(std::size_t position, const std::string&, const nlohmann::detail::exception& error) override {
    std::string why = error.what();  // "[json.exception.parse_error.101] parse error at line 1, column 3: ..."
    // Of a text of one line (a record, say, whose own line is in source_) the byte says all.
    if (size_t cut = why.find("] "); cut != std::string::npos) why.erase(0, cut + 2);
    if (size_t cut = why.find(": "); why.starts_with("parse error at line 1,") && cut != std::string::npos) why.erase(0, cut + 2);
    throw DataError(str(source_, ": not valid JSON at byte ", position, ": ", printable(shortened(why))));
  }

 private:
  template <typename T>
  bool put(T&& value) {
    if (open_.empty()) {
      last_ = &(result_ = std::forward<T>(value));
    } else if (open_.back()->is_array()) {
      last_ = &open_.back()->emplace_back(std::forward<T>(value));
    } else {
      last_ = &(*member_ = std::forward<T>(value));
    }
    return true;
  }
  bool open(Json&& container) {
    if (static_cast<int>(open_.size()) >= max_depth_)
      throw DataError(str(source_, ": JSON nested deeper than ", max_depth_, " levels"));
    put(std::move(container));
    open_.push_back(last_);
    return true;
  }

  Json& result_;
  const std::string& source_;
  int max_depth_;
  std::vector<Json*> open_;                   // objects and arrays that are not yet closed, outermost first
  std::vector<std::set<std::string>> keys_;   // of the objects among them
  Json *member_ = nullptr, *last_ = nullptr;  // where the value of the last key goes; the value put last
};

template <typename T>
struct JsonType;
template <>
struct JsonType<std::string> {
  static constexpr const char* name = "a string";
  static bool is(const Json& v) { return v.is_string(); }
};
template <>
struct JsonType<bool> {
  static constexpr const char* name = "true or false";
  static bool is(const Json& v) { return v.is_boolean(); }
};
template <>
struct JsonType<int64_t> {
  static constexpr const char* name = "an integer";
  static bool is(const Json& v) {
    return v.is_number_integer() && !(v.is_number_unsigned() && v.get<uint64_t>() > uint64_t{INT64_MAX});
  }
};
template <>
struct JsonType<double> {
  static constexpr const char* name = "a number";
  static bool is(const Json& v) { return v.is_number(); }
};

}  // namespace

Json parse_json(std::string_view text, const std::string& source, int max_depth) {
  Json result;
  StrictBuilder builder(result, source, max_depth);
  Json::sax_parse(text.begin(), text.end(), &builder);
  // The library takes a NUL for the end of the text; in a string it has refused it.
  if (size_t at = text.find('\0'); at != std::string_view::npos)
    throw DataError(str(source, ": not valid JSON at byte ", at + 1, ": a NUL byte"));
  return result;
}

Json read_json_file(const std::string& path, uint64_t max_bytes) { return parse_json(read_file(path, max_bytes), path); }

template <typename T>
T json_get(const Json& value, const char* key, const std::string& source) {
  if (!value.is_object()) throw DataError(str(source, ": an object is expected, found ", value.type_name()));
  auto it = value.find(key);
  if (it == value.end()) throw DataError(str(source, ": the key \"", key, "\" is missing"));
  if (!JsonType<T>::is(*it))
    throw DataError(str(source, ": \"", key, "\" must be ", JsonType<T>::name, ", found ", printable(dump_json(*it).substr(0, 80))));
  return it->template get<T>();
}

template <typename T>
T json_get_or(const Json& value, const char* key, T fallback, const std::string& source) {
  if (!value.is_object()) throw DataError(str(source, ": an object is expected, found ", value.type_name()));
  auto it = value.find(key);
  return it == value.end() || it->is_null() ? fallback : json_get<T>(value, key, source);
}

template std::string json_get<std::string>(const Json&, const char*, const std::string&);
template bool json_get<bool>(const Json&, const char*, const std::string&);
template int64_t json_get<int64_t>(const Json&, const char*, const std::string&);
template double json_get<double>(const Json&, const char*, const std::string&);
template std::string json_get_or<std::string>(const Json&, const char*, std::string, const std::string&);
template bool json_get_or<bool>(const Json&, const char*, bool, const std::string&);
template int64_t json_get_or<int64_t>(const Json&, const char*, int64_t, const std::string&);
template double json_get_or<double>(const Json&, const char*, double, const std::string&);

std::string dump_json(const Json& value) { return value.dump(-1, ' ', false, Json::error_handler_t::replace); }
std::string dump_json_pretty(const Json& value) { return value.dump(2, ' ', false, Json::error_handler_t::replace) + "\n"; }

}  // namespace trireme
