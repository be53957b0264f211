#include "data/jinja_text.h"

#include <algorithm>
#include <charconv>
#include <cmath>

#include "data/jinja_value.h"

namespace trireme::jinja {
namespace {

struct CaseRun {
  char32_t first, last;
  int stride, difference;
};
struct CaseSpecial {
  char32_t code;
  const char* text;
};
struct CodeRange {
  char32_t first, last;
};
#include "data/jinja_unicode.inc"

template <size_t N>
bool in_ranges(const CodeRange (&ranges)[N], char32_t code) {
  auto after = std::upper_bound(ranges, ranges + N, code, [](char32_t c, const CodeRange& r) { return c < r.first; });
  return after != ranges && code <= after[-1].last;
}

template <size_t N>
int difference(const CaseRun (&runs)[N], char32_t code) {
  auto after = std::upper_bound(runs, runs + N, code, [](char32_t c, const CaseRun& r) { return c < r.first; });
  // Runs with a stride of 2 may overlap the next one, so look one further back.
  for (int back = 1; back <= 2 && after - runs >= back; ++back) {
    const CaseRun& run = after[-back];
    if (code <= run.last && (code - run.first) % run.stride == 0) return run.difference;
  }
  return 0;
}

template <size_t N>
const char* special(const CaseSpecial (&list)[N], char32_t code) {
  for (const CaseSpecial& entry : list)
    if (entry.code == code) return entry.text;
  return nullptr;
}

void append_upper(std::string& out, char32_t code) {
  if (code < 128) {
    out += static_cast<char>(code >= 'a' && code <= 'z' ? code - 32 : code);
  } else if (const char* text = special(kUpperSpecial, code)) {
    out += text;
  } else {
    append_utf8(out, code + difference(kUpperRuns, code));
  }
}

void append_title(std::string& out, char32_t code) {
  if (const char* text = code < 128 ? nullptr : special(kTitleSpecial, code)) {
    out += text;
  } else if (int moved = code < 128 ? 0 : difference(kTitleRuns, code)) {
    append_utf8(out, code + moved);
  } else {
    append_upper(out, code);
  }
}

void append_lower(std::string& out, char32_t code) {
  if (code < 128) {
    out += static_cast<char>(code >= 'A' && code <= 'Z' ? code + 32 : code);
  } else if (const char* text = special(kLowerSpecial, code)) {
    out += text;
  } else {
    append_utf8(out, code + difference(kLowerRuns, code));
  }
}

bool is_cased(char32_t code) { return is_cased_upper(code) || is_cased_lower(code); }

// A capital sigma at the end of a word has a form of its own.
void append_lower_at(std::string& out, const std::u32string& codes, size_t i) {
  if (codes[i] == 0x3a3 && i > 0 && is_cased(codes[i - 1]) && (i + 1 == codes.size() || !is_cased(codes[i + 1])))
    append_utf8(out, 0x3c2);
  else
    append_lower(out, codes[i]);
}

}  // namespace

std::u32string decode(std::string_view text) {
  std::u32string codes;
  codes.reserve(text.size());
  for (size_t i = 0; i < text.size();) {
    auto byte = static_cast<unsigned char>(text[i]);
    int extra = byte < 0xc0 ? 0 : byte < 0xe0 ? 1 : byte < 0xf0 ? 2 : 3;
    char32_t code = extra == 0 ? byte : byte & (0x3f >> extra);
    ++i;
    for (; extra > 0 && i < text.size(); --extra) code = code << 6 | (text[i++] & 0x3f);
    codes += code;
  }
  return codes;
}

void append_utf8(std::string& out, char32_t code) {
  if (code < 0x80) {
    out += static_cast<char>(code);
  } else if (code < 0x800) {
    out += static_cast<char>(0xc0 | code >> 6);
    out += static_cast<char>(0x80 | (code & 0x3f));
  } else if (code < 0x10000) {
    out += static_cast<char>(0xe0 | code >> 12);
    out += static_cast<char>(0x80 | (code >> 6 & 0x3f));
    out += static_cast<char>(0x80 | (code & 0x3f));
  } else {
    out += static_cast<char>(0xf0 | code >> 18);
    out += static_cast<char>(0x80 | (code >> 12 & 0x3f));
    out += static_cast<char>(0x80 | (code >> 6 & 0x3f));
    out += static_cast<char>(0x80 | (code & 0x3f));
  }
}

std::string encode(std::u32string_view codes) {
  std::string text;
  for (char32_t code : codes) append_utf8(text, code);
  return text;
}

bool is_ascii(std::string_view text) {
  return std::none_of(text.begin(), text.end(), [](char c) { return static_cast<unsigned char>(c) >= 128; });
}

size_t count_codes(std::string_view text) {
  return static_cast<size_t>(std::count_if(text.begin(), text.end(), [](char c) { return (c & 0xc0) != 0x80; }));
}

bool is_space(char32_t c) {
  return (c >= 9 && c <= 13) || (c >= 0x1c && c <= 0x20) || c == 0x85 || c == 0xa0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200a) || c == 0x2028 || c == 0x2029 || c == 0x202f || c == 0x205f || c == 0x3000;
}
bool is_alpha(char32_t c) { return c < 128 ? (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') : in_ranges(kAlpha, c); }
bool is_digit(char32_t c) { return c < 128 ? c >= '0' && c <= '9' : in_ranges(kDigit, c); }
bool is_printable(char32_t c) { return c < 128 ? c >= 32 && c < 127 : !in_ranges(kUnprintable, c); }
bool is_cased_upper(char32_t c) {
  return c < 128 ? c >= 'A' && c <= 'Z' : difference(kLowerRuns, c) != 0 || special(kLowerSpecial, c);
}
bool is_cased_lower(char32_t c) {
  return c < 128 ? c >= 'a' && c <= 'z' : difference(kUpperRuns, c) != 0 || special(kUpperSpecial, c);
}

std::string to_upper(std::string_view text) {
  std::string out;
  for (char32_t code : decode(text)) append_upper(out, code);
  return out;
}

std::string to_lower(std::string_view text) {
  std::string out;
  std::u32string codes = decode(text);
  for (size_t i = 0; i < codes.size(); ++i) append_lower_at(out, codes, i);
  return out;
}

std::string to_capitalized(std::string_view text) {
  std::string out;
  std::u32string codes = decode(text);
  for (size_t i = 0; i < codes.size(); ++i) i == 0 ? append_title(out, codes[i]) : append_lower_at(out, codes, i);
  return out;
}

std::string to_title(std::string_view text) {
  std::string out;
  std::u32string codes = decode(text);
  for (size_t i = 0; i < codes.size(); ++i)
    i > 0 && is_cased(codes[i - 1]) ? append_lower_at(out, codes, i) : append_title(out, codes[i]);
  return out;
}

std::string_view strip(std::string_view text, Side side, const std::string* chars) {
  std::u32string set = chars ? decode(*chars) : std::u32string();
  auto goes = [&](char32_t code) { return chars ? set.find(code) != std::u32string::npos : is_space(code); };
  if (side != Side::kRight) {
    while (!text.empty()) {
      size_t size = 1;
      while (size < text.size() && (text[size] & 0xc0) == 0x80) ++size;
      if (!goes(decode(text.substr(0, size))[0])) break;
      text.remove_prefix(size);
    }
  }
  if (side != Side::kLeft) {
    while (!text.empty()) {
      size_t start = text.size() - 1;
      while (start > 0 && (text[start] & 0xc0) == 0x80) --start;
      if (!goes(decode(text.substr(start))[0])) break;
      text.remove_suffix(text.size() - start);
    }
  }
  return text;
}

std::vector<std::string_view> split_space(std::string_view text, int64_t max_splits, bool from_right) {
  std::vector<std::string_view> parts;
  text = strip(text, from_right ? Side::kRight : Side::kLeft);
  while (!text.empty()) {
    if (max_splits >= 0 && static_cast<int64_t>(parts.size()) == max_splits) {
      parts.push_back(text);
      break;
    }
    if (from_right) {
      size_t start = text.size();
      while (start > 0) {  // back over one code point at a time
        size_t before = start - 1;
        while (before > 0 && (text[before] & 0xc0) == 0x80) --before;
        if (is_space(decode(text.substr(before, start - before))[0])) break;
        start = before;
      }
      parts.push_back(text.substr(start));
      text = strip(text.substr(0, start), Side::kRight);
    } else {
      size_t end = 0;
      while (end < text.size()) {
        size_t size = 1;
        while (end + size < text.size() && (text[end + size] & 0xc0) == 0x80) ++size;
        if (is_space(decode(text.substr(end, size))[0])) break;
        end += size;
      }
      parts.push_back(text.substr(0, end));
      text = strip(text.substr(end), Side::kLeft);
    }
  }
  if (from_right) std::reverse(parts.begin(), parts.end());
  return parts;
}

std::vector<std::string_view> split_lines(std::string_view text, bool keep_ends) {
  std::vector<std::string_view> lines;
  size_t start = 0;
  for (size_t i = 0; i < text.size();) {
    auto byte = static_cast<unsigned char>(text[i]);
    size_t end_size = 0;
    if (byte == '\r' && i + 1 < text.size() && text[i + 1] == '\n')
      end_size = 2;
    else if ((byte >= 10 && byte <= 13) || (byte >= 0x1c && byte <= 0x1e))
      end_size = 1;
    else if (text.substr(i, 2) == "\xc2\x85")
      end_size = 2;
    else if (text.substr(i, 3) == "\xe2\x80\xa8" || text.substr(i, 3) == "\xe2\x80\xa9")
      end_size = 3;
    if (end_size == 0) {
      ++i;
      continue;
    }
    lines.push_back(text.substr(start, i - start + (keep_ends ? end_size : 0)));
    i += end_size;
    start = i;
  }
  if (start < text.size()) lines.push_back(text.substr(start));
  return lines;
}

std::string string_repr(std::string_view text) {
  char quote = text.find('\'') != std::string_view::npos && text.find('"') == std::string_view::npos ? '"' : '\'';
  std::string out(1, quote);
  auto hex = [&](const char* prefix, char32_t code, int digits) {
    out += prefix;
    for (int shift = 4 * (digits - 1); shift >= 0; shift -= 4) out += "0123456789abcdef"[code >> shift & 15];
  };
  for (char32_t code : decode(text)) {
    if (code == static_cast<char32_t>(quote) || code == '\\') {
      out += '\\';
      out += static_cast<char>(code);
    } else if (code == '\n')
      out += "\\n";
    else if (code == '\r')
      out += "\\r";
    else if (code == '\t')
      out += "\\t";
    else if (is_printable(code))
      append_utf8(out, code);
    else if (code < 0x100)
      hex("\\x", code, 2);
    else if (code < 0x10000)
      hex("\\u", code, 4);
    else
      hex("\\U", code, 8);
  }
  return out + quote;
}

std::string float_repr(double value) {
  if (std::isnan(value)) return "nan";
  if (std::isinf(value)) return value < 0 ? "-inf" : "inf";
  char buffer[40];
  auto end = std::to_chars(buffer, buffer + sizeof buffer, value, std::chars_format::scientific).ptr;
  std::string_view text(buffer, static_cast<size_t>(end - buffer));
  std::string sign = text[0] == '-' ? "-" : "";
  if (!sign.empty()) text.remove_prefix(1);
  size_t e = text.find('e');
  std::string digits(1, text[0]);
  if (e > 2) digits += text.substr(2, e - 2);
  int exponent = std::stoi(std::string(text.substr(e + 1)));
  if (exponent < -4 || exponent >= 16) {
    if (digits.size() > 1) digits.insert(1, ".");
    std::string power = std::to_string(std::abs(exponent));
    return sign + digits + (exponent < 0 ? "e-" : "e+") + (power.size() < 2 ? "0" : "") + power;
  }
  if (exponent < 0) return sign + "0." + std::string(static_cast<size_t>(-exponent - 1), '0') + digits;
  size_t point = static_cast<size_t>(exponent) + 1;
  if (digits.size() <= point) return sign + digits + std::string(point - digits.size(), '0') + ".0";
  return sign + digits.substr(0, point) + "." + digits.substr(point);
}

namespace {

// Removes underscores between digits; false where one stands elsewhere.
bool drop_underscores(std::string_view text, std::string& out) {
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] != '_') {
      out += text[i];
    } else if (i == 0 || i + 1 == text.size() || !std::isalnum(static_cast<unsigned char>(text[i - 1])) ||
               !std::isalnum(static_cast<unsigned char>(text[i + 1]))) {
      return false;
    }
  }
  return true;
}

}  // namespace

