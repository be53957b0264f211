#include "base/tensor.h"

#include "serve/decoding.h"

#include <c10/core/Event.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>
#include <bit>

#include "base/check.h"
#include "ops/device.h"
#include "serve/sampler.h"
#include "tasks/task.h"

namespace trireme {
namespace {

int64_t rounded_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Rows of a cache, in steps of at most a quarter: prompts of about the same length share a cache and what was recorded with it.
int64_t capacity_of(const Transformer& model, int64_t prompt_size, int64_t max_tokens) {
  const int64_t needed = std::max(rounded_up(prompt_size, row_multiple(model)), prompt_size + max_tokens + model.seams().row_multiple);
  return rounded_up(needed, std::max<int64_t>(256, static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(needed))) / 4));
}

std::vector<int64_t> counted_from(int64_t first, int64_t count) {
  std::vector<int64_t> out;
  for (int64_t i = 0; i < count; ++i) out.push_back(first + i);
  return out;
}

}  // namespace

Decoding::Decoding(Transformer& model, bool likeliest, bool graphs)
    : model_(model), likeliest_(likeliest && !model.device().is_cpu()), rows_(model.seams().row_multiple) {
  const ModelSeams& seams = model.seams();
  graphs_ = graphs && !seams.embed && !seams.all_rows && !seams.receive && !seams.from_last_stage;
  tokens_T = at::zeros({rows_}, at::TensorOptions(at::kLong).device(model.device()));
  positions_T = at::zeros_like(tokens_T);
  found_ = at::zeros({2}, tokens_T.options());
  logits_1V = at::empty({1, model.config().vocab_size}, tokens_T.options().dtype(model.dtype() == at::kDouble ? at::kDouble : at::kFloat));
}

int64_t Decoding::cache_bytes(const Transformer& model, int64_t prompt_size, int64_t max_tokens) {
  return model.cache_bytes(capacity_of(model, prompt_size, max_tokens));
}

void Decoding::begin(const std::vector<int64_t>& prompt, int64_t max_tokens) {
  const at::NoGradGuard no_grad;
  const auto size = static_cast<int64_t>(prompt.size());
  if (const int64_t capacity = capacity_of(model_, size, max_tokens); !cache_ || cache_->capacity() != capacity) {
    graph_.reset(), cache_.reset();
    prepared_ = false;
    cache_.emplace(model_.new_cache(capacity));
  }
  cache_->set_empty(true);
  max_tokens_ = max_tokens, num_tokens_ = 0;
  // No token sees the ones behind it: a prompt is filled up with any, in whose places others come later.
  std::vector<int64_t> tokens = prompt;
  tokens.resize(static_cast<size_t>(rounded_up(size, size > 1 ? row_multiple(model_) : rows_)), prompt.back());
  const auto filled = static_cast<int64_t>(tokens.size());
  ModelInput input;
  input.tokens_T = to_device(tokens, model_.device());
  input.positions_T = to_device(counted_from(0, filled), model_.device());
  input.cu_seqlens = {0, filled};
  positions_T.copy_(to_device(counted_from(size, rows_), model_.device()));
  finish(model_.forward(input, &*cache_), size - 1);
}

void Decoding::step() {
  ModelInput input;
  input.tokens_T = tokens_T;
  input.positions_T = positions_T;
  input.cu_seqlens = {0, rows_};
  finish(model_.forward(input, &*cache_), 0);
  positions_T.add_(1);
}

void Decoding::finish(const at::Tensor& hidden_TC, int64_t row) {
  logits_1V.copy_(model_.logits(model_.all_rows(hidden_TC).narrow(0, row, 1)));
  if (!likeliest_) return;
  const auto [largest, id] = logits_1V.max(1);
  found_.copy_(at::cat({id, at::isfinite(largest).to(at::kLong)}));
  tokens_T.copy_(id.expand_as(tokens_T));
}

void Decoding::advance() {
  if (!graph_ && graphs_ && prepared_ && (graph_ = new_step_graph(model_.device()))) graph_->record([this] { step(); });
  if (graph_) return graph_->replay();
  step();
  prepared_ = true;
}

int64_t Decoding::next(const Choose& choose) {
  const at::NoGradGuard no_grad;
  TRIREME_CHECK(num_tokens_ < max_tokens_, max_tokens_, " tokens were asked for");
  ++num_tokens_;
  if (likeliest_) {
    const at::Device device = model_.device();
    const at::Tensor found = at::empty({2}, at::TensorOptions(at::kLong).pinned_memory(device.is_cuda()));
    found.copy_(found_, /*non_blocking=*/true);
    c10::Event arrived(device.type());
    arrived.record(c10::impl::VirtualGuardImpl(device.type()).getStream(device));
    if (num_tokens_ < max_tokens_) advance();  // with a token that the host does not know yet; of a last one nobody asks for the next
    arrived.synchronize();
    if (found.data_ptr<int64_t>()[1] == 0) throw not_finite();
    return found.data_ptr<int64_t>()[0];
  }
  if (num_tokens_ > 1) {
    tokens_T.copy_(to_device(std::vector<int64_t>(static_cast<size_t>(rows_), last_), model_.device()));
    advance();
  }
  return last_ = choose(logits_1V.view({-1}).cpu());
}

}  // namespace trireme
