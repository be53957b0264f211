#include "data/tokenizer.h"

#include <algorithm>
#include <filesystem>

#include "base/check.h"
#include "base/file.h"
#include "data/tok_pipeline.h"
#include "data/tok_unicode.h"

namespace trireme {
namespace {

using tok::Pipeline;
using tok::Text;

constexpr size_t kMaxTextBytes = size_t{256} << 20;  // places in a text are numbers of 32 bits

// Cuts `text` at the tokens; `part(piece, id)` gets what stands between them (id -1) and them.
template <typename F>
void cut(const tok::AddedTokens& tokens, Text text, F part) {
  std::vector<tok::AddedTokens::Part> parts;
  if (!tokens.cut(text.bytes, parts)) return part(std::move(text), -1);
  for (const auto& [span, id] : parts) part(text.slice(span.first, span.last), id);
}

// `on_token(text, id)` for each added token, `on_words(words)` for the text between them, cut into words, in their
// order.
template <typename OnToken, typename OnWords>
void run(const Pipeline& p, std::string_view utf8, bool aligned, OnToken on_token, OnWords on_words) {
  if (utf8.size() > kMaxTextBytes)
    throw DataError(
        str("a text of ", utf8.size(), " bytes is too long to be tokenised at once; allowed are ", kMaxTextBytes));
  if (!tok::valid_utf8(utf8)) throw DataError("a text to be tokenised is not valid UTF-8");
  cut(p.raw, tok::text_of(utf8, aligned), [&](Text raw, int64_t raw_id) {
    if (raw_id >= 0) return on_token(raw, raw_id);
    if (p.normalizer) p.normalizer(raw);
    cut(p.normalized, std::move(raw), [&](Text text, int64_t id) {
      if (text.size() == 0) return;
      if (id >= 0) return on_token(text, id);
      auto size = static_cast<uint32_t>(text.size());
      tok::Words words{std::move(text), {{0, size}}};
      p.pre_tokenizer.run(words);
      p.model->cut(words);
      on_words(words);
    });
  });
}

// Takes the white space at the ends of a token out of its offsets.
void trim(const tok::PostStep& step, std::string_view token, bool first, std::pair<int64_t, int64_t>& offsets) {
  auto space_at = [&](size_t i) {
    uint32_t c = tok::code_point(token, i);
    return c == 0x120 || (tok::char_class(c) & tok::kSpace) != 0;  // U+0120: a space among byte characters
  };
  int64_t leading = 0, trailing = 0;
  for (size_t i = 0; i < token.size() && space_at(i); i += tok::char_length(token, i)) ++leading;
  for (size_t i = token.size(); i > 0 && space_at(tok::previous_char(token, i)); i = tok::previous_char(token, i))
    ++trailing;
  // A single one at the beginning may be the prefix that was put there, which stands for no character.
  if (leading == 1 && (first || offsets.first == 0) && step.adds_prefix_space) leading = 0;
  offsets.first = std::min(offsets.first + leading, offsets.second);
  if (offsets.second >= trailing) offsets.second = std::max(offsets.second - trailing, offsets.first);
}

}  // namespace

Tokenizer Tokenizer::load(const std::string& path) {
  std::string file = std::filesystem::is_directory(path) ? path + "/tokenizer.json" : path;
  if (!std::filesystem::exists(file))
    throw DataError(str(file, " is not there; a folder with a tokenizer.json is needed (set model.tokenizer)"));
  return parse(read_file(file, 512ull << 20), file);
}

Tokenizer Tokenizer::parse(std::string_view json, const std::string& source) {
  return Tokenizer(tok::read_pipeline(json, source));
}

Encoding Tokenizer::encode(std::string_view text, bool add_special_tokens) const {
  const Pipeline& p = *pipeline_;
  Encoding out;
  std::vector<std::string> added;  // as they stand in the text, [of ids that are added tokens]
  std::vector<size_t> added_at;
  std::vector<tok::Piece> pieces;
  run(
      p, text, true,
      [&](const Text& token, int64_t id) {
        added_at.push_back(out.ids.size());
        added.push_back(token.bytes);
        out.ids.push_back(id);
        out.offsets.emplace_back(token.begin.front(), token.end.back());
      },
      [&](const tok::Words& words) {
        for (size_t i = 0; i < words.spans.size(); ++i) {
          pieces.clear();
          p.model->encode(words.word(i), pieces);
          for (const auto& piece : pieces) {
            out.ids.push_back(piece.id);
            out.offsets.emplace_back(words.text.begin[words.spans[i].first + piece.begin],
                                     words.text.end[words.spans[i].first + piece.end - 1]);
          }
        }
      });
  out.special.assign(out.ids.size(), 0);
  size_t shift = 0;  // ids put before the text so far
  for (const tok::PostStep& step : p.post) {
    size_t next = 0;
    for (size_t i = 0; step.trims && i < out.ids.size(); ++i) {
      bool is_added = next < added_at.size() && added_at[next] + shift == i;
      trim(step, is_added ? added[next] : p.tokens.at(out.ids[i]), i == 0, out.offsets[i]);
      next += is_added;
    }
    if (!add_special_tokens) continue;
    auto put = [&](const std::vector<int64_t>& ids, size_t at) {
      auto place = static_cast<std::ptrdiff_t>(at);
      out.ids.insert(out.ids.begin() + place, ids.begin(), ids.end());
      out.offsets.insert(out.offsets.begin() + place, ids.size(), {0, 0});
      out.special.insert(out.special.begin() + place, ids.size(), 1);
    };
    put(step.before, 0);
    put(step.after, out.ids.size());
    shift += step.before.size();
  }
  return out;
}

std::vector<int64_t> Tokenizer::encode_ids(std::string_view text, bool add_special_tokens) const {
  const Pipeline& p = *pipeline_;
  tok::IdBuffer out(text.size() / 3);
  if (add_special_tokens)
    for (auto step = p.post.rbegin(); step != p.post.rend(); ++step)
      for (int64_t id : step->before) out.push(id);
  // Without a normalizer the beginning of the text is where it was; else only alignment can tell.
  run(
      p, text, p.pre_tokenizer.asks_for_start && p.normalizer, [&](const Text&, int64_t id) { out.push(id); },
      [&](const tok::Words& words) { p.model->encode(words, out); });
  if (add_special_tokens)
    for (const auto& step : p.post)
      for (int64_t id : step.after) out.push(id);
  return out.take();
}

std::string Tokenizer::decode(std::span<const int64_t> ids, bool skip_special) const {
  tok::DecodeState state(pipeline_, skip_special);
  for (int64_t id : ids) state.put(id);
  state.finish();
  return state.take();
}

int64_t Tokenizer::vocab_size() const { return pipeline_->vocab_size; }
std::optional<int64_t> Tokenizer::token_to_id(std::string_view token) const {
  auto it = pipeline_->ids.find(std::string(token));
  return it == pipeline_->ids.end() ? std::nullopt : std::optional(it->second);
}
std::string Tokenizer::id_to_token(int64_t id) const {
  auto it = pipeline_->tokens.find(id);
  return it == pipeline_->tokens.end() ? "" : it->second;
}
bool Tokenizer::is_special(int64_t id) const { return pipeline_->special.count(id) != 0; }
bool Tokenizer::is_added(int64_t id) const { return pipeline_->added.count(id) != 0; }
const std::string& Tokenizer::content_hash() const { return pipeline_->hash; }
const std::string& Tokenizer::source() const { return pipeline_->source; }

StreamDecoder::StreamDecoder(const Tokenizer& tokenizer, bool skip_special)
    : state_(std::make_unique<tok::DecodeState>(tokenizer.pipeline_, skip_special)) {}
StreamDecoder::~StreamDecoder() = default;
StreamDecoder::StreamDecoder(StreamDecoder&&) noexcept = default;
StreamDecoder& StreamDecoder::operator=(StreamDecoder&&) noexcept = default;

std::string StreamDecoder::push(int64_t id) {
  state_->put(id);
  return state_->take();
}

std::string StreamDecoder::finish() {
  state_->finish();
  return state_->take();
}

}  // namespace trireme
