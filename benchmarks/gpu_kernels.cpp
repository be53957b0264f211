// Times Trireme's kernels beside torch's and the card's own speed, in one process:  bench_gpu_kernels STAGE [--dry-run] [LENGTHS]
// Prints rows as benchmarks/table.py reads them, each on a line when it is known. STAGE: attention_128, attention_64, attention_sm80 (both by
// the kernels for any card, on a card that has its own), attention_packed, decode_attention, memory,
// linear_cross_entropy, paged_state.
// --dry-run: tiny shapes over the emulated kernels on the CPU, by the wall clock: shows that this runs, and no speed. LENGTHS: a file of
// sequence lengths. Times are medians of CUDA events, of random data, with a cold L2: 256 MB are written before each call.
#include "tests/attention_beside_torch.h"

#include <ATen/DeviceAccelerator.h>
#include <c10/core/Event.h>
#include <torch/csrc/autograd/autograd.h>

#include <chrono>
#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>

#include "kernels/architecture.h"
#include "launch/cuda_paged.h"
#include "ops/ops.h"
#include "optim/optimizer.h"

namespace trireme {
namespace {

using kernels::Type;
using Json = nlohmann::json;

class Bench {
 public:
  explicit Bench(bool dry)
      : dry(dry), device(dry ? at::kCPU : at::kCUDA, dry ? -1 : 0), k(dry ? kernels::emulated_kernels() : kernels::cuda_kernels()), wide(at::TensorOptions(at::kFloat).device(device)), narrow(wide.dtype(at::kBFloat16)) {
    set_kernels(device.type(), &k);
    if (!dry) flush_ = at::empty({256 << 20}, wide.dtype(at::kByte));
  }

  template <typename F>
  double milliseconds(const F& f) {
    const int repeats = dry ? 1 : 11;
    double spent = 0;
    for (int i = 0; !dry && (i < 3 || spent < kWarmMilliseconds); ++i) spent += of_wall_clock([&] { of_events(f); });
    std::vector<double> all;
    for (int i = 0; i < repeats; ++i) all.push_back(dry ? of_wall_clock(f) : of_events(f));
    std::nth_element(all.begin(), all.begin() + repeats / 2, all.end());
    return all[static_cast<size_t>(repeats / 2)];
  }

  // `baseline` 0: none.
  void row(const std::string& what, const std::string& shape, const char* unit, double trireme, double baseline, const std::string& name, std::optional<double> target) {
    std::cout << Json{{"what", what}, {"shape", shape}, {"unit", unit}, {"trireme", trireme}, {"baseline", baseline > 0 ? Json(baseline) : Json()},
                    {"baseline_name", name}, {"ratio", baseline > 0 ? Json(trireme / baseline) : Json()}, {"target", target ? Json(*target) : Json()}} << std::endl;
    std::cerr << what << ", " << shape << ": " << trireme << " " << unit << (baseline > 0 ? str(", ", name, " ", baseline) : "") << std::endl;
  }

  const bool dry;
  const at::Device device;
  const kernels::Kernels& k;
  const at::TensorOptions wide, narrow;
  std::string attention = "attention";  // as rows name it

 private:
  static constexpr double kWarmMilliseconds = 200;  // an idle card's clock is a fraction of a busy one's

  template <typename F>
  static double of_wall_clock(const F& f) {
    const auto begin = std::chrono::steady_clock::now();
    f();
    return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - begin).count();
  }
  template <typename F>
  double of_events(const F& f) {
    const c10::impl::VirtualGuardImpl guard(device.type());
    const c10::Stream stream = guard.getStream(device);
    c10::Event begin(device.type(), c10::EventFlag::BACKEND_DEFAULT), end(device.type(), c10::EventFlag::BACKEND_DEFAULT);
    flush_.zero_();
    begin.record(stream);
    f();
    end.record(stream);
    end.synchronize();
    return begin.elapsedTime(end);
  }

