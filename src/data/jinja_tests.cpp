// What may follow `is`.
#include <unordered_map>

#include "data/jinja_runtime.h"
#include "data/jinja_text.h"

namespace trireme::jinja {
namespace {

using Test = bool (*)(Runtime&, const Value&, const Args&);

const Value& other(const Args& args) { return *args.bind("test", {"other"}, 1)[0]; }

template <Kind kind>
bool is_kind(Runtime&, const Value& value, const Args& args) {
  args.bind("test", {});
  return value.is(kind);
}

template <int rest>
bool is_parity(Runtime& runtime, const Value& value, const Args&) {
  return runtime.equal(runtime.binary("%", value, Value::integer(2)), Value::integer(rest));
}

bool is_sized(const Value& value) {  // has len() and []
  switch (value.kind()) {
    case Kind::kString:
    case Kind::kList:
    case Kind::kTuple:
    case Kind::kDict:
    case Kind::kRange:
    case Kind::kUndefined:
      return true;
    default:
      return false;
  }
}

const std::unordered_map<std::string, Test> kTests = {
    {"defined", [](Runtime&, const Value& v, const Args&) { return !v.is_undefined(); }},
    {"undefined", is_kind<Kind::kUndefined>},
    {"none", is_kind<Kind::kNone>},
    {"boolean", is_kind<Kind::kBool>},
    {"integer", is_kind<Kind::kInt>},
    {"float", is_kind<Kind::kFloat>},
    {"string", is_kind<Kind::kString>},
    {"mapping", is_kind<Kind::kDict>},
    {"true", [](Runtime&, const Value& v, const Args&) { return v.is(Kind::kBool) && v.as_bool(); }},
    {"false", [](Runtime&, const Value& v, const Args&) { return v.is(Kind::kBool) && !v.as_bool(); }},
    {"number", [](Runtime&, const Value& v, const Args&) { return v.is_number(); }},
    {"sequence", [](Runtime&, const Value& v, const Args&) { return is_sized(v); }},
    {"iterable",
     [](Runtime&, const Value& v, const Args&) {
       return is_sized(v) || v.is(Kind::kView) || v.is(Kind::kIterator) || v.is(Kind::kLoop);
     }},
    {"callable", [](Runtime&, const Value& v,
                    const Args&) { return v.is(Kind::kFunction) || v.is(Kind::kLoop) || v.is_undefined(); }},
    {"escaped", [](Runtime&, const Value& v, const Args&) { return v.safe(); }},
    {"odd", is_parity<1>},
    {"even", is_parity<0>},
    {"divisibleby",
     [](Runtime& r, const Value& v, const Args& args) {
       return r.equal(r.binary("%", v, *args.bind("divisibleby", {"num"}, 1)[0]), Value::integer(0));
     }},
    {"lower", [](Runtime& r, const Value& v,
                 const Args&) { return Runtime::truth(r.call(r.method(Value::string(r.str(v)), "islower"), {})); }},
    {"upper", [](Runtime& r, const Value& v,
                 const Args&) { return Runtime::truth(r.call(r.method(Value::string(r.str(v)), "isupper"), {})); }},
    {"filter", [](Runtime&, const Value& v, const Args&) { return v.is_string() && Runtime::has_filter(v.text()); }},
    {"test", [](Runtime&, const Value& v, const Args&) { return v.is_string() && Runtime::has_test(v.text()); }},
    {"in", [](Runtime& r, const Value& v, const Args& args) { return r.contains(*args.bind("in", {"seq"}, 1)[0], v); }},
    {"sameas",
     [](Runtime&, const Value& v, const Args& args) {
       const Value& o = other(args);
       if (v.kind() != o.kind()) return false;
       if (v.is_none()) return true;
       if (v.is_integral()) return v.as_int() == o.as_int();
       return v.object() && (v.object() == o.object() || (v.is_string() && v.text() == o.text()));
     }},
    {"eq", [](Runtime& r, const Value& v, const Args& args) { return r.equal(v, other(args)); }},
    {"ne", [](Runtime& r, const Value& v, const Args& args) { return !r.equal(v, other(args)); }},
    {"lt", [](Runtime& r, const Value& v, const Args& args) { return r.less(v, other(args)); }},
    {"gt", [](Runtime& r, const Value& v, const Args& args) { return r.less(other(args), v, ">"); }},
    {"le", [](Runtime& r, const Value& v,
              const Args& args) { return r.less(v, other(args), "<=") || r.equal(v, other(args)); }},
    {"ge", [](Runtime& r, const Value& v,
              const Args& args) { return r.less(other(args), v, ">=") || r.equal(v, other(args)); }},
};

const std::string& canonical(const std::string& name) {
  static const std::unordered_map<std::string, std::string> kSame = {
      {"==", "eq"}, {"equalto", "eq"},     {"!=", "ne"}, {"<", "lt"}, {"lessthan", "lt"},
      {">", "gt"},  {"greaterthan", "gt"}, {"<=", "le"}, {">=", "ge"}};
  auto found = kSame.find(name);
  return found == kSame.end() ? name : found->second;
}

}  // namespace

bool Runtime::has_test(const std::string& name) { return kTests.count(canonical(name)) > 0; }

bool Runtime::test(const std::string& name, const Value& value, const Args& args) {
  step_over(value);
  auto found = kTests.find(canonical(name));
  if (found == kTests.end()) fail("No test named " + string_repr(name) + ".");
  return found->second(*this, value, args);
}

}  // namespace trireme::jinja
