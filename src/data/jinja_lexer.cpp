// Cuts a template into tokens with jinja2's rules of white space: trim_blocks and lstrip_blocks are on.
#include <algorithm>
#include <charconv>

#include "data/jinja_node.h"
#include "data/jinja_text.h"

namespace trireme::jinja {
namespace {

bool is_name_start(char c) { return std::isalpha(static_cast<unsigned char>(c)) || c == '_'; }
bool is_name_part(char c) { return std::isalnum(static_cast<unsigned char>(c)) || c == '_'; }
bool digit(char c) { return c >= '0' && c <= '9'; }

class Lexer {
 public:
  explicit Lexer(const std::string& source) {
    // All line ends become \n, and one at the very end goes.
    for (size_t i = 0; i < source.size(); ++i) {
      if (source[i] == '\r') {
        text_ += '\n';
        if (i + 1 < source.size() && source[i + 1] == '\n') ++i;
      } else {
        text_ += source[i];
      }
    }
    if (text_.ends_with('\n')) text_.pop_back();
  }

  std::vector<Token> run() {
    while (at_ < text_.size()) read_data();
    add(TokenKind::kEnd, "");
    return std::move(tokens_);
  }

 private:
  [[noreturn]] void error(const std::string& message) { throw TemplateError{message, line_}; }
  void add(TokenKind kind, std::string text) { tokens_.push_back({kind, line_, std::move(text), {}}); }
  bool looking_at(std::string_view what) const { return std::string_view(text_).substr(at_).starts_with(what); }

  void advance(size_t count) {
    line_ += static_cast<int>(std::count(text_.begin() + static_cast<std::ptrdiff_t>(at_),
                                         text_.begin() + static_cast<std::ptrdiff_t>(at_ + count), '\n'));
    at_ += count;
    if (count > 0) line_starting_ = text_[at_ - 1] == '\n';
  }

  // The number of bytes of white space from `at`.
  size_t space_at(size_t at) const {
    std::string_view rest = std::string_view(text_).substr(at);
    return rest.size() - strip(rest, Side::kLeft).size();
  }

  // The data before a tag at `end` with `sign` ('-', '+' or 0), as the tag leaves it.
  std::string strip_before(size_t end, char sign, bool variable) const {
    std::string_view data = std::string_view(text_).substr(at_, end - at_);
    if (sign == '-') return std::string(strip(data, Side::kRight));
    if (sign != '+' && !variable) {
      size_t line_start = data.rfind('\n') + 1;
      if ((line_start > 0 || line_starting_) && strip(data.substr(line_start), Side::kLeft).empty())
        data = data.substr(0, line_start);
    }
    return std::string(data);
  }

  char sign_at(size_t at) const { return at < text_.size() && (text_[at] == '-' || text_[at] == '+') ? text_[at] : 0; }

  void read_data() {
    size_t tag = at_;
    for (;; ++tag) {
      tag = text_.find('{', tag);
      if (tag == std::string::npos || tag + 1 >= text_.size()) {
        add(TokenKind::kData, text_.substr(at_));
        at_ = text_.size();
        return;
      }
      char next = text_[tag + 1];
      if (next == '%' || next == '{' || next == '#') break;
    }
    char kind = text_[tag + 1], sign = sign_at(tag + 2);
    std::string data = strip_before(tag, sign, kind == '{');
    if (!data.empty()) add(TokenKind::kData, data);
    advance(tag - at_);
    advance(sign ? 3 : 2);
    if (kind == '#') {
      skip_comment();
    } else if (kind == '{') {
      add(TokenKind::kVariableBegin, "");
      read_code(false);
    } else if (!read_raw()) {
      add(TokenKind::kBlockBegin, "");
      read_code(true);
    }
  }

  void skip_comment() {
    size_t end = text_.find("#}", at_);
    if (end == std::string::npos) error("Missing end of comment tag");
    char sign = end > at_ ? sign_at(end - 1) : 0;
    advance(end + 2 - at_);
    after_tag(sign);
  }

  // White space after a block or comment: '-' takes all, '+' none, otherwise one line end goes.
  void after_tag(char sign) {
    if (sign == '-')
      advance(space_at(at_));
    else if (sign != '+' && looking_at("\n"))
      advance(1);
  }

