// json.dumps as the tojson filter of transformers calls it.
#include <algorithm>
#include <cmath>

#include "data/jinja_runtime.h"
#include "data/jinja_text.h"

namespace trireme::jinja {
namespace {

void append_string(std::string& out, const std::string& text, bool ensure_ascii) {
  auto escape = [&](char32_t code) {
    out += "\\u";
    for (int shift = 12; shift >= 0; shift -= 4) out += "0123456789abcdef"[code >> shift & 15];
  };
  out += '"';
  for (char32_t code : decode(text)) {
    if (code == '"' || code == '\\')
      (out += '\\') += static_cast<char>(code);
    else if (code == '\n')
      out += "\\n";
    else if (code == '\r')
      out += "\\r";
    else if (code == '\t')
      out += "\\t";
    else if (code == '\b')
      out += "\\b";
    else if (code == '\f')
      out += "\\f";
    else if (code < 0x20)
      escape(code);
    else if (code < 0x7f || (!ensure_ascii) || code == 0x7f)
      append_utf8(out, code);
    else if (code < 0x10000)
      escape(code);
    else {
      escape(0xd800 + ((code - 0x10000) >> 10));
      escape(0xdc00 + ((code - 0x10000) & 0x3ff));
    }
  }
  out += '"';
}

std::string json_key(const Value& key) {
  switch (key.kind()) {
    case Kind::kString:
      return key.text();
    case Kind::kNone:
      return "null";
    case Kind::kBool:
      return key.as_bool() ? "true" : "false";
    case Kind::kInt:
      return std::to_string(key.as_int());
    case Kind::kFloat:
      return float_repr(key.as_double());
    default:
      fail("keys must be str, int, float, bool or None, not " + key.type_name());
  }
}

}  // namespace

std::string Runtime::to_json(const Value& value, const std::string& indent, bool pretty,
                             const std::string& item_separator, const std::string& key_separator, bool ensure_ascii,
                             bool sort_keys) {
  std::string out;
  append_json(out, value, indent, pretty, item_separator, key_separator, ensure_ascii, sort_keys, 0);
  return out;
}

void Runtime::append_json(std::string& out, const Value& value, const std::string& indent, bool pretty,
                          const std::string& item_separator, const std::string& key_separator, bool ensure_ascii,
                          bool sort_keys, int level) {
  step(1 + (value.is_string() ? value.text().size() / 16 : 0));
  check_string(out.size() + indent.size() * static_cast<size_t>(level));
  auto line = [&](int depth) {
    if (!pretty) return;
    out += '\n';
    for (int i = 0; i < depth; ++i) out += indent;
  };
  switch (value.kind()) {
    case Kind::kNone:
      out += "null";
      return;
    case Kind::kBool:
      out += value.as_bool() ? "true" : "false";
      return;
    case Kind::kInt:
      out += std::to_string(value.as_int());
      return;
    case Kind::kFloat: {
      double number = value.as_double();
      out += std::isnan(number)   ? "NaN"
             : std::isinf(number) ? (number < 0 ? "-Infinity" : "Infinity")
                                  : float_repr(number);
      return;
    }
    case Kind::kString:
      append_string(out, value.text(), ensure_ascii);
      return;
    case Kind::kList:
    case Kind::kTuple: {
      if (value.items().empty()) {
        out += "[]";
        return;
      }
      out += '[';
      for (size_t i = 0; i < value.items().size(); ++i) {
        if (i > 0) out += item_separator;
        line(level + 1);
        append_json(out, value.items()[i], indent, pretty, item_separator, key_separator, ensure_ascii, sort_keys,
                    level + 1);
      }
      line(level);
      out += ']';
      return;
    }
    case Kind::kDict: {
      auto entries = value.as_dict().entries;
      if (entries.empty()) {
        out += "{}";
        return;
      }
      if (sort_keys)
        std::stable_sort(entries.begin(), entries.end(),
                         [&](const auto& a, const auto& b) { return less(a.first, b.first); });
      out += '{';
      for (size_t i = 0; i < entries.size(); ++i) {
        if (i > 0) out += item_separator;
        line(level + 1);
        append_string(out, json_key(entries[i].first), ensure_ascii);
        out += key_separator;
        append_json(out, entries[i].second, indent, pretty, item_separator, key_separator, ensure_ascii, sort_keys,
                    level + 1);
      }
      line(level);
      out += '}';
      return;
    }
    default:
      fail("Object of type " + value.type_name() + " is not JSON serializable");
  }
}

}  // namespace trireme::jinja
