// The decoder of the Llama family (Llama, Mistral, Qwen2, Qwen3, SmolLM) on one device, over flat tokens.
// Shape suffixes: T tokens of all segments, C hidden size, F intermediate size, H query heads, K key/value heads,
// D head size, S keys (T and what the cache holds), V vocabulary, R rank of an adapter, O/I rows/columns of a weight.
#pragma once

#include "base/parameter.h"
#include "model/hf_config.h"
#include "model/kv_cache.h"
#include "model/linear.h"
#include "ops/ops.h"

namespace trireme {

// data/batch.h's SequenceBatch on the device, but the targets. Several rows are one flat run: attention only looks at cu_seqlens.
struct ModelInput {
  at::Tensor tokens_T, positions_T;             // int64 [T]
  at::Tensor targets_T;                         // int64 [T], in host memory; may be undefined where no loss is asked for
  std::vector<int64_t> cu_seqlens;              // [segments + 1]
  std::vector<int64_t> sample_ids;              // [segments] keys the dropout masks; may be empty without dropout
  uint64_t dropout_seed = 0;                    // of the run; new masks in each epoch come from sample_ids, which tell the epoch
  at::Tensor hidden_TC;  // what the pipeline stage before has sent; undefined where the model holds the embedding
};

// What backward computes again instead of keeping it. full: a block's input only is kept. selective: what is cheap is
// computed again (norms, q/k norm and rotary embedding, SwiGLU), the matrix products and attention are kept.
// The gradients are the same bits in all three.
enum class Recompute { kNone, kSelective, kFull };
Recompute parse_recompute(const std::string& name);  // none, selective, full; ConfigError

enum class Weights { kRandom, kUninitialized };  // kUninitialized: a file will fill them; nothing is written twice

struct Norm {
  std::string path;
  at::Tensor weight_C;
};

struct Block {
  int64_t index = 0;
  Norm input_norm, post_attention_norm;
  Norm q_norm, k_norm;  // weight undefined where the family has none
  Linear q, k, v, o, gate, up, down;
  int64_t window = -1;
  bool uses_rope = true;
};

// What lies between the parts of a model whose weights are sliced over ranks: all empty on one device, set by parallel/.
// The residual stream, the norms and the output of forward() have a share of the rows there, in the order of the ranks.
struct ModelSeams {
  std::function<at::Tensor(const at::Tensor& w_VC, const at::Tensor& ids_T)> embed;
  std::function<ArrivingRows(const at::Tensor& x_TC)> all_rows;    // of what lies spread over the ranks by rows
  std::function<at::Tensor(const at::Tensor& part_TV)> all_logits;  // from every rank's part of the vocabulary
  std::optional<VocabularyPart> vocabulary;  // that the head has here
  int64_t row_multiple = 1;                    // number of rows of which T is a multiple
  // Where the layers are dealt out over stages that only run forward; one stage goes on while the next computes.
  std::function<at::Tensor(int64_t rows)> receive;       // [rows, C] from the stage before
  std::function<void(const at::Tensor& x_TC)> send;      // to the stage behind
  std::function<void(at::Tensor logits)> from_last_stage;  // what the last stage has in this tensor
};

// Provides weights that are not always in memory. Told before and after a block computes, in forward and in backward; there
// a block is released when the gradient of its input is known, which nobody asks for where nothing before it is trained.
class BlockWeights {
 public:
  virtual ~BlockWeights() = default;
  // `block` -1: all that is outside of the blocks; once a forward, and never released.
  virtual void acquire(int64_t block, bool backward) = 0;
  virtual void release(int64_t block, bool backward) = 0;
};

class Transformer {
 public:
  // kRandom: matrices normal(0, initializer_range), norms 1, biases 0; an element is a function of (seed, parameter, its
  // place in it), rounded to dtype. Every parameter requires gradients.
  Transformer(const ModelConfig& config, at::ScalarType dtype, uint64_t seed, Weights weights = Weights::kRandom,
              at::Device device = at::kCPU);

  const ModelConfig& config() const { return config_; }
  at::ScalarType dtype() const { return dtype_; }
  at::Device device() const { return device_; }

  // [T, C] after the final norm; where the head is on a later stage: after the last layer here. Dropout acts only while
  // training() is true.
  // With a cache, of one sequence (model/kv_cache.h), without gradients: an empty one takes the keys and values of a prompt; later tokens
  // are put where positions_T says and see all before them. Nothing of a later pass depends on numbers of the host: on a device it can be
  // recorded (ops/step_graph.h) and launched for the next tokens.
  at::Tensor forward(const ModelInput& input, KvCache* cache = nullptr);
  // An empty cache for up to `capacity` tokens (rows that a batch is filled up with count), for the layers and heads that are here.
  KvCache new_cache(int64_t capacity) const;
  int64_t cache_bytes(int64_t capacity) const;
  // fp32 (fp64 for fp64) logits of hidden states (all_rows() of them), without gradients, chunk by chunk. Stages that run forward
  // only (ModelSeams) all have them.
  at::Tensor logits(const at::Tensor& hidden_TC, int64_t chunk_rows = 512) const;
  // Of what forward() returns: every row, on every rank.
  at::Tensor all_rows(const at::Tensor& hidden_TC) const { return arriving_rows(hidden_TC).wait(); }
  // Next-token loss of what forward() returned; see linear_cross_entropy() in ops/ops.h. 0 of 0 rows where the head is on
  // another stage.
  LossSum cross_entropy(const at::Tensor& hidden_TC, const at::Tensor& targets_T, double gradient_scale = 1, const CrossEntropyTerms& terms = {}) const;