  bool read_raw() {
    size_t at = at_ + space_at(at_);
    if (std::string_view(text_).substr(at, 3) != "raw") return false;
    at += 3;
    at += space_at(at);
    bool minus = std::string_view(text_).substr(at).starts_with("-%}");
    if (!minus && !std::string_view(text_).substr(at).starts_with("%}")) return false;
    advance(at + (minus ? 3 : 2) - at_);
    if (minus) advance(space_at(at_));
    for (size_t tag = text_.find("{%", at_); tag != std::string::npos; tag = text_.find("{%", tag + 1)) {
      char sign = sign_at(tag + 2);
      size_t end = tag + (sign ? 3 : 2);
      end += space_at(end);
      if (std::string_view(text_).substr(end, 6) != "endraw") continue;
      end += 6;
      end += space_at(end);
      char end_sign = sign_at(end);
      if (end_sign) ++end;
      if (std::string_view(text_).substr(end, 2) != "%}") continue;
      std::string data = strip_before(tag, sign, false);
      if (!data.empty()) add(TokenKind::kData, data);
      advance(end + 2 - at_);
      after_tag(end_sign);
      return true;
    }
    error("Missing end of raw directive");
  }

  // Tokens up to the end of the tag.
  void read_code(bool block) {
    std::string open;  // brackets that wait for their end
    const char* end = block ? "%}" : "}}";
    while (true) {
      if (open.empty()) {
        char sign = looking_at(std::string("-") + end) ? '-' : block && looking_at(std::string("+") + end) ? '+' : 0;
        if (sign || looking_at(end)) {
          add(block ? TokenKind::kBlockEnd : TokenKind::kVariableEnd, "");
          advance(sign ? 3 : 2);
          if (block || sign == '-') after_tag(sign);
          return;
        }
      }
      if (at_ >= text_.size()) {  // the parser says which tag is open
        return;
      }
      if (size_t space = space_at(at_)) {
        advance(space);
      } else if (digit(text_[at_])) {
        read_number();
      } else if (is_name_start(text_[at_])) {
        size_t stop = at_;
        while (stop < text_.size() && is_name_part(text_[stop])) ++stop;
        add(TokenKind::kName, text_.substr(at_, stop - at_));
        advance(stop - at_);
      } else if (text_[at_] == '\'' || text_[at_] == '"') {
        read_string();
      } else {
        read_operator(open);
      }
    }
  }

  void read_operator(std::string& open) {
    static constexpr std::string_view kTwo[] = {"//", "**", "==", "!=", ">=", "<="};
    std::string_view rest = std::string_view(text_).substr(at_);
    std::string op(1, rest[0]);
    for (std::string_view two : kTwo)
      if (rest.starts_with(two)) op = two;
    if (op.size() == 1 && std::string_view("+-/*%~[](){}><=.:|,;").find(op[0]) == std::string_view::npos) {
      size_t size = 1;
      while (size < rest.size() && (rest[size] & 0xc0) == 0x80) ++size;
      error("unexpected char " + string_repr(rest.substr(0, size)) + " at " +
            std::to_string(count_codes(text_.substr(0, at_))));
    }
    if (op == "{" || op == "(" || op == "[") open += op == "{" ? '}' : op == "(" ? ')' : ']';
    if (op == "}" || op == ")" || op == "]") {
      if (open.empty()) error("unexpected '" + op + "'");
      if (open.back() != op[0]) error("unexpected '" + op + "', expected '" + open.back() + "'");
      open.pop_back();
    }
    add(TokenKind::kOperator, op);
    advance(op.size());
  }

  // digits with single underscores between them, from `at`; returns the end
  template <typename Is>
  size_t digits_end(size_t at, Is is) const {
    size_t end = at;
    while (end < text_.size() &&
           (is(text_[end]) || (text_[end] == '_' && end > at && end + 1 < text_.size() && is(text_[end + 1]))))
      ++end;
    return end;
  }

