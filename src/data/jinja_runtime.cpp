#include "data/jinja_runtime.h"

#include <algorithm>
#include <cmath>

#include "data/jinja_loop.h"
#include "data/jinja_text.h"

namespace trireme::jinja {

Runtime::~Runtime() {
  for (auto& space : namespaces) space->entries.clear();
}

void Runtime::step(uint64_t count) {
  steps_ += count;
  if (steps_ > limits_.max_steps)
    fail("the template ran for more than " + std::to_string(limits_.max_steps) + " steps and was stopped");
}

void Runtime::step_over(const Value& value) { step(1 + (value.is_string() ? value.text().size() / 64 : 0)); }

void Runtime::check_string(uint64_t num_bytes) {
  if (num_bytes > limits_.max_string_bytes)
    fail("the template makes a text of more than " + std::to_string(limits_.max_string_bytes) + " bytes");
  if (bytes_ + num_bytes > limits_.max_total_bytes)
    fail("the template makes more than " + std::to_string(limits_.max_total_bytes) + " bytes of text in all");
}

Value Runtime::text(std::string text, bool safe) {
  check_string(text.size());
  bytes_ += text.size();
  step(1 + text.size() / 64);
  return Value::string(std::move(text), safe);
}

Runtime::Depth::Depth(Runtime& runtime) : runtime(runtime) {
  if (runtime.depth_ >= runtime.limits_.max_depth)
    fail("the template nests or recurses deeper than " + std::to_string(runtime.limits_.max_depth) + " levels");
  ++runtime.depth_;
}

bool Runtime::truth(const Value& value) {
  switch (value.kind()) {
    case Kind::kUndefined:
    case Kind::kNone:
      return false;
    case Kind::kBool:
    case Kind::kInt:
      return value.as_int() != 0;
    case Kind::kFloat:
      return value.as_double() != 0;
    case Kind::kString:
      return !value.text().empty();
    case Kind::kList:
    case Kind::kTuple:
    case Kind::kView:
      return !value.items().empty();
    case Kind::kDict:
      return !value.as_dict().entries.empty();
    case Kind::kRange:
      return value.as_range().size() > 0;
    case Kind::kLoop:
      return value.as_loop().length() > 0;
    default:
      return true;
  }
}

namespace {

// Exact also where an integer has no double: Python compares the numbers themselves.
int compare_numbers(const Value& a, const Value& b) {  // 2: not comparable (nan)
  if (a.is_integral() && b.is_integral()) return a.as_int() < b.as_int() ? -1 : a.as_int() > b.as_int();
  long double x = a.is_integral() ? static_cast<long double>(a.as_int()) : a.as_double();
  long double y = b.is_integral() ? static_cast<long double>(b.as_int()) : b.as_double();
  return std::isnan(x) || std::isnan(y) ? 2 : x < y ? -1 : x > y;
}

}  // namespace

bool Runtime::equal(const Value& a, const Value& b) {
  step_over(a);
  if (a.is_number() && b.is_number()) return compare_numbers(a, b) == 0;
  if (a.kind() != b.kind()) return false;
  switch (a.kind()) {
    case Kind::kUndefined:
    case Kind::kNone:
      return true;
    case Kind::kString:
      return a.text() == b.text();
    case Kind::kList:
    case Kind::kTuple: {
      if (a.object() == b.object()) return true;
      if (a.items().size() != b.items().size()) return false;
      for (size_t i = 0; i < a.items().size(); ++i)
        if (!equal(a.items()[i], b.items()[i])) return false;
      return true;
    }
    case Kind::kDict: {
      if (a.object() == b.object()) return true;
      if (a.as_dict().entries.size() != b.as_dict().entries.size()) return false;
      for (const auto& [key, value] : a.as_dict().entries) {
        const Value* other = b.as_dict().find(key);
        if (!other || !equal(value, *other)) return false;
      }
      return true;
    }
    case Kind::kRange: {
      const RangeObject &x = a.as_range(), &y = b.as_range();
      int64_t size = x.size();
      return size == y.size() && (size == 0 || (x.start == y.start && (size == 1 || x.step == y.step)));
    }
    default:
      return a.object() == b.object();
  }
}

bool Runtime::less(const Value& a, const Value& b, const char* op) {
  step_over(a);
  for (const Value* value : {&a, &b})
    if (value->is_undefined()) fail(value->text());
  if (a.is_number() && b.is_number()) return compare_numbers(a, b) == -1;
  if (a.is_string() && b.is_string()) return a.text() < b.text();  // the order of UTF-8 is that of code points
  if (a.kind() == b.kind() && (a.is(Kind::kList) || a.is(Kind::kTuple))) {
    size_t num = std::min(a.items().size(), b.items().size());
    for (size_t i = 0; i < num; ++i)
      if (!equal(a.items()[i], b.items()[i])) return less(a.items()[i], b.items()[i], op);
    return a.items().size() < b.items().size();
  }
  fail(std::string("'") + op + "' not supported between instances of '" + a.type_name() + "' and '" + b.type_name() +
       "'");
}

bool Runtime::contains(const Value& container, const Value& item) {
  switch (container.kind()) {
    case Kind::kString:
      if (item.is_undefined()) fail("'in <string>' requires string as left operand, not Undefined");
      if (!item.is_string()) fail("'in <string>' requires string as left operand, not " + item.type_name());
      step(1 + container.text().size() / 64);
      return container.text().find(item.text()) != std::string::npos;
    case Kind::kDict:
      return container.as_dict().find(item) != nullptr;
    case Kind::kRange:
    case Kind::kUndefined:
    case Kind::kList:
    case Kind::kTuple:
    case Kind::kView:
    case Kind::kIterator:
      if (container.is(Kind::kList) || container.is(Kind::kTuple) || container.is(Kind::kView)) {
        for (const Value& other : container.items())
          if (equal(other, item)) return true;
        return false;
      }
      for (const Value& other : iterate(container))
        if (equal(other, item)) return true;
      return false;
    default:
      fail("argument of type '" + container.type_name() + "' is not iterable");
  }
}

std::vector<Value> Runtime::iterate(const Value& value) {
  std::vector<Value> items;
  switch (value.kind()) {
    case Kind::kUndefined:
      break;
    case Kind::kString: {
      step(value.text().size());
      for (char32_t code : decode(value.text())) items.push_back(Value::string(encode(std::u32string_view(&code, 1))));
      break;
    }
    case Kind::kList:
    case Kind::kTuple:
    case Kind::kView:
      items = value.items();
      break;
    case Kind::kDict:
      for (const auto& [key, unused] : value.as_dict().entries) items.push_back(key);
      break;
    case Kind::kRange: {
      const RangeObject& range = value.as_range();
      int64_t size = range.size();
      step(static_cast<uint64_t>(size));
      for (int64_t i = 0; i < size; ++i) items.push_back(Value::integer(range.start + i * range.step));
      break;
    }
    case Kind::kIterator: {
      IteratorObject& iterator = value.as_iterator();
      items.assign(iterator.items.begin() + static_cast<std::ptrdiff_t>(iterator.at), iterator.items.end());
      iterator.at = iterator.items.size();
      break;
    }
    case Kind::kLoop: {
      LoopObject& loop = value.as_loop();
      while (loop.next()) {
        items.push_back(Value::tuple({*loop.current, value}));
        step();
      }
      break;
    }
    default:
      fail("'" + value.type_name() + "' object is not iterable");
  }
  step(items.size());
  return items;
}

int64_t Runtime::length(const Value& value) {
  step_over(value);
  switch (value.kind()) {
    case Kind::kUndefined:
      return 0;
    case Kind::kString:
      return static_cast<int64_t>(count_codes(value.text()));
    case Kind::kList:
    case Kind::kTuple:
    case Kind::kView:
      return static_cast<int64_t>(value.items().size());
    case Kind::kDict:
      return static_cast<int64_t>(value.as_dict().entries.size());
    case Kind::kRange:
      return value.as_range().size();
    case Kind::kLoop:
      return value.as_loop().length();
    default:
      fail("object of type '" + value.type_name() + "' has no len()");
  }
}

std::string Runtime::str(const Value& value) {
  if (value.is_string()) return value.text();
  if (value.is_undefined()) return "";
  return repr(value);
}

std::string Runtime::repr(const Value& value) {
  std::string out;
  append_repr(out, value, 0);
  return out;
}

void Runtime::append_repr(std::string& out, const Value& value, int depth) {
  step(1 + (value.is_string() ? value.text().size() / 16 : 0));
  check_string(out.size());
  if (depth > 2 * kMaxNesting) fail("a value is nested too deeply to be printed");  // only through namespaces
  auto join = [&](const std::vector<Value>& items, const char* open, const char* close) {
    out += open;
    for (size_t i = 0; i < items.size(); ++i) {
      if (i > 0) out += ", ";
      append_repr(out, items[i], depth + 1);
    }
    out += close;
  };
  switch (value.kind()) {
    case Kind::kUndefined:
      out += "Undefined";
      break;
    case Kind::kNone:
      out += "None";
      break;
    case Kind::kBool:
      out += value.as_bool() ? "True" : "False";
      break;
    case Kind::kInt:
      out += std::to_string(value.as_int());
      break;
    case Kind::kFloat:
      out += float_repr(value.as_double());
      break;
    case Kind::kString:
      out += value.safe() ? "Markup(" + string_repr(value.text()) + ")" : string_repr(value.text());
      break;
    case Kind::kList:
      join(value.items(), "[", "]");
      break;
    case Kind::kTuple:
      join(value.items(), "(", value.items().size() == 1 ? ",)" : ")");
      break;
    case Kind::kView:
      join(value.items(), (value.type_name() + "([").c_str(), "])");
      break;
    case Kind::kNamespace:
    case Kind::kDict: {
      bool space = value.is(Kind::kNamespace);
      const auto& entries = space ? value.as_namespace().entries : value.as_dict().entries;
      out += space ? "<Namespace {" : "{";
      for (size_t i = 0; i < entries.size(); ++i) {
        if (i > 0) out += ", ";
        append_repr(out, entries[i].first, depth + 1);
        out += ": ";
        append_repr(out, entries[i].second, depth + 1);
      }
      out += space ? "}>" : "}";
      break;
    }
    case Kind::kRange: {
      const RangeObject& range = value.as_range();
      out += "range(" + std::to_string(range.start) + ", " + std::to_string(range.stop);
      if (range.step != 1) out += ", " + std::to_string(range.step);
      out += ")";
      break;
    }
    case Kind::kLoop: {
      LoopObject& loop = value.as_loop();
      out += "<LoopContext " + std::to_string(loop.index0 + 1) + "/" + std::to_string(loop.length()) + ">";
      break;
    }
    case Kind::kFunction:
    case Kind::kIterator:
      out += "<" + value.type_name() + " object>";
      break;  // Python prints an address here
  }
}

Value Runtime::call(const Value& function, const Args& args) {
  if (function.is_undefined()) fail(function.text());
  if (function.is(Kind::kLoop)) {
    if (!function.as_loop().recurse) fail("The loop must have the 'recursive' marker to be called recursively.");
    const Value* items = args.bind("loop", {"iterable"}, 1)[0];
    return function.as_loop().recurse(*items);
  }
  if (!function.is(Kind::kFunction)) fail("'" + function.type_name() + "' object is not callable");
  Depth depth(*this);
  step();
  Value result = function.as_function().call(*this, args);
  if (result.is_string()) return text(result.text(), result.safe());
  return result;
}

Value Runtime::from_json(const Json& value, int depth) {
  if (depth > kMaxNesting) fail("the messages are nested deeper than " + std::to_string(kMaxNesting) + " levels");
  switch (value.type()) {
    case Json::value_t::boolean:
      return Value::boolean(value.get<bool>());
    case Json::value_t::number_integer:
      return Value::integer(value.get<int64_t>());
    case Json::value_t::number_unsigned: {
      uint64_t number = value.get<uint64_t>();
      if (number > static_cast<uint64_t>(INT64_MAX))
        fail("the messages hold the integer " + std::to_string(number) + "; integers beyond 64 bits are not supported");
      return Value::integer(static_cast<int64_t>(number));
    }
    case Json::value_t::number_float:
      return Value::real(value.get<double>());
    case Json::value_t::string:
      return Value::string(value.get_ref<const std::string&>());
    case Json::value_t::array: {
      std::vector<Value> items;
      for (const Json& item : value) items.push_back(from_json(item, depth + 1));
      return Value::list(std::move(items));
    }
    case Json::value_t::object: {
      auto dict = std::make_shared<DictObject>();
      for (const auto& [key, item] : value.items()) dict->set(Value::string(key), from_json(item, depth + 1));
      return Value::dict(std::move(dict));
    }
    default:
      return Value();
  }
}

}  // namespace trireme::jinja
