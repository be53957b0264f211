#include "ops/device.h"
#include "ops/op_support.h"
#include "ops/ops.h"
#include "ops/product.h"

namespace trireme {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::Variable;
using torch::autograd::variable_list;

constexpr int64_t kIgnored = -100;

// Matrix products are compiled once per number of rows: a few milliseconds, which every step would pay again because
// the number of learnt rows differs. So products have a multiple of 64 rows, the rest being zero.
int64_t padded_rows(int64_t rows) { return rows <= 64 ? rows : (rows + 63) / 64 * 64; }

struct Rows {
  std::vector<int64_t> index, target;  // of the learnt rows
};

Rows learnt_rows(const at::Tensor& targets_T, int64_t vocabulary) {
  at::Tensor targets = targets_T.contiguous();
  const int64_t* target = targets.data_ptr<int64_t>();
  Rows rows;
  for (int64_t t = 0; t < targets.numel(); ++t) {
    if (target[t] == kIgnored) continue;
    TRIREME_CHECK(target[t] >= 0 && target[t] < vocabulary, "target ", target[t], " at row ", t,
                  " with a vocabulary of ", vocabulary);
    rows.index.push_back(t);
    rows.target.push_back(target[t]);
  }
  return rows;
}

// Rows of logits [N, V] that go on at other ranks: losses and hits of the whole rows; the logits become their gradients.
void cross_entropy_of_part(at::Tensor logits_NV, const int64_t* target, const VocabularyPart& part, double* losses, uint8_t* correct,
                           bool want_gradient) {
  const int64_t n = logits_NV.size(0), size = logits_NV.size(1);
  at::Tensor z = logits_NV.to(compute_dtype(logits_NV.scalar_type()), false, /*copy=*/true).contiguous();
  auto [largest, place] = z.max(1);
  at::Tensor maximum = largest.clone();
  part.combine(maximum, true);
  // The first of equals: the largest of the negative ids.
  at::Tensor first = at::where(largest == maximum, -(place + part.first), std::numeric_limits<int64_t>::min());
  part.combine(first, true);
  at::Tensor sums = at::zeros({2, n}, at::kDouble);  // of exponentials; the target's logit less the maximum
  at::Tensor local = at::from_blob(const_cast<int64_t*>(target), {n}, at::kLong) - part.first;
  at::Tensor here = at::nonzero((local >= 0).logical_and(local < size)).view({-1}), column = local.index_select(0, here);
  z.sub_(maximum.unsqueeze(1));
  sums[1].index_copy_(0, here, z.index({here, column}).to(at::kDouble));
  z.exp_();
  at::Tensor exponentials = sums[0];
  constexpr int64_t kRows = 16;  // at a time: of what it adds up ATen makes a copy in double
  for (int64_t i = 0; i < n; i += kRows) {
    at::Tensor part_sums = exponentials.narrow(0, i, std::min(kRows, n - i));
    at::sum_out(part_sums, z.narrow(0, i, part_sums.size(0)), at::IntArrayRef{1}, false, at::kDouble);
  }
  part.combine(sums, false);
  const double *sum = sums.const_data_ptr<double>(), *logit = sum + n;
  const int64_t* hit = first.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < n; ++i) losses[i] = std::log(sum[i]) - logit[i], correct[i] = -hit[i] == target[i];
  if (!want_gradient) return;
  z.div_(sums[0].to(z.scalar_type()).unsqueeze(1));
  z.index_put_({here, column}, at::scalar_tensor(-1.0, z.options()), /*accumulate=*/true);
  logits_NV.copy_(z);
}

struct Computed {
  double loss = 0.0;
  int64_t correct = 0;
  at::Tensor grad_hidden_TC, grad_head_VC;  // for an incoming gradient of gradient_scale; undefined where not wanted
};

