// What evaluating a template needs: the budget, and Python's operations on values under it.
#pragma once

#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "base/json.h"
#include "data/jinja.h"
#include "data/jinja_value.h"

namespace trireme::jinja {

class Runtime {
 public:
  explicit Runtime(const Limits& limits) : limits_(limits) {}
  ~Runtime();
  Runtime(const Runtime&) = delete;
  Runtime& operator=(const Runtime&) = delete;

  // The budget. All fail with a message that names the limit.
  void step(uint64_t count = 1);
  void step_over(const Value& value);            // one step, and those of reading a text
  uint64_t steps() const { return steps_; }
  void check_string(uint64_t num_bytes);  // before a string of this size is made
  Value text(std::string text, bool safe = false);
  Value text(std::string_view view) { return text(std::string(view)); }
  struct Depth {  // held while one level deeper
    explicit Depth(Runtime& runtime);
    ~Depth() { --runtime.depth_; }
    Runtime& runtime;
  };

  // Python's operators and protocols.
  static bool truth(const Value& value);
  bool equal(const Value& a, const Value& b);
  bool less(const Value& a, const Value& b, const char* op = "<");
  bool contains(const Value& container, const Value& item);
  std::string str(const Value& value);
  std::string repr(const Value& value);
  int64_t length(const Value& value);
  std::vector<Value> iterate(const Value& value);
  Value binary(const std::string& op, const Value& a, const Value& b);
  Value negative(const Value& value, bool minus);
  Value attribute(const Value& object, const std::string& name);  // object.name: attribute, then item
  Value item(const Value& object, const Value& key);              // object[key]: item, then attribute
  Value slice(const Value& object, const Value& start, const Value& stop, const Value& step);
  Value call(const Value& function, const Args& args);
  Value method(const Value& object, const std::string& name);  // a method of a str, list, dict, ...; None where absent

  Value percent_format(const std::string& format, const Value& arguments);  // format % arguments
  Value brace_format(const std::string& format, const Args& args);          // format.format(...)
  std::string format_value(const Value& value, const std::string& spec);    // format(value, spec)
  std::string to_json(const Value& value, const std::string& indent, bool pretty, const std::string& item_separator,
                      const std::string& key_separator, bool ensure_ascii, bool sort_keys);

  Value filter(const std::string& name, const Value& value, const Args& args);
  bool test(const std::string& name, const Value& value, const Args& args);
  static bool has_filter(const std::string& name);
  static bool has_test(const std::string& name);

  Value from_json(const Json& value, int depth = 0);

  // Objects that may hold each other in a circle; emptied at the end.
  std::vector<std::shared_ptr<NamespaceObject>> namespaces;

 private:
  void append_repr(std::string& out, const Value& value, int depth);
  void append_json(std::string& out, const Value& value, const std::string& indent, bool pretty,
                   const std::string& item_separator, const std::string& key_separator, bool ensure_ascii,
                   bool sort_keys, int level);
  Value repeat(const Value& sequence, int64_t count);
  std::string format_float(double value, char type, int precision, bool alternate);
  Value brace_field(const std::string& field, const Args& args, size_t& next_index);
  std::string brace_text(const std::string& format, const Args& args, size_t& next_index, int depth);

  const Limits limits_;
  uint64_t steps_ = 0, bytes_ = 0;
  int depth_ = 0;
};

// range, dict, namespace, joiner, raise_exception, strftime_now; null where there is none of this name.
Value global_function(const std::string& name);

}  // namespace trireme::jinja
