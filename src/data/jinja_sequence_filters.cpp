// Filters on lists and dicts, and the call of a filter by its name.
#include <algorithm>
#include <unordered_set>

#include "data/jinja_filters.h"
#include "data/jinja_text.h"

namespace trireme::jinja {
namespace {

using Bound = std::vector<const Value*>;

bool flag(const Value* value) { return value && Runtime::truth(*value); }

// jinja2's make_attrgetter: "a.b.0" goes down step by step.
Value get_path(Runtime& runtime, Value value, const Value* path, const Value* absent = nullptr) {
  if (!path || path->is_none()) return value;
  std::vector<Value> parts;
  if (path->is_string()) {
    const std::string& text = path->text();
    for (size_t at = 0; at <= text.size();) {
      size_t end = std::min(text.find('.', at), text.size());
      std::string part = text.substr(at, end - at);
      int64_t index = 0;
      bool digits =
          !part.empty() && part.find_first_not_of("0123456789") == std::string::npos && parse_int(part, 10, index);
      parts.push_back(digits ? Value::integer(index) : Value::string(part));
      at = end + 1;
    }
  } else {
    parts.push_back(*path);
  }
  for (const Value& part : parts) {
    value = runtime.item(value, part);
    if (absent && !absent->is_none() && value.is_undefined()) value = *absent;
  }
  return value;
}

Value fold_case(const Value& value, bool case_sensitive) {
  return value.is_string() && !case_sensitive ? Value::string(to_lower(value.text())) : value;
}

// Stable, by `key` of each item.
std::vector<Value> sorted_by(Runtime& runtime, const std::vector<Value>& items, const std::vector<Value>& keys,
                             bool reverse) {
  std::vector<size_t> order(items.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  if (reverse) std::reverse(order.begin(), order.end());
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return runtime.less(keys[a], keys[b]); });
  if (reverse) std::reverse(order.begin(), order.end());
  std::vector<Value> sorted;
  for (size_t i : order) sorted.push_back(items[i]);
  return sorted;
}

Value filter_sort(Runtime& runtime, const Value& value, const Args& args) {
  Bound bound = args.bind("sort", {"reverse", "case_sensitive", "attribute"});
  std::vector<Value> items = runtime.iterate(value), keys;
  std::vector<Value> paths;
  if (bound[2] && bound[2]->is_string()) {
    const std::string& text = bound[2]->text();
    for (size_t at = 0; at <= text.size();) {
      size_t end = std::min(text.find(',', at), text.size());
      paths.push_back(Value::string(text.substr(at, end - at)));
      at = end + 1;
    }
  } else {
    paths.push_back(bound[2] ? *bound[2] : Value());
  }
  for (const Value& item : items) {
    std::vector<Value> key;
    for (const Value& path : paths) key.push_back(fold_case(get_path(runtime, item, &path), flag(bound[1])));
    keys.push_back(Value::list(std::move(key)));
  }
  return Value::list(sorted_by(runtime, items, keys, flag(bound[0])));
}

Value filter_dictsort(Runtime& runtime, const Value& value, const Args& args) {
  Bound bound = args.bind("dictsort", {"case_sensitive", "by", "reverse"});
  std::string by = bound[1] ? runtime.str(*bound[1]) : "key";
  if (by != "key" && by != "value") fail("You can only sort by either \"key\" or \"value\"");
  if (value.is_undefined()) fail(value.text());
  if (!value.is(Kind::kDict)) fail("'" + value.type_name() + "' object has no attribute 'items'");
  std::vector<Value> items, keys;
  for (const auto& [key, item] : value.as_dict().entries) {
    items.push_back(Value::tuple({key, item}));
    keys.push_back(fold_case(by == "key" ? key : item, flag(bound[0])));
  }
  return Value::list(sorted_by(runtime, items, keys, flag(bound[2])));
}

Value filter_unique(Runtime& runtime, const Value& value, const Args& args) {
  Bound bound = args.bind("unique", {"case_sensitive", "attribute"});
  std::unordered_set<std::string> seen;
  std::vector<Value> items;
  for (const Value& item : runtime.iterate(value))
    if (seen.insert(hash_key(fold_case(get_path(runtime, item, bound[1]), flag(bound[0])))).second)
      items.push_back(item);
  return Value::iterator("generator", std::move(items));
}

template <bool want_max>
Value filter_extreme(Runtime& runtime, const Value& value, const Args& args) {
  Bound bound = args.bind(want_max ? "max" : "min", {"case_sensitive", "attribute"});
  std::vector<Value> items = runtime.iterate(value);
  if (items.empty()) return Value::undefined("No aggregated item, sequence was empty.");
  size_t best = 0;
  std::vector<Value> keys;
  for (const Value& item : items) keys.push_back(fold_case(get_path(runtime, item, bound[1]), flag(bound[0])));
  for (size_t i = 1; i < items.size(); ++i)
    if (want_max ? runtime.less(keys[best], keys[i], ">") : runtime.less(keys[i], keys[best])) best = i;
  return items[best];
}

Value filter_sum(Runtime& runtime, const Value& value, const Args& args) {
  Bound bound = args.bind("sum", {"attribute", "start"});
  Value total = bound[1] ? *bound[1] : Value::integer(0);
  if (total.is_string()) fail("sum() can't sum strings [use ''.join(seq) instead]");
  for (const Value& item : runtime.iterate(value))
    total = runtime.binary("+", total, get_path(runtime, item, bound[0]));
  return total;
}

Value filter_join(Runtime& runtime, const Value& value, const Args& args) {
  Bound bound = args.bind("join", {"d", "attribute"});
  std::string separator = bound[0] ? runtime.str(*bound[0]) : "", out;
  bool first = true;
  for (const Value& item : runtime.iterate(value)) {
    if (!first) out += separator;
    first = false;
    out += runtime.str(get_path(runtime, item, bound[1]));
    runtime.check_string(out.size());
  }
  return Value::string(std::move(out));
}

Value filter_first(Runtime& runtime, const Value& value, const Args& args) {
  args.bind("first", {});
  if (value.is(Kind::kIterator)) {
    IteratorObject& iterator = value.as_iterator();
    if (iterator.at < iterator.items.size()) return iterator.items[iterator.at++];
    return Value::undefined("No first item, sequence was empty.");
  }
  if ((value.is(Kind::kList) || value.is(Kind::kTuple)) && !value.items().empty()) return value.items()[0];
  std::vector<Value> items = runtime.iterate(value);
  return items.empty() ? Value::undefined("No first item, sequence was empty.") : items[0];
}

void check_reversible(const Value& value) {
  if (value.is_undefined()) return;
  if (value.is(Kind::kIterator) || value.is_number() || value.is_none() || value.is(Kind::kNamespace) ||
      value.is(Kind::kFunction))
    fail("'" + value.type_name() + "' object is not reversible");
}

Value filter_last(Runtime& runtime, const Value& value, const Args& args) {
  args.bind("last", {});
  check_reversible(value);
  if ((value.is(Kind::kList) || value.is(Kind::kTuple)) && !value.items().empty()) return value.items().back();
  std::vector<Value> items = runtime.iterate(value);
  return items.empty() ? Value::undefined("No last item, sequence was empty.") : items.back();
}

Value filter_reverse(Runtime& runtime, const Value& value, const Args& args) {
  args.bind("reverse", {});
  if (value.is_string()) {
    std::u32string codes = decode(value.text());
    std::reverse(codes.begin(), codes.end());
    return Value::string(encode(codes));
  }
  std::vector<Value> items = runtime.iterate(value);
  std::reverse(items.begin(), items.end());
  if (value.is(Kind::kIterator)) return Value::list(std::move(items));
  return Value::iterator(value.is(Kind::kList) ? "list_reverseiterator" : "reversed", std::move(items));
}

Value filter_length(Runtime& runtime, const Value& value, const Args& args) {
  args.bind("length", {});
  return Value::integer(runtime.length(value));
}

Value filter_list(Runtime& runtime, const Value& value, const Args& args) {
  args.bind("list", {});
  return Value::list(runtime.iterate(value));
}

Value filter_items(Runtime&, const Value& value, const Args& args) {
  args.bind("items", {});
  std::vector<Value> items;
  if (!value.is_undefined() && !value.is(Kind::kDict)) fail("Can only get item pairs from a mapping.");
  if (value.is(Kind::kDict))
    for (const auto& [key, item] : value.as_dict().entries) items.push_back(Value::tuple({key, item}));
  return Value::iterator("generator", std::move(items));
}

Value filter_default(Runtime&, const Value& value, const Args& args) {
  Bound bound = args.bind("default", {"default_value", "boolean"});
  if (value.is_undefined() || (flag(bound[1]) && !Runtime::truth(value)))
    return bound[0] ? *bound[0] : Value::string("");
  return value;
}

Value filter_map(Runtime& runtime, const Value& value, const Args& args) {
  std::vector<Value> items;
  if (!Runtime::truth(value)) return Value::iterator("generator", {});
  if (args.positional.empty()) {
    Bound bound = args.bind("map", {"attribute", "default"});
    if (!bound[0]) fail("map requires a filter argument");
    for (const Value& item : runtime.iterate(value)) items.push_back(get_path(runtime, item, bound[0], bound[1]));
  } else {
    Args rest{{args.positional.begin() + 1, args.positional.end()}, args.named};
    std::string name = runtime.str(args.positional[0]);
    for (const Value& item : runtime.iterate(value)) items.push_back(runtime.filter(name, item, rest));
  }
  return Value::iterator("generator", std::move(items));
}

template <bool keep, bool by_attribute>
Value filter_select(Runtime& runtime, const Value& value, const Args& args) {
  std::vector<Value> items;
  if (!Runtime::truth(value)) return Value::iterator("generator", {});
  if (by_attribute && args.positional.empty()) fail("Missing parameter for attribute name");
  size_t offset = by_attribute ? 1 : 0;
  bool has_test = args.positional.size() > offset;
  std::string name = has_test ? runtime.str(args.positional[offset]) : "";
  Args rest;
  if (has_test)
    rest = {{args.positional.begin() + static_cast<std::ptrdiff_t>(offset) + 1, args.positional.end()}, args.named};
  for (const Value& item : runtime.iterate(value)) {
    Value tested = by_attribute ? get_path(runtime, item, &args.positional[0]) : item;
    if ((has_test ? runtime.test(name, tested, rest) : Runtime::truth(tested)) == keep) items.push_back(item);
  }
  return Value::iterator("generator", std::move(items));
}

Value filter_batch(Runtime& runtime, const Value& value, const Args& args) {
  Bound bound = args.bind("batch", {"linecount", "fill_with"}, 1);
  if (!bound[0]->is_integral()) fail("'" + bound[0]->type_name() + "' object cannot be interpreted as an integer");
  int64_t size = bound[0]->as_int();
  std::vector<Value> batches, batch;
  for (const Value& item : runtime.iterate(value)) {
    if (static_cast<int64_t>(batch.size()) == size) batches.push_back(Value::list(std::exchange(batch, {})));
    batch.push_back(item);
  }
  if (!batch.empty()) {
    if (bound[1] && !bound[1]->is_none())
      while (static_cast<int64_t>(batch.size()) < size) {
        runtime.step();
        batch.push_back(*bound[1]);
      }
    batches.push_back(Value::list(std::move(batch)));
  }
  return Value::iterator("generator", std::move(batches));
}

Value filter_groupby(Runtime& runtime, const Value& value, const Args& args) {
  Bound bound = args.bind("groupby", {"attribute", "default", "case_sensitive"}, 1);
  std::vector<Value> items = runtime.iterate(value), keys;
  for (const Value& item : items)
    keys.push_back(fold_case(get_path(runtime, item, bound[0], bound[1]), flag(bound[2])));
  std::vector<Value> pairs;
  for (size_t i = 0; i < items.size(); ++i) pairs.push_back(Value::tuple({keys[i], items[i]}));
  std::vector<Value> groups, group;
  Value key;
  auto flush = [&] {
    if (group.empty()) return;
    Value shown = get_path(runtime, group[0], bound[0], bound[1]);
    groups.push_back(Value::tuple({shown, Value::list(std::exchange(group, {}))}));
  };
  for (const Value& pair : sorted_by(runtime, pairs, keys, false)) {
    if (group.empty() || !runtime.equal(key, pair.items()[0])) flush();
    key = pair.items()[0];
    group.push_back(pair.items()[1]);
  }
  flush();
  return Value::list(std::move(groups));
}

Value filter_attr(Runtime& runtime, const Value& value, const Args& args) {
  const Value& name = *args.bind("attr", {"name"}, 1)[0];
  if (value.is(Kind::kDict)) {  // an attribute, never a key
    Value method = runtime.method(value, runtime.str(name));
    return method.is_none() ? Value::undefined("'dict object' has no attribute " + runtime.repr(name)) : method;
  }
  return runtime.attribute(value, runtime.str(name));
}

}  // namespace

