#include "base/tensor.h"

#include "model/transformer.h"

#include "base/check.h"
#include "base/random.h"
#include "model/initialize.h"
#include "model/rope.h"
#include "ops/device.h"
#include "ops/ops.h"

namespace trireme {
namespace {

struct DtypeName {
  const char* name;
  const char* short_name;
  at::ScalarType dtype;
};
constexpr DtypeName kDtypes[] = {{"float32", "fp32", at::kFloat}, {"bfloat16", "bf16", at::kBFloat16},
                                 {"float16", "fp16", at::kHalf}, {"float64", "fp64", at::kDouble}};

}  // namespace

at::ScalarType parse_dtype(const std::string& name, const std::string& key) {
  for (const auto& d : kDtypes)
    if (name == d.name || name == d.short_name) return d.dtype;
  throw ConfigError(str(key, "=", name, ": allowed are float32, bfloat16, float16, float64"));
}

std::string dtype_name(at::ScalarType dtype) {
  for (const auto& d : kDtypes)
    if (dtype == d.dtype) return d.name;
  throw InternalError(str("no name for dtype ", c10::toString(dtype)));
}

Recompute parse_recompute(const std::string& name) {
  if (name == "none") return Recompute::kNone;
  if (name == "selective") return Recompute::kSelective;
  if (name == "full") return Recompute::kFull;
  throw ConfigError(str("train.recompute=", name, ": allowed are none, selective, full"));
}

Transformer::Transformer(const ModelConfig& config, at::ScalarType dtype, uint64_t seed, Weights weights, at::Device device)
    : config_(config), dtype_(dtype), device_(at::kMeta) {
  auto options = at::TensorOptions().dtype(dtype).device(at::kMeta);
  auto matrix = [&](int64_t rows, int64_t columns) { return at::empty({rows, columns}, options).requires_grad_(true); };
  auto vector = [&](int64_t size) { return at::empty({size}, options).requires_grad_(true); };
  const auto& c = config;
  embedding_VC_ = matrix(c.vocab_size, c.hidden_size);
  int64_t count = 0, q_size = c.num_heads * c.head_dim, kv_size = c.num_kv_heads * c.head_dim;
  auto linear_layer = [&](const std::string& path, int64_t out, int64_t in, bool bias) {
    Linear l;
    l.path = path;
    l.index = count++;
    l.weight_OI = matrix(out, in);
    if (bias) l.bias_O = vector(out);
    return l;
  };
  for (int64_t i = 0; i < c.num_layers; ++i) {
    std::string p = str("model.layers.", i);
    Block b;
    b.index = i;
    b.window = c.window[static_cast<size_t>(i)];
    b.uses_rope = c.uses_rope[static_cast<size_t>(i)];
    b.q = linear_layer(p + ".self_attn.q_proj", q_size, c.hidden_size, c.qkv_bias);
    b.k = linear_layer(p + ".self_attn.k_proj", kv_size, c.hidden_size, c.qkv_bias);
    b.v = linear_layer(p + ".self_attn.v_proj", kv_size, c.hidden_size, c.qkv_bias);
    b.o = linear_layer(p + ".self_attn.o_proj", c.hidden_size, q_size, c.output_bias);
    if (c.qk_norm) {
      b.q_norm = {p + ".self_attn.q_norm", vector(c.head_dim)};
      b.k_norm = {p + ".self_attn.k_norm", vector(c.head_dim)};
    }
    b.gate = linear_layer(p + ".mlp.gate_proj", c.intermediate_size, c.hidden_size, c.mlp_bias);
    b.up = linear_layer(p + ".mlp.up_proj", c.intermediate_size, c.hidden_size, c.mlp_bias);
    b.down = linear_layer(p + ".mlp.down_proj", c.hidden_size, c.intermediate_size, c.mlp_bias);
    b.input_norm = {p + ".input_layernorm", vector(c.hidden_size)};
    b.post_attention_norm = {p + ".post_attention_layernorm", vector(c.hidden_size)};
    blocks_.push_back(std::move(b));
  }
  final_norm_ = {"model.norm", vector(c.hidden_size)};
  head_weight_VC_ = c.tie_embeddings ? embedding_VC_ : matrix(c.vocab_size, c.hidden_size);
  RopeFrequencies rope = rope_frequencies(c.rope, c.head_dim, dtype);
  inv_freq_ = rope.inv_freq;
  rope_scale_ = rope.scale;
  const bool random = weights == Weights::kRandom;
  if (!device.is_meta()) materialize(device, seed, [=](const std::string&) { return random; });
}

void Transformer::for_each_leaf(const std::function<void(const std::string& name, at::Tensor& leaf)>& fn, const std::function<void(Linear&)>& frozen) {
  auto visit = [&](const std::string& name, at::Tensor& leaf) {
    if (leaf.defined()) fn(name, leaf);
  };
  auto visit_linear = [&](Linear& l) {
    visit(l.path + ".weight", l.weight_OI);
    if (l.frozen && frozen) frozen(l);
    else if (l.frozen)
      for (FrozenWeight::Leaf& leaf : l.frozen->leaves()) visit(l.path + leaf.suffix, leaf.value);
    visit(l.path + ".bias", l.bias_O);
  };
  auto visit_norm = [&](Norm& n) { visit(n.path + ".weight", n.weight_C); };
  const bool tied = config_.tie_embeddings;
  if (has_embedding_ || (tied && has_head_)) visit("model.embed_tokens.weight", embedding_VC_);
  for (auto& b : blocks_) {
    for (Linear* l : {&b.q, &b.k, &b.v, &b.o}) visit_linear(*l);
    visit_norm(b.q_norm);
    visit_norm(b.k_norm);
    for (Linear* l : {&b.gate, &b.up, &b.down}) visit_linear(*l);
    visit_norm(b.input_norm);
    visit_norm(b.post_attention_norm);
  }
  if (has_head_) visit_norm(final_norm_);
  if (has_head_ && !tied) visit("lm_head.weight", head_weight_VC_);
  for (Linear* l : linears()) {
    if (!l->lora) continue;
    visit("base_model.model." + l->path + ".lora_A.weight", l->lora->a_RI);
    visit("base_model.model." + l->path + ".lora_B.weight", l->lora->b_OR);
    visit("base_model.model." + l->path + ".lora_magnitude_vector", l->lora->magnitude_O);
  }
  if (tied) head_weight_VC_ = embedding_VC_;
}

std::vector<Parameter> Transformer::parameters() const {
  std::vector<Parameter> out;
  const_cast<Transformer*>(this)->for_each_leaf([&](const std::string& name, at::Tensor& leaf) {
    auto slice = slices_.find(name);
    out.push_back({name, leaf, slice == slices_.end() ? ShardSpec::whole(leaf) : slice->second, embedding_on_host_ && leaf.is_same(embedding_VC_)});
  });
  return out;
}

void Transformer::keep_layers(int64_t first, int64_t end, bool embedding, bool head) {
  TRIREME_CHECK(0 <= first && first <= end && end <= static_cast<int64_t>(blocks_.size()), first, " ", end);
  blocks_.erase(blocks_.begin() + end, blocks_.end());
  blocks_.erase(blocks_.begin(), blocks_.begin() + first);
  has_embedding_ = embedding, has_head_ = head;
}

void Transformer::share_tied_embedding(const Transformer& first) {
  if (config_.tie_embeddings && has_head_ && first.has_embedding_) embedding_VC_ = head_weight_VC_ = first.embedding_VC_;
}

void Transformer::slice(const std::function<std::pair<at::Tensor, ShardSpec>(const Parameter&)>& cut) {
  TRIREME_CHECK(device_.is_meta(), "only a model without memory is cut");
  at::NoGradGuard no_grad;
  for_each_leaf([&](const std::string& name, at::Tensor& leaf) {
    const bool trained = leaf.requires_grad();
    auto [part, place] = cut({name, leaf, ShardSpec::whole(leaf)});
    if (part.sizes() != leaf.sizes()) slices_[name] = place;
    leaf = part.detach().requires_grad_(trained);
  }, [&](Linear& l) {
    const at::Tensor whole = at::empty({l.out_features(), l.in_features()}, at::TensorOptions(dtype_).device(at::kMeta));
    const auto [part, place] = cut({l.path + ".weight", whole, ShardSpec::whole(whole)});
    for (int64_t d : {0, 1}) {
      const int64_t begin = place.offset[static_cast<size_t>(d)];
      if (part.size(d) != whole.size(d)) l.frozen->keep(d, begin, begin + part.size(d));
    }
    for (const FrozenWeight::Leaf& leaf : l.frozen->leaves()) slices_[l.path + leaf.suffix] = leaf.place;
  });
}

void Transformer::materialize(at::Device device, uint64_t seed, const std::function<bool(const std::string&)>& fill) {
  for_each_leaf([&](const std::string&, at::Tensor& leaf) {
    const bool on_host = embedding_on_host_ && leaf.is_same(embedding_VC_);
    const auto options = leaf.options().requires_grad(false).device(on_host ? at::kCPU : device).pinned_memory(on_host && device.is_cuda());
    TRIREME_CHECK(!on_host || (!leaf.requires_grad() && !config_.tie_embeddings));
    leaf = (fill || on_host ? at::empty(leaf.sizes(), options) : at::empty({}, options).expand(leaf.sizes())).requires_grad_(leaf.requires_grad());
  });
  device_ = device;
  inv_freq_ = inv_freq_.to(device);
  for (const auto& p : parameters())
    if (fill && fill(p.name)) fill_initial(p, seed, config_.initializer_range);
}

std::vector<Linear*> Transformer::linears() {
  std::vector<Linear*> out;
  for (auto& b : blocks_)
    for (Linear* l : {&b.q, &b.k, &b.v, &b.o, &b.gate, &b.up, &b.down}) out.push_back(l);
  return out;
}

Transformer::Pass Transformer::prepare(const ModelInput& input, KvCache* cache) const {
  Pass pass;
  pass.cu_seqlens = input.cu_seqlens;
  TRIREME_CHECK(!cache || input.cu_seqlens.size() == 2, input.cu_seqlens.size());
  pass.cache = cache;
  if (cache && !cache->empty()) {
    pass.positions_T = input.positions_T;
    pass.lengths_B = (input.positions_T.slice(0, -1) + 1).to(at::kInt);
  } else {
    pass.bounds = bounds_of(input.cu_seqlens, device_);
  }
  at::Tensor angles = input.positions_T.to(inv_freq_.scalar_type()).unsqueeze(1) * inv_freq_.unsqueeze(0);
  angles = at::cat({angles, angles}, 1);
  pass.cos_TR = angles.cos().mul_(rope_scale_);
  pass.sin_TR = angles.sin().mul_(rope_scale_);
  if (!training_) return pass;
  bool drops = false;
  for (const auto& b : blocks_)
    for (const Linear* l : {&b.q, &b.k, &b.v, &b.o, &b.gate, &b.up, &b.down}) drops |= l->lora && l->lora->dropout > 0;
  if (!drops) return pass;
  TRIREME_CHECK(input.sample_ids.size() + 1 == input.cu_seqlens.size(), "dropout needs sample ids");
  pass.dropout.active = true;
  pass.dropout.seed = input.dropout_seed;
  std::vector<int64_t> ids;  // of sample and place in it
  for (size_t s = 0; s + 1 < input.cu_seqlens.size(); ++s)
    for (int64_t t = 0; t < input.cu_seqlens[s + 1] - input.cu_seqlens[s]; ++t)
      ids.push_back(static_cast<int64_t>(random_bits(0, RandomStream::kDropout, static_cast<uint64_t>(input.sample_ids[s]), static_cast<uint64_t>(t))));
  pass.dropout.row_ids_T = to_device(ids, device_);
  return pass;
}

at::Tensor Transformer::attention(const Block& b, const ArrivingRows& x_TC, const Pass& pass) const {
  auto see = [&](const std::string& path, const at::Tensor& out) {
    if (pass.observe) pass.observe(path, out);
    return out;
  };
  int64_t t = pass.cos_TR.size(0), d = config_.head_dim;
  // Head counts come from the weights: under tensor parallelism a rank has some of the heads.
  at::Tensor q_THD = see(b.q.path, b.q.forward(x_TC, pass.dropout)).view({t, -1, d});
  at::Tensor k_TKD = see(b.k.path, b.k.forward(x_TC, pass.dropout)).view({t, -1, d});
  at::Tensor v_TKD = see(b.v.path, b.v.forward(x_TC, pass.dropout)).view({t, -1, d});
  if (b.q_norm.weight_C.defined()) {
    q_THD = rms_norm(q_THD, b.q_norm.weight_C, config_.rms_norm_eps);
    k_TKD = rms_norm(k_TKD, b.k_norm.weight_C, config_.rms_norm_eps);
  }
  if (b.uses_rope) {
    q_THD = rope(q_THD, pass.cos_TR, pass.sin_TR);
    k_TKD = rope(k_TKD, pass.cos_TR, pass.sin_TR);
  }
  if (pass.cache) pass.cache->put(b.index, k_TKD, v_TKD, pass.positions_T);
  at::Tensor out_THD;
  if (pass.lengths_B.defined()) {
    const KvCache::Layer& cached = pass.cache->layer(b.index);
    out_THD = decode_attention(q_THD, cached.k_BSKD, cached.v_BSKD, pass.lengths_B, b.window);
  } else {
    AttentionSpec spec;
    spec.cu_seqlens_q = spec.cu_seqlens_k = pass.cu_seqlens;
    spec.window = b.window;
    spec.bounds_q = spec.bounds_k = pass.bounds;
    out_THD = trireme::attention(q_THD, k_TKD, v_TKD, spec);
  }
  return see(b.o.path, b.o.forward(out_THD.reshape({t, -1}), pass.dropout));
}

// The last of a block: what is computed again for backward alone need not end.
at::Tensor Transformer::mlp(const Block& b, const ArrivingRows& x_TC, const Pass& pass) const {
  if (mlp_rows_ > 0 && x_TC.promised().size(0) > mlp_rows_ && !pass.observe) return mlp_in_pieces(b, x_TC.wait(), pass);
  at::Tensor gate_TF = b.gate.forward(x_TC, pass.dropout), up_TF = b.up.forward(x_TC, pass.dropout);
  at::Tensor out_TC = b.down.forward(swiglu(gate_TF, up_TF), pass.dropout, !recomputing());
  if (pass.observe) {
    pass.observe(b.gate.path, gate_TF);
    pass.observe(b.up.path, up_TF);
    pass.observe(b.down.path, out_TC);
  }
  return out_TC;
}

at::Tensor Transformer::mlp_in_pieces(const Block& b, const at::Tensor& x_TC, const Pass& pass) const {
  std::vector<at::Tensor> trained;
  for (const Linear* l : {&b.gate, &b.up, &b.down})
    for (at::Tensor& leaf : l->trained()) trained.push_back(std::move(leaf));
  const auto piece = [&b, dropout = pass.dropout, gate_norm = b.gate.row_norms(), up_norm = b.up.row_norms(), down_norm = b.down.row_norms()](int64_t first, const at::Tensor& x_tC) {
    const DropoutContext rows = dropout.rows(first, x_tC.size(0));
    return b.down.part(swiglu(b.gate.part(x_tC, rows, gate_norm), b.up.part(x_tC, rows, up_norm)), rows, down_norm);
  };
  return b.down.whole(in_row_pieces(piece, x_TC, mlp_rows_, config_.hidden_size, trained, !recomputing()), !recomputing());
}

at::Tensor Transformer::run_block(const Block& b, const at::Tensor& x_TC, const Pass& pass) const {
  at::Tensor normed = rms_norm(x_TC, b.input_norm.weight_C, config_.rms_norm_eps);
  if (pass.observe) pass.observe(b.input_norm.path, normed);
  at::Tensor attended = attention(b, arriving_rows(normed), pass);
  auto [sum_TC, normed_sum] = add_rms_norm(attended, x_TC, b.post_attention_norm.weight_C, config_.rms_norm_eps);
  if (pass.observe) pass.observe(b.post_attention_norm.path, normed_sum);
  return sum_TC + mlp(b, arriving_rows(normed_sum), pass);
}

at::Tensor Transformer::run(const ModelInput& input, Pass& pass) {
  BlockWeights* weights = block_weights_;
  if (weights) weights->acquire(-1, false);
  // Between two blocks backward leaves the later and enters the earlier one.
  auto on_backward = [&](const at::Tensor& x_TC, int64_t leaves, int64_t enters) {
    if (!weights || !x_TC.requires_grad()) return;
    x_TC.register_hook([weights, leaves, enters](const at::Tensor&) {
      if (leaves >= 0) weights->release(leaves, true);
      if (enters >= 0) weights->acquire(enters, true);
    });
  };
  at::Tensor x_TC = input.hidden_TC;
  if (has_embedding_) {
    x_TC = seams_.embed ? seams_.embed(embedding_VC_, input.tokens_T) : trireme::embedding(embedding_VC_, input.tokens_T);
    if (pass.observe) pass.observe("model.embed_tokens", x_TC);
  }
  if (!x_TC.defined() && seams_.receive) x_TC = seams_.receive(input.tokens_T.size(0) / seams_.row_multiple);
  TRIREME_CHECK(x_TC.defined(), "a model without its embedding wants hidden_TC");
  SelectiveRecompute selective(recompute_ == Recompute::kSelective);
  bool full = recompute_ == Recompute::kFull && at::GradMode::is_enabled() && !pass.cache && !pass.observe;
  auto shared = std::make_shared<Pass>(pass);  // recomputation reads it again in backward
  int64_t before = -1;
  for (const auto& b : blocks_) {
    on_backward(x_TC, b.index, before);
    if (weights) weights->acquire(b.index, false);
    if (full) x_TC = recompute([this, &b, shared](const std::vector<at::Tensor>& in) { return run_block(b, in[0], *shared); }, {x_TC}, true, offload_);
    else x_TC = run_block(b, x_TC, pass);
    if (weights) weights->release(b.index, false);
    before = b.index;
  }
  on_backward(x_TC, -1, before);
  if (!has_head_) {
    if (seams_.send) seams_.send(x_TC);
    return x_TC;
  }
  x_TC = rms_norm(x_TC, final_norm_.weight_C, config_.rms_norm_eps);
  if (pass.observe) pass.observe(final_norm_.path, x_TC);
  return x_TC;
}

at::Tensor Transformer::forward(const ModelInput& input, KvCache* cache) {
  Pass pass = prepare(input, cache);
  at::Tensor hidden_TC = run(input, pass);
  if (cache) cache->set_empty(false);
  return hidden_TC;
}

KvCache Transformer::new_cache(int64_t capacity) const {
  std::map<int64_t, int64_t> heads;
  for (const Block& b : blocks_) heads[b.index] = b.k.out_features() / config_.head_dim;
  return KvCache(heads, config_.head_dim, capacity, at::TensorOptions(dtype_).device(device_));
}

int64_t Transformer::cache_bytes(int64_t capacity) const {
  int64_t values = 0;
  for (const Block& b : blocks_) values += (b.k.out_features() + b.v.out_features()) * capacity;
  return values * static_cast<int64_t>(c10::elementSize(dtype_));
}

at::Tensor Transformer::logits(const at::Tensor& hidden_TC, int64_t chunk_rows) const {
  at::NoGradGuard no_grad;
  at::Tensor out = at::empty({hidden_TC.size(0), config_.vocab_size},
                             hidden_TC.options().dtype(dtype_ == at::kDouble ? at::kDouble : at::kFloat));
  for (int64_t row = 0; has_head_ && row < hidden_TC.size(0); row += chunk_rows) {
    int64_t n = std::min(chunk_rows, hidden_TC.size(0) - row);
    at::Tensor part = trireme::linear(hidden_TC.narrow(0, row, n), head_weight_VC_);
    out.narrow(0, row, n).copy_(seams_.all_logits ? seams_.all_logits(part) : part);
  }
  if (seams_.from_last_stage) seams_.from_last_stage(out);
  return out;
}

LossSum Transformer::cross_entropy(const at::Tensor& hidden_TC, const at::Tensor& targets_T, double gradient_scale, const CrossEntropyTerms& terms) const {
  if (!has_head_) return {at::zeros({}, at::kDouble), 0, at::zeros({}, at::kLong)};
  return linear_cross_entropy(all_rows(hidden_TC), head_weight_VC_, targets_T, 0, gradient_scale,
                              seams_.vocabulary ? &*seams_.vocabulary : nullptr, terms);
}

std::string Transformer::first_nonfinite(const ModelInput& input) {
  at::NoGradGuard no_grad;
  std::string first;
  auto look = [&](const std::string& path, const at::Tensor& value) {
    if (!first.empty()) return;
    int64_t bad = value.numel() - at::isfinite(value).sum().item<int64_t>();
    if (bad > 0) first = str(path, ": ", bad, " of ", value.numel(), " values are not finite");
  };
  for (const auto& p : parameters()) look(p.name, p.value);
  // Where ranks share the rows all of them run: they meet in the seams.
  if (!has_embedding_ || (!first.empty() && !seams_.all_rows)) return first;
  bool was_training = training_;
  training_ = false;
  Pass pass = prepare(input, nullptr);
  pass.observe = look;
  run(input, pass);
  training_ = was_training;
  return first;
}

}  // namespace trireme
