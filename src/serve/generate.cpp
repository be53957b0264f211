#include "base/tensor.h"

#include "serve/generate.h"

#include <algorithm>

#include "base/check.h"

namespace trireme {
namespace {

// Bytes at the end of `text` that may be the beginning of a stop text.
size_t held_back(const std::string& text, const std::vector<std::string>& stop) {
  size_t longest = 0;
  for (const auto& s : stop)
    for (size_t n = std::min(s.size() - 1, text.size()); n > longest; --n)
      if (text.compare(text.size() - n, n, s, 0, n) == 0) longest = n;
  return longest;
}

}  // namespace

Generator::Generator(Transformer& model, const Tokenizer& tokenizer, GenerateOptions options)
    : tokenizer_(tokenizer), options_(std::move(options)), context_(model.config().max_positions),
      decoding_(model, options_.sampling.temperature <= 0 && options_.sampling.repetition_penalty == 1, options_.graphs) {
  for (const auto& s : options_.stop)
    if (s.empty()) throw ConfigError("generate.stop has an empty text");
  model.set_training(false);
}

Answer Generator::answer(const std::vector<int64_t>& prompt, uint64_t prompt_index, const std::function<void(const std::string&)>& on_text) {
  const GenerateOptions& options = options_;
  if (prompt.empty()) throw DataError(str("prompt ", prompt_index + 1, " is empty"));
  const int64_t room = context_ - static_cast<int64_t>(prompt.size());
  if (room < 1)
    throw DataError(str("prompt ", prompt_index + 1, " has ", prompt.size(), " tokens; the model's context (max_position_embeddings) is ",
                        context_, ", one of which the answer needs"));
  const int64_t max_tokens = std::min(options.max_tokens, room);
  StreamDecoder decoder(tokenizer_, true);
  Answer answer;
  answer.finish_reason = "length";
  std::vector<int64_t> seen = prompt;
  size_t emitted = 0;
  auto emit = [&](size_t up_to) {
    if (on_text && up_to > emitted) on_text(answer.text.substr(emitted, up_to - emitted));
    emitted = std::max(emitted, up_to);
  };
  // Cuts the answer at the first stop text. What is emitted cannot hold the beginning of one.
  auto stopped = [&] {
    size_t first = std::string::npos;
    for (const auto& s : options.stop) first = std::min(first, answer.text.find(s, emitted));
    if (first == std::string::npos) return false;
    answer.text.resize(first);
    answer.finish_reason = "stop";
    return true;
  };
  bool stop = false;
  decoding_.begin(prompt, max_tokens);
  while (!stop && static_cast<int64_t>(answer.ids.size()) < max_tokens) {
    const int64_t id = decoding_.next([&](const at::Tensor& logits_V) { return sample(logits_V, seen, options.sampling, prompt_index, answer.ids.size()); });
    if (std::find(options.end_ids.begin(), options.end_ids.end(), id) != options.end_ids.end()) {
      answer.finish_reason = "stop";
      break;
    }
    answer.ids.push_back(id);
    seen.push_back(id);
    answer.text += decoder.push(id);
    stop = stopped();
    emit(answer.text.size() - (stop ? 0 : held_back(answer.text, options.stop)));
  }
  if (!stop) {
    answer.text += decoder.finish();
    stopped();
  }
  emit(answer.text.size());
  return answer;
}

Answer generate(Transformer& model, const Tokenizer& tokenizer, const std::vector<int64_t>& prompt, uint64_t prompt_index,
                const GenerateOptions& options, const std::function<void(const std::string&)>& on_text) {
  return Generator(model, tokenizer, options).answer(prompt, prompt_index, on_text);
}

}  // namespace trireme
