#include "parallel/tensor_parallel.h"

#include <algorithm>

#include "base/check.h"
#include "comm/process.h"

namespace trireme {
namespace {

struct Range {
  int64_t begin = 0, end = 0;
};

// Which part of dim `dim` of a parameter a rank holds; dim -1: all of it.
struct Cut {
  int64_t dim = -1;
  Range range;
};

class Cutter {
 public:
  Cutter(const ModelConfig& config, int64_t rank, int64_t size) : config_(config), rank_(rank), size_(size) {}

  Cut cut_of(const std::string& name) const {
    auto in = [&](const char* module) { return name.find(std::string(".") + module + ".") != std::string::npos; };
    if (in("embed_tokens") || name.starts_with("lm_head.")) return {0, vocabulary()};
    const bool bias = name.ends_with(".bias"), a = name.ends_with(".lora_A.weight"), b = name.ends_with(".lora_B.weight"), m = name.ends_with(".lora_magnitude_vector");
    auto column = [&](Range range) { return a ? Cut{} : Cut{0, range}; };
    auto row = [&](Range range) { return bias || b || m ? Cut{} : Cut{1, range}; };
    const int64_t d = config_.head_dim;
    if (in("q_proj")) return column(scaled(share(config_.num_heads), d));
    if (in("k_proj") || in("v_proj")) return column(scaled(key_heads(), d));
    if (in("gate_proj") || in("up_proj")) return column(share(config_.intermediate_size));
    if (in("o_proj")) return row(scaled(share(config_.num_heads), d));
    if (in("down_proj")) return row(share(config_.intermediate_size));
    TRIREME_CHECK(name.ends_with("norm.weight"), "no placement for ", name);
    return {};
  }
  Range vocabulary() const { return share(config_.vocab_size); }
  Range vocabulary_of(int64_t rank) const { return Cutter(config_, rank, size_).vocabulary(); }

 private:
  Range share(int64_t n) const { return {n * rank_ / size_, n * (rank_ + 1) / size_}; }
  Range key_heads() const {
    const int64_t k = config_.num_kv_heads;
    return k >= size_ ? share(k) : Range{rank_ * k / size_, rank_ * k / size_ + 1};
  }
  static Range scaled(Range r, int64_t factor) { return {r.begin * factor, r.end * factor}; }

