#include "base/tensor.h"

#include "ops/attention_device.h"

#include "ops/device.h"
#include "ops/op_support.h"

namespace trireme {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::Variable;
using torch::autograd::variable_list;

constexpr int64_t kAlignment = 16;  // bytes, of addresses and strides

// What kernels read in place: rows and heads anywhere, values of a head together.
at::Tensor readable(const at::Tensor& x) {
  const int64_t values = kAlignment / x.element_size();
  const bool in_place = x.stride(2) == 1 && x.stride(0) % values == 0 && x.stride(1) % values == 0 && reinterpret_cast<uintptr_t>(x.data_ptr()) % kAlignment == 0;
  return in_place ? x : x.contiguous();
}
kernels::ConstHeads in(const at::Tensor& x) { return {x.data_ptr(), x.stride(0), x.stride(1)}; }
kernels::Heads out(const at::Tensor& x) { return {x.data_ptr(), x.stride(0), x.stride(1)}; }

struct DeviceAttention : Function<DeviceAttention> {
  static kernels::AttentionShape shape_of(const at::Tensor& q, const at::Tensor& k, const at::Tensor& bounds_q, const at::Tensor& bounds_k, double scale,
                                          int64_t window, bool causal) {
    return {kernel_type(q), static_cast<int>(q.size(2)), q.size(1), k.size(1), q.size(0), k.size(0), bounds_q.numel() - 1, bounds_q.data_ptr<int32_t>(),
            bounds_k.data_ptr<int32_t>(), static_cast<float>(scale), window, causal};
  }

  static Variable forward(AutogradContext* ctx, const Variable& q_THD, const Variable& k_SKD, const Variable& v_SKD, const AttentionSpec& spec, double scale) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const at::Tensor q = readable(q_THD), k = readable(k_SKD), v = readable(v_SKD);
    const at::Tensor bounds_q = spec.bounds_q.defined() ? spec.bounds_q : bounds_of(spec.cu_seqlens_q, q.device());
    const at::Tensor bounds_k = spec.bounds_k.defined() ? spec.bounds_k : bounds_of(spec.cu_seqlens_k, q.device());
    at::Tensor o = at::empty(q.sizes(), q.options()), lse = at::empty({q.size(1), q.size(0)}, q.options().dtype(at::kFloat));
    kernels_of(q)->attention_forward({shape_of(q, k, bounds_q, bounds_k, scale, spec.window, spec.causal), in(q), in(k), in(v), out(o), lse.data_ptr<float>()},
                                     stream_of(q));
    keep(ctx, "q", q.is_same(q_THD) ? q_THD : q);
    keep(ctx, "k", k.is_same(k_SKD) ? k_SKD : k);
    keep(ctx, "v", v.is_same(v_SKD) ? v_SKD : v);
    ctx->saved_data["lse"] = lse;
    ctx->saved_data["scale"] = scale;
    ctx->saved_data["window"] = spec.window;
    ctx->saved_data["causal"] = spec.causal;
    ctx->save_for_backward({o, bounds_q, bounds_k});
    return o;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor q = readable(take(ctx, "q")), k = readable(take(ctx, "k")), v = readable(take(ctx, "v")), grad_o = readable(grads[0]);
    const at::Tensor lse = ctx->saved_data.at("lse").toTensor();
    const bool deterministic = kernel_settings().deterministic;
    kernels::AttentionBackward call;
    call.shape = shape_of(q, k, saved[1], saved[2], ctx->saved_data.at("scale").toDouble(), ctx->saved_data.at("window").toInt(), ctx->saved_data.at("causal").toBool());
    ctx->saved_data.clear();
    const at::Tensor grad_q = at::empty(q.sizes(), q.options()), grad_k = at::empty(k.sizes(), k.options()), grad_v = at::empty(v.sizes(), v.options());
    const int64_t num_bytes = kernels::attention_backward_workspace_bytes(call.shape, deterministic);
    const at::Tensor workspace = at::empty({num_bytes}, q.options().dtype(at::kByte));
    call.q = in(q), call.k = in(k), call.v = in(v), call.o = in(saved[0]), call.grad_o = in(grad_o), call.lse = lse.data_ptr<float>();
    call.grad_q = out(grad_q), call.grad_k = out(grad_k), call.grad_v = out(grad_v);
    call.deterministic = deterministic, call.workspace = workspace.data_ptr(), call.workspace_bytes = num_bytes;
    kernels_of(q)->attention_backward(call, stream_of(q));
    return {grad_q, grad_k, grad_v, {}, {}};
  }
};

}  // namespace

at::Tensor bounds_of(const std::vector<int64_t>& cu_seqlens, at::Device device) { return to_device(cu_seqlens, device, at::kInt); }

bool has_attention_kernels(at::ScalarType dtype, int64_t head_dim) {
  return c10::isReducedFloatingType(dtype) && (head_dim == 64 || head_dim == 96 || head_dim == 128 || head_dim == 256);
}

bool has_device_attention(const at::Tensor& q_THD) {
  if (!kernels_of(q_THD)) return false;
  return has_attention_kernels(q_THD.scalar_type(), q_THD.size(2));
}

at::Tensor device_attention(const at::Tensor& q_THD, const at::Tensor& k_SKD, const at::Tensor& v_SKD, const AttentionSpec& spec, double scale) {
  return DeviceAttention::apply(q_THD, k_SKD, v_SKD, spec, scale);
}

at::Tensor device_decode_attention(const at::Tensor& q_THD, const at::Tensor& k_BSKD, const at::Tensor& v_BSKD, const at::Tensor& lengths_B, int64_t window, double scale) {
  const at::Tensor q = readable(q_THD), o = at::empty(q.sizes(), q.options());
  const auto cache = [](const at::Tensor& x) { return kernels::ConstHeads{x.data_ptr(), x.stride(1), x.stride(2)}; };  // a sequence is a page
  kernels::AttentionDecode call;
  call.type = kernel_type(q), call.head_dim = static_cast<int>(q.size(2));
  call.num_heads = q.size(1), call.num_key_heads = k_BSKD.size(2);
  call.num_sequences = k_BSKD.size(0), call.num_queries = q.size(0) / k_BSKD.size(0);
  call.scale = static_cast<float>(scale), call.window = window;
  call.q = in(q), call.k = cache(k_BSKD), call.v = cache(v_BSKD), call.o = out(o);
  call.k_page_stride = k_BSKD.stride(0), call.v_page_stride = v_BSKD.stride(0);
  call.lengths = lengths_B.data_ptr<int32_t>(), call.max_length = k_BSKD.size(1);
  call.workspace_bytes = kernels::decode_attention_workspace_bytes(call);
  const at::Tensor workspace = at::empty({call.workspace_bytes}, q.options().dtype(at::kByte));
  call.workspace = workspace.data_ptr();
  kernels_of(q)->decode_attention(call, stream_of(q));
  return o;
}

}  // namespace trireme
