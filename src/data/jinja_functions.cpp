// Global functions.
#include <ctime>

#include "data/jinja_runtime.h"
#include "data/jinja_text.h"

namespace trireme::jinja {
namespace {

constexpr int64_t kMaxRange = 100'000;  // as jinja2's sandbox

Value make_range(Runtime&, const Args& args) {
  if (!args.named.empty()) fail("range() takes no keyword arguments");
  if (args.positional.empty() || args.positional.size() > 3)
    fail("range expected 1 to 3 arguments, got " + std::to_string(args.positional.size()));
  int64_t bounds[3] = {0, 0, 1};
  for (size_t i = 0; i < args.positional.size(); ++i) {
    const Value& value = args.positional[i];
    if (value.is_undefined()) fail(value.text());
    if (!value.is_integral()) fail("'" + value.type_name() + "' object cannot be interpreted as an integer");
    bounds[args.positional.size() == 1 ? 1 : i] = value.as_int();
  }
  if (bounds[2] == 0) fail("range() arg 3 must not be zero");
  Value range = Value::range(bounds[0], bounds[1], bounds[2]);
  if (int64_t size = range.as_range().size(); size > kMaxRange || size < 0)
    fail("Range too big. The sandbox blocks ranges larger than MAX_RANGE (100000).");
  return range;
}

void fill(Runtime& runtime, DictObject& dict, const Args& args, const char* name) {
  if (args.positional.size() > 1)
    fail(std::string(name) + " expected at most 1 argument, got " + std::to_string(args.positional.size()));
  for (const Value& source : args.positional) {
    if (source.is(Kind::kDict)) {
      for (const auto& [key, value] : source.as_dict().entries) dict.set(key, value);
      continue;
    }
    for (const Value& pair : runtime.iterate(source)) {
      std::vector<Value> both = runtime.iterate(pair);
      if (both.size() != 2)
        fail("dictionary update sequence element has length " + std::to_string(both.size()) + "; 2 is required");
      dict.set(both[0], both[1]);
    }
  }
  for (const auto& [key, value] : args.named) dict.set(Value::string(key), value);
  runtime.step(dict.entries.size());
}

Value make_dict(Runtime& runtime, const Args& args) {
  auto dict = std::make_shared<DictObject>();
  fill(runtime, *dict, args, "dict");
  return Value::dict(std::move(dict));
}

Value make_namespace(Runtime& runtime, const Args& args) {
  auto space = std::make_shared<NamespaceObject>();
  runtime.namespaces.push_back(space);
  fill(runtime, *space, args, "namespace");
  for (const auto& [key, value] : space->entries)
    if (key.is_string() && key.text().starts_with("_"))
      fail("Chat templates cannot store underscore-prefixed attributes on a namespace, but got " +
           string_repr(key.text()) + ". Please rename the attribute.");
  return Value::of(Kind::kNamespace, std::move(space));
}

Value make_joiner(Runtime& runtime, const Args& args) {
  const Value* separator = args.bind("joiner", {"sep"})[0];
  auto used = std::make_shared<bool>(false);
  std::string text = separator ? runtime.str(*separator) : ", ";
  return Value::function(
      "joiner", [used, text](Runtime&, const Args&) { return Value::string(std::exchange(*used, true) ? text : ""); });
}

Value raise_exception(Runtime& runtime, const Args& args) {
  fail(runtime.str(*args.bind("raise_exception", {"message"}, 1)[0]));
}

Value strftime_now(Runtime& runtime, const Args& args) {
  std::string format = runtime.str(*args.bind("strftime_now", {"format"}, 1)[0]);
  if (format.size() > 1000) fail("the format of strftime_now is longer than 1000 bytes");
  if (format.empty()) return Value::string("");
  std::time_t now = std::time(nullptr);
  std::tm local{};
  localtime_r(&now, &local);
  std::string buffer(100'000, '\0');
  buffer.resize(std::strftime(buffer.data(), buffer.size(), format.c_str(), &local));
  return Value::string(buffer);
}

}  // namespace

Value global_function(const std::string& name) {
  if (name == "range") return Value::function(name, make_range);
  if (name == "dict") return Value::function(name, make_dict);
  if (name == "namespace") return Value::function(name, make_namespace);
  if (name == "joiner") return Value::function(name, make_joiner);
  if (name == "raise_exception") return Value::function(name, raise_exception);
  if (name == "strftime_now") return Value::function(name, strftime_now);
  return Value();
}

}  // namespace trireme::jinja
