#include "base/json.h"

#include <set>

#include "base/check.h"
#include "base/file.h"

namespace trireme {
namespace {

// nlohmann keeps the last of two equal keys and nests without limit; this SAX front end refuses both, then builds the
// value as the library's own DOM parser does.
class StrictParser : public nlohmann::detail::json_sax_dom_parser<Json> {
  using Base = nlohmann::detail::json_sax_dom_parser<Json>;

 public:
  StrictParser(Json& result, const std::string& source, int max_depth)
      : Base(result, false), source_(source), max_depth_(max_depth) {}

  bool start_object(std::size_t n) {
    enter();
    keys_.emplace_back();
    return Base::start_object(n);
  }
  bool end_object() {
    keys_.pop_back();
    --depth_;
    return Base::end_object();
  }
  bool start_array(std::size_t n) {
    enter();
    return Base::start_array(n);
  }
  bool end_array() {
    --depth_;
    return Base::end_array();
  }
  bool key(std::string& name) {
    if (!keys_.back().insert(name).second)
      throw DataError(str(source_, ": the key \"", name, "\" stands twice in one object"));
    return Base::key(name);
  }
  bool parse_error(std::size_t position, const std::string&, const nlohmann::detail::exception& error) {
    std::string why = error.what();  // "[json.exception.parse_error.101] parse error at line 1, column 3: ..."
    size_t cut = why.find("] ");
    throw DataError(str(source_, ": not valid JSON at byte ", position, ": ",
                        cut == std::string::npos ? why : why.substr(cut + 2)));
  }

 private:
  void enter() {
    if (++depth_ > max_depth_) throw DataError(str(source_, ": JSON nested deeper than ", max_depth_, " levels"));
  }
  const std::string& source_;
  int max_depth_, depth_ = 0;
  std::vector<std::set<std::string>> keys_;
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
  StrictParser parser(result, source, max_depth);
  Json::sax_parse(text.begin(), text.end(), &parser);
  return result;
}

Json read_json_file(const std::string& path, uint64_t max_bytes) { return parse_json(read_file(path, max_bytes), path); }

template <typename T>
T json_get(const Json& value, const char* key, const std::string& source) {
  if (!value.is_object()) throw DataError(str(source, ": an object is expected, found ", value.type_name()));
  auto it = value.find(key);
  if (it == value.end()) throw DataError(str(source, ": the key \"", key, "\" is missing"));
  if (!JsonType<T>::is(*it))
    throw DataError(str(source, ": \"", key, "\" must be ", JsonType<T>::name, ", found ", dump_json(*it).substr(0, 80)));
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