  void read_number() {
    size_t end = digits_end(at_, digit), stop = end;
    bool real = false;
    if (at_ == 0 || text_[at_ - 1] != '.') {
      if (stop + 1 < text_.size() && text_[stop] == '.' && digit(text_[stop + 1])) {
        stop = digits_end(stop + 1, digit);
        real = true;
      }
      if (stop < text_.size() && (text_[stop] | 32) == 'e') {
        size_t power = stop + 1 + (stop + 1 < text_.size() && (text_[stop + 1] == '+' || text_[stop + 1] == '-'));
        if (power < text_.size() && digit(text_[power])) {
          stop = digits_end(power, digit);
          real = true;
        }
      }
    }
    Token token{TokenKind::kNumber, line_, "", {}};
    if (real) {
      double value = 0;
      parse_float(std::string_view(text_).substr(at_, stop - at_), value);
      token.number = Value::real(value);
    } else {
      stop = end;
      char prefix = at_ + 1 < text_.size() && text_[at_] == '0' ? static_cast<char>(text_[at_ + 1] | 32) : ' ';
      int base = prefix == 'x' ? 16 : prefix == 'o' ? 8 : prefix == 'b' ? 2 : 10;
      if (base != 10) {
        size_t first = at_ + 2 + (at_ + 2 < text_.size() && text_[at_ + 2] == '_');
        size_t last = digits_end(first, [base](char c) {
          int value = digit(c) ? c - '0' : (c | 32) >= 'a' && (c | 32) <= 'f' ? (c | 32) - 'a' + 10 : 99;
          return value < base;
        });
        if (last > first)
          stop = last;
        else
          base = 10;
      }
      if (base == 10 && text_[at_] == '0') {  // 0, 00, 0_0: a following digit is another token
        stop = at_ + 1;
        while (stop < end && (text_[stop] == '0' || (text_[stop] == '_' && text_[stop + 1] == '0'))) ++stop;
      }
      int64_t value = 0;
      try {
        parse_int(std::string_view(text_).substr(at_, stop - at_), base == 10 ? 10 : 0, value);
      } catch (const TemplateError& overflow) {
        error(overflow.message);
      }
      token.number = Value::integer(value);
    }
    tokens_.push_back(std::move(token));
    advance(stop - at_);
  }

  void read_string() {
    char quote = text_[at_];
    size_t end = at_ + 1;
    while (end < text_.size() && text_[end] != quote) end += text_[end] == '\\' ? 2 : 1;
    if (end >= text_.size())
      error("unexpected char " + string_repr(std::string(1, quote)) + " at " +
            std::to_string(count_codes(text_.substr(0, at_))));
    std::string_view raw = std::string_view(text_).substr(at_ + 1, end - at_ - 1);
    add(TokenKind::kString, unescape(raw));
    advance(end + 1 - at_);
  }

  std::string unescape(std::string_view raw) {
    std::string out;
    for (size_t i = 0; i < raw.size(); ++i) {
      if (raw[i] != '\\') {
        out += raw[i];
        continue;
      }
      char c = raw[++i];
      static constexpr std::string_view kFrom = "\\'\"abfnrtv", kTo = "\\'\"\a\b\f\n\r\t\v";
      if (size_t known = kFrom.find(c); known != std::string_view::npos) {
        out += kTo[known];
      } else if (c == '\n') {
      } else if (c >= '0' && c <= '7') {
        char32_t code = 0;
        for (int n = 0; n < 3 && i < raw.size() && raw[i] >= '0' && raw[i] <= '7'; ++n)
          code = code * 8 + (raw[i++] - '0');
        --i;
        append_utf8(out, code);
      } else if (c == 'x' || c == 'u' || c == 'U') {
        size_t size = c == 'x' ? 2 : c == 'u' ? 4 : 8;
        uint32_t code = 0;
        std::string_view hex = raw.substr(i + 1, size);
        auto [stop, failed] = std::from_chars(hex.data(), hex.data() + hex.size(), code, 16);
        if (hex.size() < size || stop != hex.data() + hex.size() || failed != std::errc())
          error("truncated \\" + std::string(1, c) + (c == 'x' ? "XX" : c == 'u' ? "XXXX" : "XXXXXXXX") + " escape");
        if (code > 0x10ffff) error("illegal Unicode character");
        if (code >= 0xd800 && code < 0xe000) error("a surrogate (\\ud800 to \\udfff) is not a character");
        append_utf8(out, code);
        i += size;
      } else if (c == 'N') {
        error("the escape \\N{...} is not supported");
      } else {
        out += '\\';
        out += c;
      }
    }
    return out;
  }

  std::string text_;
  size_t at_ = 0;
  int line_ = 1;
  bool line_starting_ = true;
  std::vector<Token> tokens_;
};

}  // namespace

std::vector<Token> tokenize(const std::string& source) { return Lexer(source).run(); }

}  // namespace trireme::jinja
