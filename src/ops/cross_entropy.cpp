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

// What becomes of rows of logits [N, V]: losses (fp64, of kernels fp32) and hits, and where wanted the logits become their
// gradients times gradient_scale.
struct Loss {
  at::Tensor logits_NV, target_N, losses_N, correct_N;
  bool want_gradient;
  double gradient_scale;
  CrossEntropyTerms terms;
};

void by_kernels(const kernels::Kernels& k, const Loss& loss, const VocabularyPart* part) {
  const at::Tensor& z = loss.logits_NV;
  const int64_t n = z.size(0);
  const kernels::CrossEntropy rows{kernel_type(z), n, z.size(1), z.stride(0), data_of(z), loss.target_N.data_ptr<int64_t>(), static_cast<float>(loss.terms.label_smoothing),
                                   static_cast<float>(loss.terms.z_loss), static_cast<float>(loss.gradient_scale), loss.want_gradient, loss.losses_N.data_ptr<float>(), loss.correct_N.data_ptr<uint8_t>()};
  if (!part) return k.cross_entropy(rows, stream_of(z));
  const at::Tensor here = at::empty({n}, z.options().dtype(at::kFloat)), sums = at::empty({3, n}, here.options());  // exponentials, target's logits, logits
  at::Tensor largest = at::empty({n}, loss.target_N.options());
  kernels::CrossEntropyPart call{rows, part->first, part->num_ids, here.data_ptr<float>(), sums.data_ptr<float>(), sums.data_ptr<float>() + n, sums.data_ptr<float>() + 2 * n,
                                 largest.data_ptr<int64_t>()};
  k.cross_entropy_part(call, stream_of(z));
  const at::Tensor maximum = here.clone();
  part->combine(maximum, true);
  // The first of equals: the largest of the negative ids.
  const at::Tensor negative = (-largest).masked_fill_(here != maximum, std::numeric_limits<int64_t>::min());
  part->combine(negative, true);
  sums[0].mul_((here - maximum).exp_());
  part->combine(sums.narrow(0, 0, loss.terms.label_smoothing != 0 ? 3 : 2), false);
  largest = -negative;
  call.maximum = maximum.data_ptr<float>(), call.largest = largest.data_ptr<int64_t>();
  k.cross_entropy_finish(call, stream_of(z));
}

void by_loops(const Loss& loss) {
  dispatch_floating(loss.logits_NV.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const int64_t stride = loss.logits_NV.stride(0);
    at::parallel_for(0, loss.logits_NV.size(0), 1, [&](int64_t from, int64_t to) {
      for (int64_t row = from; row < to; ++row)
        loops<T>().cross_entropy(1, loss.logits_NV.size(1), loss.logits_NV.data_ptr<T>() + row * stride, loss.target_N.data_ptr<int64_t>() + row,
                                 loss.terms.label_smoothing, loss.terms.z_loss, loss.losses_N.data_ptr<double>() + row, loss.correct_N.data_ptr<uint8_t>() + row, loss.want_gradient);
    });
  });
}

// By ATen, where rows go on at other ranks.
void of_part(const Loss& loss, const VocabularyPart& part) {
  const at::Tensor logits_NV = loss.logits_NV;
  const int64_t n = logits_NV.size(0), size = logits_NV.size(1);
  at::Tensor z = logits_NV.to(compute_dtype(logits_NV.scalar_type()), false, /*copy=*/true).contiguous();
  auto [largest, place] = z.max(1);
  at::Tensor maximum = largest.clone();
  part.combine(maximum, true);
  // The first of equals: the largest of the negative ids.
  at::Tensor first = at::where(largest == maximum, -(place + part.first), std::numeric_limits<int64_t>::min());
  part.combine(first, true);
  const auto [smoothing, z_loss] = loss.terms;
  at::Tensor sums = at::zeros({smoothing != 0 ? 3 : 2, n}, at::kDouble);  // of exponentials; the target's logit less the maximum; sum of logits less it
  at::Tensor local = loss.target_N - part.first;
  at::Tensor here = at::nonzero((local >= 0).logical_and(local < size)).view({-1}), column = local.index_select(0, here);
  z.sub_(maximum.unsqueeze(1));
  sums[1].index_copy_(0, here, z.index({here, column}).to(at::kDouble));
  const auto add_up = [&](const at::Tensor& sum_N) {
    constexpr int64_t kRows = 16;  // at a time: of what it adds up ATen makes a copy in double
    for (int64_t i = 0; i < n; i += kRows) {
      at::Tensor part_sums = sum_N.narrow(0, i, std::min(kRows, n - i));
      at::sum_out(part_sums, z.narrow(0, i, part_sums.size(0)), at::IntArrayRef{1}, false, at::kDouble);
    }
  };
  if (smoothing != 0) add_up(sums[2]);
  z.exp_();
  add_up(sums[0]);
  part.combine(sums, false);
  const double *sum = sums.const_data_ptr<double>(), *logit = sum + n;
  const int64_t *hit = first.const_data_ptr<int64_t>(), *target = loss.target_N.const_data_ptr<int64_t>();
  double* losses = loss.losses_N.data_ptr<double>();
  uint8_t* correct = loss.correct_N.data_ptr<uint8_t>();
  const at::Tensor log_sum = maximum.to(at::kDouble) + sums[0].log();
  for (int64_t i = 0; i < n; ++i) {
    losses[i] = std::log(sum[i]) - logit[i], correct[i] = -hit[i] == target[i];
    if (z_loss != 0) losses[i] += z_loss * std::pow(log_sum.const_data_ptr<double>()[i], 2);
    if (smoothing != 0) losses[i] += smoothing * (logit[i] - sum[2 * n + i] / static_cast<double>(part.num_ids));
  }
  if (!loss.want_gradient) return;
  z.div_(sums[0].to(z.scalar_type()).unsqueeze(1));
  if (z_loss != 0) z.mul_((1 + 2 * z_loss * log_sum).to(z.scalar_type()).unsqueeze(1));
  if (smoothing != 0) z.sub_(smoothing / static_cast<double>(part.num_ids));
  z.index_put_({here, column}, at::scalar_tensor(smoothing - 1.0, z.options()), /*accumulate=*/true);
  logits_NV.copy_(z);
}

