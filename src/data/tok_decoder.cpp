#include <algorithm>

#include "base/check.h"
#include "data/tok_components.h"

namespace trireme::tok {
namespace {

constexpr const char* kReplacement = "\xEF\xBF\xBD";

// Steps that need whole tokens, each one by itself: waits until a token is complete, then hands on what `change` makes
// of it.
class MapStep : public DecodeStep {
 public:
  using Change = std::function<void(std::string& token, bool first)>;
  explicit MapStep(Change change) : change_(std::move(change)) {}
  void put(std::string_view part, bool complete) override {
    token_ += part;
    if (!complete) return;
    change_(token_, first_);
    first_ = false;
    std::string token = std::move(token_);
    token_.clear();
    next->put(token, true);
  }
  void finish() override {
    first_ = true;
    next->finish();
  }

 private:
  Change change_;
  std::string token_;
  bool first_ = true;
};

class FuseStep : public DecodeStep {
 public:
  void put(std::string_view part, bool) override { next->put(part, false); }
  void finish() override {
    next->put("", true);
    next->finish();
  }
};

// Printable characters back to bytes; a token with another character is taken as it stands. All become one text, in
// which each maximal broken part is one U+FFFD.
class ByteLevelStep : public DecodeStep {
 public:
  void put(std::string_view part, bool complete) override {
    token_ += part;
    if (!complete) return;
    size_t before = bytes_.size();
    for (size_t i = 0; i < token_.size(); i += char_length(token_, i)) {
      int byte = char_byte(code_point(token_, i));
      if (byte < 0) {
        bytes_.resize(before);
        bytes_ += token_;
        break;
      }
      bytes_ += static_cast<char>(byte);
    }
    token_.clear();
    hand_on(false);
  }
  void finish() override {
    hand_on(true);
    next->put("", true);
    next->finish();
  }

 private:
  void hand_on(bool all) {
    std::string text;
    size_t i = 0;
    while (i < bytes_.size()) {
      size_t broken = 1;
      bool cut_off = false;
      size_t n = valid_length(bytes_, i, &broken, &cut_off);
      if (n == 0 && cut_off && !all) break;  // the rest of the character may follow
      if (n > 0)
        text.append(bytes_, i, n);
      else
        text += kReplacement;
      i += n > 0 ? n : broken;
    }
    bytes_.erase(0, i);
    if (!text.empty()) next->put(text, false);
  }
  std::string token_, bytes_;
};

// Runs of <0x..> tokens become their bytes; a run that is no UTF-8 gives one U+FFFD for each token.
class ByteFallbackStep : public DecodeStep {
 public:
  void put(std::string_view part, bool complete) override {
    token_ += part;
    if (!complete) return;
    int byte = byte_of(token_);
    if (byte >= 0) {
      run_ += static_cast<char>(byte);
    } else {
      end_run();
      next->put(token_, true);
    }
    token_.clear();
  }
  void finish() override {
    end_run();
    next->finish();
  }

 private:
  static int byte_of(std::string_view token) {
    auto digit = [](char c) {
      return c >= '0' && c <= '9'   ? c - '0'
             : c >= 'a' && c <= 'f' ? c - 'a' + 10
             : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                    : -1;
    };
    if (token.size() != 6 || !token.starts_with("<0x") || token[5] != '>') return -1;
    int high = digit(token[3]), low = digit(token[4]);
    if (token[3] == '+') return low;  // as Rust reads a number
    return high < 0 || low < 0 ? -1 : high * 16 + low;
  }
  void end_run() {
    if (run_.empty()) return;
    if (valid_utf8(run_))
      next->put(run_, true);
    else
      for (size_t i = 0; i < run_.size(); ++i) next->put(kReplacement, true);
    run_.clear();
  }
  std::string token_, run_;
};

// Takes up to `start` characters `content` off the beginning of each token and up to `stop` off its end.
class StripStep : public DecodeStep {
 public:
  StripStep(std::string content, size_t start, size_t stop)
      : content_(std::move(content)), start_(start), stop_(stop) {}
  void put(std::string_view part, bool complete) override {
    token_ += part;
    if (beginning_) {
      while (stripped_ < start_ && token_.starts_with(content_)) token_.erase(0, content_.size()), ++stripped_;
      if (stripped_ < start_ && token_.empty()) return end(complete);
      beginning_ = false;
    }
    size_t keep = token_.size(), held = 0;  // what the end of the token could still strip
    while (held < stop_ && keep >= content_.size() &&
           token_.compare(keep - content_.size(), content_.size(), content_) == 0)
      keep -= content_.size(), ++held;
    if (keep > 0) next->put(std::string_view(token_).substr(0, keep), false);
    token_.erase(0, keep);
    end(complete);
  }
  void finish() override { next->finish(); }