  const ModelConfig& config_;
  int64_t rank_, size_;
};

// Rows of this rank's ids; rows of other ids are 0, for their ranks add them.
Placed<Partial> embedding_of_part(const at::Tensor& w_VC, const Placed<Replicate>& ids_T, int64_t first) {
  at::Tensor local = ids_T.local - first;
  at::Tensor here = (local >= 0).logical_and(local < w_VC.size(0));
  at::Tensor rows = trireme::embedding(w_VC, local.where(here, 0));
  return {rows.masked_fill(here.logical_not().unsqueeze(1), 0.0)};
}

// [T, V] from the parts of all ranks, which may differ in width by one.
Placed<Replicate> join_logits(const Placed<Shard<1>>& logits, const Cutter& cutter, const Communicator& tensor) {
  const at::Tensor& part_TV = logits.local;
  std::vector<Range> ranges;
  int64_t widest = 0;
  for (int r = 0; r < tensor.size(); ++r) {
    ranges.push_back(cutter.vocabulary_of(r));
    widest = std::max(widest, ranges.back().end - ranges.back().begin);
  }
  at::Tensor mine = at::constant_pad_nd(part_TV, {0, widest - part_TV.size(1)}).contiguous();
  at::Tensor all = at::empty({tensor.size(), mine.size(0), widest}, mine.options());
  tensor.all_gather(all, mine);
  std::vector<at::Tensor> parts;
  for (int r = 0; r < tensor.size(); ++r)
    parts.push_back(all[r].narrow(1, 0, ranges[static_cast<size_t>(r)].end - ranges[static_cast<size_t>(r)].begin));
  return {at::cat(parts, 1)};
}

}  // namespace

void check_tensor_parallel(const ModelConfig& c, int64_t n) {
  auto fits = [&](int64_t t) {
    return c.num_heads % t == 0 && (c.num_kv_heads % t == 0 || t % c.num_kv_heads == 0) && c.intermediate_size >= t && c.vocab_size >= t;
  };
  if (fits(n)) return;
  std::string sizes;
  for (int64_t t = 1; t <= c.num_heads; ++t)
    if (fits(t)) sizes += str(sizes.empty() ? "" : ", ", t);
  std::string parts;
  auto wrong = [&](bool fails, int64_t count, const char* what) {
    if (fails) parts += str(parts.empty() ? "" : " and ", "the ", count, " ", what);
  };
  wrong(c.num_heads % n != 0, c.num_heads, "heads");
  wrong(c.num_kv_heads % n != 0 && n % c.num_kv_heads != 0, c.num_kv_heads, "key heads");
  wrong(c.intermediate_size < n, c.intermediate_size, "MLP units");
  wrong(c.vocab_size < n, c.vocab_size, "ids");
  throw ConfigError(str("parallel.tensor=", n, ": ", parts, " of ", c.source, " cannot be shared out evenly over ", n,
                        " ranks; sizes that can: ", sizes));
}

void keep_tensor_part(Transformer& model, int rank, int size) {
  if (size == 1) return;
  check_tensor_parallel(model.config(), size);
  const Cutter cutter(model.config(), rank, size);
  model.slice([&](const Parameter& whole) -> std::pair<at::Tensor, ShardSpec> {
    const Cut cut = cutter.cut_of(whole.name);
    if (cut.dim < 0) return {whole.value, whole.shard};
    ShardSpec place = whole.shard;
    place.offset[static_cast<size_t>(cut.dim)] = cut.range.begin;
    auto sizes = whole.value.sizes().vec();
    sizes[static_cast<size_t>(cut.dim)] = cut.range.end - cut.range.begin;
    return {at::empty(sizes, whole.value.options().requires_grad(false)), place};
  });
}

void apply_tensor_parallel(Transformer& model, const Communicator& tensor, RowOverlap overlap) {
  if (tensor.size() == 1) return;
  if (tensor.agree(tensor.broadcast_bytes(host_name()) != host_name())) overlap.over_mpi = true;
  keep_tensor_part(model, tensor.rank(), tensor.size());
  const ModelConfig& config = model.config();
  const Cutter cutter(config, tensor.rank(), tensor.size());
  const TensorAxis axis{tensor};
  for (Linear* l : model.linears()) {
    const Cut cut = cutter.cut_of(l->path + ".weight");
    if (cut.dim != 1) continue;  // column-parallel: reads all rows, which the block has gathered
    l->after = sum_of_products(tensor, overlap);
    l->sum_over_inputs = [tensor](at::Tensor x) { tensor.all_reduce(x, ReduceOp::kSum); };
    if (l->frozen) l->frozen->maximum_over_inputs = [tensor](at::Tensor x) { tensor.all_reduce(x, ReduceOp::kMax); };
    l->first_feature = cut.range.begin;
  }
  ModelSeams seams;
  seams.row_multiple = tensor.size();
  const int64_t first = cutter.vocabulary().begin;
  seams.embed = [axis, first](const at::Tensor& w_VC, const at::Tensor& ids_T) {
    if constexpr (kChecksPlacements) check_placement(ids_T, true, axis.ranks, "the batch");
    return reduce_scatter(embedding_of_part(w_VC, {ids_T}, first), axis).local;
  };
  seams.all_rows = [axis, overlap](const at::Tensor& x_TC) { return start_all_gather(Placed<Shard<0>>{x_TC}, axis, overlap); };
  seams.all_logits = [tensor, config](const at::Tensor& part_TV) {
    return join_logits({part_TV}, Cutter(config, tensor.rank(), tensor.size()), tensor).local;
  };
  seams.vocabulary = VocabularyPart{first, config.vocab_size, [tensor](at::Tensor x, bool maximum) {
                                      tensor.all_reduce(x, maximum ? ReduceOp::kMax : ReduceOp::kSum);
                                    }};
  model.set_seams(std::move(seams));
}

}  // namespace trireme
