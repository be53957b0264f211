#include "parallel/placement.h"

#include "base/check.h"

namespace trireme {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::Variable;
using torch::autograd::variable_list;

at::Tensor gathered(const at::Tensor& part, const Communicator& axis) {
  auto sizes = part.sizes().vec();
  sizes[0] *= axis.size();
  at::Tensor whole = at::empty(sizes, part.options().requires_grad(false));
  axis.all_gather(whole, part.contiguous());
  return whole;
}

at::Tensor scattered(const at::Tensor& partial, const Communicator& axis) {
  auto sizes = partial.sizes().vec();
  TRIREME_CHECK(sizes[0] % axis.size() == 0, partial.sizes(), " over ", axis.size(), " ranks");
  sizes[0] /= axis.size();
  at::Tensor part = at::empty(sizes, partial.options().requires_grad(false));
  axis.reduce_scatter(part, partial.contiguous());
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

Placed<Replicate> all_gather(const Placed<Shard<0>>& x, const Communicator& axis) { return {AllGather::apply(x.local, axis)}; }
Placed<Shard<0>> reduce_scatter(const Placed<Partial>& x, const Communicator& axis) { return {ReduceScatter::apply(x.local, axis)}; }

}  // namespace trireme