  at::Tensor flush_;
};

bool is_hopper(const Bench& bench) { return !bench.dry && kernels::probe_device(0).compute_major == 9; }

// Floating-point operations of both products over the pairs of query and key that are seen; backward has five products.
void attention_rows(Bench& b, const std::vector<int64_t>& lengths, int64_t heads, int64_t head_dim, bool causal, const std::string& shape, bool with_cudnn) {
  double pairs = 0;
  for (int64_t n : lengths) pairs += static_cast<double>(n) * static_cast<double>(n) / (causal ? 2 : 1);
  const double forward = 4 * pairs * static_cast<double>(heads * head_dim) * 1e-9, backward = 2.5 * forward;  // of TFLOP/s by milliseconds
  const test::AttentionInput in(lengths, heads, heads, head_dim, causal, b.narrow);
  test::KernelAttention ours(b.k, in, false), repeatable(b.k, in, true);
  const double ours_forward = forward / b.milliseconds([&] { ours.forward(); }), ours_backward = backward / b.milliseconds([&] { ours.backward(); });
  repeatable.forward();
  const std::string head = str(b.attention, ", head dim ", head_dim, causal ? ", causal, " : ", full, ");
  b.row(head + "backward, deterministic", shape, "TFLOP/s", backward / b.milliseconds([&] { repeatable.backward(); }), 0, "", {});
  struct Other {
    test::TorchBackend backend;
    const char* name;
    std::optional<double> forward, backward;
  };
  const bool judged = is_hopper(b) && in.longest >= 2048;
  std::vector<Other> others{{test::TorchBackend::kFlash, "torch's flash attention", 1, 1}};
  if (with_cudnn && !b.dry) others.push_back({test::TorchBackend::kCudnn, "cuDNN", judged ? std::optional(0.85) : std::nullopt, judged ? std::optional(0.80) : std::nullopt});
  for (const Other& other : others) {
    double its_forward = 0, its_backward = 0;
    std::string name = other.name;
    try {
      test::TorchAttention theirs(other.backend, in);
      its_forward = forward / b.milliseconds([&] { theirs.forward(); }), its_backward = backward / b.milliseconds([&] { theirs.backward(); });
    } catch (const c10::Error& error) {
      name += str(" (refuses: ", error.what_without_backtrace(), ")");
    }
    const auto target = [](double its, std::optional<double> ratio) { return its > 0 ? ratio : std::nullopt; };
    b.row(head + "forward", shape, "TFLOP/s", ours_forward, its_forward, name, target(its_forward, other.forward));
    b.row(head + "backward", shape, "TFLOP/s", ours_backward, its_backward, name, target(its_backward, other.backward));
  }
}

void attention(Bench& b, int64_t head_dim) {
  const int64_t tokens = b.dry ? 64 : 32768, heads = b.dry ? 1 : 2048 / head_dim;
  for (bool causal : {true, false})
    for (int64_t length = b.dry ? 32 : 1024; length <= tokens; length *= 2)
      attention_rows(b, std::vector<int64_t>(static_cast<size_t>(tokens / length), length), heads, head_dim, causal, str(tokens / length, " x ", length, ", ", heads, " heads"), true);
}

void attention_packed(Bench& b, const std::string& file) {
  std::ifstream in(file);
  std::vector<int64_t> lengths;
  int64_t tokens = 0;
  for (int64_t n; tokens < (b.dry ? 300 : 16384) && in >> n; tokens += n) lengths.push_back(n);
  TRIREME_CHECK(!lengths.empty(), "no lengths in ", file);
  if (b.dry) lengths.assign(2, 20);  // torch on the CPU takes sequences of one length
  for (int64_t head_dim : {128, 64})
    attention_rows(b, lengths, b.dry ? 1 : 2048 / head_dim, head_dim, true, str(lengths.size(), " sequences of GSM8K, ", tokens, " tokens"), false);
}

// Operations that move memory, beside a copy on the same card: bytes that have to be read and written.
void memory(Bench& b) {
  const int64_t rows = b.dry ? 4 : 40960, width = b.dry ? 64 : 4096, count = rows * width;  // 336 MB of bf16
  const std::string shape = str(rows, " x ", width, ", bf16");
  const kernels::Stream stream = stream_of(at::empty({1}, b.wide));
  const double copied = 2.0 * static_cast<double>(count) * 4;
  double copy = 0;
  {
    const at::Tensor from = at::randn({count}, b.wide), to = at::empty_like(from);
    copy = copied * 1e-9 / b.milliseconds([&] { to.copy_(from); });  // TB/s
  }
  b.row("copy of the card", str(count, " fp32"), "TB/s", copy, 0, "", {});
  auto time = [&](const std::string& what, const std::string& of, double bytes, std::optional<double> target, const std::function<void()>& f) {
    b.row(what, of, "TB/s", bytes * 1e-9 / b.milliseconds(f), copy, "copy of the card", target);
  };
  auto random = [&] { return at::randn({rows, width}, b.narrow); };
  auto empty = [&](int64_t n, at::TensorOptions o) { return at::empty({n}, o); };
  const double n = static_cast<double>(count);
  {
    const at::Tensor x = random(), residual = random(), w = at::randn({width}, b.narrow), y = random(), sum = random(), rstd = at::rand({rows}, b.wide) + 0.5, mean = at::randn({rows}, b.wide);
    const at::Tensor gw = empty(width, b.wide), gb = empty(width, b.wide), workspace = empty(kernels::layer_norm_workspace(rows, width), b.wide);
    time("RMSNorm, forward", shape, n * 4, 0.85, [&] { b.k.rms_norm_forward({Type::kBFloat16, rows, width, x.data_ptr(), nullptr, w.data_ptr(), 1e-5f, y.data_ptr(), nullptr, rstd.data_ptr<float>()}, stream); });
    time("RMSNorm with residual, forward", shape, n * 8, 0.85, [&] { b.k.rms_norm_forward({Type::kBFloat16, rows, width, x.data_ptr(), residual.data_ptr(), w.data_ptr(), 1e-5f, y.data_ptr(), sum.data_ptr(), rstd.data_ptr<float>()}, stream); });
    time("RMSNorm, backward", shape, n * 6, 0.80, [&] { b.k.rms_norm_backward({Type::kBFloat16, rows, width, x.data_ptr(), nullptr, residual.data_ptr(), w.data_ptr(), rstd.data_ptr<float>(), y.data_ptr(), gw.data_ptr<float>(), workspace.data_ptr<float>()}, stream); });
    time("LayerNorm, forward", shape, n * 4, {}, [&] { b.k.layer_norm_forward({Type::kBFloat16, rows, width, x.data_ptr(), nullptr, w.data_ptr(), w.data_ptr(), 1e-5f, y.data_ptr(), nullptr, mean.data_ptr<float>(), rstd.data_ptr<float>()}, stream); });
    time("LayerNorm, backward", shape, n * 6, {}, [&] { b.k.layer_norm_backward({Type::kBFloat16, rows, width, x.data_ptr(), nullptr, residual.data_ptr(), w.data_ptr(), mean.data_ptr<float>(), rstd.data_ptr<float>(), y.data_ptr(), gw.data_ptr<float>(), gb.data_ptr<float>(), workspace.data_ptr<float>()}, stream); });
  }
  {
    const at::Tensor gate = random(), up = random(), y = random(), grad_gate = random(), grad_up = random();
    time("SwiGLU, forward", shape, n * 6, 0.85, [&] { b.k.glu_forward({Type::kBFloat16, kernels::Gate::kSilu, rows, width, width, gate.data_ptr(), up.data_ptr(), y.data_ptr()}, stream); });
    time("SwiGLU, backward", shape, n * 10, 0.80, [&] { b.k.glu_backward({Type::kBFloat16, kernels::Gate::kSilu, rows, width, width, y.data_ptr(), gate.data_ptr(), up.data_ptr(), grad_gate.data_ptr(), grad_up.data_ptr()}, stream); });
    const int64_t dim = b.dry ? 32 : 128;
    const at::Tensor cos = at::randn({rows, dim}, b.wide), sin = at::randn({rows, dim}, b.wide);
    for (bool inverse : {false, true})
      time(inverse ? "rotary, backward" : "rotary, forward", shape, n * 4 + static_cast<double>(rows * dim) * 8, inverse ? 0.80 : 0.85,
           [&] { b.k.rope({Type::kBFloat16, rows, width / dim, dim, dim, gate.data_ptr(), width, cos.data_ptr<float>(), sin.data_ptr<float>(), y.data_ptr(), width, inverse}, stream); });
  }
  {
    const at::Tensor x = at::randn({rows, width}, b.wide), y = random(), z = random();
    time("cast, fp32 to bf16", str(count), n * 6, 0.85, [&] { b.k.convert({Type::kFloat32, Type::kBFloat16, count, x.data_ptr(), y.data_ptr(), 1, false, nullptr}, stream); });
    time("cast, bf16 to fp32", str(count), n * 6, 0.85, [&] { b.k.convert({Type::kBFloat16, Type::kFloat32, count, y.data_ptr(), x.data_ptr(), 1, false, nullptr}, stream); });
    time("transpose", shape, n * 4, {}, [&] { b.k.transpose({Type::kBFloat16, 1, rows, width, y.data_ptr(), z.data_ptr()}, stream); });
    const at::Tensor squares = empty(1, b.wide.dtype(at::kDouble)), norm = empty(1, b.wide), factor = empty(1, b.wide);
    const kernels::GradientTensor tensor{count, x.data_ptr()};
    const at::Tensor workspace = empty(kernels::gradient_norm_workspace(&tensor, 1), b.wide.dtype(at::kDouble));
    time("gradient norm, fp32", str(count), n * 4, {}, [&] { b.k.gradient_norm({Type::kFloat32, &tensor, 1, workspace.data_ptr<double>(), squares.data_ptr<double>(), {1, 1, norm.data_ptr<float>(), factor.data_ptr<float>(), false}}, stream); });
  }
  {
    constexpr int64_t kSize = 64;
    const int64_t blocks = count / kSize, nested_blocks = (blocks + 255) / 256;
    const double num_blocks = static_cast<double>(blocks);
    const at::Tensor x = random(), y = random(), codes = empty(count, b.wide.dtype(at::kByte)), absmax = at::rand({std::max(blocks, rows)}, b.wide), map = at::linspace(-1, 1, 256, b.wide);
    const at::Tensor scale_codes = at::randint(256, {blocks}, b.wide.dtype(at::kByte)), nested = at::rand({nested_blocks}, b.wide), offset = at::rand({1}, b.wide);
    uint8_t* const bytes = codes.data_ptr<uint8_t>();
    float *const scales = absmax.data_ptr<float>(), *const numbers = map.data_ptr<float>();
    time("NF4, quantize", shape, n * 2.5 + num_blocks * 4, {}, [&] { b.k.quantize_4({Type::kBFloat16, kernels::FourBit::kNf4, count, kSize, x.data_ptr(), bytes, scales}, stream); });
    time("NF4, dequantize", shape, n * 2.5 + num_blocks * 4, 0.85,
         [&] { b.k.dequantize_4({Type::kBFloat16, kernels::FourBit::kNf4, count, kSize, bytes, {scales, nullptr, nullptr, nullptr, 0, nullptr, {}}, y.data_ptr()}, stream); });
    time("NF4 with scales in 8 bits, dequantize", shape, n * 2.5 + num_blocks, 0.85, [&] {
      b.k.dequantize_4({Type::kBFloat16, kernels::FourBit::kNf4, count, kSize, bytes, {nullptr, scale_codes.data_ptr<uint8_t>(), nested.data_ptr<float>(), numbers, 256, offset.data_ptr<float>(), {}}, y.data_ptr()}, stream);
    });
    time("8 bits of a map, quantize", shape, n * 3 + num_blocks, {}, [&] { b.k.quantize_blocks({Type::kBFloat16, count, 256, x.data_ptr(), 0, numbers, bytes, scales}, stream); });
    time("8 bits of a map, dequantize", shape, n * 3 + num_blocks, {}, [&] { b.k.dequantize_blocks({Type::kBFloat16, count, 256, bytes, scales, numbers, y.data_ptr()}, stream); });
    int8_t* const integers = static_cast<int8_t*>(codes.data_ptr());
    time("int8 rows, quantize", shape, n * 3, {}, [&] {
      const kernels::QuantizeRows call{Type::kBFloat16, rows, width, x.data_ptr(), 0, integers, scales, nullptr};
      b.k.largest_of_rows(call, stream), b.k.quantize_rows(call, stream);
    });
    time("int8 rows, dequantize", shape, n * 3, {}, [&] { b.k.dequantize_rows({Type::kBFloat16, rows, width, integers, scales, y.data_ptr()}, stream); });
  }
  {
    const int64_t tokens = b.dry ? 4 : 2048, vocabulary = b.dry ? 100 : 128256;
    const double logits_bytes = static_cast<double>(tokens * vocabulary) * 2;
    const at::Tensor logits = at::randn({tokens, vocabulary}, b.narrow), targets = at::randint(vocabulary, {tokens}, b.wide.dtype(at::kLong));
    const at::Tensor loss = empty(tokens, b.wide), correct = empty(tokens, b.wide.dtype(at::kByte));
    for (bool gradient : {false, true})
      time(gradient ? "cross-entropy with gradient" : "cross-entropy, loss alone", str(tokens, " x ", vocabulary, ", bf16"), logits_bytes * (gradient ? 2 : 1), gradient ? 0.80 : 0.85, [&] {
        b.k.cross_entropy({Type::kBFloat16, tokens, vocabulary, vocabulary, logits.data_ptr(), targets.data_ptr<int64_t>(), 0, 0, 1, gradient, loss.data_ptr<float>(), correct.data_ptr<uint8_t>()}, stream);
      });
  }
  const at::Tensor weight = random(), master = at::randn({count}, b.wide), grad = at::randn({count}, b.wide), m = at::randn({count}, b.wide), v = at::rand({count}, b.wide);
  const kernels::UpdateTensor tensor{count, weight.data_ptr(), master.data_ptr<float>(), grad.data_ptr<float>(), m.data_ptr<float>(), v.data_ptr<float>(), {}, 0};
  const int64_t blocks = (count + kernels::k8BitBlock - 1) / kernels::k8BitBlock;
  const at::Tensor codes = at::randint(256, {2, count}, b.wide.dtype(at::kByte)), scales = at::rand({2, blocks}, b.wide), maps = at::linspace(-1, 1, 512, b.wide);
  kernels::UpdateTensor without = tensor, in_8_bits = tensor;
  without.master = in_8_bits.master = nullptr;
  in_8_bits.m = codes.data_ptr(), in_8_bits.v = codes[1].data_ptr(), in_8_bits.m_scale = scales.data_ptr<float>(), in_8_bits.v_scale = scales[1].data_ptr<float>();
  const auto update = [&](kernels::UpdateRule rule, const kernels::UpdateTensor& of) {
    b.k.update({rule, Type::kBFloat16, &of, 1, 1e-4, 0.01, 0.9, 0.95, 1e-8, 0.1, 0.05, nullptr, 1, 1, maps.data_ptr<float>()}, stream);
  };
  time("AdamW, bf16 with master", str(count), n * 30, 0.85, [&] { update(kernels::UpdateRule::kAdamW, tensor); });
  time("AdamW, bf16 without master", str(count), n * 24, 0.85, [&] { update(kernels::UpdateRule::kAdamW, without); });
  time("AdamW in 8 bits, bf16 without master", str(count), n * 12 + static_cast<double>(blocks) * 16, 0.85, [&] { update(kernels::UpdateRule::kAdamW8Bit, in_8_bits); });
  time("Lion, bf16 with master", str(count), n * 22, {}, [&] { update(kernels::UpdateRule::kLion, tensor); });
  const at::Tensor of_rows = at::rand({rows}, b.wide), of_columns = at::rand({width}, b.wide), sums = at::ones({rows + width + 3}, b.wide.dtype(at::kDouble));
  kernels::Adafactor part{};
  part.type = Type::kBFloat16, part.size = count, part.num_rows = rows, part.num_columns = width, part.weight = weight.data_ptr(), part.master = master.data_ptr<float>();
  part.grad = grad.data_ptr<float>(), part.rows = of_rows.data_ptr<float>(), part.columns = of_columns.data_ptr<float>();
  part.sums = sums.data_ptr<double>(), part.mean_of_rows = part.sums + rows + width + 1, part.norm = part.mean_of_rows + 1;
  part.mix = 0.1, part.lr = part.largest_rate = 1e-4, part.seed = part.step = 1;
  const at::Tensor workspace = empty(kernels::adafactor_workspace(part), sums.options());
  part.workspace = workspace.data_ptr<double>();
  time("Adafactor, bf16 with master", shape, n * (8 + 4 + 14), {}, [&] {
    b.k.adafactor_sums(part, stream), b.k.adafactor_means(part, stream), b.k.adafactor_norm(part, stream), b.k.adafactor_update(part, stream);
  });
}

// AdamW's step with its state in paged memory: where all has room, and where memory that is not paged has pushed half of it out. Fails where a
// bit differs from the step of state that stays.
void paged_state(Bench& b) {
  const int64_t count = b.dry ? 4096 : int64_t{1} << 28;
  const double bytes = static_cast<double>(count) * 30, state = static_cast<double>(count) * 12;
  const auto optimizer_of = [&](bool paged) {
    const at::Tensor grad = at::sin(at::arange(count, b.wide)), weight = grad.to(at::kBFloat16);
    return Optimizer({{"w", weight, grad, 0.01}}, {.paged = paged});
  };
  Optimizer stays = optimizer_of(false), moves = optimizer_of(true);
  const auto time = [&](Optimizer& optimizer) { return b.milliseconds([&] { optimizer.step(1e-4); }); };
  const double alone = bytes * 1e-9 / time(stays);
  const std::string shape = str(count, " elements, bf16 with master");
  b.row("AdamW, paged state that has room", shape, "TB/s", bytes * 1e-9 / time(moves), alone, "state that stays", {});
  double copy = 0;
  {
    const at::Tensor host = at::empty({b.dry ? 4096 : 1 << 28}, at::TensorOptions(at::kByte).pinned_memory(!b.dry)), to = at::empty(host.sizes(), b.wide.dtype(at::kByte));
    copy = static_cast<double>(host.numel()) * 1e-9 / b.milliseconds([&] { to.copy_(host, /*non_blocking=*/true); });
  }
  at::Tensor others;
  if (!b.dry) {
    const size_t free = c10::getDeviceAllocator(at::kCUDA)->getMemoryInfo(b.device.index()).first;
    others = at::empty({static_cast<int64_t>(free) + static_cast<int64_t>(state / 2)}, b.wide.dtype(at::kByte));
  }
  b.row("AdamW, paged state of which half has no room", shape, "TB/s of state", state * 1e-9 / time(moves), copy, "copy from pinned host memory", {});
  for (Optimizer* optimizer : {&stays, &moves})
    while (optimizer->num_steps() < std::max(stays.num_steps(), moves.num_steps())) optimizer->step(1e-4);
  const auto there = stays.state(), back = moves.state();
  for (size_t i = 0; i < there.size(); ++i) TRIREME_CHECK(at::equal(there[i].value, back[i].value), there[i].kind, " differs where it is paged");
  TRIREME_CHECK(at::equal(stays.tensors()[0].weight, moves.tensors()[0].weight), "weights differ where state is paged");
}

// Attention of the newest token of each sequence, beside torch's and beside a copy on the same card: a step reads all keys and values. Heads
// of Llama 3 8B.
void decode_attention_rows(Bench& b) {
  const int64_t heads = b.dry ? 4 : 32, key_heads = b.dry ? 2 : 8, dim = b.dry ? 64 : 128;
  const at::Tensor from = at::randn({b.dry ? 1024 : 128 << 20}, b.wide), to = at::empty_like(from);
  const double copy = 2e-9 * static_cast<double>(from.nbytes()) / b.milliseconds([&] { to.copy_(from); });  // TB/s
  for (const int64_t sequences : {1, 8, 64})
    for (const int64_t length : b.dry ? std::vector<int64_t>{70} : std::vector<int64_t>{1024, 4096, 32768}) {
      const at::Tensor q = at::randn({sequences, heads, dim}, b.narrow), k = at::randn({sequences, length, key_heads, dim}, b.narrow), v = at::randn_like(k);
      const at::Tensor lengths = at::full({sequences}, length, b.wide.dtype(at::kInt));
      const std::string shape = str(sequences, " x ", length, ", ", heads, " heads over ", key_heads, ", head dim ", dim);
      const double bytes = 2e-9 * static_cast<double>(k.nbytes()), ours = bytes / b.milliseconds([&] { decode_attention(q, k, v, lengths); });
      const at::Tensor q_BHTD = q.unsqueeze(2), k_BKSD = k.transpose(1, 2), v_BKSD = v.transpose(1, 2);
      const double theirs = bytes / b.milliseconds([&] { at::scaled_dot_product_attention(q_BHTD, k_BKSD, v_BKSD, {}, 0.0, false, {}, /*enable_gqa=*/true); });
      b.row("decode attention", shape, "TB/s", ours, copy, "copy of the card", {});
      b.row("decode attention", shape, "TB/s", ours, theirs, "torch's attention", {});
    }
}

// Forward and backward of the head and the loss. What a training step holds besides: gradients; the rest is workspace.
void linear_cross_entropy_rows(Bench& b) {
  const int64_t tokens = b.dry ? 8 : 4096, width = b.dry ? 16 : 4096, vocabulary = b.dry ? 100 : 128256;
  const std::string shape = str(tokens, " x ", width, " x ", vocabulary, ", bf16");
  at::Tensor hidden = at::randn({tokens, width}, b.narrow).requires_grad_(), head = (at::randn({vocabulary, width}, b.narrow) * 0.02);
  const at::Tensor targets = at::randint(vocabulary, {tokens}, at::kLong), device_targets = targets.to(b.device);
  for (bool trained : {true, false}) {
    head.set_requires_grad(trained);
    const std::string what = trained ? "linear and cross-entropy" : "linear and cross-entropy, frozen head";
    auto clear = [&] { hidden.mutable_grad() = head.mutable_grad() = at::Tensor(); };
    auto ours = [&] {
      clear();
      trireme::linear_cross_entropy(hidden, head, targets).sum.backward();
    };
    auto theirs = [&] {
      clear();
      at::cross_entropy_loss(at::matmul(hidden, head.t()).to(at::kFloat), device_targets, {}, at::Reduction::Sum).backward();
    };
    const double time = b.milliseconds(ours);
    b.row(what, shape, "ms", time, 0, "", trained ? 18.5 : 13.0);
    if (!b.dry) {
      clear();
      const auto allocated = [&] { return at::accelerator::getDeviceStats(0).allocated_bytes[0]; };
      const int64_t before = allocated().current;
      at::accelerator::resetPeakStats(0);
      ours();
      const int64_t gradients = (hidden.numel() + (trained ? head.numel() : 0)) * 2;
      b.row(what + ", workspace", shape, "MB", static_cast<double>(allocated().peak - before - gradients) * 1e-6, 0, "", 525);
    }
    b.row(what, shape, "ms", time, b.milliseconds(theirs), "torch, all logits at once", {});
  }
}

int main_of(const std::vector<std::string>& words) {
  const bool dry = words.size() > 1 && words[1] == "--dry-run";
  const std::string stage = words.empty() ? "" : words[0], file = words.size() > 1 ? words.back() : "";
  if (!dry && !test::loads_device()) {
    std::cerr << "bench_gpu_kernels: no CUDA device; --dry-run shows on the CPU that it runs\n";
    return 2;
  }
  offer_cuda_paged_memory();
  Bench b(dry);
  if (stage == "attention_128") attention(b, 128);
  else if (stage == "attention_64") attention(b, 64);
  else if (stage == "attention_sm80") {
    dry ? kernels::emulated::set_architecture(80) : kernels::cuda::set_architecture(80);
    b.attention = "attention of sm_80";
    for (int64_t head_dim : {128, 64}) attention(b, head_dim);
  } else if (stage == "attention_packed") attention_packed(b, file);
  else if (stage == "memory") memory(b);
  else if (stage == "decode_attention") decode_attention_rows(b);
  else if (stage == "linear_cross_entropy") linear_cross_entropy_rows(b);
  else if (stage == "paged_state") paged_state(b);
  else {
    std::cerr << "bench_gpu_kernels: no stage '" << stage << "'; there are attention_128, attention_64, attention_sm80, attention_packed, decode_attention, memory, linear_cross_entropy and paged_state\n";
    return 2;
  }
  return 0;
}

}  // namespace
}  // namespace trireme

int main(int argc, char** argv) {
  try {
    return trireme::main_of({argv + 1, argv + argc});
  } catch (const std::exception& error) {
    std::cerr << "bench_gpu_kernels: " << error.what() << "\n";
    return 1;
  }
}
