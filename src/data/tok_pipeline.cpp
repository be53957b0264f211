#include "data/tok_pipeline.h"

#include "base/check.h"
#include "base/hash.h"

namespace trireme::tok {

std::shared_ptr<const Pipeline> read_pipeline(std::string_view text, const std::string& source) {
  const Json json = parse_json(text, source);
  if (!json.is_object()) throw DataError(str(source, ": an object is expected"));
  static const Json nothing;
  auto part = [&](const char* key) -> const Json& { return json.contains(key) ? json[key] : nothing; };
  auto p = std::make_shared<Pipeline>();
  p->source = source;
  p->hash = hash_bytes(text);
  p->model = read_model(part("model"), source);
  p->normalizer = read_normalizer(part("normalizer"), source);
  p->pre_tokenizer = read_pre_tokenizer(part("pre_tokenizer"), source);
  if (p->pre_tokenizer.bytes_to_chars && !p->model->take_bytes()) p->pre_tokenizer.steps.push_back(words_to_byte_chars);
  p->post = read_post_processor(part("post_processor"), source);
  p->decoder = read_decoder(part("decoder"), source);
  auto name = [&](int64_t id, const std::string& token) {
    p->tokens[id] = token;
    p->ids[token] = id;
    p->vocab_size = std::max(p->vocab_size, id + 1);
  };
  p->tokens.reserve(p->model->vocab().size());
  p->ids.reserve(p->model->vocab().size());
  for (const auto& [token, id] : p->model->vocab()) name(id, token);
  const Json& added = part("added_tokens");
  if (!added.is_null() && !added.is_array()) throw DataError(str(source, ": \"added_tokens\" must be a list"));
  for (const Json& item : added) {
    AddedToken token = read_added_token(item, source);
    name(token.id, token.content);
    if (!token.content.empty()) p->added.insert(token.id);
    if (token.special) p->special.insert(token.id);
    if (token.normalized && p->normalizer) {
      Text content = text_of(token.content, false);
      p->normalizer(content);
      token.content = std::move(content.bytes);
      p->tokens[token.id] = token.content;  // so the library decodes it
    }
    (token.normalized ? p->normalized : p->raw).add(token);
  }
  for (const PostStep& step : p->post)
    for (const auto* ids : {&step.before, &step.after})
      for (int64_t id : *ids)
        if (!p->tokens.count(id)) throw DataError(str(source, ": post_processor: no token has the id ", id));
  p->raw.finish();
  p->normalized.finish();
  return p;
}

DecodeState::DecodeState(std::shared_ptr<const Pipeline> pipeline, bool skip_special)
    : pipeline_(std::move(pipeline)), skip_special_(skip_special) {
  for (const auto& make : pipeline_->decoder) steps_.push_back(make());
  for (size_t i = 0; i < steps_.size(); ++i) steps_[i]->next = i + 1 < steps_.size() ? steps_[i + 1].get() : &sink_;
}

void DecodeState::put(int64_t id) {
  auto it = pipeline_->tokens.find(id);
  if (it == pipeline_->tokens.end() || (skip_special_ && pipeline_->special.count(id))) return;
  (steps_.empty() ? static_cast<DecodeStep*>(&sink_) : steps_.front().get())->put(it->second, true);
}

void DecodeState::finish() {
  if (!steps_.empty()) steps_.front()->finish();
}

std::string DecodeState::take() {
  std::string text = std::move(sink_.text);
  sink_.text.clear();
  return text;
}

}  // namespace trireme::tok
