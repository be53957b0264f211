// Methods of str, list, tuple, dict and iterators.
#include <algorithm>
#include <unordered_map>

#include "data/jinja_runtime.h"
#include "data/jinja_text.h"

namespace trireme::jinja {
namespace {

using Method = Value (*)(Runtime&, const Value& self, const Args&);
using Bound = std::vector<const Value*>;

const std::string& text_argument(const Value& value) {
  if (!value.is_string()) fail("must be str, not " + value.type_name());
  return value.text();
}

int64_t int_argument(const Value& value) {
  if (!value.is_integral()) fail("'" + value.type_name() + "' object cannot be interpreted as an integer");
  return value.as_int();
}

Value text_list(Runtime& runtime, const std::vector<std::string_view>& parts) {
  std::vector<Value> items;
  for (std::string_view part : parts) items.push_back(runtime.text(part));
  return Value::list(std::move(items));
}

template <Side side>
Value strip_method(Runtime& runtime, const Value& self, const Args& args) {
  const Value* chars = args.bind("strip", {"chars"})[0];
  const std::string* set = chars && !chars->is_none() ? &text_argument(*chars) : nullptr;
  runtime.step(set ? set->size() / 64 * (1 + self.text().size() / 64) : 0);
  return runtime.text(strip(self.text(), side, set));
}

template <bool from_right>
Value split_method(Runtime& runtime, const Value& self, const Args& args) {
  Bound bound = args.bind("split", {"sep", "maxsplit"});
  int64_t max_splits = bound[1] ? int_argument(*bound[1]) : -1;
  std::string_view text = self.text();
  if (!bound[0] || bound[0]->is_none()) return text_list(runtime, split_space(text, max_splits, from_right));
  const std::string& separator = text_argument(*bound[0]);
  if (separator.empty()) fail("empty separator");
  std::vector<std::string_view> parts;
  while (max_splits < 0 || static_cast<int64_t>(parts.size()) < max_splits) {
    size_t at = from_right ? text.rfind(separator) : text.find(separator);
    if (at == std::string_view::npos) break;
    runtime.step();
    parts.push_back(from_right ? text.substr(at + separator.size()) : text.substr(0, at));
    text = from_right ? text.substr(0, at) : text.substr(at + separator.size());
  }
  parts.push_back(text);
  if (from_right) std::reverse(parts.begin(), parts.end());
  return text_list(runtime, parts);
}

// Cuts [start, end) out of `text`, in code points as Python counts them. False where the range is beyond the text.
bool cut(std::string_view& text, const Value* start, const Value* end, int64_t* offset = nullptr) {
  auto size = static_cast<int64_t>(count_codes(text));
  auto bound = [&](const Value* value, int64_t absent) {
    if (!value || value->is_none()) return absent;
    int64_t i = int_argument(*value);
    return i < 0 ? std::max<int64_t>(i < -size ? 0 : i + size, 0) : i;
  };
  int64_t from = bound(start, 0), to = std::min(bound(end, size), size);
  if (from > size || from > to) return false;
  std::u32string codes = decode(text);
  size_t begin_byte = encode(std::u32string_view(codes).substr(0, static_cast<size_t>(from))).size();
  size_t end_byte = encode(std::u32string_view(codes).substr(0, static_cast<size_t>(to))).size();
  text = text.substr(begin_byte, end_byte - begin_byte);
  if (offset) *offset = from;
  return true;
}

template <bool at_end>
Value affix_method(Runtime& runtime, const Value& self, const Args& args) {
  Bound bound = args.bind(at_end ? "endswith" : "startswith", {"prefix", "start", "end"}, 1);
  std::vector<Value> affixes = bound[0]->is(Kind::kTuple) ? bound[0]->items() : std::vector<Value>{*bound[0]};
  std::string_view text = self.text();
  if ((bound[1] || bound[2]) && !cut(text, bound[1], bound[2])) return Value::boolean(false);
  for (const Value& affix : affixes) {
    runtime.step();
    if (!affix.is_string())
      fail(std::string(at_end ? "endswith" : "startswith") + " first arg must be str or a tuple of str, not " +
           affix.type_name());
    if (at_end ? text.ends_with(affix.text()) : text.starts_with(affix.text())) return Value::boolean(true);
  }
  return Value::boolean(false);
}

template <bool from_right, bool must>
Value find_method(Runtime& runtime, const Value& self, const Args& args) {
  Bound bound = args.bind("find", {"sub", "start", "end"}, 1);
  const std::string& needle = text_argument(*bound[0]);
  std::string_view text = self.text();
  runtime.step(text.size() / 64);
  int64_t offset = 0;
  size_t at = std::string_view::npos;
  if ((!bound[1] && !bound[2]) || cut(text, bound[1], bound[2], &offset))
    at = from_right ? text.rfind(needle) : text.find(needle);
  if (at == std::string_view::npos && must) fail("substring not found");
  if (at == std::string_view::npos) return Value::integer(-1);
  return Value::integer(offset + static_cast<int64_t>(count_codes(text.substr(0, at))));
}

Value count_method(Runtime& runtime, const Value& self, const Args& args) {
  Bound bound = args.bind("count", {"sub", "start", "end"}, 1);
  const std::string& needle = text_argument(*bound[0]);
  std::string_view text = self.text();
  runtime.step(text.size() / 64);
  if ((bound[1] || bound[2]) && !cut(text, bound[1], bound[2])) return Value::integer(0);
  if (needle.empty()) return Value::integer(static_cast<int64_t>(count_codes(text)) + 1);
  int64_t count = 0;
  for (size_t at = text.find(needle); at != std::string_view::npos; at = text.find(needle, at + needle.size())) ++count;
  return Value::integer(count);
}

Value replace_method(Runtime& runtime, const Value& self, const Args& args) {
  Bound bound = args.bind("replace", {"old", "new", "count"}, 2);
  const std::string &text = self.text(), &from = text_argument(*bound[0]), &to = text_argument(*bound[1]);
  int64_t left = bound[2] ? int_argument(*bound[2]) : -1;
  std::string result;
  size_t at = 0;
  while (left != 0) {
    size_t found = from.empty() ? at : text.find(from, at);
    if (found == std::string::npos) break;
    runtime.step();
    runtime.check_string(result.size() + (found - at) + to.size());
    result.append(text, at, found - at);
    result += to;
    at = found + from.size();
    --left;
    if (from.empty()) {  // between any two code points and at both ends
      if (at >= text.size()) break;
      do result += text[at++];
      while (at < text.size() && (text[at] & 0xc0) == 0x80);
    }
  }
  if (at < text.size()) result.append(text, at);
  return runtime.text(std::move(result));
}

Value join_method(Runtime& runtime, const Value& self, const Args& args) {
  std::string result;
  bool first = true;
  for (const Value& item : runtime.iterate(*args.bind("join", {"iterable"}, 1)[0])) {
    if (!item.is_string()) fail("sequence item: expected str instance, " + item.type_name() + " found");
    if (!first) result += self.text();
    first = false;
    runtime.check_string(result.size() + item.text().size());
    result += item.text();
  }
  return runtime.text(std::move(result));
}

template <int where>  // -1: text to the left, 0: in the middle, 1: to the right
Value justify_method(Runtime& runtime, const Value& self, const Args& args) {
  Bound bound = args.bind("justify", {"width", "fillchar"}, 1);
  int64_t size = static_cast<int64_t>(count_codes(self.text()));
  int64_t width = int_argument(*bound[0]), room = width - size;
  std::string fill = bound[1] ? text_argument(*bound[1]) : " ";
  if (count_codes(fill) != 1) fail("The fill character must be exactly one character long");
  if (room <= 0) return self;
  runtime.check_string(static_cast<uint64_t>(room) > (1u << 30) ? UINT64_MAX / 2
                                                                : static_cast<uint64_t>(room) * fill.size());
  int64_t left = where < 0 ? 0 : where > 0 ? room : room / 2 + (room & width & 1);
  std::string result;
  for (int64_t i = 0; i < left; ++i) result += fill;
  result += self.text();
  for (int64_t i = left; i < room; ++i) result += fill;
  return runtime.text(std::move(result));
}

Value zfill_method(Runtime& runtime, const Value& self, const Args& args) {
  int64_t width = int_argument(*args.bind("zfill", {"width"}, 1)[0]);
  int64_t room = width - static_cast<int64_t>(count_codes(self.text()));
  if (room <= 0) return self;
  runtime.check_string(static_cast<uint64_t>(room));
  bool sign = !self.text().empty() && (self.text()[0] == '-' || self.text()[0] == '+');
  std::string result = self.text();
  result.insert(sign ? 1 : 0, static_cast<size_t>(room), '0');
  return runtime.text(std::move(result));
}

template <bool from_right>
Value partition_method(Runtime& runtime, const Value& self, const Args& args) {
  const std::string& separator = text_argument(*args.bind("partition", {"sep"}, 1)[0]);
  if (separator.empty()) fail("empty separator");
  const std::string& text = self.text();
  size_t at = from_right ? text.rfind(separator) : text.find(separator);
  Value empty = Value::string("");
  if (at == std::string::npos)
    return from_right ? Value::tuple({empty, empty, self}) : Value::tuple({self, empty, empty});
  return Value::tuple(
      {runtime.text(text.substr(0, at)), Value::string(separator), runtime.text(text.substr(at + separator.size()))});
}

template <std::string (*change)(std::string_view)>
Value case_method(Runtime& runtime, const Value& self, const Args& args) {
  args.bind("case", {});
  return runtime.text(change(self.text()), self.safe());
}

std::string swap_case(std::string_view text) {
  std::string out;
  for (char32_t code : decode(text)) {
    std::string one = encode(std::u32string_view(&code, 1));
    out += is_cased_upper(code) ? to_lower(one) : to_upper(one);
  }
  return out;
}

template <bool (*is)(char32_t)>
Value all_method(Runtime&, const Value& self, const Args& args) {
  args.bind("isalpha", {});
  std::u32string codes = decode(self.text());
  return Value::boolean(!codes.empty() && std::all_of(codes.begin(), codes.end(), is));
}

bool is_alnum(char32_t code) { return is_alpha(code) || is_digit(code); }

template <bool upper>
Value is_case_method(Runtime&, const Value& self, const Args& args) {
  args.bind("isupper", {});
  bool any = false;
  for (char32_t code : decode(self.text())) {
    if (upper ? is_cased_lower(code) : is_cased_upper(code)) return Value::boolean(false);
    any = any || (upper ? is_cased_upper(code) : is_cased_lower(code));
  }
  return Value::boolean(any);
}

template <bool at_end>
Value remove_method(Runtime& runtime, const Value& self, const Args& args) {
  std::string_view text = self.text(), affix = text_argument(*args.bind("removeprefix", {"prefix"}, 1)[0]);
  if (at_end && text.ends_with(affix)) text.remove_suffix(affix.size());
  if (!at_end && text.starts_with(affix)) text.remove_prefix(affix.size());
  return runtime.text(text);
}

Value splitlines_method(Runtime& runtime, const Value& self, const Args& args) {
  const Value* keep = args.bind("splitlines", {"keepends"})[0];
  return text_list(runtime, split_lines(self.text(), keep && Runtime::truth(*keep)));
}

Value format_method(Runtime& runtime, const Value& self, const Args& args) {
  return runtime.brace_format(self.text(), args);
}

const std::unordered_map<std::string, Method> kStringMethods = {{"strip", strip_method<Side::kBoth>},
                                                                {"lstrip", strip_method<Side::kLeft>},
                                                                {"rstrip", strip_method<Side::kRight>},
                                                                {"split", split_method<false>},
                                                                {"rsplit", split_method<true>},
                                                                {"splitlines", splitlines_method},
                                                                {"startswith", affix_method<false>},
                                                                {"endswith", affix_method<true>},
                                                                {"replace", replace_method},
                                                                {"find", find_method<false, false>},
                                                                {"rfind", find_method<true, false>},
                                                                {"index", find_method<false, true>},
                                                                {"rindex", find_method<true, true>},
                                                                {"count", count_method},
                                                                {"join", join_method},
                                                                {"format", format_method},
                                                                {"ljust", justify_method<-1>},
                                                                {"center", justify_method<0>},
                                                                {"rjust", justify_method<1>},
                                                                {"zfill", zfill_method},
                                                                {"partition", partition_method<false>},
                                                                {"rpartition", partition_method<true>},
                                                                {"upper", case_method<to_upper>},
                                                                {"lower", case_method<to_lower>},
                                                                {"title", case_method<to_title>},
                                                                {"capitalize", case_method<to_capitalized>},
                                                                {"casefold", case_method<to_lower>},
                                                                {"swapcase", case_method<swap_case>},
                                                                {"isalpha", all_method<is_alpha>},
                                                                {"isdigit", all_method<is_digit>},
                                                                {"isnumeric", all_method<is_digit>},
                                                                {"isdecimal", all_method<is_digit>},
                                                                {"isalnum", all_method<is_alnum>},
                                                                {"isspace", all_method<is_space>},
                                                                {"isupper", is_case_method<true>},
                                                                {"islower", is_case_method<false>},
                                                                {"removeprefix", remove_method<false>},
                                                                {"removesuffix", remove_method<true>}};

// --- list, tuple, dict
// ------------------------------------------------------------------------------------------------
Value sequence_index(Runtime& runtime, const Value& self, const Args& args) {
  const Value& wanted = *args.bind("index", {"value"}, 1)[0];
  for (size_t i = 0; i < self.items().size(); ++i)
    if (runtime.equal(self.items()[i], wanted)) return Value::integer(static_cast<int64_t>(i));
  fail(runtime.repr(wanted) + " is not in list");
}

Value sequence_count(Runtime& runtime, const Value& self, const Args& args) {
  const Value& wanted = *args.bind("count", {"value"}, 1)[0];
  int64_t count = 0;
  for (const Value& item : self.items()) count += runtime.equal(item, wanted);
  return Value::integer(count);
}

Value copy_method(Runtime&, const Value& self, const Args& args) {
  args.bind("copy", {});
  return self;  // immutable
}

Value dict_get(Runtime&, const Value& self, const Args& args) {
  Bound bound = args.bind("get", {"key", "default"}, 1);
  const Value* value = self.as_dict().find(*bound[0]);
  return value ? *value : bound[1] ? *bound[1] : Value();
}

template <int what>  // 0: keys, 1: values, 2: items
Value dict_view(Runtime& runtime, const Value& self, const Args& args) {
  args.bind("items", {});
  std::vector<Value> items;
  runtime.step(self.as_dict().entries.size());
  for (const auto& [key, value] : self.as_dict().entries)
    items.push_back(what == 0 ? key : what == 1 ? value : Value::tuple({key, value}));
  return Value::view(what == 0 ? "dict_keys" : what == 1 ? "dict_values" : "dict_items", std::move(items));
}

const std::unordered_map<std::string, Method> kListMethods = {
    {"index", sequence_index}, {"count", sequence_count}, {"copy", copy_method}};
const std::unordered_map<std::string, Method> kTupleMethods = {{"index", sequence_index}, {"count", sequence_count}};
const std::unordered_map<std::string, Method> kDictMethods = {{"get", dict_get},
                                                              {"keys", dict_view<0>},
                                                              {"values", dict_view<1>},
                                                              {"items", dict_view<2>},
                                                              {"copy", copy_method}};

}  // namespace

Value Runtime::method(const Value& object, const std::string& name) {
  const std::unordered_map<std::string, Method>* methods = object.is_string()        ? &kStringMethods
                                                           : object.is(Kind::kList)  ? &kListMethods
                                                           : object.is(Kind::kTuple) ? &kTupleMethods
                                                           : object.is(Kind::kDict)  ? &kDictMethods
                                                                                     : nullptr;
  if (!methods) return Value();
  auto found = methods->find(name);
  if (found == methods->end()) return Value();
  step_over(object);
  auto call = [method = found->second, object](Runtime& runtime, const Args& args) {
    return method(runtime, object, args);
  };
  return Value::function(name, call, object.nesting() + 1);
}

}  // namespace trireme::jinja
