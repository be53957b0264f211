// The values of a Jinja template: Python's, as far as templates see them. All but namespaces are immutable.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace trireme::jinja {

class Runtime;
class Value;

// What Python would raise; Template::render makes a DataError of it.
struct TemplateError {
  std::string message;
  int line = 0;  // 0: the line being evaluated
};
[[noreturn]] void fail(std::string message);

constexpr int kMaxNesting = 200;  // of lists and dicts in each other; keeps every recursion over values short

enum class Kind : uint8_t {
  kUndefined,
  kNone,
  kBool,
  kInt,
  kFloat,
  kString,
  kList,
  kTuple,
  kDict,
  kRange,
  kView,
  kIterator,
  kNamespace,
  kFunction,
  kLoop
};

struct Object {
  virtual ~Object() = default;
  int nesting = 0;
};

struct Args {
  std::vector<Value> positional;
  std::vector<std::pair<std::string, Value>> named;

  // The values of the parameters `names`, null where absent. The first num_required must be there. Messages name
  // `callee`.
  std::vector<const Value*> bind(const char* callee, std::initializer_list<const char*> names,
                                 size_t num_required = 0) const;
};

struct ListObject;
struct DictObject;
struct RangeObject;
struct IteratorObject;
struct NamespaceObject;
struct FunctionObject;
struct LoopObject;

class Value {
 public:
  Value() = default;  // None
  static Value undefined(std::string message);
  static Value boolean(bool value);
  static Value integer(int64_t value);
  static Value real(double value);
  static Value string(std::string text, bool safe = false);  // safe: Python's Markup
  static Value list(std::vector<Value> items) { return sequence(Kind::kList, std::move(items)); }
  static Value tuple(std::vector<Value> items) { return sequence(Kind::kTuple, std::move(items)); }
  static Value dict(std::shared_ptr<DictObject> dict);
  static Value range(int64_t start, int64_t stop, int64_t step);
  static Value view(const char* type, std::vector<Value> items);      // dict_items, dict_keys, dict_values
  static Value iterator(const char* type, std::vector<Value> items);  // read once
  static Value function(std::string name, std::function<Value(Runtime&, const Args&)> call, int nesting = 0);
  static Value of(Kind kind, std::shared_ptr<Object> object);

  Kind kind() const { return kind_; }
  bool is(Kind kind) const { return kind_ == kind; }
  bool is_undefined() const { return is(Kind::kUndefined); }
  bool is_none() const { return is(Kind::kNone); }
  bool is_string() const { return is(Kind::kString); }
  bool is_integral() const { return is(Kind::kInt) || is(Kind::kBool); }
  bool is_number() const { return is_integral() || is(Kind::kFloat); }
  bool as_bool() const { return integer_ != 0; }
  int64_t as_int() const { return integer_; }  // kBool and kInt
  double as_double() const { return is(Kind::kFloat) ? real_ : static_cast<double>(integer_); }
  const std::string& text() const;          // kString; kUndefined: its message
  bool safe() const;                        // kString marked as safe
  const std::vector<Value>& items() const;  // kList, kTuple, kView
  const DictObject& as_dict() const;
  const RangeObject& as_range() const;
  IteratorObject& as_iterator() const;
  NamespaceObject& as_namespace() const;
  const FunctionObject& as_function() const;
  LoopObject& as_loop() const;
  const Object* object() const { return object_.get(); }
  int nesting() const { return object_ ? object_->nesting : 0; }
  std::string type_name() const;  // as Python's type(x).__name__

 private:
  static Value sequence(Kind kind, std::vector<Value> items);

  Kind kind_ = Kind::kNone;
  union {
    int64_t integer_ = 0;
    double real_;
  };
  std::shared_ptr<Object> object_;
};

struct StringObject : Object {
  std::string text;
  bool safe = false;
};
struct ListObject : Object {
  std::vector<Value> items;
  const char* type = "";
};
struct RangeObject : Object {
  int64_t start, stop, step;
  int64_t size() const;
};
struct IteratorObject : ListObject {
  size_t at = 0;
};
struct FunctionObject : Object {
  std::string name;
  std::function<Value(Runtime&, const Args&)> call;
};

// Keeps the order of insertion, as Python does.
struct DictObject : Object {
  std::vector<std::pair<Value, Value>> entries;
  const Value* find(const Value& key) const;
  const Value* find(const std::string& key) const;
  void set(const Value& key, Value value);

 private:
  size_t index_of(const std::string& key) const;
  std::unordered_map<std::string, size_t> index_;
};
struct NamespaceObject : DictObject {};

// One string per class of equal hashable values (1 == 1.0 == True). Fails where Python's hash() does.
std::string hash_key(const Value& value);

}  // namespace trireme::jinja