bool parse_float(std::string_view text, double& value) {
  std::string digits;
  if (!drop_underscores(strip(text, Side::kBoth), digits)) return false;
  std::string_view rest = digits;
  bool negative = !rest.empty() && rest[0] == '-';
  if (negative || (!rest.empty() && rest[0] == '+')) rest.remove_prefix(1);
  if (rest.empty() || rest[0] == '-' || rest[0] == '+') return false;
  std::string lower = to_lower(rest);
  if (std::isalpha(static_cast<unsigned char>(rest[0])) && lower != "inf" && lower != "infinity" && lower != "nan")
    return false;
  auto [end, error] = std::from_chars(rest.data(), rest.data() + rest.size(), value);
  if (end != rest.data() + rest.size() || error == std::errc::invalid_argument) return false;
  if (error == std::errc::result_out_of_range) value = std::strtod(digits.c_str() + (digits[0] == '-'), nullptr);
  if (negative) value = -value;
  return true;
}

bool parse_int(std::string_view text, int base, int64_t& value) {
  text = strip(text, Side::kBoth);
  bool negative = !text.empty() && text[0] == '-';
  if (negative || (!text.empty() && text[0] == '+')) text.remove_prefix(1);
  if (text.size() > 1 && text[0] == '0') {
    char kind = static_cast<char>(text[1] | 32);
    int prefixed = kind == 'x' ? 16 : kind == 'o' ? 8 : kind == 'b' ? 2 : 0;
    if (prefixed != 0 && (base == prefixed || base == 0)) {
      text.remove_prefix(text.size() > 2 && text[2] == '_' ? 3 : 2);
      base = prefixed;
    }
  }
  if (base == 0) base = 10;
  std::string digits;
  if (!drop_underscores(text, digits) || digits.empty() || digits[0] == '-') return false;
  uint64_t magnitude = 0;
  auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), magnitude, base);
  if (end != digits.data() + digits.size() || error == std::errc::invalid_argument) return false;
  if (error == std::errc::result_out_of_range || magnitude > static_cast<uint64_t>(INT64_MAX))
    fail("integers beyond 64 bits are not supported");
  value = negative ? -static_cast<int64_t>(magnitude) : static_cast<int64_t>(magnitude);
  return true;
}

}  // namespace trireme::jinja