const FilterTable& sequence_filters() {
  static const FilterTable kFilters = {{"sort", filter_sort},
                                       {"dictsort", filter_dictsort},
                                       {"unique", filter_unique},
                                       {"min", filter_extreme<false>},
                                       {"max", filter_extreme<true>},
                                       {"sum", filter_sum},
                                       {"join", filter_join},
                                       {"first", filter_first},
                                       {"last", filter_last},
                                       {"reverse", filter_reverse},
                                       {"length", filter_length},
                                       {"count", filter_length},
                                       {"list", filter_list},
                                       {"items", filter_items},
                                       {"default", filter_default},
                                       {"d", filter_default},
                                       {"map", filter_map},
                                       {"select", filter_select<true, false>},
                                       {"reject", filter_select<false, false>},
                                       {"selectattr", filter_select<true, true>},
                                       {"rejectattr", filter_select<false, true>},
                                       {"batch", filter_batch},
                                       {"groupby", filter_groupby},
                                       {"attr", filter_attr}};
  return kFilters;
}

bool Runtime::has_filter(const std::string& name) {
  return text_filters().count(name) > 0 || sequence_filters().count(name) > 0;
}

Value Runtime::filter(const std::string& name, const Value& value, const Args& args) {
  step_over(value);
  auto found = text_filters().find(name);
  if (found == text_filters().end()) {
    found = sequence_filters().find(name);
    if (found == sequence_filters().end()) fail("No filter named " + string_repr(name) + ".");
  }
  Value result = found->second(*this, value, args);
  if (result.is_string() && result.object() != value.object()) return text(result.text(), result.safe());
  return result;
}

}  // namespace trireme::jinja
