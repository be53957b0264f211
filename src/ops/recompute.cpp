#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/functions/utils.h>

#include <unordered_map>

#include "ops/delayed_gradients.h"
#include "ops/host_copy.h"
#include "ops/op_support.h"
#include "ops/ops.h"

namespace trireme {
namespace {

using torch::autograd::Variable;
using torch::autograd::variable_list;

using RecomputeFn = std::function<at::Tensor(const std::vector<at::Tensor>&)>;

thread_local bool again = false;

class Again {
 public:
  Again() : before_(std::exchange(again, true)) {}
  ~Again() { again = before_; }
  Again(const Again&) = delete;
  Again& operator=(const Again&) = delete;

 private:
  bool before_;
};

// A node of its own: torch's Function takes no list of tensors.
struct RecomputeNode : torch::autograd::Node {
  struct Input {
    torch::autograd::SavedVariable kept;
    std::shared_ptr<HostCopy> away;  // in its place
    bool requires_grad = false;
    at::Tensor unpack() {
      if (!away) return kept.unpack();
      return away->take().requires_grad_(requires_grad);
    }
  };
  RecomputeFn fn;
  std::vector<Input> inputs;
  std::vector<std::weak_ptr<HostCopy>> next;  // what backward asks for next

  variable_list apply(variable_list&& grads) override {
    TRIREME_CHECK(fn != nullptr, "a second backward through the same graph");
    for (const auto& copy : next)
      if (const auto there = copy.lock()) there->fetch();
    variable_list leaves, result;
    for (auto& input : inputs) {
      at::Tensor saved = input.unpack();
      at::Tensor leaf = saved.defined() ? saved.detach() : saved;
      if (saved.defined() && saved.requires_grad()) leaf.requires_grad_();
      leaves.push_back(leaf);
    }
    at::Tensor output;
    {
      at::AutoGradMode enable(true);
      const Again running;
      output = fn(leaves);
    }
    release_variables();
    if (grads[0].defined() && output.requires_grad()) torch::autograd::backward({output}, {grads[0]});
    for (auto& leaf : leaves) result.push_back(leaf.defined() ? leaf.grad() : Variable());
    return result;
  }
  void release_variables() override {
    fn = nullptr;
    inputs.clear();
  }
};

struct RowPiecesNode : torch::autograd::Node {
  std::function<at::Tensor(int64_t, const at::Tensor&)> fn;
  std::optional<Kept> x;
  int64_t rows = 0;
  bool x_requires_grad = false;
  std::vector<torch::autograd::SavedVariable> trained;

