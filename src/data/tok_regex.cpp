#define PCRE2_CODE_UNIT_WIDTH 8
#include "data/tok_regex.h"

#include <pcre2.h>

#include <algorithm>

#include "base/check.h"

namespace trireme::tok {
namespace {

constexpr const char* kSpaces = R"(\t-\r\x{85}\p{Z})";  // PCRE2's \s has U+180E too
constexpr const char* kWords =                          // PCRE2's \w leaves out marks
    R"(\p{L}\p{M}\p{Nd}\p{Nl}\p{Pc}\x{B2}\x{B3}\x{B9}\x{BC}-\x{BE}\x{24B6}-\x{24E9})"
    R"(\x{1F130}-\x{1F149}\x{1F150}-\x{1F169}\x{1F170}-\x{1F189})";

bool is_script(std::string_view name) {
  for (std::string_view script :
       {"Han",      "Hiragana", "Katakana", "Hangul",   "Bopomofo",   "Latin",    "Greek",    "Cyrillic",
        "Armenian", "Hebrew",   "Arabic",   "Syriac",   "Devanagari", "Bengali",  "Gurmukhi", "Gujarati",
        "Oriya",    "Tamil",    "Telugu",   "Kannada",  "Malayalam",  "Sinhala",  "Thai",     "Lao",
        "Tibetan",  "Myanmar",  "Georgian", "Ethiopic", "Khmer",      "Mongolian"})
    if (name == script) return true;
  return false;
}

// Oniguruma's pattern in PCRE2's words.
std::string translated(const std::string& in, const std::string& source) {
  auto refuse = [&](const char* what) {
    throw DataError(
        str(source, ": the regular expression ", in.substr(0, 200), " holds ", what, ", which is not supported"));
  };
  std::string out;
  bool in_set = false;
  for (size_t i = 0; i < in.size(); ++i) {
    char c = in[i];
    if (c == '\\' && i + 1 < in.size()) {
      char next = in[++i];
      auto set = [&](const char* members, bool inverted) {
        if (in_set && !inverted)
          out += members;
        else if (in_set)
          out += {c, next};  // as PCRE2 has it: a set cannot hold the inverse of another
        else
          out += str(inverted ? "[^" : "[", members, "]");
      };
      if (next == 's' || next == 'S')
        set(kSpaces, next == 'S');
      else if (next == 'w' || next == 'W')
        set(kWords, next == 'W');
      else if (next == 'h' || next == 'H')
        set("0-9a-fA-F", next == 'H');
      else if ((next == 'p' || next == 'P') && i + 1 < in.size() && in[i + 1] == '{') {
        // A script is its own characters alone, not those it shares (PCRE2's default since 10.40).
        size_t name = std::min(in.find_first_not_of("{^", i + 1), in.size()),
               end = std::min(in.find('}', name), in.size());
        out += {c, next};
        if (PCRE2_MAJOR * 100 + PCRE2_MINOR >= 1040 && is_script(in.substr(name, end - name))) {
          out += in.substr(i + 1, name - i - 1) + "sc:";
          i = name - 1;
        }
      } else {
        out += {c, next};
      }
    } else if (in_set) {
      if (c == '[' && in.compare(i, 2, "[:") != 0) refuse("a set inside a set");
      if (in.compare(i, 2, "&&") == 0) refuse("an intersection of sets (&&)");
      if (c == '[') {  // [:name:]
        size_t end = in.find(":]", i + 2);
        if (end == std::string::npos) refuse("a set inside a set");
        out.append(in, i, end + 2 - i);
        i = end + 1;
        continue;
      }
      in_set = c != ']';
      out += c;
    } else if (c == '[') {
      in_set = true;
      out += c;
      if (in.compare(i + 1, 1, "^") == 0) out += in[++i];
      if (in.compare(i + 1, 1, "]") == 0) out += in[++i];  // the first ] is a member
    } else if (c == '{' && in.compare(i, 2, "{,") == 0) {
      out += "{0";
    } else {
      out += c;
    }
  }
  return out;
}

struct Scratch {
  pcre2_match_data* data = pcre2_match_data_create(1, nullptr);  // the whole match is all that is asked for
  pcre2_match_context* context = pcre2_match_context_create(nullptr);
  pcre2_jit_stack* stack = pcre2_jit_stack_create(32 << 10, 8 << 20, nullptr);
  Scratch() {
    pcre2_set_match_limit(context, 10'000'000);
    pcre2_set_depth_limit(context, 100'000);
    pcre2_set_heap_limit(context, 64 << 10);
    pcre2_jit_stack_assign(context, nullptr, stack);
  }
  ~Scratch() {
    pcre2_match_data_free(data);
    pcre2_match_context_free(context);
    pcre2_jit_stack_free(stack);
  }
};

}  // namespace

Regex::Regex(const std::string& pattern, const std::string& source, bool by_hand) : source_(source) {
  if (by_hand) scanner_ = scanner_for(pattern);
  if (scanner_) return;
  int error = 0;
  PCRE2_SIZE at = 0;
  std::string ours = translated(pattern, source);
  pcre2_compile_context* context = pcre2_compile_context_create(nullptr);
  pcre2_set_newline(context, PCRE2_NEWLINE_LF);
  pcre2_set_parens_nest_limit(context, 100);
  pcre2_set_max_pattern_length(context, 1 << 16);
  // In Ruby's syntax ^ and $ are the ends of a line.
  pcre2_code* code = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(ours.data()), ours.size(),
                                   PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE, &error, &at, context);
  pcre2_compile_context_free(context);
  if (!code) {
    PCRE2_UCHAR text[200];
    pcre2_get_error_message(error, text, sizeof text);
    throw DataError(str(source, ": the regular expression ", pattern.substr(0, 200), " is wrong or not supported: ",
                        reinterpret_cast<const char*>(text), " (at character ", at, ")"));
  }
  pcre2_jit_compile(code, PCRE2_JIT_COMPLETE);
  code_ = std::shared_ptr<void>(code, [](void* c) { pcre2_code_free(static_cast<pcre2_code*>(c)); });
}

void Regex::matches(std::string_view text, uint32_t shift, std::vector<Span>& out) const {
  if (scanner_) return scanner_(text, shift, out);
  thread_local Scratch scratch;
  const auto* code = static_cast<const pcre2_code*>(code_.get());
  const PCRE2_SIZE* range = pcre2_get_ovector_pointer(scratch.data);
  auto subject = reinterpret_cast<PCRE2_SPTR>(text.data());
  bool any = false;
  for (size_t at = 0, last_end = 0; at <= text.size() && !text.empty();) {
    int found = pcre2_match(code, subject, text.size(), at, PCRE2_NO_UTF_CHECK, scratch.data, scratch.context);
    if (found == PCRE2_ERROR_JIT_STACKLIMIT)
      found =
          pcre2_match(code, subject, text.size(), at, PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT, scratch.data, scratch.context);
    if (found == PCRE2_ERROR_NOMATCH) break;
    if (found < 0) throw DataError(str(source_, ": the regular expression takes too long on this text"));
    size_t first = range[0], last = range[1];
    first = std::min(std::max(first, last_end), last);  // \K in a look-around may put it anywhere
    if (first == last && any && last == last_end) {     // an empty match where the last one ended: go on by a character
      at += at < text.size() ? char_length(text, at) : 1;
      continue;
    }
    out.push_back({shift + static_cast<uint32_t>(first), shift + static_cast<uint32_t>(last)});
    at = last_end = last;
    any = true;
  }
}

}  // namespace trireme::tok
