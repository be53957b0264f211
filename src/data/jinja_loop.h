// The `loop` variable of a for statement. Items are tested and taken one at a time, as in jinja2: a test may look at
// what the body has written into a namespace.
#pragma once

#include <functional>
#include <optional>

#include "data/jinja_value.h"

namespace trireme::jinja {

struct LoopObject : Object {
  std::vector<Value> source;
  size_t at = 0;                               // of the next item of `source`
  std::function<bool(const Value&)> test;      // of `for ... if`; empty: every item
  std::function<Value(const Value&)> recurse;  // of `recursive` loops
  int64_t index0 = -1, depth0 = 0;
  std::optional<int64_t> known_length;
  std::optional<Value> after, current, before, last_changed;

  bool next();  // moves to the next item; false at the end
  const std::optional<Value>& peek();
  int64_t length();
  Value attribute(const std::string& name, const Value& self);

 private:
  std::optional<Value> take();
};

}  // namespace trireme::jinja
