#include "data/jinja_value.h"

#include <cmath>

#include "data/jinja_loop.h"
#include "data/jinja_text.h"

namespace trireme::jinja {

void fail(std::string message) { throw TemplateError{std::move(message)}; }

std::vector<const Value*> Args::bind(const char* callee, std::initializer_list<const char*> names,
                                     size_t num_required) const {
  std::vector<const Value*> values(names.size(), nullptr);
  if (positional.size() > names.size())
    fail(std::string(callee) + "() takes at most " + std::to_string(names.size()) + " arguments (" +
         std::to_string(positional.size()) + " given)");
  for (size_t i = 0; i < positional.size(); ++i) values[i] = &positional[i];
  for (const auto& [name, value] : named) {
    size_t i = 0;
    for (const char* candidate : names) {
      if (name == candidate) break;
      ++i;
    }
    if (i == names.size()) fail(std::string(callee) + "() got an unexpected keyword argument '" + name + "'");
    if (values[i]) fail(std::string(callee) + "() got multiple values for argument '" + name + "'");
    values[i] = &value;
  }
  for (size_t i = 0; i < num_required; ++i)
    if (!values[i]) fail(std::string(callee) + "() missing required argument '" + names.begin()[i] + "'");
  return values;
}

Value Value::of(Kind kind, std::shared_ptr<Object> object) {
  if (object->nesting > kMaxNesting)
    fail("lists and dicts are nested deeper than " + std::to_string(kMaxNesting) + " levels");
  Value value;
  value.kind_ = kind;
  value.object_ = std::move(object);
  return value;
}

Value Value::undefined(std::string message) {
  auto object = std::make_shared<StringObject>();
  object->text = std::move(message);
  return of(Kind::kUndefined, std::move(object));
}

Value Value::boolean(bool value) {
  Value result;
  result.kind_ = Kind::kBool;
  result.integer_ = value;
  return result;
}

Value Value::integer(int64_t value) {
  Value result;
  result.kind_ = Kind::kInt;
  result.integer_ = value;
  return result;
}

Value Value::real(double value) {
  Value result;
  result.kind_ = Kind::kFloat;
  result.real_ = value;
  return result;
}

Value Value::string(std::string text, bool safe) {
  auto object = std::make_shared<StringObject>();
  object->text = std::move(text);
  object->safe = safe;
  return of(Kind::kString, std::move(object));
}

namespace {

template <typename T>
std::shared_ptr<T> make_list(std::vector<Value> items, const char* type) {
  auto object = std::make_shared<T>();
  for (const Value& item : items) object->nesting = std::max(object->nesting, item.nesting() + 1);
  object->items = std::move(items);
  object->type = type;
  return object;
}

}  // namespace

Value Value::sequence(Kind kind, std::vector<Value> items) {
  return of(kind, make_list<ListObject>(std::move(items), kind == Kind::kList ? "list" : "tuple"));
}

Value Value::view(const char* type, std::vector<Value> items) {
  return of(Kind::kView, make_list<ListObject>(std::move(items), type));
}

Value Value::iterator(const char* type, std::vector<Value> items) {
  return of(Kind::kIterator, make_list<IteratorObject>(std::move(items), type));
}

Value Value::dict(std::shared_ptr<DictObject> dict) {
  for (const auto& [key, value] : dict->entries)
    dict->nesting = std::max({dict->nesting, key.nesting() + 1, value.nesting() + 1});
  return of(Kind::kDict, std::move(dict));
}

Value Value::range(int64_t start, int64_t stop, int64_t step) {
  auto object = std::make_shared<RangeObject>();
  object->start = start;
  object->stop = stop;
  object->step = step;
  return of(Kind::kRange, std::move(object));
}

Value Value::function(std::string name, std::function<Value(Runtime&, const Args&)> call, int nesting) {
  auto object = std::make_shared<FunctionObject>();
  object->name = std::move(name);
  object->call = std::move(call);
  object->nesting = nesting;
  return of(Kind::kFunction, std::move(object));
}

const std::string& Value::text() const { return static_cast<const StringObject&>(*object_).text; }
bool Value::safe() const { return is_string() && static_cast<const StringObject&>(*object_).safe; }
const std::vector<Value>& Value::items() const { return static_cast<const ListObject&>(*object_).items; }
const DictObject& Value::as_dict() const { return static_cast<const DictObject&>(*object_); }
const RangeObject& Value::as_range() const { return static_cast<const RangeObject&>(*object_); }
IteratorObject& Value::as_iterator() const { return static_cast<IteratorObject&>(*object_); }
NamespaceObject& Value::as_namespace() const { return static_cast<NamespaceObject&>(*object_); }
const FunctionObject& Value::as_function() const { return static_cast<const FunctionObject&>(*object_); }
LoopObject& Value::as_loop() const { return static_cast<LoopObject&>(*object_); }

std::string Value::type_name() const {
  switch (kind_) {
    case Kind::kUndefined:
      return "Undefined";
    case Kind::kNone:
      return "NoneType";
    case Kind::kBool:
      return "bool";
    case Kind::kInt:
      return "int";
    case Kind::kFloat:
      return "float";
    case Kind::kString:
      return safe() ? "Markup" : "str";
    case Kind::kDict:
      return "dict";
    case Kind::kRange:
      return "range";
    case Kind::kNamespace:
      return "Namespace";
    case Kind::kFunction:
      return "function";
    case Kind::kLoop:
      return "LoopContext";
    case Kind::kList:
    case Kind::kTuple:
    case Kind::kView:
    case Kind::kIterator:
      return static_cast<const ListObject&>(*object_).type;
  }
  return "object";
}

int64_t RangeObject::size() const {
  // In unsigned arithmetic: stop - start may not fit into 64 bits with sign.
  if (step > 0) return start >= stop ? 0 : static_cast<int64_t>((static_cast<uint64_t>(stop) - start - 1) / step) + 1;
  return start <= stop
             ? 0
             : static_cast<int64_t>((static_cast<uint64_t>(start) - stop - 1) / (0 - static_cast<uint64_t>(step))) + 1;
}

// --- dict
// -------------------------------------------------------------------------------------------------------------
size_t DictObject::index_of(const std::string& key) const {
  auto found = index_.find(key);
  return found == index_.end() ? entries.size() : found->second;
}

const Value* DictObject::find(const Value& key) const {
  size_t i = index_of(hash_key(key));
  return i < entries.size() ? &entries[i].second : nullptr;
}

const Value* DictObject::find(const std::string& key) const {
  size_t i = index_of("s" + key);
  return i < entries.size() ? &entries[i].second : nullptr;
}

void DictObject::set(const Value& key, Value value) {
  std::string hashed = hash_key(key);
  size_t i = index_of(hashed);
  if (i < entries.size()) {
    entries[i].second = std::move(value);
  } else {
    index_.emplace(std::move(hashed), entries.size());
    entries.emplace_back(key, std::move(value));
  }
}

std::string hash_key(const Value& value) {
  switch (value.kind()) {
    case Kind::kString:
      return "s" + value.text();
    case Kind::kNone:
      return "z";
    case Kind::kBool:
    case Kind::kInt:
      return "n" + std::to_string(value.as_int());
    case Kind::kFloat: {
      double number = value.as_double();
      if (number == std::floor(number) && std::abs(number) < 9e18)
        return "n" + std::to_string(static_cast<int64_t>(number));
      return "f" + float_repr(number);
    }
    case Kind::kTuple: {
      std::string key = "t";
      for (const Value& item : value.items()) {
        std::string part = hash_key(item);
        key += std::to_string(part.size()) + ":" + part;
        if (key.size() > (1u << 20)) fail("a tuple used as a key is larger than 1 MiB");
      }
      return key;
    }
    case Kind::kUndefined:
      return "u";
    case Kind::kList:
    case Kind::kDict:
      fail("unhashable type: '" + value.type_name() + "'");
    default:
      return "o" + std::to_string(reinterpret_cast<uintptr_t>(value.object()));
  }
}

}  // namespace trireme::jinja
