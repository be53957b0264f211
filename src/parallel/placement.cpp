#include "parallel/placement.h"

#include <algorithm>

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

struct Gather {
  at::Tensor part, whole;
  Work work;
};
Gather start_gather(const at::Tensor& part, const Communicator& axis) {
  auto sizes = part.sizes().vec();
  sizes[0] *= axis.size();
  if constexpr (kChecksPlacements) check_placement(part, false, axis, "a part to gather");
  Gather g{part.contiguous(), at::empty(sizes, part.options().requires_grad(false)), {}};
  g.work = axis.start_all_gather(g.whole, g.part);
  return g;
}

at::Tensor gathered(const at::Tensor& part, const Communicator& axis) {
  Gather g = start_gather(part, axis);
  finish(std::move(g.work));
  return g.whole;
}

// `whole`: what to call the result of g.
ArrivingRows arriving(Gather g, at::Tensor whole, const Communicator& axis, const RowOverlap& overlap) {
  const int64_t rows = g.part.size(0);
  auto work = std::make_shared<Work>(std::move(g.work));
  ArrivingRows all(std::move(whole), std::move(g.part), axis.rank() * rows, [work] { finish(std::move(*work)); });
  if (!overlap.applies(rows, all.promised().is_cuda())) all.wait();
  return all;
}

Work start_scatter(const at::Tensor& part, const at::Tensor& partial, const Communicator& axis) {
  if constexpr (kChecksPlacements) check_placement(partial, false, axis, "a partial sum to scatter");
  return axis.start_reduce_scatter(part, partial.contiguous());
}

at::Tensor scattered(const at::Tensor& partial, const Communicator& axis) {
  auto sizes = partial.sizes().vec();
  TRIREME_CHECK(sizes[0] % axis.size() == 0, partial.sizes(), " over ", axis.size(), " ranks");
  sizes[0] /= axis.size();
  at::Tensor part = at::empty(sizes, partial.options().requires_grad(false));
  finish(start_scatter(part, partial, axis));
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
  static Variable forward(AutogradContext* ctx, const Variable& x, const Communicator& axis, Gather* gather) {
    at::AutoDispatchBelowADInplaceOrView guard;
    keep(ctx, axis);
    *gather = start_gather(x.detach(), axis);
    return gather->whole;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) { return {scattered(grads[0], kept(ctx)), {}, {}}; }
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

ArrivingRows gather_rows(const at::Tensor& part, const Communicator& ranks, const RowOverlap& overlap) {
  Gather gather;
  at::Tensor whole = AllGather::apply(part, ranks, &gather);
  if (selective_recompute()) {
    auto kept = std::make_shared<Kept>(part);
    register_recipe(whole, [kept, ranks] { return gathered(kept->take(), ranks); });
  }
  return arriving(std::move(gather), std::move(whole), ranks, overlap);
}

at::Tensor scatter_sum(const at::Tensor& partial, const Communicator& ranks) { return ReduceScatter::apply(partial, ranks); }

std::shared_ptr<const RowSum> sum_of_products(const Communicator& ranks, const RowOverlap& overlap) {
  RowSum sum;
  sum.num_ranks = ranks.size();
  sum.num_pieces = [overlap](int64_t rows, bool on_device) {
    return overlap.applies(rows, on_device) ? std::min(rows / overlap.least_rows, overlap.num_pieces) : 1;
  };
  sum.start = [ranks](const at::Tensor& part, const at::Tensor& partial) {
    auto work = std::make_shared<Work>(start_scatter(part, partial, ranks));
    return [work] { finish(std::move(*work)); };
  };
  sum.gather = [ranks, overlap](const at::Tensor& part) {
    Gather gather = start_gather(part, ranks);
    at::Tensor whole = gather.whole;
    return arriving(std::move(gather), std::move(whole), ranks, overlap);
  };
  return std::make_shared<const RowSum>(std::move(sum));
}

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