Computed run(const at::Tensor& hidden_TC, const at::Tensor& head_VC, const Rows& rows, int64_t chunk_rows,
             bool want_hidden, bool want_head, double gradient_scale, const VocabularyPart* part) {
  at::NoGradGuard no_grad;
  const int64_t count = static_cast<int64_t>(rows.index.size()), size = hidden_TC.size(1), vocabulary = head_VC.size(0);
  const auto dtype = hidden_TC.scalar_type();
  Computed out;
  if (want_hidden)
    out.grad_hidden_TC = count == hidden_TC.size(0) ? at::empty_like(hidden_TC) : at::zeros_like(hidden_TC);
  // Sums of chunks are kept in fp32; one chunk needs no second buffer.
  const bool several = count > chunk_rows;
  if (want_head && (several || count == 0))
    out.grad_head_VC = at::zeros({vocabulary, size}, head_VC.options().dtype(compute_dtype(dtype)));
  std::vector<double> losses(static_cast<size_t>(count));
  std::vector<uint8_t> correct(static_cast<size_t>(count));
  const int64_t most_rows = padded_rows(std::min(count, chunk_rows));
  // Rows of a stride that is a multiple of a cache line: with an odd vocabulary the products are a fifth faster.
  const int64_t stride = (vocabulary + 63) / 64 * 64;
  at::Tensor buffer = at::empty({most_rows, stride}, hidden_TC.options()).slice(1, 0, vocabulary);
  at::Tensor gathered = at::empty({most_rows, size}, hidden_TC.options());
  for (int64_t begin = 0; begin < count; begin += chunk_rows) {
    const int64_t end = std::min(count, begin + chunk_rows), n = end - begin;
    const int64_t padded = padded_rows(n), first = rows.index[static_cast<size_t>(begin)];
    const bool dense = padded == n && rows.index[static_cast<size_t>(end - 1)] - first + 1 == n;
    at::Tensor index = at::from_blob(const_cast<int64_t*>(rows.index.data()) + begin, {n}, at::kLong);
    at::Tensor hidden = dense ? hidden_TC.slice(0, first, first + n) : gathered.slice(0, 0, padded);
    if (!dense) {
      at::Tensor part = hidden.slice(0, 0, n);
      at::index_select_out(part, hidden_TC, 0, index);
      hidden.slice(0, n, padded).zero_();
    }
    at::Tensor logits = buffer.slice(0, 0, padded);
    product(hidden, head_VC.t(), logits);
    if (part)
      cross_entropy_of_part(logits.slice(0, 0, n), rows.target.data() + begin, *part, losses.data() + begin, correct.data() + begin,
                            want_hidden || want_head);
    else dispatch_floating(dtype, [&](auto zero) {
      using T = decltype(zero);
      at::parallel_for(0, n, 1, [&](int64_t from, int64_t to) {
        for (int64_t row = from; row < to; ++row)
          loops<T>().cross_entropy(1, vocabulary, logits.data_ptr<T>() + row * stride, rows.target.data() + begin + row,
                                   losses.data() + begin + row, correct.data() + begin + row, want_hidden || want_head);
      });
    });
    if (gradient_scale != 1 && (want_hidden || want_head)) logits.slice(0, 0, n).mul_(gradient_scale);
    if (want_hidden && dense) {
      at::Tensor part = out.grad_hidden_TC.slice(0, first, first + n);
      product(logits, head_VC, part);
    } else if (want_hidden) {
      out.grad_hidden_TC.index_copy_(0, index, product(logits, head_VC).slice(0, 0, n));
    }
    if (want_head) {  // rows of zeros in hidden take nothing from what stands in their logits: those are finite
      if (!several)
        out.grad_head_VC = product(logits.t(), hidden);
      else if (kernels_of(logits))
        product(logits.t(), hidden, out.grad_head_VC, {.add = true});
      else
        out.grad_head_VC.add_(product(logits.t(), hidden));
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    out.loss += losses[static_cast<size_t>(i)];
    out.correct += correct[static_cast<size_t>(i)];
  }
  return out;
}

// x * scale, rounded once.
at::Tensor scaled(const at::Tensor& x, double scale, at::ScalarType dtype) {
  at::Tensor y = at::empty(x.sizes(), x.options().dtype(dtype));
  if (x.scalar_type() == dtype) return at::mul_out(y, x, at::scalar_tensor(scale, at::kDouble));
  dispatch_floating(dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = typename ComputeType<T>::type;
    for_rows(x.numel(), 1, [&](int64_t begin, int64_t end) {
      loops<T>().scale_from(end - begin, x.data_ptr<A>() + begin, scale, y.data_ptr<T>() + begin);
    });
  });
  return y;
}

