// Python's text rules on UTF-8: lengths and places count code points.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace trireme::jinja {

std::u32string decode(std::string_view text);
void append_utf8(std::string& out, char32_t code);
std::string encode(std::u32string_view codes);
bool is_ascii(std::string_view text);
size_t count_codes(std::string_view text);

bool is_space(char32_t code);  // str.isspace, and \s of a regular expression
bool is_alpha(char32_t code);
bool is_digit(char32_t code);
bool is_printable(char32_t code);
bool is_cased_upper(char32_t code);
bool is_cased_lower(char32_t code);

std::string to_upper(std::string_view text);
std::string to_lower(std::string_view text);
std::string to_capitalized(std::string_view text);  // first letter as in a title, the rest lower
std::string to_title(std::string_view text);        // str.title

enum class Side { kLeft, kRight, kBoth };
// Removes code points of `chars`; `chars` null: white space.
std::string_view strip(std::string_view text, Side side, const std::string* chars = nullptr);

std::vector<std::string_view> split_space(std::string_view text, int64_t max_splits, bool from_right);
std::vector<std::string_view> split_lines(std::string_view text, bool keep_ends);

std::string string_repr(std::string_view text);
std::string float_repr(double value);
// A number as float(text) and int(text, base) read it; false where Python raises ValueError. `base` 0: by prefix.
bool parse_float(std::string_view text, double& value);
bool parse_int(std::string_view text, int base, int64_t& value);

}  // namespace trireme::jinja
