// Filters on texts and numbers; those on sequences: jinja_sequence_filters.cpp.
#include "data/jinja_filters.h"

#include <cmath>

#include "data/jinja_text.h"

namespace trireme::jinja {
namespace {

using Bound = std::vector<const Value*>;

int64_t int_or(const Value* value, int64_t absent) {
  if (!value || value->is_none()) return absent;
  if (!value->is_integral()) fail("'" + value->type_name() + "' object cannot be interpreted as an integer");
  return value->as_int();
}

Value call_method(Runtime& runtime, const Value& value, const char* name, const Args& args) {
  return runtime.call(runtime.method(Value::string(runtime.str(value)), name), args);
}

template <std::string (*change)(std::string_view)>
Value change_case(Runtime& runtime, const Value& value, const Args& args) {
  args.bind("filter", {});
  return Value::string(change(runtime.str(value)));
}

// jinja2's own: a word begins after white space or one of -({[<.
std::string title(std::string_view text) {
  std::string out, word;
  auto flush = [&] {
    if (word.empty()) return;
    std::u32string codes = decode(word);
    out += to_upper(encode(std::u32string_view(codes).substr(0, 1))) +
           to_lower(encode(std::u32string_view(codes).substr(1)));
    word.clear();
  };
  for (char32_t code : decode(text)) {
    bool border = is_space(code) || code == '-' || code == '(' || code == '{' || code == '[' || code == '<';
    if (border) {
      flush();
      append_utf8(out, code);
    } else {
      append_utf8(word, code);
    }
  }
  flush();
  return out;
}

Value filter_int(Runtime& runtime, const Value& value, const Args& args) {
  Bound bound = args.bind("int", {"default", "base"});
  Value absent = bound[0] ? *bound[0] : Value::integer(0);
  if (value.is_undefined()) fail(value.text());
  if (value.is_integral()) return Value::integer(value.as_int());
  double number = 0;
  if (value.is_string()) {
    int64_t integer = 0;
    if (parse_int(value.text(), static_cast<int>(std::clamp<int64_t>(int_or(bound[1], 10), 0, 36)), integer))
      return Value::integer(integer);
    if (!parse_float(value.text(), number)) return absent;
  } else if (value.is(Kind::kFloat)) {
    number = value.as_double();
  } else {
    return absent;
  }
  runtime.step();
  if (!std::isfinite(number)) return absent;
  if (std::abs(number) >= 9.2e18) fail("integers beyond 64 bits are not supported");
  return Value::integer(static_cast<int64_t>(number));
}

Value filter_float(Runtime&, const Value& value, const Args& args) {
  Bound bound = args.bind("float", {"default"});
  double number = 0;
  if (value.is_undefined()) fail(value.text());
  if (value.is_number()) return Value::real(value.as_double());
  if (value.is_string() && parse_float(value.text(), number)) return Value::real(number);
  return bound[0] ? *bound[0] : Value::real(0);
}

Value filter_round(Runtime&, const Value& value, const Args& args) {
  Bound bound = args.bind("round", {"precision", "method"});
  int64_t precision = std::clamp<int64_t>(int_or(bound[0], 0), -330, 330);
  std::string method = bound[1] ? bound[1]->is_string() ? bound[1]->text() : "" : "common";
  if (value.is_undefined()) fail(value.text());
  if (!value.is_number()) fail("type " + value.type_name() + " doesn't define __round__ method");
  double number = value.as_double();
  if (method == "common") {
    if (value.is_integral() && precision >= 0) return Value::integer(value.as_int());
    if (value.is_integral()) {  // to tens, hundreds, ...; halves to even
      double unit = std::pow(10.0, static_cast<double>(-precision));
      return Value::integer(static_cast<int64_t>(std::nearbyint(number / unit) * unit));
    }
    if (!std::isfinite(number) || precision > 300) return value;
    if (precision < 0) {
      double unit = std::pow(10.0, static_cast<double>(-precision));
      return Value::real(std::nearbyint(number / unit) * unit);
    }
    char buffer[800];  // correctly rounded by the C library, as Python does
    std::snprintf(buffer, sizeof buffer, "%.*f", static_cast<int>(precision), number);
    double rounded = number;
    parse_float(buffer, rounded);
    return Value::real(rounded);
  }
  if (method != "ceil" && method != "floor") fail("method must be common, ceil or floor");
  double unit = std::pow(10.0, static_cast<double>(precision)), scaled = number * unit;
  if (!std::isfinite(scaled)) fail("cannot convert float infinity or NaN to integer");
  return Value::real((method == "ceil" ? std::ceil(scaled) : std::floor(scaled)) / unit);
}

Value filter_abs(Runtime& runtime, const Value& value, const Args& args) {
  args.bind("abs", {});
  if (value.is_undefined() || !value.is_number()) fail("bad operand type for abs(): '" + value.type_name() + "'");
  if (value.is(Kind::kFloat)) return Value::real(std::abs(value.as_double()));
  return value.as_int() < 0 ? runtime.negative(value, true) : Value::integer(value.as_int());
}

Value filter_indent(Runtime& runtime, const Value& value, const Args& args) {
  Bound bound = args.bind("indent", {"width", "first", "blank"});
  std::string indent;
  if (bound[0] && bound[0]->is_string())
    indent = bound[0]->text();
  else
    indent = std::string(static_cast<size_t>(std::clamp<int64_t>(int_or(bound[0], 4), 0, 1 << 20)), ' ');
  bool first = bound[1] && Runtime::truth(*bound[1]), blank = bound[2] && Runtime::truth(*bound[2]);
  if (value.is_undefined()) fail(value.text());
  if (!value.is_string()) fail("unsupported operand type(s) for +=: '" + value.type_name() + "' and 'str'");
  std::string source = value.text() + "\n", out;
  std::vector<std::string_view> lines = split_lines(source, false);
  for (size_t i = 0; i < lines.size(); ++i) {
    runtime.check_string(out.size() + indent.size() + lines[i].size());
    if (i > 0) out += '\n';
    if (i > 0 && (blank || !lines[i].empty())) out += indent;
    out += lines[i];
  }
  return Value::string(first ? indent + out : out);
}

Value filter_escape(Runtime& runtime, const Value& value, const Args& args) {
  args.bind("escape", {});
  if (value.safe()) return value;
  std::string out;
  for (char c : runtime.str(value)) {
    if (c == '&')
      out += "&amp;";
    else if (c == '<')
      out += "&lt;";
    else if (c == '>')
      out += "&gt;";
    else if (c == '"')
      out += "&#34;";
    else if (c == '\'')
      out += "&#39;";
    else
      out += c;
  }
  return Value::string(std::move(out), true);
}

Value filter_tojson(Runtime& runtime, const Value& value, const Args& args) {
  Bound bound = args.bind("tojson", {"ensure_ascii", "indent", "separators", "sort_keys"});
  bool pretty = bound[1] && !bound[1]->is_none();
  std::string indent;
  if (pretty && bound[1]->is_string())
    indent = bound[1]->text();
  else if (pretty)
    indent = std::string(static_cast<size_t>(std::clamp<int64_t>(int_or(bound[1], 0), 0, 1000)), ' ');
  std::string item_separator = pretty ? "," : ", ", key_separator = ": ";
  if (bound[2] && !bound[2]->is_none()) {
    std::vector<Value> both = runtime.iterate(*bound[2]);
    if (both.size() != 2 || !both[0].is_string() || !both[1].is_string()) fail("separators must be two strings");
    item_separator = both[0].text();
    key_separator = both[1].text();
  }
  return Value::string(runtime.to_json(value, indent, pretty, item_separator, key_separator,
                                       bound[0] && Runtime::truth(*bound[0]), bound[3] && Runtime::truth(*bound[3])));
}

Value filter_replace(Runtime& runtime, const Value& value, const Args& args) {
  Bound bound = args.bind("replace", {"old", "new", "count"}, 2);
  Args strings;
  for (int i = 0; i < 2; ++i) strings.positional.push_back(Value::string(runtime.str(*bound[static_cast<size_t>(i)])));
  if (bound[2] && !bound[2]->is_none()) strings.positional.push_back(*bound[2]);
  return call_method(runtime, value, "replace", strings);
}

Value filter_format(Runtime& runtime, const Value& value, const Args& args) {
  if (!args.positional.empty() && !args.named.empty())
    fail("can't handle positional and keyword arguments at the same time");
  if (args.named.empty()) return runtime.percent_format(runtime.str(value), Value::tuple(args.positional));
  auto dict = std::make_shared<DictObject>();
  for (const auto& [name, named] : args.named) dict->set(Value::string(name), named);
  return runtime.percent_format(runtime.str(value), Value::dict(std::move(dict)));
}

Value filter_truncate(Runtime& runtime, const Value& value, const Args& args) {
  Bound bound = args.bind("truncate", {"length", "killwords", "end", "leeway"});
  int64_t length = int_or(bound[0], 255), leeway = int_or(bound[3], 5);
  std::u32string codes = decode(runtime.str(value)), end = decode(bound[2] ? runtime.str(*bound[2]) : "...");
  if (length < static_cast<int64_t>(end.size()))
    fail("expected length >= " + std::to_string(end.size()) + ", got " + std::to_string(length));
  if (leeway < 0) fail("expected leeway >= 0, got " + std::to_string(leeway));
  if (static_cast<int64_t>(codes.size()) - leeway <= length) return value;
  std::u32string kept = codes.substr(0, static_cast<size_t>(length) - end.size());
  if (!(bound[1] && Runtime::truth(*bound[1])))
    if (size_t space = kept.rfind(U' '); space != std::u32string::npos) kept.resize(space);
  return Value::string(encode(kept + end));
}

Value filter_wordcount(Runtime& runtime, const Value& value, const Args& args) {
  args.bind("wordcount", {});
  int64_t count = 0;
  bool inside = false;
  for (char32_t code : decode(runtime.str(value))) {
    bool word = is_alpha(code) || is_digit(code) || code == '_';
    count += word && !inside;
    inside = word;
  }
  return Value::integer(count);
}

Value filter_urlencode(Runtime& runtime, const Value& value, const Args& args) {
  args.bind("urlencode", {});
  if (!value.is_string()) fail("urlencode is supported for strings only");
  std::string out;
  for (unsigned char c : runtime.str(value)) {
    if (std::isalnum(c) || std::string("_.-~/").find(static_cast<char>(c)) != std::string::npos)
      out += static_cast<char>(c);
    else
      (out += '%') += {"0123456789ABCDEF"[c >> 4], "0123456789ABCDEF"[c & 15]};
  }
  return Value::string(out);
}

}  // namespace

const FilterTable& text_filters() {
  static const FilterTable kFilters = {
      {"upper", change_case<to_upper>},
      {"lower", change_case<to_lower>},
      {"capitalize", change_case<to_capitalized>},
      {"title", change_case<title>},
      {"trim", [](Runtime& r, const Value& v, const Args& args) { return call_method(r, v, "strip", args); }},
      {"center",
       [](Runtime& r, const Value& v, const Args& args) {
         const Value* width = args.bind("center", {"width"})[0];
         return call_method(r, v, "center", {{width ? *width : Value::integer(80)}, {}});
       }},
      {"int", filter_int},
      {"float", filter_float},
      {"round", filter_round},
      {"abs", filter_abs},
      {"string",
       [](Runtime& r, const Value& v, const Args& args) {
         args.bind("string", {});
         return Value::string(r.str(v), v.safe());
       }},
      {"safe",
       [](Runtime& r, const Value& v, const Args& args) {
         args.bind("safe", {});
         return Value::string(r.str(v), true);
       }},
      {"escape", filter_escape},
      {"e", filter_escape},
      {"forceescape",
       [](Runtime& r, const Value& v, const Args& args) { return filter_escape(r, Value::string(r.str(v)), args); }},
      {"indent", filter_indent},
      {"tojson", filter_tojson},
      {"replace", filter_replace},
      {"format", filter_format},
      {"truncate", filter_truncate},
      {"wordcount", filter_wordcount},
      {"urlencode", filter_urlencode},
  };
  return kFilters;
}

}  // namespace trireme::jinja
