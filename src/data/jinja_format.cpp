// Python's two ways to format: '%s' % x and '{}'.format(x).
#include <cmath>
#include <cstdio>

#include "data/jinja_runtime.h"
#include "data/jinja_text.h"

namespace trireme::jinja {
namespace {

constexpr int kMaxWidth = 1 << 20, kMaxPrecision = 1000;

int read_number(const std::string& text, size_t& at, int limit) {
  int number = 0;
  while (at < text.size() && text[at] >= '0' && text[at] <= '9') {
    number = number * 10 + (text[at++] - '0');
    if (number > limit) fail("a width or precision in a format is larger than " + std::to_string(limit));
  }
  return number;
}

std::string pad(const std::string& text, int width, char align, const std::string& fill) {
  auto size = static_cast<int>(count_codes(text));
  if (size >= width) return text;
  int room = width - size, left = align == '>' ? room : align == '^' ? room / 2 : 0;
  std::string out;
  for (int i = 0; i < left; ++i) out += fill;
  out += text;
  for (int i = left; i < room; ++i) out += fill;
  return out;
}

std::string with_sign(bool negative, char sign, const std::string& digits) {
  return (negative ? "-" : sign == '+' ? "+" : sign == ' ' ? " " : "") + digits;
}

// Zeros between the sign (and the prefix 0x) and the digits.
std::string pad_zeros(const std::string& text, int width) {
  size_t at = !text.empty() && (text[0] == '-' || text[0] == '+' || text[0] == ' ') ? 1 : 0;
  if (text.size() > at + 1 && text[at] == '0' && std::isalpha(static_cast<unsigned char>(text[at + 1]))) at += 2;
  std::string out = text;
  if (static_cast<int>(text.size()) < width) out.insert(at, static_cast<size_t>(width) - text.size(), '0');
  return out;
}

std::string int_digits(int64_t value, char type, bool prefix) {
  uint64_t rest = value < 0 ? 0 - static_cast<uint64_t>(value) : static_cast<uint64_t>(value);
  unsigned base = type == 'x' || type == 'X' ? 16 : type == 'o' ? 8 : type == 'b' ? 2 : 10;
  std::string digits;
  do digits.insert(digits.begin(), (type == 'X' ? "0123456789ABCDEF" : "0123456789abcdef")[rest % base]);
  while (rest /= base);
  return (prefix && base != 10 ? std::string("0") + type : "") + digits;
}

void group_thousands(std::string& digits, char mark) {
  size_t end = 0;
  while (end < digits.size() && std::isdigit(static_cast<unsigned char>(digits[end]))) ++end;
  for (size_t at = end; at > 3; at -= 3) digits.insert(at - 3, 1, mark);
}

int64_t to_integer(const Value& value, char type) {
  if (value.is_undefined()) fail(value.text());
  if (value.is_integral()) return value.as_int();
  bool decimal = type == 'd' || type == 'i' || type == 'u';
  if (value.is(Kind::kFloat) && decimal && std::abs(value.as_double()) < 9e18)
    return static_cast<int64_t>(value.as_double());
  fail("%" + std::string(1, type) + " format: " + (decimal ? "a real number" : "an integer") + " is required, not " +
       value.type_name());
}

}  // namespace

// The digits of |value| in the type e, f, g (or their capitals).
std::string Runtime::format_float(double value, char type, int precision, bool alternate) {
  value = std::abs(value);
  if (!std::isfinite(value)) {
    std::string text = std::isnan(value) ? "nan" : "inf";
    return std::isupper(static_cast<unsigned char>(type)) ? to_upper(text) : text;
  }
  std::string pattern = alternate ? "%#.*" : "%.*";
  pattern += type;
  std::string buffer(static_cast<size_t>(precision) + 400, '\0');
  int size = std::snprintf(buffer.data(), buffer.size(), pattern.c_str(), precision, value);
  buffer.resize(static_cast<size_t>(size));
  return buffer;
}

Value Runtime::percent_format(const std::string& format, const Value& arguments) {
  std::vector<Value> positional = arguments.is(Kind::kTuple) ? arguments.items() : std::vector<Value>{arguments};
  size_t next = 0;
  bool used_mapping = false;
  auto take = [&]() -> Value {
    if (next >= positional.size()) fail("not enough arguments for format string");
    return positional[next++];
  };
  std::string out;
  for (size_t at = 0; at < format.size();) {
    if (format[at] != '%') {
      out += format[at++];
      continue;
    }
    step();
    check_string(out.size());
    if (++at >= format.size()) fail("incomplete format");
    std::string key;
    bool has_key = format[at] == '(';
    if (has_key) {
      size_t end = format.find(')', at);
      if (end == std::string::npos) fail("incomplete format key");
      key = format.substr(at + 1, end - at - 1);
      at = end + 1;
    }
    bool left = false, zero = false, alternate = false;
    char sign = 0;
    for (; at < format.size(); ++at) {
      if (format[at] == '-')
        left = true;
      else if (format[at] == '0')
        zero = true;
      else if (format[at] == '#')
        alternate = true;
      else if (format[at] == '+')
        sign = '+';
      else if (format[at] == ' ')
        sign = sign ? sign : ' ';
      else
        break;
    }
    auto number = [&](int limit) {
      if (at >= format.size() || format[at] != '*') return read_number(format, at, limit);
      ++at;
      Value value = take();
      if (!value.is_integral()) fail("* wants int");
      if (std::abs(value.as_int()) > limit)
        fail("a width or precision in a format is larger than " + std::to_string(limit));
      return static_cast<int>(value.as_int());
    };
    int width = number(kMaxWidth), precision = -1;
    if (width < 0) {
      left = true;
      width = -width;
    }
    if (at < format.size() && format[at] == '.') precision = (++at, std::max(0, number(kMaxPrecision)));
    if (at >= format.size()) fail("incomplete format");
    char type = format[at++];
    if (type == '%') {
      out += '%';
      continue;
    }
    Value value;
    if (has_key) {
      if (!arguments.is(Kind::kDict)) fail("format requires a mapping");
      const Value* found = arguments.as_dict().find(key);
      if (!found) fail(string_repr(key));
      value = *found;
      used_mapping = true;
    } else {
      value = take();
    }
    std::string text;
    bool numeric = true;
    if (type == 's' || type == 'r' || type == 'a') {
      text = type == 's' ? str(value) : repr(value);
      if (precision >= 0) text = encode(std::u32string_view(decode(text)).substr(0, static_cast<size_t>(precision)));
      numeric = false;
    } else if (type == 'c') {
      if (value.is_string() && count_codes(value.text()) == 1)
        text = value.text();
      else if (value.is_integral() && value.as_int() >= 0 && value.as_int() < 0xd800)
        append_utf8(text, static_cast<char32_t>(value.as_int()));
      else
        fail("%c requires int or char");
      numeric = false;
    } else if (std::string("diuxXo").find(type) != std::string::npos) {
      int64_t integer = to_integer(value, type);
      std::string digits = int_digits(integer, type, false);
      if (precision > static_cast<int>(digits.size()))
        digits.insert(0, static_cast<size_t>(precision) - digits.size(), '0');
      if (alternate && (type == 'x' || type == 'X' || type == 'o')) digits = std::string("0") + type + digits;
      text = with_sign(integer < 0, sign, digits);
    } else if (std::string("eEfFgG").find(type) != std::string::npos) {
      if (value.is_undefined()) fail(value.text());
      if (!value.is_number()) fail("must be real number, not " + value.type_name());
      text = with_sign(std::signbit(value.as_double()), sign,
                       format_float(value.as_double(), type, precision < 0 ? 6 : precision, alternate));
    } else {
      fail("unsupported format character '" + std::string(1, type) + "'");
    }
    if (numeric && zero && !left) text = pad_zeros(text, width);
    out += pad(text, width, left ? '<' : '>', " ");
  }
  if (next < positional.size() && !used_mapping && !arguments.is(Kind::kDict) && !arguments.is(Kind::kList))
    fail("not all arguments converted during string formatting");
  if (arguments.is(Kind::kList) && next == 0 && positional.size() == 1 && !used_mapping) return text(std::move(out));
  return text(std::move(out));
}

std::string Runtime::format_value(const Value& value, const std::string& spec) {
  if (spec.empty()) return str(value);
  if (value.is_undefined() || !(value.is_string() || value.is_number()))
    fail("unsupported format string passed to " + value.type_name() + ".__format__");
  std::u32string codes = decode(spec);
  std::string fill = " ", rest = spec;
  char align = 0;
  auto is_align = [](char32_t c) { return c == '<' || c == '>' || c == '^' || c == '='; };
  if (codes.size() > 1 && is_align(codes[1])) {
    fill = encode(std::u32string_view(codes).substr(0, 1));
    align = static_cast<char>(codes[1]);
    rest = encode(std::u32string_view(codes).substr(2));
  } else if (is_align(codes[0])) {
    align = static_cast<char>(codes[0]);
    rest = spec.substr(1);
  }
  size_t at = 0;
  auto take = [&](const char* any) -> char {
    return at < rest.size() && std::string(any).find(rest[at]) != std::string::npos ? rest[at++] : 0;
  };
  char sign = take("+- ");
  bool alternate = take("#") != 0;
  if (at < rest.size() && rest[at] == '0') {
    ++at;
    if (!align) {
      align = '=';
      fill = "0";
    }
  }
  int width = read_number(rest, at, kMaxWidth);
  char mark = take(",_");
  int precision = -1;
  if (take(".")) {
    size_t before = at;
    precision = read_number(rest, at, kMaxPrecision);
    if (at == before) fail("Format specifier missing precision");
  }
  char type = at < rest.size() ? rest[at++] : 0;
  if (at < rest.size())
    fail("Invalid format specifier " + string_repr(spec) + " for object of type '" + value.type_name() + "'");
  auto unknown = [&] {
    fail("Unknown format code '" + std::string(1, type) + "' for object of type '" + value.type_name() + "'");
  };

  if (value.is_string()) {
    if (type && type != 's') unknown();
    if (sign) fail("Sign not allowed in string format specifier");
    if (align == '=' && fill != "0") fail("'=' alignment not allowed in string format specifier");
    std::string text = value.text();
    if (precision >= 0) text = encode(std::u32string_view(decode(text)).substr(0, static_cast<size_t>(precision)));
    return pad(text, width, align == '=' || !align ? '<' : align, fill);
  }
  bool negative;
  std::string digits;
  if (value.is_integral() && (!type || std::string("dxXobcn").find(type) != std::string::npos)) {
    if (precision >= 0) fail("Precision not allowed in integer format specifier");
    negative = value.as_int() < 0;
    if (type == 'c')
      append_utf8(digits, static_cast<char32_t>(value.as_int() & 0xffff));
    else
      digits = int_digits(value.as_int(), type, alternate);
  } else {
    if (type && std::string("eEfFgG%n").find(type) == std::string::npos) unknown();
    double number = value.as_double();
    negative = std::signbit(number);
    if (!type && precision < 0)
      digits = float_repr(std::abs(number));
    else if (type == '%')
      digits = format_float(number * 100, 'f', precision < 0 ? 6 : precision, alternate) + "%";
    else
      digits = format_float(number, type && type != 'n' ? type : 'g', precision < 0 ? 6 : precision, alternate);
    if (!type && precision >= 0 && digits.find_first_of(".en") == std::string::npos) digits += ".0";
  }
  if (mark) group_thousands(digits, mark);
  std::string text = with_sign(negative, sign, digits);
  if (align == '=' && fill == "0") return pad_zeros(text, width);
  return pad(text, width, align == '=' || !align ? '>' : align, fill);
}

// --- '{}'.format
// --------------------------------------------------------------------------------------------------------
Value Runtime::brace_field(const std::string& field, const Args& args, size_t& next_index) {
  size_t end = std::min(field.find_first_of(".["), field.size());
  std::string first = field.substr(0, end);
  Value value;
  if (first.empty() || std::isdigit(static_cast<unsigned char>(first[0]))) {
    int64_t index = 0;
    bool automatic = first.empty();
    if (automatic) {
      if (next_index == SIZE_MAX) fail("cannot switch from manual field specification to automatic field numbering");
      index = static_cast<int64_t>(next_index++);
    } else {
      if (next_index != 0 && next_index != SIZE_MAX)
        fail("cannot switch from automatic field numbering to manual field specification");
      next_index = SIZE_MAX;
      if (!parse_int(first, 10, index)) fail("invalid field name");
    }
    if (index >= static_cast<int64_t>(args.positional.size()))
      fail("Replacement index " + std::to_string(index) + " out of range for positional args tuple");
    value = args.positional[static_cast<size_t>(index)];
  } else {
    const Value* found = nullptr;
    for (const auto& [name, named] : args.named)
      if (name == first) found = &named;
    if (!found) fail(string_repr(first));
    value = *found;
  }
  for (size_t at = end; at < field.size();) {
    bool is_item = field[at] == '[';
    size_t stop = is_item ? field.find(']', at) : field.find_first_of(".[", at + 1);
    if (is_item && stop == std::string::npos) fail("expected '}' before end of string");
    stop = std::min(stop, field.size());
    std::string part = field.substr(at + 1, stop - at - 1);
    if (part.empty()) fail("Empty attribute in format string");
    int64_t index = 0;
    bool integer = is_item && std::isdigit(static_cast<unsigned char>(part[0])) && parse_int(part, 10, index);
    value = !is_item ? attribute(value, part) : item(value, integer ? Value::integer(index) : Value::string(part));
    at = stop + (is_item ? 1 : 0);
    if (is_item && at < field.size() && field[at] != '.' && field[at] != '[')
      fail("Only '.' or '[' may follow ']' in format field specifier");
  }
  return value;
}

std::string Runtime::brace_text(const std::string& format, const Args& args, size_t& next_index, int depth) {
  if (depth > 2) fail("Max string recursion exceeded");
  std::string out;
  for (size_t at = 0; at < format.size();) {
    char c = format[at++];
    if (c == '}') {
      if (at >= format.size() || format[at] != '}') fail("Single '}' encountered in format string");
      ++at;
      out += '}';
      continue;
    }
    if (c != '{') {
      out += c;
      continue;
    }
    if (at < format.size() && format[at] == '{') {
      ++at;
      out += '{';
      continue;
    }
    step();
    check_string(out.size());
    size_t start = at;
    int open = 1;
    bool in_item = false;
    for (; at < format.size(); ++at) {
      if (format[at] == '[') in_item = true;
      if (format[at] == ']') in_item = false;
      if (!in_item && format[at] == '{') ++open;
      if (!in_item && format[at] == '}' && --open == 0) break;
    }
    if (at >= format.size())
      fail(start >= format.size() ? "Single '{' encountered in format string" : "expected '}' before end of string");
    std::string field = format.substr(start, at++ - start), spec;
    size_t colon = field.find_first_of(":!");
    if (size_t bracket = field.find('['); bracket != std::string::npos && colon != std::string::npos && bracket < colon)
      colon = field.find_first_of(
          ":!", field.find(']', bracket) == std::string::npos ? field.size() : field.find(']', bracket));
    char conversion = 0;
    std::string name = field.substr(0, colon);
    if (colon != std::string::npos && field[colon] == '!') {
      if (colon + 1 >= field.size()) fail("end of string while looking for conversion specifier");
      conversion = field[colon + 1];
      if (colon + 2 < field.size() && field[colon + 2] != ':') fail("expected ':' after conversion specifier");
      colon = colon + 2 < field.size() ? colon + 2 : std::string::npos;
    }
    if (colon != std::string::npos) spec = field.substr(colon + 1);
    Value value = brace_field(name, args, next_index);
    if (conversion == 's')
      value = Value::string(str(value));
    else if (conversion == 'r' || conversion == 'a')
      value = Value::string(repr(value));
    else if (conversion)
      fail("Unknown conversion specifier '" + std::string(1, conversion) + "'");
    if (spec.find('{') != std::string::npos) spec = brace_text(spec, args, next_index, depth + 1);
    out += format_value(value, spec);
  }
  return out;
}

Value Runtime::brace_format(const std::string& format, const Args& args) {
  size_t next_index = 0;
  return text(brace_text(format, args, next_index, 1));
}

}  // namespace trireme::jinja
