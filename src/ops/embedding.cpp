#include <numeric>

#include "ops/device.h"
#include "ops/op_support.h"
#include "ops/ops.h"

namespace trireme {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::Variable;
using torch::autograd::variable_list;

at::Tensor rows_of(const at::Tensor& w_VC, const at::Tensor& ids_T) {
  const kernels::Kernels* k = kernels_of(ids_T.is_cpu() ? w_VC : at::empty({0}, w_VC.options().device(ids_T.device())));
  if (!k) return at::embedding(w_VC, ids_T);
  const at::Tensor w = w_VC.contiguous();
  at::Tensor y = at::empty({ids_T.numel(), w.size(1)}, w.options().device(ids_T.device()));
  k->embedding({kernel_type(w), ids_T.numel(), w.size(1), ids_T.data_ptr<int64_t>(), data_of(w), 0, w.size(0), data_of(y)}, stream_of(y));
  return y;
}

// grad_w, of zeros: each row the sum of the rows of grad_y that have its id, in the order of t.
void add_rows_by_id(const at::Tensor& grad_y, const at::Tensor& ids, const at::Tensor& grad_w) {
  const int64_t size = grad_y.size(1), count = ids.numel();
  if (const kernels::Kernels* k = kernels_of(grad_y)) {
    const at::Tensor workspace = at::empty({kernels::embedding_gradient_workspace(count)}, ids.options());
    k->embedding_gradient({kernel_type(grad_y), kernel_type(grad_w), count, size, ids.data_ptr<int64_t>(), data_of(grad_y), 0, grad_w.size(0), data_of(grad_w),
                           workspace.data_ptr<int64_t>()}, stream_of(grad_y));
    return;
  }
  // Places of one id stand together, in the order of t.
  std::vector<int64_t> order(static_cast<size_t>(count)), starts;
  const int64_t* id = ids.data_ptr<int64_t>();
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t s, int64_t t) { return id[s] < id[t]; });
  for (int64_t i = 0; i < count; ++i)
    if (i == 0 || id[order[static_cast<size_t>(i)]] != id[order[static_cast<size_t>(i - 1)]]) starts.push_back(i);
  const int64_t num_ids = static_cast<int64_t>(starts.size());
  starts.push_back(count);
  dispatch_floating(grad_y.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = typename ComputeType<T>::type;
    for_rows(num_ids, size, [&](int64_t begin, int64_t end) {
      std::vector<A> sum(static_cast<size_t>(size));
      for (int64_t group = begin; group < end; ++group) {
        std::fill(sum.begin(), sum.end(), A(0));
        const int64_t first = starts[static_cast<size_t>(group)], last = starts[static_cast<size_t>(group + 1)];
        for (int64_t i = first; i < last; ++i)
          loops<T>().add_rows(1, size, grad_y.data_ptr<T>() + order[static_cast<size_t>(i)] * size, sum.data());
        const int64_t row = id[order[static_cast<size_t>(first)]];
        loops<T>().scale_from(size, sum.data(), 1.0, grad_w.data_ptr<T>() + row * size);
      }
    });
  });
}

struct Embedding : Function<Embedding> {
  static Variable forward(AutogradContext* ctx, const Variable& w_VC, const Variable& ids_T) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->saved_data["ids"] = ids_T;
    ctx->saved_data["rows"] = w_VC.size(0);
    return rows_of(w_VC, ids_T);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const at::Tensor grad_y = grads[0].contiguous();
    const at::Tensor grad_w = at::zeros({ctx->saved_data.at("rows").toInt(), grad_y.size(1)}, grad_y.options());
    add_rows_by_id(grad_y, ctx->saved_data.at("ids").toTensor(), grad_w);
    return {grad_w, {}};
  }
};

}  // namespace

at::Tensor embedding(const at::Tensor& w_VC, const at::Tensor& ids_T) {
  const bool from_host = w_VC.is_cpu() && (ids_T.is_cuda() || ids_T.is_privateuseone());
  if (!from_host) check_alike("embedding", {"weight", w_VC}, {{"ids", ids_T}}, at::kLong);
  TRIREME_CHECK(w_VC.dim() == 2 && ids_T.dim() == 1, w_VC.sizes(), ids_T.sizes());
  if (!from_host) return Embedding::apply(w_VC, ids_T.contiguous());
  TRIREME_CHECK(!wants_gradient(w_VC) && ids_T.scalar_type() == at::kLong && w_VC.is_contiguous() && (!ids_T.is_cuda() || w_VC.is_pinned()), w_VC.toString(), ids_T.toString());
  return rows_of(w_VC, ids_T.contiguous());
}

}  // namespace trireme