 private:
  void end(bool complete) {
    if (!complete) return;
    token_.clear();
    stripped_ = 0;
    beginning_ = true;
    next->put("", true);
  }
  std::string content_, token_;
  size_t start_, stop_, stripped_ = 0;
  bool beginning_ = true;
};

void replace_all(std::string& text, std::string_view from, std::string_view to) {
  size_t at = text.find(from), done = 0;
  if (at == std::string::npos) return;
  std::string out;
  for (; at != std::string::npos; at = text.find(from, done)) {
    out.append(text, done, at - done) += to;
    done = at + from.size();
  }
  text = out.append(text, done);
}

MapStep::Change word_piece(const Json& json, const std::string& place) {
  auto prefix = json_get_or<std::string>(json, "prefix", "##", place);
  bool cleans = json_get_or<bool>(json, "cleanup", true, place);
  return [=](std::string& token, bool first) {
    if (!first) {
      if (token.starts_with(prefix))
        token.erase(0, prefix.size());
      else
        token.insert(0, " ");
    }
    if (!cleans) return;
    for (auto [from, to] : {std::pair{" .", "."},
                            {" ?", "?"},
                            {" !", "!"},
                            {" ,", ","},
                            {" ' ", "'"},
                            {" n't", "n't"},
                            {" 'm", "'m"},
                            {" do not", " don't"},
                            {" 's", "'s"},
                            {" 've", "'ve"},
                            {" 're", "'re"}})
      replace_all(token, from, to);
  };
}

MapStep::Change metaspace(const Json& json, const std::string& place) {
  std::string mark = one_character(json, "replacement", "\xE2\x96\x81", place);
  bool drops = metaspace_scheme(json, place) != "never";
  return [=](std::string& token, bool first) { replace_all(token, mark, first && drops ? "" : " "); };
}

}  // namespace

std::vector<DecodeStepMaker> read_decoder(const Json& json, const std::string& source) {
  auto map = [](MapStep::Change change) -> std::vector<DecodeStepMaker> {
    return {[change] { return std::make_unique<MapStep>(change); }};
  };
  if (json.is_null()) return map([](std::string& token, bool first) { token.insert(0, first ? "" : " "); });
  std::string type = type_of(json, source, "decoder"), place = str(source, ": decoder ", type);
  if (type == "Sequence") {
    std::vector<DecodeStepMaker> out;
    for (const Json& part : list_of(json, "decoders", place))
      for (auto& step : read_decoder(part, source)) out.push_back(std::move(step));
    return out;
  }
  if (type == "ByteLevel") return {[] { return std::make_unique<ByteLevelStep>(); }};
  if (type == "ByteFallback") return {[] { return std::make_unique<ByteFallbackStep>(); }};
  if (type == "Fuse") return {[] { return std::make_unique<FuseStep>(); }};
  if (type == "Metaspace") return map(metaspace(json, place));
  if (type == "WordPiece") return map(word_piece(json, place));
  if (type == "Replace")
    return map([find = read_finder(json, place), content = json_get<std::string>(json, "content", place)](
                   std::string& token, bool) {
      Text text = text_of(token, false);
      text.limit = std::max(token.size(), size_t{1} << 20);
      replace(text, find, content);
      token = std::move(text.bytes);
    });
  if (type == "Strip") {
    std::string content = one_character(json, "content", nullptr, place);
    auto start = json_get<int64_t>(json, "start", place), stop = json_get<int64_t>(json, "stop", place);
    if (start < 0 || stop < 0) throw DataError(str(place, ": \"start\" and \"stop\" must not be negative"));
    return {
        [=] { return std::make_unique<StripStep>(content, static_cast<size_t>(start), static_cast<size_t>(stop)); }};
  }
  refuse_type(source, "decoder", type);
}

}  // namespace trireme::tok
