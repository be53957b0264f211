#include "base/tensor.h"

#include "serve/generate.h"

#include <algorithm>

#include "base/check.h"
#include "tasks/task.h"

namespace trireme {
namespace {

// One segment that goes on at `start`.
ModelInput continuation(const std::vector<int64_t>& ids, int64_t start, at::Device device) {
  ModelInput input;
  auto n = static_cast<int64_t>(ids.size());
  input.tokens_T = at::tensor(ids, at::kLong).to(device);
  input.positions_T = at::arange(start, start + n, at::kLong).to(device);
  input.cu_seqlens = {0, n};
  return input;
}

// Bytes at the end of `text` that may be the beginning of a stop text.
size_t held_back(const std::string& text, const std::vector<std::string>& stop) {
  size_t longest = 0;
  for (const auto& s : stop)
    for (size_t n = std::min(s.size() - 1, text.size()); n > longest; --n)
      if (text.compare(text.size() - n, n, s, 0, n) == 0) longest = n;
  return longest;
}

}  // namespace

Answer generate(Transformer& model, const Tokenizer& tokenizer, const std::vector<int64_t>& prompt, uint64_t prompt_index,
                const GenerateOptions& options, const std::function<void(const std::string&)>& on_text) {
  if (prompt.empty()) throw DataError(str("prompt ", prompt_index + 1, " is empty"));
  const int64_t context = model.config().max_positions, room = context - static_cast<int64_t>(prompt.size());
  if (room < 1)
    throw DataError(str("prompt ", prompt_index + 1, " has ", prompt.size(), " tokens; the model's context (max_position_embeddings) is ",
                        context, ", one of which the answer needs"));
  for (const auto& s : options.stop)
    if (s.empty()) throw ConfigError("generate.stop has an empty text");
  at::NoGradGuard no_grad;
  model.set_training(false);
  KvCache cache(model.config().num_layers);
  StreamDecoder decoder(tokenizer, true);
  Answer answer;
  answer.finish_reason = "length";
  std::vector<int64_t> seen = prompt, next = prompt;
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
  while (!stop && static_cast<int64_t>(answer.ids.size()) < std::min(options.max_tokens, room)) {
    // No token sees the ones behind it: a prompt is filled up with any, which are forgotten again.
    const auto own = static_cast<int64_t>(next.size()), multiple = own > 1 ? row_multiple(model) : model.seams().row_multiple;
    next.resize(static_cast<size_t>((own + multiple - 1) / multiple * multiple), next.back());
    at::Tensor hidden = model.all_rows(model.forward(continuation(next, cache.length(), model.device()), &cache));
    cache.forget_last(hidden.size(0) - own);
    at::Tensor logits = model.logits(hidden.narrow(0, own - 1, 1)).view({-1}).cpu();
    int64_t id = sample(logits, seen, options.sampling, prompt_index, answer.ids.size());
    if (std::find(options.end_ids.begin(), options.end_ids.end(), id) != options.end_ids.end()) {
      answer.finish_reason = "stop";
      break;
    }
    answer.ids.push_back(id);
    seen.push_back(id);
    next = {id};
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

}  // namespace trireme