struct LinearCrossEntropy : Function<LinearCrossEntropy> {
  static Variable forward(AutogradContext* ctx, const Variable& hidden_TC, const Variable& head_VC,
                          const Computed& computed) {
    (void)head_VC;
    if (computed.grad_hidden_TC.defined()) ctx->saved_data["hidden"] = computed.grad_hidden_TC;
    if (computed.grad_head_VC.defined()) ctx->saved_data["head"] = computed.grad_head_VC;
    ctx->saved_data["dtype"] = static_cast<int64_t>(hidden_TC.scalar_type());
    return at::scalar_tensor(computed.loss, at::TensorOptions().dtype(compute_dtype(hidden_TC.scalar_type())));
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const double scale = grads[0].item<double>();
    const auto dtype = static_cast<at::ScalarType>(ctx->saved_data.at("dtype").toInt());
    auto gradient = [&](const char* name) {
      auto found = ctx->saved_data.find(name);
      return found == ctx->saved_data.end() ? at::Tensor() : scaled(found->second.toTensor(), scale, dtype);
    };
    at::Tensor grad_hidden = gradient("hidden");
    ctx->saved_data.erase("hidden");
    at::Tensor grad_head = gradient("head");
    ctx->saved_data.erase("head");
    return {grad_hidden, grad_head, {}};
  }
};

}  // namespace

// Logits of about 32 MB: large enough for the matrix products, small enough for the caches. A trained head is read and
// written once a chunk, so its chunks are larger. The products of a device want a thousand rows and more.
int64_t cross_entropy_chunk_rows(int64_t vocabulary, at::ScalarType dtype, bool trains, at::DeviceType device) {
  const int64_t row_bytes = std::max<int64_t>(1, vocabulary * static_cast<int64_t>(c10::elementSize(dtype)));
  if (device != at::kCPU) return std::clamp<int64_t>((256ll << 20) / row_bytes / 64, 1, 64) * 64;
  return std::clamp<int64_t>((trains ? 128ll << 20 : 32ll << 20) / row_bytes / 64, 1, 32) * 64;
}

LossSum linear_cross_entropy(const at::Tensor& hidden_TC, const at::Tensor& head_VC, const at::Tensor& targets_T,
                             int64_t chunk_rows, double gradient_scale, const VocabularyPart* part) {
  TRIREME_CHECK(hidden_TC.dim() == 2 && head_VC.dim() == 2 && hidden_TC.size(1) == head_VC.size(1) &&
                    hidden_TC.scalar_type() == head_VC.scalar_type() && targets_T.dim() == 1 &&
                    targets_T.size(0) == hidden_TC.size(0) && targets_T.scalar_type() == at::kLong && targets_T.is_cpu(),
                hidden_TC.sizes(), head_VC.sizes(), targets_T.sizes(), targets_T.device().str());
  const int64_t vocabulary = part ? part->num_ids : head_VC.size(0);
  const Rows rows = learnt_rows(targets_T, vocabulary);
  const bool want_hidden = wants_gradient(hidden_TC), want_head = wants_gradient(head_VC);
  if (chunk_rows <= 0) chunk_rows = cross_entropy_chunk_rows(vocabulary, head_VC.scalar_type(), want_head, head_VC.device().type());
  Computed computed = run(hidden_TC.detach().contiguous(), head_VC.detach(), rows, chunk_rows, want_hidden, want_head,
                          gradient_scale, part);
  LossSum result;
  result.count = static_cast<int64_t>(rows.index.size());
  result.correct = at::scalar_tensor(computed.correct, at::kLong);
  result.sum = LinearCrossEntropy::apply(hidden_TC, head_VC, computed);
  return result;
}

}  // namespace trireme