struct Computed {
  at::Tensor loss, correct;  // sums over the rows
  at::Tensor grad_hidden_TC, grad_head_VC;  // for an incoming gradient of gradient_scale; undefined where not wanted
};

Computed run(const at::Tensor& hidden_TC, const at::Tensor& head_VC, const Rows& rows, int64_t chunk_rows,
             bool want_hidden, bool want_head, double gradient_scale, const VocabularyPart* part, const CrossEntropyTerms& terms) {
  at::NoGradGuard no_grad;
  const int64_t count = static_cast<int64_t>(rows.index.size()), size = hidden_TC.size(1), vocabulary = head_VC.size(0);
  const auto dtype = hidden_TC.scalar_type();
  Computed out;
  if (want_hidden)
    out.grad_hidden_TC = count == hidden_TC.size(0) ? at::empty_like(hidden_TC) : at::zeros_like(hidden_TC);
  const kernels::Kernels* k = kernels_of(hidden_TC);
  // Sums of chunks are kept in fp32; one chunk needs no second buffer. A device's products add to the gradient itself, in fp32 but
  // for one more rounding a chunk: it has few, and no memory for a copy twice as large.
  const bool several = count > chunk_rows;
  if (want_head && (several || count == 0))
    out.grad_head_VC = at::zeros({vocabulary, size}, head_VC.options().dtype(k ? dtype : compute_dtype(dtype)));
  const at::Tensor learnt = to_device(rows.index, hidden_TC.device()), targets = to_device(rows.target, hidden_TC.device());
  const at::Tensor losses = at::empty({count}, hidden_TC.options().dtype(k ? at::kFloat : at::kDouble)), correct = at::empty({count}, losses.options().dtype(at::kByte));
  const int64_t most_rows = padded_rows(std::min(count, chunk_rows));
  // Rows of a stride that is a multiple of a cache line: with an odd vocabulary the products are a fifth faster.
  const int64_t stride = (vocabulary + 63) / 64 * 64;
  at::Tensor buffer = at::empty({most_rows, stride}, hidden_TC.options()).slice(1, 0, vocabulary);
  at::Tensor gathered = at::empty({most_rows, size}, hidden_TC.options());
  for (int64_t begin = 0; begin < count; begin += chunk_rows) {
    const int64_t end = std::min(count, begin + chunk_rows), n = end - begin;
    const int64_t padded = padded_rows(n), first = rows.index[static_cast<size_t>(begin)];
    const bool dense = padded == n && rows.index[static_cast<size_t>(end - 1)] - first + 1 == n;
    const at::Tensor index = learnt.slice(0, begin, end);
    at::Tensor hidden = dense ? hidden_TC.slice(0, first, first + n) : gathered.slice(0, 0, padded);
    if (!dense) {
      at::Tensor part = hidden.slice(0, 0, n);
      at::index_select_out(part, hidden_TC, 0, index);
      hidden.slice(0, n, padded).zero_();
    }
    at::Tensor logits = buffer.slice(0, 0, padded);
    product(hidden, head_VC.t(), logits);
    const Loss loss{logits.slice(0, 0, n), targets.slice(0, begin, end), losses.slice(0, begin, end), correct.slice(0, begin, end), want_hidden || want_head, gradient_scale, terms};
    if (k) {
      by_kernels(*k, loss, part);
    } else {
      part ? of_part(loss, *part) : by_loops(loss);
      if (gradient_scale != 1 && loss.want_gradient) loss.logits_NV.mul_(gradient_scale);
    }
    if (want_hidden && dense) {
      at::Tensor part = out.grad_hidden_TC.slice(0, first, first + n);
      product(logits, head_VC, part);
    } else if (want_hidden) {
      out.grad_hidden_TC.index_copy_(0, index, product(logits, head_VC).slice(0, 0, n));
    }
    if (want_head) {  // rows of zeros in hidden take nothing from what stands in their logits: those are finite
      if (!several)
        out.grad_head_VC = product(logits.t(), hidden);
      else if (k)
        product(logits.t(), hidden, out.grad_head_VC, {.add = begin > 0});
      else
        out.grad_head_VC.add_(product(logits.t(), hidden));
    }
  }
  out.correct = correct.sum(at::kLong);
  if (k) {
    out.loss = losses.sum(at::kDouble).to(at::kFloat);
  } else {
    double sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += losses.data_ptr<double>()[i];
    out.loss = at::scalar_tensor(sum, at::TensorOptions().dtype(compute_dtype(dtype)));
  }
  return out;
}