  // x's gradient, then those of the trained leaves, each once: whoever counts contributions sees one, of however many pieces.
  variable_list apply(variable_list&& grads) override {
    TRIREME_CHECK(fn != nullptr, "a second backward through the same graph");
    const at::Tensor x_TI = x->take(), grad_TO = std::move(grads[0]);
    variable_list leaves, sums;
    for (auto& leaf : trained) leaves.push_back(leaf.unpack());
    const size_t first_leaf = x_requires_grad ? 1 : 0;
    at::Tensor grad_TI = x_requires_grad ? at::empty_like(x_TI) : at::Tensor();
    sums.resize(leaves.size());
    const DelayWeightGradients none(nullptr);  // what waits would keep every piece
    for (int64_t first = 0; grad_TO.defined() && first < x_TI.size(0); first += rows) {
      const int64_t count = std::min(rows, x_TI.size(0) - first);
      const at::Tensor piece = x_TI.narrow(0, first, count).detach().requires_grad_(x_requires_grad);
      variable_list wanted = leaves;
      if (x_requires_grad) wanted.insert(wanted.begin(), piece);
      at::Tensor output;
      {
        at::AutoGradMode enable(true);
        output = fn(first, piece);
      }
      const variable_list found = torch::autograd::grad({output}, wanted, {grad_TO.narrow(0, first, count)}, false, false, /*allow_unused=*/true);
      if (x_requires_grad) grad_TI.narrow(0, first, count).copy_(found[0]);
      for (size_t i = 0; i < sums.size(); ++i) {
        const at::Tensor& more = found[first_leaf + i];
        if (!more.defined()) continue;
        if (sums[i].defined()) sums[i].add_(more);
        else sums[i] = more.to(compute_dtype(more.scalar_type()));
      }
    }
    release_variables();
    variable_list result = {grad_TI};
    for (size_t i = 0; i < sums.size(); ++i) {
      const at::Tensor sum = std::move(sums[i]);
      result.push_back(sum.defined() ? sum.to(leaves[i].scalar_type()) : Variable());
    }
    return result;
  }
  void release_variables() override {
    fn = nullptr;
    x.reset();
    trained.clear();
  }
};

struct RegisteredRecipe {
  c10::weak_intrusive_ptr<c10::TensorImpl> owner;  // an address may be used again: the recipe belongs to this tensor
  std::shared_ptr<Recipe> recipe;
};
thread_local std::vector<std::weak_ptr<HostCopy>> last_away;  // of the recompute() before
thread_local bool selective = false;
thread_local std::unordered_map<const c10::TensorImpl*, RegisteredRecipe> recipes;

}  // namespace

at::Tensor recompute(const RecomputeFn& fn, const std::vector<at::Tensor>& inputs, bool trains, bool to_host) {
  bool any = trains;
  for (const auto& input : inputs) any = any || wants_gradient(input);
  if (!any || !at::GradMode::is_enabled()) return fn(inputs);
  at::Tensor output;
  {
    at::NoGradGuard no_grad;
    output = fn(inputs).detach();  // never one of the inputs itself
  }
  auto node = std::shared_ptr<RecomputeNode>(new RecomputeNode(), torch::autograd::deleteNode);
  node->fn = fn;
  node->set_next_edges(torch::autograd::collect_next_edges(inputs));
  for (const auto& input : inputs) {
    if (!to_host || !input.defined() || input.is_cpu()) {
      node->inputs.push_back({{input, false}, nullptr});
      continue;
    }
    at::NoGradGuard no_grad;
    node->inputs.push_back({{}, std::make_shared<HostCopy>(input.detach()), input.requires_grad()});
  }
  if (to_host) {
    node->next = std::exchange(last_away, {});
    for (const auto& input : node->inputs)
      if (input.away) last_away.push_back(input.away);
  }
  torch::autograd::set_history(output, node);
  return output;
}

bool recomputing() { return again; }

at::Tensor in_row_pieces(const std::function<at::Tensor(int64_t, const at::Tensor&)>& fn, const at::Tensor& x_TI, int64_t rows, int64_t out_features,
                         const std::vector<at::Tensor>& trained, bool is_read) {
  TRIREME_CHECK(rows > 0 && x_TI.dim() == 2, rows, x_TI.sizes());
  at::Tensor y_TO = at::empty({x_TI.size(0), out_features}, x_TI.options().requires_grad(false));
  for (int64_t first = 0; is_read && first < x_TI.size(0); first += rows) {
    const int64_t count = std::min(rows, x_TI.size(0) - first);
    at::NoGradGuard no_grad;
    y_TO.narrow(0, first, count).copy_(fn(first, x_TI.narrow(0, first, count)));
  }
  variable_list inputs = {x_TI};
  inputs.insert(inputs.end(), trained.begin(), trained.end());
  if (std::none_of(inputs.begin(), inputs.end(), wants_gradient)) return y_TO;
  auto node = std::shared_ptr<RowPiecesNode>(new RowPiecesNode(), torch::autograd::deleteNode);
  node->fn = fn;
  node->x.emplace(x_TI);
  node->rows = rows;
  node->x_requires_grad = wants_gradient(x_TI);
  for (const at::Tensor& leaf : trained) node->trained.push_back({leaf, false});
  node->set_next_edges(torch::autograd::collect_next_edges(inputs));
  torch::autograd::set_history(y_TO, node);
  return y_TO;
}

SelectiveRecompute::SelectiveRecompute(bool on) : before_(selective) { selective = on && at::GradMode::is_enabled(); }
SelectiveRecompute::~SelectiveRecompute() {
  selective = before_;
  if (!selective) recipes.clear();
}

bool selective_recompute() { return selective && at::GradMode::is_enabled(); }

void register_recipe(const at::Tensor& output, std::function<at::Tensor()> compute) {
  // Recipes own what they need, which frees itself with the graph; the table must not keep it longer than the tensor.
  if (recipes.size() > 64) std::erase_if(recipes, [](auto& entry) { return entry.second.owner.expired(); });
  recipes.insert_or_assign(output.unsafeGetTensorImpl(),
                           RegisteredRecipe{c10::weak_intrusive_ptr<c10::TensorImpl>(output.getIntrusivePtr()),
                                            std::make_shared<Recipe>(std::move(compute))});
}

at::Tensor Recipe::take() {
  at::NoGradGuard no_grad;
  if (!value_.defined()) value_ = compute_();
  at::Tensor value = value_;
  if (++taken_ >= users_) {
    value_.reset();
    compute_ = nullptr;  // frees what it owns
  }
  return value;
}

Kept::Kept(const at::Tensor& value) {
  if (selective && value.defined()) {
    auto found = recipes.find(value.unsafeGetTensorImpl());
    if (found != recipes.end() && !found->second.owner.expired()) {
      recipe_ = found->second.recipe;
      recipe_->add_user();
      return;
    }
  }
  value_ = value.defined() ? value.detach() : value;
}

at::Tensor Kept::take() {
  at::Tensor value = recipe_ ? recipe_->take() : std::move(value_);
  TRIREME_CHECK(value.defined(), "a second backward through the same graph");
  recipe_.reset();
  value_.reset();
  return value;
}

}  // namespace trireme
