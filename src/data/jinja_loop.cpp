#include "data/jinja_loop.h"

#include "data/jinja_runtime.h"

namespace trireme::jinja {

std::optional<Value> LoopObject::take() {
  while (at < source.size()) {
    const Value& item = source[at++];
    if (!test || test(item)) return item;
  }
  return std::nullopt;
}

const std::optional<Value>& LoopObject::peek() {
  if (!after) after = take();
  return after;
}

bool LoopObject::next() {
  std::optional<Value> item = after ? std::move(after) : take();
  after.reset();
  if (!item) return false;
  ++index0;
  before = std::move(current);
  current = std::move(item);
  return true;
}

int64_t LoopObject::length() {
  if (known_length) return *known_length;
  if (test) {  // take the rest at once
    std::vector<Value> rest;
    while (std::optional<Value> item = take()) rest.push_back(*item);
    source = std::move(rest);
    at = 0;
    test = nullptr;
    known_length = static_cast<int64_t>(source.size()) + index0 + 1 + (after ? 1 : 0);
  } else {
    known_length = static_cast<int64_t>(source.size());
  }
  return *known_length;
}

Value LoopObject::attribute(const std::string& name, const Value& self) {
  if (name == "index0") return Value::integer(index0);
  if (name == "index") return Value::integer(index0 + 1);
  if (name == "first") return Value::boolean(index0 == 0);
  if (name == "last") return Value::boolean(!peek());
  if (name == "length") return Value::integer(length());
  if (name == "revindex") return Value::integer(length() - index0);
  if (name == "revindex0") return Value::integer(length() - index0 - 1);
  if (name == "depth") return Value::integer(depth0 + 1);
  if (name == "depth0") return Value::integer(depth0);
  if (name == "previtem") return before ? *before : Value::undefined("there is no previous item");
  if (name == "nextitem") return peek() ? *after : Value::undefined("there is no next item");
  if (name == "cycle")
    return Value::function(
        "cycle",
        [self](Runtime&, const Args& args) {
          if (args.positional.empty()) fail("no items for cycling given");
          return args.positional[static_cast<size_t>(self.as_loop().index0) % args.positional.size()];
        },
        nesting + 1);
  if (name == "changed")
    return Value::function(
        "changed",
        [self](Runtime& runtime, const Args& args) {
          LoopObject& loop = self.as_loop();
          Value value = Value::tuple(args.positional);
          if (loop.last_changed && runtime.equal(*loop.last_changed, value)) return Value::boolean(false);
          loop.last_changed = std::move(value);
          return Value::boolean(true);
        },
        nesting + 1);
  return Value::undefined("'jinja2.runtime.LoopContext object' has no attribute '" + name + "'");
}

}  // namespace trireme::jinja