  // All leaves in Hugging Face order and names (a tied head appears once, as the embedding), then the adapters under
  // PEFT names. Values share storage with the model: fill them to load.
  std::vector<Parameter> parameters() const;

  // To cut a model to what one rank of many holds, while it is on the meta device (parallel/), and to give it memory then.
  void keep_layers(int64_t first, int64_t end, bool embedding, bool head);  // of the pipeline stage
  // Replaces every leaf by the slice that `cut` returns: {the slice, its place}. It is asked for a frozen weight as for a dense one.
  void slice(const std::function<std::pair<at::Tensor, ShardSpec>(const Parameter& whole)>& cut);
  void set_seams(ModelSeams seams) { seams_ = std::move(seams); }
  const ModelSeams& seams() const { return seams_; }
  // Memory on `device` for all leaves; those that `fill` names have initial values. An empty `fill`: none, set_data() gives it.
  void materialize(at::Device device, uint64_t seed, const std::function<bool(const std::string& name)>& fill);
  // Where two parts of one tied model are on one rank, embedding and head are one tensor again.
  void share_tied_embedding(const Transformer& first);
  bool has_embedding() const { return has_embedding_; }
  bool has_head() const { return has_head_; }
  // The table of the tokens' vectors stays in host memory, from where a device reads a batch's rows. Before there is memory; it is
  // frozen then, and no head is tied to it.
  void keep_embedding_on_host() { embedding_on_host_ = true, embedding_VC_.requires_grad_(false); }
  std::vector<Linear*> linears();  // q, k, v, o, gate, up, down of every block, in order; not the head
  std::vector<Block>& blocks() { return blocks_; }

  // `offload`: with kFull the blocks' inputs wait in host memory, where the model is on a device.
  void set_recompute(Recompute mode, bool offload = false) { recompute_ = mode, offload_ = offload; }
  void set_mlp_rows(int64_t rows) { mlp_rows_ = rows; }  // at most so many go through a block's MLP at once (in_row_pieces()); 0: all
  void set_block_weights(BlockWeights* weights) { block_weights_ = weights; }  // outlives every backward; null: all are there
  BlockWeights* block_weights() const { return block_weights_; }
  void set_training(bool training) { training_ = training; }
  bool training() const { return training_; }

  // Runs forward without gradients and returns the path of the first module whose output is not finite, with the number
  // of bad values ("model.layers.3.mlp.down_proj: 12 of 4096 values are not finite"); "" where all are.
  // A weight that is not finite is named first.
  std::string first_nonfinite(const ModelInput& input);

 private:
  // What every block of one forward needs.
  struct Pass {
    at::Tensor cos_TR, sin_TR;
    std::vector<int64_t> cu_seqlens;
    at::Tensor bounds;  // the same, on the device
    DropoutContext dropout;
    KvCache* cache = nullptr;
    at::Tensor positions_T, lengths_B;  // of tokens behind a cache's prompt: their places, and the number of keys with them
    std::function<void(const std::string& path, const at::Tensor& output)> observe;  // empty, or told every output
  };
  Pass prepare(const ModelInput& input, KvCache* cache) const;
  at::Tensor run(const ModelInput& input, Pass& pass);
  at::Tensor run_block(const Block& block, const at::Tensor& x_TC, const Pass& pass) const;
  ArrivingRows arriving_rows(const at::Tensor& x_TC) const { return seams_.all_rows ? seams_.all_rows(x_TC) : x_TC; }
  at::Tensor attention(const Block& block, const ArrivingRows& x_TC, const Pass& pass) const;
  at::Tensor mlp(const Block& block, const ArrivingRows& x_TC, const Pass& pass) const;
  at::Tensor mlp_in_pieces(const Block& block, const at::Tensor& x_TC, const Pass& pass) const;

  // fn(name, leaf), in the order of parameters(); leaves may be replaced. `frozen`, where it is given, is told of a layer whose weight
  // is made of several leaves in place of these.
  void for_each_leaf(const std::function<void(const std::string& name, at::Tensor& leaf)>& fn, const std::function<void(Linear&)>& frozen = {});

  ModelConfig config_;
  at::ScalarType dtype_;
  at::Device device_;
  at::Tensor embedding_VC_, head_weight_VC_;
  std::vector<Block> blocks_;
  Norm final_norm_;
  bool has_embedding_ = true, has_head_ = true;
  std::map<std::string, ShardSpec> slices_;  // of leaves that are no longer whole
  ModelSeams seams_;
  at::Tensor inv_freq_;  // fp32 [D / 2] (fp64 in an fp64 model)
  double rope_scale_ = 1.0;
  Recompute recompute_ = Recompute::kNone;
  bool offload_ = false, embedding_on_host_ = false;
  int64_t mlp_rows_ = 0;
  bool training_ = false;
  BlockWeights* block_weights_ = nullptr;
};

// float32 | bfloat16 | float16 | float64 and the short fp32, bf16, ...; ConfigError lists them. `key` is named in it.
at::ScalarType parse_dtype(const std::string& name, const std::string& key);
std::string dtype_name(at::ScalarType dtype);  // float32, ...

}  // namespace trireme
