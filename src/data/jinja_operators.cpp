// Python's operators, attributes, items and slices.
#include <algorithm>
#include <cmath>

#include "data/jinja_loop.h"
#include "data/jinja_runtime.h"
#include "data/jinja_text.h"

namespace trireme::jinja {
namespace {

[[noreturn]] void fail_overflow() { fail("integers beyond 64 bits are not supported"); }

Value integer_power(int64_t base, int64_t exponent) {
  if (exponent < 0) {
    if (base == 0) fail("0.0 cannot be raised to a negative power");
    return Value::real(std::pow(static_cast<double>(base), static_cast<double>(exponent)));
  }
  int64_t result = 1;
  for (; exponent > 0; exponent >>= 1) {
    if ((exponent & 1) && __builtin_mul_overflow(result, base, &result)) fail_overflow();
    if (exponent > 1 && __builtin_mul_overflow(base, base, &base)) fail_overflow();
  }
  return Value::integer(result);
}

Value integer_binary(const std::string& op, int64_t a, int64_t b) {
  int64_t result = 0;
  if (op == "+") {
    if (__builtin_add_overflow(a, b, &result)) fail_overflow();
  } else if (op == "-") {
    if (__builtin_sub_overflow(a, b, &result)) fail_overflow();
  } else if (op == "*") {
    if (__builtin_mul_overflow(a, b, &result)) fail_overflow();
  } else if (op == "**") {
    return integer_power(a, b);
  } else {
    if (b == 0) fail(op == "/" ? "division by zero" : "integer division or modulo by zero");
    if (op == "/") return Value::real(static_cast<double>(a) / static_cast<double>(b));
    if (b == -1) {  // the smallest integer has no positive counterpart
      if (op == "%") return Value::integer(0);
      if (__builtin_sub_overflow(static_cast<int64_t>(0), a, &result)) fail_overflow();
      return Value::integer(result);
    }
    int64_t quotient = a / b, rest = a % b;
    if (rest != 0 && (rest < 0) != (b < 0)) {
      --quotient;
      rest += b;
    }
    result = op == "%" ? rest : quotient;
  }
  return Value::integer(result);
}

Value float_binary(const std::string& op, double a, double b) {
  if (op == "+") return Value::real(a + b);
  if (op == "-") return Value::real(a - b);
  if (op == "*") return Value::real(a * b);
  if (op == "**") {
    if (a == 0 && b < 0) fail("0.0 cannot be raised to a negative power");
    if (a < 0 && b != std::floor(b)) fail("complex numbers are not supported");
    double power = std::pow(a, b);
    if (std::isinf(power) && std::isfinite(a) && std::isfinite(b)) fail("(34, 'Numerical result out of range')");
    return Value::real(power);
  }
  if (b == 0)
    fail(op == "/" ? "float division by zero" : op == "%" ? "float modulo by zero" : "float floor division by zero");
  if (op == "/") return Value::real(a / b);
  double rest = std::fmod(a, b);
  if (rest != 0 && (rest < 0) != (b < 0)) rest += b;
  if (op == "%") return Value::real(rest == 0 ? std::copysign(0.0, b) : rest);
  double quotient = (a - rest) / b;
  return Value::real(quotient == 0 ? std::copysign(0.0, a / b) : std::floor(quotient + 0.5));
}

std::string object_name(const Value& value) {  // jinja2's object_type_repr
  if (value.is_none()) return "None";
  if (value.is(Kind::kNamespace)) return "transformers.utils.chat_template_utils.TemplateNamespace object";
  if (value.is_string() && value.safe()) return "markupsafe.Markup object";
  return value.type_name() + " object";
}

Value no_attribute(const Value& object, const std::string& name) {
  return Value::undefined(string_repr(object_name(object)) + " has no attribute " + string_repr(name));
}

bool mutates(const Value& object, const std::string& name) {
  static const char* const kList[] = {"append", "clear", "pop", "reverse", "insert", "sort", "extend", "remove"};
  static const char* const kDict[] = {"clear", "pop", "popitem", "setdefault", "update"};
  if (object.is(Kind::kList)) return std::find(std::begin(kList), std::end(kList), name) != std::end(kList);
  return object.is(Kind::kDict) && std::find(std::begin(kDict), std::end(kDict), name) != std::end(kDict);
}

// An attribute in Python's sense, null where there is none.
Value python_attribute(Runtime& runtime, const Value& object, const std::string& name, bool& found) {
  found = true;
  if (mutates(object, name) || (name.starts_with("__") && name.ends_with("__") && !object.is(Kind::kNamespace)))
    return Value::undefined("access to attribute " + string_repr(name) + " of " + string_repr(object.type_name()) +
                            " object is unsafe.");
  if (object.is(Kind::kNamespace)) {
    if (const Value* value = object.as_namespace().find(name)) return *value;
  } else if (object.is(Kind::kLoop)) {
    Value value = object.as_loop().attribute(name, object);
    if (!value.is_undefined() || name == "previtem" || name == "nextitem") return value;
  } else if (Value method = runtime.method(object, name); !method.is_none()) {
    return method;
  } else if (object.is(Kind::kFunction) && name == "name") {
    return Value::string(object.as_function().name);
  }
  found = false;
  return Value();
}

// The item in Python's sense; `found` false on TypeError and LookupError.
Value python_item(Runtime& runtime, const Value& object, const Value& key, bool& found) {
  found = true;
  if (object.is(Kind::kDict) || object.is(Kind::kNamespace)) {
    bool hashable = !key.is(Kind::kList) && !key.is(Kind::kDict);
    const Value* value = !hashable                ? nullptr
                         : object.is(Kind::kDict) ? object.as_dict().find(key)
                                                  : object.as_namespace().find(key);
    if (value) return *value;
  } else if (key.is_integral()) {
    int64_t i = key.as_int();
    if (object.is_string()) {
      if (is_ascii(object.text())) {
        auto size = static_cast<int64_t>(object.text().size());
        if (i < 0) i += size;
        if (i >= 0 && i < size) return Value::string(std::string(1, object.text()[static_cast<size_t>(i)]));
      } else {
        runtime.step(object.text().size() / 16);
        std::u32string codes = decode(object.text());
        if (i < 0) i += static_cast<int64_t>(codes.size());
        if (i >= 0 && i < static_cast<int64_t>(codes.size()))
          return Value::string(encode(std::u32string_view(codes).substr(static_cast<size_t>(i), 1)));
      }
    } else if (object.is(Kind::kList) || object.is(Kind::kTuple)) {
      auto size = static_cast<int64_t>(object.items().size());
      if (i < 0) i += size;
      if (i >= 0 && i < size) return object.items()[static_cast<size_t>(i)];
    } else if (object.is(Kind::kRange)) {
      int64_t size = object.as_range().size();
      if (i < 0) i += size;
      if (i >= 0 && i < size) return Value::integer(object.as_range().start + i * object.as_range().step);
    }
  }
  found = false;
  return Value();
}

}  // namespace

Value Runtime::attribute(const Value& object, const std::string& name) {
  step();
  if (object.is_undefined()) fail(object.text());
  bool found;
  Value value = python_attribute(*this, object, name, found);
  if (found) return value;
  value = python_item(*this, object, Value::string(name), found);
  return found ? value : no_attribute(object, name);
}

Value Runtime::item(const Value& object, const Value& key) {
  step();
  if (object.is_undefined()) fail(object.text());
  bool found;
  Value value = python_item(*this, object, key, found);
  if (found) return value;
  if (!key.is_string()) return Value::undefined(object_name(object) + " has no element " + repr(key));
  value = python_attribute(*this, object, key.text(), found);
  return found ? value : no_attribute(object, key.text());
}

Value Runtime::slice(const Value& object, const Value& start, const Value& stop, const Value& step_value) {
  if (object.is_undefined()) fail(object.text());
  bool sliceable = object.is_string() || object.is(Kind::kList) || object.is(Kind::kTuple) || object.is(Kind::kRange);
  if (!sliceable) fail("'" + object.type_name() + "' object cannot be sliced");
  for (const Value* part : {&start, &stop, &step_value})
    if (!part->is_none() && !part->is_integral())
      fail("slice indices must be integers or None or have an __index__ method");
  int64_t by = step_value.is_none() ? 1 : step_value.as_int();
  if (by == 0) fail("slice step cannot be zero");
  by = std::clamp<int64_t>(by, -INT32_MAX, INT32_MAX);
  std::u32string codes;
  bool ascii = object.is_string() && is_ascii(object.text());
  if (object.is_string() && !ascii) codes = decode(object.text());
  int64_t size =
      object.is_string() ? static_cast<int64_t>(ascii ? object.text().size() : codes.size()) : length(object);
  auto bound = [&](const Value& value, int64_t absent) {
    if (value.is_none()) return absent;
    int64_t i = value.as_int();
    if (i < 0) i = i < -size ? -1 : i + size;
    return std::clamp<int64_t>(i, by < 0 ? -1 : 0, by < 0 ? size - 1 : size);
  };
  int64_t first = bound(start, by < 0 ? size - 1 : 0), last = bound(stop, by < 0 ? -1 : size);
  step(static_cast<uint64_t>(size) / 16 + 1);
  if (object.is(Kind::kRange)) {
    const RangeObject& range = object.as_range();
    int64_t new_step = 0;
    if (__builtin_mul_overflow(range.step, by, &new_step)) fail_overflow();
    return Value::range(range.start + first * range.step, range.start + last * range.step, new_step);
  }
  std::string text;
  std::vector<Value> items;
  for (int64_t i = first; by > 0 ? i < last : i > last; i += by) {
    auto at = static_cast<size_t>(i);
    if (ascii)
      text += object.text()[at];
    else if (object.is_string())
      append_utf8(text, codes[at]);
    else
      items.push_back(object.items()[at]);
  }
  if (object.is_string()) return this->text(std::move(text), object.safe());
  step(items.size());
  return object.is(Kind::kList) ? Value::list(std::move(items)) : Value::tuple(std::move(items));
}

Value Runtime::repeat(const Value& sequence, int64_t count) {
  count = std::max<int64_t>(count, 0);
  if (sequence.is_string()) {
    const std::string& unit = sequence.text();
    if (unit.empty()) return sequence;
    check_string(static_cast<uint64_t>(count) > limits_.max_string_bytes ? UINT64_MAX / 2
                                                                         : unit.size() * static_cast<uint64_t>(count));
    std::string result;
    result.reserve(unit.size() * static_cast<size_t>(count));
    for (int64_t i = 0; i < count; ++i) result += unit;
    return text(std::move(result), sequence.safe());
  }
  std::vector<Value> items;
  const std::vector<Value>& unit = sequence.items();
  if (!unit.empty())
    step(static_cast<uint64_t>(count) > limits_.max_steps ? limits_.max_steps
                                                          : static_cast<uint64_t>(count) * unit.size());
  for (int64_t i = 0; i < count && !unit.empty(); ++i) items.insert(items.end(), unit.begin(), unit.end());
  return sequence.is(Kind::kList) ? Value::list(std::move(items)) : Value::tuple(std::move(items));
}

Value Runtime::binary(const std::string& op, const Value& a, const Value& b) {
  step();
  if (op == "%" && a.is_string()) return percent_format(a.text(), b);
  for (const Value* value : {&a, &b})
    if (value->is_undefined()) fail(value->text());
  if (a.is_integral() && b.is_integral()) return integer_binary(op, a.as_int(), b.as_int());
  if (a.is_number() && b.is_number()) return float_binary(op, a.as_double(), b.as_double());
  if (op == "+") {
    if (a.is_string() && b.is_string()) {
      check_string(a.text().size() + b.text().size());
      if (a.safe() == b.safe()) return text(a.text() + b.text(), a.safe());
      Value left = a.safe() ? a : filter("e", a, {}), right = b.safe() ? b : filter("e", b, {});
      return text(left.text() + right.text(), true);
    }
    if (a.kind() == b.kind() && (a.is(Kind::kList) || a.is(Kind::kTuple))) {
      step(a.items().size() + b.items().size());
      std::vector<Value> items = a.items();
      items.insert(items.end(), b.items().begin(), b.items().end());
      return a.is(Kind::kList) ? Value::list(std::move(items)) : Value::tuple(std::move(items));
    }
    if (a.is_string()) fail("can only concatenate str (not \"" + b.type_name() + "\") to str");
    if (a.is(Kind::kList)) fail("can only concatenate list (not \"" + b.type_name() + "\") to list");
    if (a.is(Kind::kTuple)) fail("can only concatenate tuple (not \"" + b.type_name() + "\") to tuple");
  }
  if (op == "*") {
    auto repeats = [](const Value& value) {
      return value.is_string() || value.is(Kind::kList) || value.is(Kind::kTuple);
    };
    if (repeats(a) && b.is_integral()) return repeat(a, b.as_int());
    if (repeats(b) && a.is_integral()) return repeat(b, a.as_int());
    if (repeats(a)) fail("can't multiply sequence by non-int of type '" + b.type_name() + "'");
  }
  fail("unsupported operand type(s) for " + (op == "**" ? "** or pow()" : op) + ": '" + a.type_name() + "' and '" +
       b.type_name() + "'");
}

Value Runtime::negative(const Value& value, bool minus) {
  if (value.is_undefined()) fail(value.text());
  if (value.is(Kind::kFloat)) return Value::real(minus ? -value.as_double() : value.as_double());
  if (!value.is_integral())
    fail(std::string("bad operand type for unary ") + (minus ? "-" : "+") + ": '" + value.type_name() + "'");
  if (!minus) return Value::integer(value.as_int());
  return integer_binary("-", 0, value.as_int());
}

}  // namespace trireme::jinja
