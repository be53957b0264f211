#include "data/tokenizer.h"

#include <utf8proc.h>

#include <algorithm>
#include <filesystem>

#include "base/check.h"
#include "base/file.h"
#include "base/hash.h"
#include "data/tok_pipeline.h"

namespace trireme {
namespace {

using tok::Text;

// A part of the text: an added token, or text for the model.
struct Part {
  Text text;
  int64_t id = -1;
};

bool is_space(uint32_t c) {
  auto category = utf8proc_category(static_cast<utf8proc_int32_t>(c));
  return (c >= 9 && c <= 13) || c == 0x85 || category == UTF8PROC_CATEGORY_ZS || category == UTF8PROC_CATEGORY_ZL || category == UTF8PROC_CATEGORY_ZP;
}

bool is_word(uint32_t c) {
  auto category = utf8proc_category(static_cast<utf8proc_int32_t>(c));
  return c == '_' || (category >= UTF8PROC_CATEGORY_LU && category <= UTF8PROC_CATEGORY_NO);
}

size_t previous(const std::string& s, size_t at) {
  do --at;
  while (at > 0 && (static_cast<unsigned char>(s[at]) & 0xC0) == 0x80);
  return at;
}

// Cuts the added tokens of `order` out of `in`: leftmost, then longest.
void extract(const tok::Pipeline& p, const std::vector<size_t>& order, const Text& in, std::vector<Part>& out) {
  const std::string& s = in.bytes;
  size_t from = 0;
  for (size_t i = 0; i < s.size() && !order.empty();) {
    const tok::AddedToken* found = nullptr;
    auto first = std::lower_bound(order.begin(), order.end(), s[i], [&](size_t t, char c) { return p.added[t].content[0] < c; });
    for (; first != order.end() && p.added[*first].content[0] == s[i] && !found; ++first) {
      const auto& token = p.added[*first];
      if (s.compare(i, token.content.size(), token.content) != 0) continue;
      size_t end = i + token.content.size();
      if (token.single_word && ((i > 0 && is_word(tok::code_point(s, previous(s, i)))) || (end < s.size() && is_word(tok::code_point(s, end))))) continue;
      found = &token;
    }
    if (!found) {
      ++i;
      continue;
    }
    size_t begin = i, end = i + found->content.size();
    while (found->lstrip && begin > from && is_space(tok::code_point(s, previous(s, begin)))) begin = previous(s, begin);
    while (found->rstrip && end < s.size() && is_space(tok::code_point(s, end))) end += tok::char_length(static_cast<unsigned char>(s[end]));
    if (begin > from) out.push_back({in.slice(from, begin), -1});
    out.push_back({in.slice(begin, end), found->id});
    i = from = end;
  }
  if (from == 0) out.push_back({in, -1});
  else if (from < s.size()) out.push_back({in.slice(from, s.size()), -1});
}

void trim(const tok::PostProcessor& post, const std::string& token, size_t index, std::pair<int64_t, int64_t>& offsets) {
  auto space_at = [&](size_t i) {
    uint32_t c = tok::code_point(token, i);
    return c == 0x120 || is_space(c);
  };
  int64_t leading = 0, trailing = 0;
  for (size_t i = 0; i < token.size() && space_at(i); i += tok::char_length(static_cast<unsigned char>(token[i]))) ++leading;
  for (size_t i = token.size(); i > 0 && space_at(previous(token, i)); i = previous(token, i)) ++trailing;
  if (leading > 0 && (index == 0 || offsets.first == 0) && post.add_prefix_space) --leading;
  offsets.first = std::min(offsets.first + leading, offsets.second);
  if (trailing > 0) offsets.second = std::max(offsets.second - trailing, offsets.first);
}

tok::AddedToken read_added(const Json& json, const std::string& source) {
  tok::AddedToken t;
  t.id = json_get<int64_t>(json, "id", source);
  t.content = json_get<std::string>(json, "content", source);
  if (t.content.empty()) throw DataError(str(source, ": an added token has no content"));
  if (t.id < 0 || t.id > 100'000'000) throw DataError(str(source, ": the id ", t.id, " of \"", t.content, "\" is out of range"));
  t.single_word = json_get_or<bool>(json, "single_word", false, source);
  t.lstrip = json_get_or<bool>(json, "lstrip", false, source);
  t.rstrip = json_get_or<bool>(json, "rstrip", false, source);
  t.special = json_get_or<bool>(json, "special", false, source);
  t.normalized = json_get_or<bool>(json, "normalized", !t.special, source);
  return t;
}

}  // namespace

Tokenizer Tokenizer::load(const std::string& path) {
  std::string file = std::filesystem::is_directory(path) ? path + "/tokenizer.json" : path;
  if (!std::filesystem::exists(file))
    throw DataError(str(file, " is not there; a folder with a tokenizer.json is needed (set model.tokenizer)"));
  return parse(read_file(file, 512ull << 20), file);
}

Tokenizer Tokenizer::parse(std::string_view text, const std::string& source) {
  Json json = parse_json(text, source);
  if (!json.is_object()) throw DataError(str(source, ": an object is expected"));
  auto part = [&](const char* key) -> Json { return json.contains(key) ? json[key] : Json(); };
  auto p = std::make_shared<tok::Pipeline>();
  p->source = source;
  p->hash = hash_bytes(text);
  Json model = part("model");
  if (!model.is_object()) throw DataError(str(source, ": \"model\" is missing"));
  auto type = json_get_or<std::string>(model, "type", model.contains("merges") ? "BPE" : "unknown", source);
  if (type != "BPE") throw DataError(str(source, ": the model \"", type, "\" is not supported; supported is BPE"));
  p->model.emplace(model, source);
  p->normalizer = tok::read_normalizer(part("normalizer"), source);
  p->pre_tokenizer = tok::read_pre_tokenizer(part("pre_tokenizer"), source);
  p->post = tok::read_post_processor(part("post_processor"), source);
  p->decoder = tok::read_decoder(part("decoder"), source);
  auto name = [&](int64_t id, const std::string& token) {
    p->tokens[id] = token;
    p->ids[token] = id;
    p->vocab_size = std::max(p->vocab_size, id + 1);
  };
  for (const auto& [token, id] : p->model->vocab()) name(id, token);
  Json added = part("added_tokens");
  if (!added.is_null() && !added.is_array()) throw DataError(str(source, ": \"added_tokens\" must be a list"));
  for (const Json& item : added) {
    auto token = read_added(item, source);
    name(token.id, token.content);
    if (token.special) p->special[token.id] = true;
    // A normalized token is searched for in normalized text.
    if (token.normalized && p->normalizer) token.content = p->normalizer(tok::text_of(token.content)).bytes;
    if (!token.content.empty()) p->added.push_back(token);
  }
  for (size_t i = 0; i < p->added.size(); ++i) (p->added[i].normalized ? p->normalized_order : p->raw_order).push_back(i);
  for (auto* order : {&p->raw_order, &p->normalized_order})
    std::sort(order->begin(), order->end(), [&](size_t a, size_t b) {
      const auto &x = p->added[a].content, &y = p->added[b].content;
      return x[0] != y[0] ? x[0] < y[0] : x.size() != y.size() ? x.size() > y.size() : a < b;
    });
  return Tokenizer(p);
}

Encoding Tokenizer::encode(std::string_view text, bool add_special_tokens) const {
  const auto& p = *pipeline_;
  if (!tok::valid_utf8(text)) throw DataError("a text to be tokenised is not valid UTF-8");
  Encoding out;
  auto special = [&](const std::vector<int64_t>& ids) {
    for (int64_t id : ids) {
      out.ids.push_back(id);
      out.offsets.emplace_back(0, 0);
      out.special.push_back(1);
    }
  };
  if (add_special_tokens) special(p.post.before);
  size_t first_index = out.ids.size();
  std::vector<Part> raw, parts;
  extract(p, p.raw_order, tok::text_of(text), raw);
  for (auto& part : raw) {
    if (part.id >= 0) {
      parts.push_back(std::move(part));
      continue;
    }
    Text normalized = p.normalizer ? p.normalizer(std::move(part.text)) : std::move(part.text);
    extract(p, p.normalized_order, normalized, parts);
  }
  std::vector<tok::Bpe::Piece> pieces;
  for (auto& part : parts) {
    if (part.text.size() == 0) continue;
    if (part.id >= 0) {
      out.ids.push_back(part.id);
      out.offsets.emplace_back(part.text.begin.front(), part.text.end.back());
      out.special.push_back(0);
      if (p.post.trims_offsets) trim(p.post, p.tokens.at(part.id), out.ids.size() - 1 - first_index, out.offsets.back());
      continue;
    }
    std::vector<Text> words;
    words.push_back(std::move(part.text));
    if (p.pre_tokenizer) words = p.pre_tokenizer(std::move(words));
    for (const Text& word : words) {
      pieces.clear();
      p.model->encode(word.bytes, pieces);
      for (const auto& piece : pieces) {
        out.ids.push_back(piece.id);
        out.offsets.emplace_back(word.begin[piece.begin], word.end[piece.end - 1]);
        out.special.push_back(0);
        if (p.post.trims_offsets) trim(p.post, p.tokens.at(piece.id), out.ids.size() - 1 - first_index, out.offsets.back());
      }
    }
  }
  if (add_special_tokens) special(p.post.after);
  return out;
}

std::vector<int64_t> Tokenizer::encode_ids(std::string_view text, bool add_special_tokens) const {
  return encode(text, add_special_tokens).ids;
}

std::string Tokenizer::decode(std::span<const int64_t> ids, bool skip_special) const {
  std::vector<std::string> tokens;
  for (int64_t id : ids) {
    auto it = pipeline_->tokens.find(id);
    if (it != pipeline_->tokens.end() && !(skip_special && is_special(id))) tokens.push_back(it->second);
  }
  std::string out;
  if (pipeline_->decoder) {
    for (const auto& t : pipeline_->decoder(std::move(tokens))) out += t;
  } else {
    for (const auto& t : tokens) out += (out.empty() ? "" : " ") + t;
  }
  return out;
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
bool Tokenizer::is_added(int64_t id) const {
  return std::any_of(pipeline_->added.begin(), pipeline_->added.end(), [&](const auto& token) { return token.id == id; });
}
const std::string& Tokenizer::content_hash() const { return pipeline_->hash; }
const std::string& Tokenizer::source() const { return pipeline_->source; }

StreamDecoder::StreamDecoder(const Tokenizer& tokenizer, bool skip_special)
    : pipeline_(tokenizer.pipeline_), state_(std::make_unique<tok::DecodeState>()), skip_special_(skip_special) {}
StreamDecoder::~StreamDecoder() = default;
StreamDecoder::StreamDecoder(StreamDecoder&&) noexcept = default;
StreamDecoder& StreamDecoder::operator=(StreamDecoder&&) noexcept = default;

std::string StreamDecoder::push(int64_t id) {
  state_->ids.push_back(id);
  std::string text = Tokenizer(pipeline_).decode(state_->ids, skip_special_);
  // Broken UTF-8 at the end may be the first half of a character: it is held back until it is complete or over.
  size_t stable = text.size();
  while (stable >= 3 && text.compare(stable - 3, 3, "\xEF\xBF\xBD") == 0) stable -= 3;
  if (stable <= state_->emitted) return "";
  std::string out = text.substr(state_->emitted, stable - state_->emitted);
  state_->emitted = stable;
  return out;
}

std::string StreamDecoder::finish() {
  std::string text = Tokenizer(pipeline_).decode(state_->ids, skip_special_);
  std::string out = text.size() > state_->emitted ? text.substr(state_->emitted) : "";
  *state_ = {};
  return out;
}

}  // namespace trireme
