#include "train/footprint.h"

#include <algorithm>
#include <map>

#include "model/lora_init.h"
#include "optim/adafactor.h"
#include "optim/offload.h"
#include "tasks/task.h"

namespace trireme {
namespace {

int64_t size_of(at::ScalarType dtype) { return static_cast<int64_t>(c10::elementSize(dtype)); }
int64_t rank_of(const Linear& l) { return l.lora ? l.lora->a_RI.size(0) : 0; }
int64_t gradient_of(const Linear& l) { return trained(l.weight_OI) ? l.weight_OI.numel() : 0; }

// Sizes of a micro-batch in a model: bytes of an element, and of one in which sums and norms are computed.
struct Sizes {
  int64_t tokens, rows;  // all of them; this rank's share between the matrices
  int64_t element, wide;
  at::DeviceType device = at::kCPU;
  bool offload = false;  // what lies between the blocks leaves the device
  int64_t mlp_rows = 0;  // train.mlp_tokens
  bool pieced() const { return mlp_rows > 0 && mlp_rows < tokens; }
  int64_t at_once() const { return pieced() ? mlp_rows : tokens; }  // rows in an MLP
  bool shared() const { return rows < tokens; }
};

at::Tensor weight_of(const Transformer& chunk, const char* name) {
  for (const Parameter& p : chunk.parameters())
    if (p.name == name) return p.value;
  return {};
}
at::Tensor head_of(const Transformer& chunk, const ModelConfig& c) {
  return weight_of(chunk, c.tie_embeddings ? "model.embed_tokens.weight" : "lm_head.weight");
}

// What a block needs for backward, in bytes, in states that follow one another.
struct BlockBytes {
  int64_t kept = 0;      // from its forward on
  int64_t whole = 0;     // kept, with all that backward computes again
  int64_t split = 0;     // between input gradients and weight gradients, where these wait
  int64_t backward = 0;  // beside what is kept, at most, while its backward runs
};

BlockBytes bytes_of(const Block& b, const ModelConfig& c, const Sizes& s, Recompute mode, bool input_has_gradient) {
  const int64_t q = b.q.out_features(), k = b.k.out_features(), v = b.v.out_features(), f = b.gate.out_features(), width = c.hidden_size;
  const int64_t heads = q / c.head_dim, all = s.tokens;
  // DoRA with dropout multiplies x - d and d: each layer keeps a d of its own, and none what comes in; or makes both again.
  const auto has_magnitude = [](const Linear& l) { return l.lora && l.lora->magnitude_O.defined(); };
  const bool selective = mode == Recompute::kSelective;
  const auto drops = [&](const Linear& l) { return has_magnitude(l) && l.lora->dropout > 0; };
  const auto keeps = [&](const Linear& l) { return keeps_input(l) && (selective || !drops(l)); };
  const bool qkv = keeps(b.q) || keeps(b.k) || keeps(b.v), mlp = keeps(b.gate) || keeps(b.up);
  const bool in = input_has_gradient || trained(b.input_norm.weight_C), attended = in || keeps_input(b.q) || keeps_input(b.k) || keeps_input(b.v) || keeps_input(b.o);
  std::vector<const Linear*> whole = {&b.q, &b.k, &b.v, &b.o}, of_mlp = {&b.gate, &b.up, &b.down};  // `whole`: all rows at once
  if (!s.pieced()) whole.insert(whole.end(), of_mlp.begin(), of_mlp.end());
  int64_t adapters = 0, split = 0;
  for (const Linear* l : whole) adapters += rank_of(*l), split += trained(l->weight_OI) ? l->out_features() : 0;

  // Elements a token of every rank's, and of this rank's rows.
  const int64_t attention = attended ? q + k + v + q : keeps_input(b.o) ? q : 0, middle = s.pieced() ? 0 : 2 * f;
  const int64_t normed = (qkv ? width : 0) + (mlp || s.pieced() ? width : 0), product = keeps(b.down) && !s.pieced() ? f : 0;
  const int64_t twice = attended && b.q_norm.weight_C.defined() && !selective ? q + k : 0;  // before and behind their norm
  const int64_t small = (2 * s.rows + (attended ? all * heads : 0) + (b.q_norm.weight_C.defined() ? all * (q + k) / c.head_dim : 0)) * s.wide;
  const int64_t streams = (in ? 1 : 0) + 1;  // the block's input, and its sum with what attention adds
  auto in_rows = [&](int64_t per_token) { return (s.shared() ? all : s.rows) * per_token * s.element; };
  // DoRA keeps the product that the norms scale, for the magnitudes' gradient, and with it magnitudes, norms and their ratio. Its backward has
  // that product's gradient and what it is summed from, and with dropout the gradients of d and of x - d beside what is handed on; where d is
  // made again, it and the norm that it is made of.
  struct Scaled {
    int64_t kept = 0, backward = 0;
  } scaled, scaled_in_piece;
  int64_t magnitudes = 0;  // bytes
  const auto add_scaled = [&](Scaled& to, const Linear& l, int64_t rows_in, int64_t rows_out) {
    if (!has_magnitude(l)) return;
    const int64_t turned = rows_out * l.out_features(), dropped = drops(l) ? rows_in * l.in_features() : 0;
    to.kept += turned + (selective ? 0 : dropped);
    if (drops(l) && s.device == at::kCPU) to.kept += turned + dropped;  // which the heap keeps in pieces too small for the next of their kind: as measured
    to.backward = std::max(to.backward, 2 * (turned + dropped) + (selective ? dropped * (&l == &b.o || &l == &b.down ? 1 : 2) : 0));
    magnitudes += l.out_features() * (2 * s.wide + s.element);
  };
  for (const Linear* l : whole) add_scaled(scaled, *l, all, l->after || l == &b.o || l == &b.down ? s.rows : all);
  const int64_t least = (all * (attention + twice + middle + adapters) + s.rows * streams * width + scaled.kept) * s.element + small + magnitudes;

  BlockBytes bytes;
  bytes.whole = least + in_rows(normed) + all * product * s.element;
  bytes.kept = mode == Recompute::kFull ? s.rows * width * s.element : selective ? least : bytes.whole;
  // Inputs and output gradients of the matrices that wait; scattered rows are whole again there.
  bytes.split = split == 0 ? 0 : in_rows(normed) + all * (q + product + split) * s.element;
  // The MLP's, then attention's: what has come in, what it adds to it, less what it no longer needs.
  const int64_t arrived = s.rows * width + (s.shared() ? all * width : 0), again = selective ? all * product : 0;
  const int64_t down = arrived + all * f + again + gradient_of(b.down);
  const int64_t swiglu = s.rows * width + 2 * all * f - (selective ? 0 : all * product);  // one gradient takes the other's place
  const int64_t scores = s.rows * width + all * (5 * q + 2 * k) - all * (middle + product) - (selective ? 0 : (s.shared() ? all : s.rows) * (normed - (qkv ? width : 0)));
  const int64_t gates = s.rows * width + 2 * all * width + gradient_of(b.gate) + (selective ? all * width : -all * product);
  if (!s.pieced()) {
    bytes.backward = (std::max({down, swiglu, scores, gates}) + scaled.backward) * s.element;
  } else {
    // Gradients of all rows, and what one piece takes: gate, up, their product and its gradient, or the two of gate and up; rows that come and go.
    // Gradients of trained leaves are added up, and there are those of the piece.
    int64_t piece = s.mlp_rows * (4 * f + 4 * width), sums = 0;
    for (const Linear* l : of_mlp) {
      piece += s.mlp_rows * rank_of(*l);
      add_scaled(scaled_in_piece, *l, s.mlp_rows, s.mlp_rows);
      for (const at::Tensor& leaf : l->trained()) sums += leaf.numel() * (s.wide + s.element);
    }
    const int64_t mlp_bytes = (arrived + again + all * width + piece + scaled_in_piece.kept + scaled_in_piece.backward) * s.element + sums;
    bytes.backward = std::max(mlp_bytes, (scores + scaled.backward) * s.element);
  }
  if (mode == Recompute::kFull) bytes.backward += bytes.whole + 2 * s.rows * width * s.element;  // it all, its output and gradient
  return bytes;
}

// What a chunk of the model needs of one micro-batch.
struct ChunkBytes {
  BlockBytes blocks;       // kept and split: of all blocks together
  int64_t away = 0;        // kept, but in host memory
  int64_t loss_kept = 0;   // between forward and backward, of the chunk with the head
  int64_t loss_forward = 0, loss_backward = 0;  // beside kept, while the loss and its backward run
  int64_t through = 0;     // all through backward: the gradient of a tied head waits for the embedding's
  int64_t forward = 0;     // beside kept, at the end of forward
  int64_t block = 0;       // one block, without recomputation
};

ChunkBytes bytes_of(const Transformer& chunk, const ModelConfig& c, const Sizes& s, Recompute mode, int64_t learnt) {
  ChunkBytes bytes;
  bool gradient = !chunk.has_embedding() || trained(weight_of(chunk, "model.embed_tokens.weight"));
  for (const Block& b : const_cast<Transformer&>(chunk).blocks()) {
    const BlockBytes block = bytes_of(b, c, s, mode, gradient);
    (s.offload ? bytes.away : bytes.blocks.kept) += block.kept;
    bytes.blocks.split += block.split;
    bytes.blocks.backward = std::max(bytes.blocks.backward, block.backward);
    bytes.block = std::max(bytes.block, block.whole);
    gradient = true;
  }
  const int64_t row = s.rows * c.hidden_size * s.element, all = s.tokens * c.hidden_size * s.element;
  if (s.offload) bytes.blocks.kept += 2 * row;              // one that leaves, or is computed again, and the next that comes back
  bytes.blocks.kept += 2 * s.tokens * c.head_dim * s.wide;  // cos and sin
  bytes.forward = 2 * row + (s.shared() ? all : 0);         // the last block's output, and what it is the sum of
  if (!chunk.has_head()) return bytes;
  const at::Tensor head = head_of(chunk, c);
  const bool trains = trained(head);
  const int64_t vocabulary = head.size(0), whole = trains ? head.numel() : 0;
  const int64_t chunk_rows = cross_entropy_chunk_rows(c.vocab_size, chunk.dtype(), trains, s.device), rows = std::min(learnt, chunk_rows);
  const int64_t padded = rows <= 64 ? rows : (rows + 63) / 64 * 64;
  const int64_t logits = padded * ((vocabulary + 63) / 64 * 64) * s.element, gathered = padded * c.hidden_size * s.element;
  const bool copies_sum = learnt > chunk_rows && s.device == at::kCPU;  // a device adds to the gradient itself
  const int64_t sum = whole * (copies_sum ? s.wide : s.element), part = copies_sum ? whole * s.element : 0;
  const int64_t copies = s.shared() ? rows * vocabulary * s.wide : 0;
  bytes.blocks.kept += row + s.rows * s.wide;  // the final norm's input
  bytes.loss_kept = all + sum;
  bytes.loss_forward = row + (s.shared() ? all : 0) + logits + 2 * gathered + bytes.loss_kept + std::max(part, copies);
  bytes.loss_backward = bytes.loss_kept + (s.device == at::kCPU ? std::max(all, whole * s.element) : 0);  // a device scales in place
  bytes.through = c.tie_embeddings && chunk.has_embedding() ? whole * s.element : 0;
  return bytes;
}

// Of a forward that keeps nothing, at its largest moment. What run_block() has named lives to its end.
int64_t forward_bytes(const Transformer& chunk, const ModelConfig& c, const Sizes& s) {
  const int64_t row = s.rows * c.hidden_size, all = s.tokens * c.hidden_size, gathered = s.shared() ? all : 0;
  int64_t most = 0;
  for (const Block& b : const_cast<Transformer&>(chunk).blocks()) {
    const int64_t q = b.q.out_features(), kv = b.k.out_features() + b.v.out_features(), f = b.gate.out_features();
    const int64_t heads = 2 * row + gathered + s.tokens * (q + kv) + std::max(2 * s.tokens * q, s.tokens * q + all);  // the input and its norm
    const int64_t mlp = 5 * row + gathered + 3 * s.at_once() * f + all + (s.pieced() ? s.at_once() * c.hidden_size : 0) + (s.shared() ? row : 0);  // and what was added, the sum and its norm
    most = std::max({most, heads, mlp});
  }
  if (chunk.has_head()) {
    const int64_t vocabulary = head_of(chunk, c).size(0), rows = std::min(s.tokens, cross_entropy_chunk_rows(c.vocab_size, chunk.dtype(), false, s.device));
    const int64_t copies = s.shared() ? rows * vocabulary * s.wide / s.element : 0;
    most = std::max(most, row + gathered + rows * ((vocabulary + 63) / 64 * 64 + c.hidden_size) + copies);
  }
  return most * s.element + 2 * s.tokens * c.head_dim * s.wide;
}

// Beside that, of a product with a frozen weight, whenever it is.
int64_t product_bytes(const Chunks& chunks, int64_t tokens) {
  int64_t most = 0;
  for (const auto& chunk : chunks)
    for (const Linear* l : chunk->linears())
      if (l->frozen) most = std::max(most, l->frozen->product_bytes(tokens, chunk->dtype()));
  return most;
}

// What making a layer's weight takes beside its leaves, at most: quant.base, lora.init and lora.dora begin with the whole one, and all that is
// made of it is there before a rank takes its part (FrozenLayers). A decomposition (model/lora_init.h) is in host memory.
int64_t making_bytes(const Chunks& chunks, const LoraConfig& lora, int64_t element, int num_tensor, at::DeviceType device) {
  int64_t most = 0;
  for (const auto& chunk : chunks)
    for (const Linear* l : chunk->linears()) {
      const bool starts = l->lora && (lora.init == LoraInit::kPissa || (lora.init == LoraInit::kLoftq && l->frozen)), dora = l->lora && lora.dora;
      if (!l->frozen && !starts && !dora) continue;
      const int64_t o = l->out_features(), i = l->in_features(), whole = o * i * num_tensor;
      int64_t bytes = whole * element;
      if (l->frozen) bytes += l->frozen->num_bytes() * num_tensor;
      if (starts && l->frozen) bytes += 2 * whole * 4;  // LoftQ: the base, and what it loses
      else if (starts || (dora && l->frozen)) bytes += whole * element;
      if (starts && device == at::kCPU) {
        const bool by_columns = l->path.ends_with("o_proj") || l->path.ends_with("down_proj");
        bytes += lora_start_bytes(by_columns ? o : o * num_tensor, by_columns ? i * num_tensor : i, lora.init == LoraInit::kLoftq);
      }
      most = std::max(most, bytes);
    }
  return most;
}

struct Peak {
  int64_t here = 0, away = 0;
};

// The largest sums while a stage does its part of a step. One chunk and its micro-batches in turn are the same with one stage.
Peak peak_of(const std::vector<Action>& actions, const std::map<int, ChunkBytes>& chunks) {
  int64_t live = 0, away = 0;
  Peak peak;
  for (const Action& a : actions) {
    const ChunkBytes& chunk = chunks.at(a.chunk);
    const BlockBytes& blocks = chunk.blocks;
    auto reaches = [&](int64_t more) { peak.here = std::max(peak.here, live + more); };
    switch (a.kind) {
      case ActionKind::kForward:
        reaches(blocks.kept + std::max(chunk.loss_forward, chunk.forward));
        live += blocks.kept + chunk.loss_kept;
        away += chunk.away, peak.away = std::max(peak.away, away);
        break;
      case ActionKind::kBackward:
      case ActionKind::kBackwardInput: {
        const bool waits = a.kind == ActionKind::kBackwardInput;
        reaches(chunk.loss_backward - chunk.loss_kept);
        live -= chunk.loss_kept;
        reaches(chunk.through + blocks.backward + (waits ? std::max<int64_t>(0, blocks.split - blocks.kept) : 0));
        live += (waits ? blocks.split : 0) - blocks.kept;
        away -= chunk.away;
        break;
      }
      case ActionKind::kBackwardWeight:
        live -= blocks.split;
        break;
    }
  }
  return peak;
}

// ZeRO: a rank's parts, and of buckets what is there for a while.
void add_shared_out(Footprint& f, const MeshModel& model, const Config& config, const MeshCoords& coords, int64_t num_batches, at::DeviceType device) {
  const RankModel& rank = model.at(coords.pipeline, coords.tensor);
  const int64_t element = size_of(model.dtype()), wide = size_of(gradient_type(model.dtype()));
  const auto zero = config.parallel.zero;
  const bool pipeline = model.mesh().num_pipeline() > 1;
  int64_t all = 0, parts = 0, largest[2] = {0, 0};
  const OptimizerOptions options = optimizer_options(config, model.dtype());
  std::map<int64_t, int64_t> of_block;  // gradients of the buckets that hold some of a block
  int64_t weight_parts = 0, longest = 0;  // `longest`: what is updated at once
  uint64_t workspace = 0;                 // of adafactor on a device
  for (const bool of_trained : {true, false})
    for (const Bucket& bucket : model.buckets(rank, config, of_trained)) {
      const int64_t part = bucket.num_elements / MeshModel::shared_out(rank.group_sizes[bucket.group], config, model.mesh()).first;
      weight_parts += part * static_cast<int64_t>(bucket.options.dtype().itemsize());
      if (!of_trained) continue;
      all += bucket.num_elements, parts += part;
      const int num_parts = zero == 0 ? 1 : MeshModel::shared_out(rank.group_sizes[bucket.group], config, model.mesh()).first;
      uint64_t state = 0;  // of the rank that has most
      for (int p = 0; p < num_parts; ++p) {
        uint64_t of_part = 0;
        for (const PartRange& r : ranges_of_part(bucket, rank.parameters, p, num_parts))
          of_part += Optimizer::state_bytes(model.dtype(), options, r.end - r.begin, rank.parameters[r.parameter].shard.global_shape);
        state = std::max(state, of_part);
      }
      f.optimizer += state;
      for (int64_t bytes = bucket.num_elements * wide; int64_t& place : largest)
        if (bytes > place) std::swap(bytes, place);
      for (size_t i : bucket.parameters) {
        const int64_t count = zero == 0 ? rank.parameters[i].value.numel() : std::min(part, rank.parameters[i].value.numel());
        longest = std::max(longest, count);
        workspace = std::max(workspace, Adafactor::workspace_bytes(count, rank.parameters[i].shard.global_shape));
      }
      std::map<int64_t, bool> blocks;
      for (size_t i : bucket.parameters) blocks[block_of(rank.parameters[i].name)] = true;
      for (const auto& [block, there] : blocks) of_block[block] += bucket.num_elements * wide;
    }
  uint64_t weights = 0, frozen = 0, on_host = 0;
  for (const Parameter& p : rank.parameters) (p.on_host ? on_host : p.value.requires_grad() ? weights : frozen) += p.value.nbytes();
  f.weights = frozen + (zero == 0 ? weights : static_cast<uint64_t>(all * element));
  if (zero == 3) f.weights = static_cast<uint64_t>(weight_parts + gathered_blocks(model, config, coords, num_batches).peak_bytes);
  (device == at::kCPU ? f.weights : f.embedding) += on_host;
  f.gradients = static_cast<uint64_t>(all * wide);
  if (zero >= 2) {
    int64_t transient = 0;
    for (const auto& [block, bytes] : of_block) transient = std::max(transient, bytes + largest[0] + largest[1]);
    // Micro-batches add up in whole buckets; so do a pipeline's.
    const bool adds_up = config.parallel.reduce == "step" && (num_batches > 1 || pipeline);
    if (adds_up || !config.comm.overlap) transient = all * wide;
    f.gradients = static_cast<uint64_t>(parts * wide + std::min(all * wide, transient));
  }
  const bool is_adafactor = options.kind == OptimizerKind::kAdafactor;
  const uint64_t moving = !is_adafactor ? f.optimizer : has_master(model.dtype(), options.masters) ? static_cast<uint64_t>((zero == 0 ? all : parts) * wide) : 0;
  const uint64_t away = moving - Optimizer::paged_bytes_there(moving, model.dtype(), options);
  if (is_adafactor) f.optimizer += model.sums_bytes() + (device == at::kCPU ? static_cast<uint64_t>(longest * wide) : workspace);  // and a direction
  f.pages = f.optimizer - away;
  if (config.optim.offload) f.optimizer += HostStaging::bytes(longest, model.dtype());
}

}  // namespace

uint64_t kept_by_block(const Block& block, const ModelConfig& config, at::ScalarType dtype, int64_t tokens, int num_tensor, Recompute mode, int64_t mlp_rows) {
  const Sizes sizes{tokens, tokens / num_tensor, size_of(dtype), size_of(gradient_type(dtype)), at::kCPU, false, mlp_rows};
  return static_cast<uint64_t>(bytes_of(block, config, sizes, mode, true).kept);
}

Footprint step_footprint(const MeshModel& model, const Config& config, const MeshCoords& coords, const MicroBatch& batch, int64_t num_batches,
                         const EvalBatches& evaluation, at::DeviceType device) {
  Footprint f;
  const Mesh& mesh = model.mesh();
  const RankModel& rank = model.at(coords.pipeline, coords.tensor);
  add_shared_out(f, model, config, coords, num_batches, device);
  const int64_t multiple = row_multiple(device, model.dtype(), mesh.num_tensor());
  const bool offload = config.train.offload_activations && device != at::kCPU;
  auto sizes_of = [&](int64_t tokens) {
    tokens = (tokens + multiple - 1) / multiple * multiple;
    return Sizes{tokens, tokens / mesh.num_tensor(), size_of(model.dtype()), size_of(gradient_type(model.dtype())), device, offload, config.train.mlp_tokens};
  };
  const Sizes sizes = sizes_of(batch.tokens);
  const Recompute mode = parse_recompute(config.train.recompute);
  const std::vector<int> numbers = stages_of(config, model.config()).shape.chunks_of(coords.pipeline);
  std::map<int, ChunkBytes> chunks;
  for (size_t i = 0; i < numbers.size(); ++i)
    chunks[numbers[i]] = bytes_of(*rank.chunks[i], model.config(), sizes, mode, std::min(batch.learnt, sizes.tokens));
  for (const auto& [number, chunk] : chunks) f.block = std::max(f.block, static_cast<uint64_t>(chunk.block));
  constexpr int64_t kIds = 3 * 8;  // token, target and position
  auto hidden = [&](const Sizes& s, int64_t count) { return count * s.rows * model.config().hidden_size * s.element; };
  int64_t buffers = num_batches * kIds * sizes.tokens;  // ids of all micro-batches until the step is done
  Peak peak;
  if (mesh.num_pipeline() == 1) {
    peak = peak_of({{ActionKind::kForward, 0, 0}, {ActionKind::kBackward, 0, 0}}, chunks);
  } else {
    const PipelineSchedule schedule = schedule_of(config, num_batches);
    const auto& actions = schedule.actions[static_cast<size_t>(coords.pipeline)];
    peak = peak_of(actions, chunks);
    // A receive is posted of whatever comes next to a chunk, in each direction, and a message is on its way to each receiver.
    std::map<std::pair<int, bool>, int64_t> receives, sends;
    Action waiting{};
    for (const Action& a : actions) {
      const std::pair<int, bool> channel{a.chunk, a.kind == ActionKind::kForward};
      if (schedule.source(a) >= 0) receives[channel] = 1;
      if (schedule.consumer(a, &waiting)) sends[channel] = 1;
    }
    buffers += hidden(sizes, static_cast<int64_t>(receives.size() + sends.size()));
  }
  int64_t activations = peak.here + product_bytes(rank.chunks, sizes.tokens);
  f.away = static_cast<uint64_t>(peak.away);
  if (evaluation.tokens > 0) {
    const Sizes evaluated = sizes_of(evaluation.tokens);
    int64_t forward = 0, around = kIds * evaluated.tokens;
    for (const auto& chunk : rank.chunks) forward = std::max(forward, forward_bytes(*chunk, model.config(), evaluated));
    forward += product_bytes(rank.chunks, evaluated.tokens);
    // Of each chunk a receive is posted, and two outputs may be on their way (PipelineRunner).
    if (mesh.num_pipeline() > 1)
      around = kIds * std::max(evaluation.tokens_of_copy, evaluated.tokens) + hidden(evaluated, 3 * static_cast<int64_t>(numbers.size()));
    f.in_evaluation = forward + around > activations + buffers;
    if (f.in_evaluation) activations = forward, buffers = around;
  }
  f.activations = static_cast<uint64_t>(activations), f.buffers = static_cast<uint64_t>(buffers);
  const uint64_t of_optimizer = device == at::kCPU ? f.optimizer : config.optim.offload ? 0 : config.optim.paged ? f.pages : f.optimizer;
  const uint64_t beside = f.gradients + of_optimizer + f.activations + f.buffers;  // which is not there yet
  const LoraConfig lora = config.lora.path.empty() && config.lora.rank > 0 ? lora_config(config) : LoraConfig();
  const auto making = static_cast<uint64_t>(making_bytes(rank.chunks, lora, size_of(model.dtype()), mesh.num_tensor(), device));
  f.weights += making - std::min(making, beside);
  return f;
}

}  // namespace trireme
