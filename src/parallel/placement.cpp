#include "parallel/placement.h"

#include "base/check.h"
#include "base/hash.h"
#include "ops/delayed_gradients.h"
#include "ops/op_support.h"

namespace trireme {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::Variable;
using torch::autograd::variable_list;

// Weight gradients that were put off are computed while the ranks exchange.
void finish(Work work) {
  while (!work.test() && compute_waiting_gradient()) {}
  work.wait();
}

at::Tensor gathered(const at::Tensor& part, const Communicator& axis) {
  auto sizes = part.sizes().vec();
  sizes[0] *= axis.size();
  if constexpr (kChecksPlacements) check_placement(part, false, axis, "a part to gather");
  at::Tensor whole = at::empty(sizes, part.options().requires_grad(false));
  finish(axis.start_all_gather(whole, part.contiguous()));
  return whole;
}

at::Tensor scattered(const at::Tensor& partial, const Communicator& axis) {
  if constexpr (kChecksPlacements) check_placement(partial, false, axis, "a partial sum to scatter");
  auto sizes = partial.sizes().vec();
  TRIREME_CHECK(sizes[0] % axis.size() == 0, partial.sizes(), " over ", axis.size(), " ranks");
  sizes[0] /= axis.size();
  at::Tensor part = at::empty(sizes, partial.options().requires_grad(false));
  finish(axis.start_reduce_scatter(part, partial.contiguous()));
  return part;
}

// Copied into the node: the communicator lives as long as a graph that uses it.
struct KeptAxis : torch::CustomClassHolder {
  explicit KeptAxis(const Communicator& a) : axis(a) {}
  Communicator axis;
};
void keep(AutogradContext* ctx, const Communicator& axis) {
  ctx->saved_data["axis"] = c10::IValue::make_capsule(c10::make_intrusive<KeptAxis>(axis));
}
const Communicator& kept(AutogradContext* ctx) {
  return c10::static_intrusive_pointer_cast<KeptAxis>(ctx->saved_data.at("axis").toCapsule())->axis;
}

struct AllGather : Function<AllGather> {
  static Variable forward(AutogradContext* ctx, const Variable& x, const Communicator& axis) {
    at::AutoDispatchBelowADInplaceOrView guard;
    keep(ctx, axis);
    return gathered(x, axis);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) { return {scattered(grads[0], kept(ctx)), {}}; }
};

struct ReduceScatter : Function<ReduceScatter> {
  static Variable forward(AutogradContext* ctx, const Variable& x, const Communicator& axis) {
    at::AutoDispatchBelowADInplaceOrView guard;
    keep(ctx, axis);
    return scattered(x, axis);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) { return {gathered(grads[0], kept(ctx)), {}}; }
};

}  // namespace

at::Tensor gather_rows(const at::Tensor& part, const Communicator& ranks) {
  at::Tensor whole = AllGather::apply(part, ranks);
  if (selective_recompute()) {
    auto kept = std::make_shared<Kept>(part);
    register_recipe(whole, [kept, ranks] { return gathered(kept->take(), ranks); });
  }
  return whole;
}
at::Tensor scatter_sum(const at::Tensor& partial, const Communicator& ranks) { return ReduceScatter::apply(partial, ranks); }

void check_placement(const at::Tensor& local, bool same_values, const Communicator& ranks, const char* what) {
  const at::Tensor here = local.detach().cpu().contiguous();
  const std::string mine = trireme::str(here.scalar_type(), " ", here.sizes(), same_values ? " of bits " + hash_bytes(here.const_data_ptr(), here.nbytes()) : "");
  const std::string first = ranks.broadcast_bytes(mine);
  const std::string found = mine == first ? "" : str("rank ", ranks.rank(), " has ", mine, ", rank 0 ", first);
  std::string all;
  for (const std::string& text : ranks.gather_bytes(found)) all += (all.empty() || text.empty() ? "" : "; ") + text;
  all = ranks.broadcast_bytes(all);
  if (!all.empty()) throw InternalError(str(what, same_values ? " is not the same" : " has not the same shape", " on all ranks of its axis: ", all));
}

}  // namespace trireme
