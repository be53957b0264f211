#include <map>

#include "base/check.h"
#include "data/tok_components.h"
#include "data/tok_unicode.h"

namespace trireme::tok {
namespace {

using Step = std::function<void(Words&)>;

// How a split treats what its pattern matched.
enum class Behavior { kRemoved, kIsolated, kMergedWithPrevious, kMergedWithNext, kContiguous };

struct Part {
  Span span;
  bool match;
};

void join(const std::vector<Part>& parts, Behavior behavior, std::vector<Span>& out) {
  std::vector<Part> joined;
  for (const Part& part : parts) {
    Part* last = joined.empty() ? nullptr : &joined.back();
    bool to_previous = behavior == Behavior::kMergedWithPrevious && part.match && last && !last->match;
    bool to_next = behavior == Behavior::kMergedWithNext && !part.match && last && last->match;
    if (to_previous || to_next || (behavior == Behavior::kContiguous && last && part.match == last->match)) {
      last->span.last = part.span.last;
      if (behavior != Behavior::kContiguous) last->match = part.match;
    } else if (behavior != Behavior::kRemoved || !part.match) {
      joined.push_back(part);
    }
  }
  for (const Part& part : joined)
    if (part.span.last > part.span.first) out.push_back(part.span);
}

// Cuts every word where `find` matches; `invert`: where it does not.
Step splitter(Finder find, bool invert, Behavior behavior) {
  return [=](Words& words) {
    std::vector<Span> found, out;
    std::vector<Part> parts;
    out.reserve(words.spans.size() + words.text.size() / 4);
    for (Span word : words.spans) {
      found.clear();
      find(std::string_view(words.text.bytes).substr(word.first, word.last - word.first), word.first, found);
      if (behavior == Behavior::kIsolated || (behavior == Behavior::kRemoved && !invert)) {  // needs no list of parts
        uint32_t from = word.first;
        for (Span match : found) {
          if (match.first > from) out.push_back({from, match.first});
          if (behavior == Behavior::kIsolated && match.last > match.first) out.push_back(match);
          from = match.last;
        }
        if (word.last > from) out.push_back({from, word.last});
        continue;
      }
      parts.clear();
      uint32_t from = word.first;
      for (Span match : found) {
        if (match.first > from) parts.push_back({{from, match.first}, invert});
        parts.push_back({match, !invert});
        from = match.last;
      }
      if (word.last > from) parts.push_back({{from, word.last}, invert});
      join(parts, behavior, out);
    }
    words.spans = std::move(out);
  };
}

Behavior read_behavior(const Json& json, const std::string& place) {
  static const std::map<std::string, Behavior> names = {{"Removed", Behavior::kRemoved},
                                                        {"Isolated", Behavior::kIsolated},
                                                        {"MergedWithPrevious", Behavior::kMergedWithPrevious},
                                                        {"MergedWithNext", Behavior::kMergedWithNext},
                                                        {"Contiguous", Behavior::kContiguous}};
  auto name = json_get<std::string>(json, "behavior", place);
  auto it = names.find(name);
  if (it == names.end())
    throw DataError(
        str(place, ": behavior \"", name,
            "\" is not known; known are Removed, Isolated, MergedWithPrevious, MergedWithNext, Contiguous"));
  return it->second;
}

// Each character of one of these classes is a match.
Finder find_class(uint16_t classes) {
  return [classes](std::string_view text, uint32_t shift, std::vector<Span>& out) {
    for (size_t i = 0, n; i < text.size(); i += n) {
      n = char_length(text, i);
      if (char_class(code_point(text, i)) & classes)
        out.push_back({shift + static_cast<uint32_t>(i), shift + static_cast<uint32_t>(i + n)});
    }
  };
}

// Runs of word characters, and runs of what is neither those nor space.
void find_words(std::string_view text, uint32_t shift, std::vector<Span>& out) {
  auto kind = [&](size_t at) { return char_class(code_point(text, at)) & (kWordChar | kSpace); };
  for (size_t i = 0; i < text.size();) {
    size_t first = i;
    int what = kind(i);
    while (i < text.size() && kind(i) == what) i += char_length(text, i);
    if (!(what & kSpace)) out.push_back({shift + static_cast<uint32_t>(first), shift + static_cast<uint32_t>(i)});
  }
}

// The words' text is written anew: `rewrite(text, word, out)` appends what a word becomes.
template <typename Rewrite>
void rewrite_words(Words& words, Rewrite rewrite) {
  Words out{words.text.like(), {}};
  out.spans.reserve(words.spans.size());
  for (Span word : words.spans) {
    auto first = static_cast<uint32_t>(out.text.size());
    rewrite(words.text, word, out.text);
    out.spans.push_back({first, static_cast<uint32_t>(out.text.size())});
  }
  words = std::move(out);
}

void add_prefix_space(Words& words) {
  bool all = true;
  for (Span word : words.spans) all = all && words.text.bytes[word.first] == ' ';
  if (all) return;
  rewrite_words(words, [](const Text& text, Span word, Text& out) {
    if (text.bytes[word.first] != ' ') out.append_for(" ", text, word.first);
    out.append(text, word.first, word.last);
  });
}

std::vector<Step> byte_level(const Json& json, const std::string& place) {
  std::vector<Step> steps;
  if (json_get_or<bool>(json, "add_prefix_space", true, place)) steps.push_back(add_prefix_space);
  if (json_get_or<bool>(json, "use_regex", true, place)) {
    Finder find = [regex = Regex(kGpt2Pattern, place)](std::string_view text, uint32_t shift, std::vector<Span>& out) {
      regex.matches(text, shift, out);
    };
    steps.push_back(splitter(find, false, Behavior::kIsolated));
  }
  return steps;
}

std::vector<Step> metaspace(const Json& json, const std::string& place, bool* asks_for_start) {
  std::string mark = one_character(json, "replacement", "\xE2\x96\x81", place), scheme = metaspace_scheme(json, place);
  *asks_for_start |= scheme == "first";
  std::vector<Step> steps;
  steps.push_back([=](Words& words) {
    rewrite_words(words, [&](const Text& text, Span word, Text& out) {
      bool whole = word.first == 0 && word.last == text.size();  // nothing has been cut off yet
      bool first = text.aligned && !whole ? text.begin[word.first] == 0 : text.at_start && word.first == 0;
      bool marked = text.bytes[word.first] == ' ' || text.bytes.compare(word.first, mark.size(), mark) == 0;
      if (!marked && (scheme == "always" || (scheme == "first" && first))) out.append_for(mark, text, word.first);
      for (size_t at = word.first; at < word.last;) {
        size_t space = std::min<size_t>(text.bytes.find(' ', at), word.last);
        out.append(text, at, space);
        if (space < word.last) out.append_for(mark, text, space);
        at = space + 1;
      }
    });
  });
  if (json_get_or<bool>(json, "split", true, place))
    steps.push_back(splitter(find_string(mark), false, Behavior::kMergedWithNext));
  return steps;
}

}  // namespace

void words_to_byte_chars(Words& words) {
  rewrite_words(words, [](const Text& text, Span word, Text& out) {
    for (size_t i = word.first; i < word.last; ++i)
      out.append_for(byte_char(static_cast<unsigned char>(text.bytes[i])), text, i);
  });
}

PreTokenizer read_pre_tokenizer(const Json& json, const std::string& source) {
  PreTokenizer out;
  if (json.is_null()) return out;
  std::string type = type_of(json, source, "pre_tokenizer"), place = str(source, ": pre_tokenizer ", type);
  auto add = [&](std::vector<Step> steps) { std::move(steps.begin(), steps.end(), std::back_inserter(out.steps)); };
  auto behavior = [&](Behavior fallback) { return json.contains("behavior") ? read_behavior(json, place) : fallback; };
  if (type == "Sequence") {
    for (const Json& part : list_of(json, "pretokenizers", place)) {
      if (out.bytes_to_chars) add({words_to_byte_chars});  // only the last one can be left to the model
      PreTokenizer inner = read_pre_tokenizer(part, source);
      add(std::move(inner.steps));
      out.bytes_to_chars = inner.bytes_to_chars;
      out.asks_for_start |= inner.asks_for_start;
    }
  } else if (type == "ByteLevel") {
    add(byte_level(json, place));
    out.bytes_to_chars = true;
  } else if (type == "Metaspace") {
    add(metaspace(json, place, &out.asks_for_start));
  } else if (type == "Split") {
    bool invert = json_get_or<bool>(json, "invert", false, place);
    add({splitter(read_finder(json, place), invert, read_behavior(json, place))});
  } else if (type == "Digits") {
    bool single = json_get_or<bool>(json, "individual_digits", false, place);
    add({splitter(find_class(kNumeric), false, single ? Behavior::kIsolated : Behavior::kContiguous)});
  } else if (type == "Punctuation") {
    add({splitter(find_class(kPunctuation), false, behavior(Behavior::kIsolated))});
  } else if (type == "Whitespace") {
    add({splitter(find_words, true, Behavior::kRemoved)});
  } else if (type == "WhitespaceSplit") {
    add({splitter(find_class(kSpace), false, Behavior::kRemoved)});
  } else if (type == "BertPreTokenizer") {
    add({splitter(find_class(kSpace), false, Behavior::kRemoved),
         splitter(find_class(kPunctuation), false, Behavior::kIsolated)});
  } else if (type == "CharDelimiterSplit") {
    add({splitter(find_string(one_character(json, "delimiter", nullptr, place)), false, Behavior::kRemoved)});
  } else {
    refuse_type(source, "pre_tokenizer", type);
  }
  return out;
}

}  // namespace trireme::tok