// x * scale, rounded once; x may be used up. On a device nobody waits for the scale: the kernel reads it, and where it is 1, as the
// gradient that backward() begins with is, it leaves values of the right dtype alone.
at::Tensor scaled(const at::Tensor& x, const at::Tensor& scale, at::ScalarType dtype) {
  const bool same = x.scalar_type() == dtype;
  if (const kernels::Kernels* k = kernels_of(x)) {
    TRIREME_CHECK(scale.device() == x.device() && scale.scalar_type() == at::kFloat, scale.toString());
    at::Tensor y = same ? x : at::empty(x.sizes(), x.options().dtype(dtype));
    k->convert({kernel_type(x), kernel_type(y), x.numel(), data_of(x), data_of(y), 1, false, scale.data_ptr<float>()}, stream_of(x));
    return y;
  }
  at::Tensor y = at::empty(x.sizes(), x.options().dtype(dtype));
  const double factor = scale.item<double>();
  if (same) return at::mul_out(y, x, at::scalar_tensor(factor, at::kDouble));
  dispatch_floating(dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = typename ComputeType<T>::type;
    for_rows(x.numel(), 1, [&](int64_t begin, int64_t end) {
      loops<T>().scale_from(end - begin, x.data_ptr<A>() + begin, factor, y.data_ptr<T>() + begin);
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
    return computed.loss;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto dtype = static_cast<at::ScalarType>(ctx->saved_data.at("dtype").toInt());
    auto gradient = [&](const char* name) {
      auto found = ctx->saved_data.find(name);
      return found == ctx->saved_data.end() ? at::Tensor() : scaled(found->second.toTensor(), grads[0], dtype);
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
// written once a chunk, so its chunks are larger. The products of a device want a thousand rows and more: in 400 MB, as many as
// possible.
int64_t cross_entropy_chunk_rows(int64_t vocabulary, at::ScalarType dtype, bool trains, at::DeviceType device) {
  const int64_t row_bytes = std::max<int64_t>(1, vocabulary * static_cast<int64_t>(c10::elementSize(dtype)));
  if (device != at::kCPU) return std::clamp<int64_t>((400ll << 20) / row_bytes / 128, 1, 64) * 128;
  return std::clamp<int64_t>((trains ? 128ll << 20 : 32ll << 20) / row_bytes / 64, 1, 32) * 64;
}

LossSum linear_cross_entropy(const at::Tensor& hidden_TC, const at::Tensor& head_VC, const at::Tensor& targets_T,
                             int64_t chunk_rows, double gradient_scale, const VocabularyPart* part, const CrossEntropyTerms& terms) {
  check_alike("linear_cross_entropy", {"hidden", hidden_TC}, {{"head", head_VC}});
  TRIREME_CHECK(hidden_TC.dim() == 2 && head_VC.dim() == 2 && hidden_TC.size(1) == head_VC.size(1) && targets_T.dim() == 1 &&
                    targets_T.size(0) == hidden_TC.size(0) && targets_T.scalar_type() == at::kLong && targets_T.is_cpu(),
                hidden_TC.sizes(), head_VC.sizes(), targets_T.sizes(), targets_T.device().str());
  const int64_t vocabulary = part ? part->num_ids : head_VC.size(0);
  const Rows rows = learnt_rows(targets_T, vocabulary);
  const bool want_hidden = wants_gradient(hidden_TC), want_head = wants_gradient(head_VC);
  if (chunk_rows <= 0) chunk_rows = cross_entropy_chunk_rows(vocabulary, head_VC.scalar_type(), want_head, head_VC.device().type());
  if (const auto count = static_cast<int64_t>(rows.index.size()); count > chunk_rows && !head_VC.is_cpu()) {  // chunks of a size, in whole tiles
    const int64_t num_chunks = (count + chunk_rows - 1) / chunk_rows;
    chunk_rows = std::min(chunk_rows, ((count + num_chunks - 1) / num_chunks + 127) / 128 * 128);
  }
  Computed computed = run(hidden_TC.detach().contiguous(), head_VC.detach(), rows, chunk_rows, want_hidden, want_head,
                          gradient_scale, part, terms);
  LossSum result;
  result.count = static_cast<int64_t>(rows.index.size());
  result.correct = computed.correct;
  result.sum = LinearCrossEntropy::apply(hidden_TC, head_VC, computed);
  return result;
}

}  // namespace trireme
