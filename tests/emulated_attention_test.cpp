// The attention kernels, run by the host emulation, against plain loops in fp64.
//
// Bounds. Inputs are exact (rounded to the type before). With u the rounding of the type (2^-8, 2^-11) and e that of
// fp32 (2^-24), a product over n terms is off by at most 2 n e times the sum of the terms' magnitudes (the factor 2: a
// tensor core may cut off where the emulation rounds); a score's error is a relative error of its probability;
// exp2_approx and a rescaling each add some e, the latter once a tile. p and dS are rounded by u for the second
// product, results once more by u. Each bound below is the sum of these, from magnitudes computed in fp64, element by
// element; see Bound.
#include "emulated_omissions.h"

#include <algorithm>

#include "kernels/architecture.h"
#include "kernels/attention.h"
#include "kernels/reference/attention.h"

namespace trireme::kernels {
namespace {

using Doubles = std::vector<double>;
using emulated::arch::bf16;
using emulated::arch::fp16;
using test::Guarded;
using test::smallest_unit;
using test::unit;
using Seqlens = std::vector<int32_t>;

constexpr double kE = 0x1p-24;

uint16_t encode(Type type, double x) {
  const float f = static_cast<float>(x);
  return type == Type::kBFloat16 ? emulated::arch::from_float<bf16>(f).bits : emulated::arch::from_float<fp16>(f).bits;
}
double decode(Type type, uint16_t bits) {
  return type == Type::kBFloat16 ? emulated::arch::to_float(bf16{bits}) : emulated::arch::to_float(fp16{bits});
}

// [rows, heads, D] of 16 bits, kPadding elements of NaN behind each row.
class Tensor {
 public:
  static constexpr int kPadding = 8;
  Tensor(Type type, int64_t rows, int heads, int dim)
      : type_(type),
        rows_(rows),
        width_(int64_t{heads} * dim),
        dim_(dim),
        memory_(static_cast<size_t>(rows * (width_ + kPadding)) * 2) {}
  void set(const Doubles& values) {
    auto* const all = memory_.as<uint16_t>();  // waits for a device
    for (int64_t r = 0; r < rows_; ++r)
      for (int64_t c = 0; c < width_; ++c)
        all[r * (width_ + kPadding) + c] =
            encode(type_, values[static_cast<size_t>(r * width_ + c)]);
  }
  Doubles get() const {
    Doubles values;
    const auto* const all = memory_.as<uint16_t>();
    for (int64_t r = 0; r < rows_; ++r) {
      for (int64_t c = 0; c < width_; ++c)
        values.push_back(decode(type_, all[r * (width_ + kPadding) + c]));
      for (int64_t c = width_; c < width_ + kPadding; ++c)
        if (all[r * (width_ + kPadding) + c] != 0xffff) ADD_FAILURE() << "written behind row " << r;
    }
    return values;
  }
  std::vector<uint16_t> bits() const {
    return {memory_.as<uint16_t>(), memory_.as<uint16_t>() + rows_ * (width_ + kPadding)};
  }
  ConstHeads in() const { return {memory_.as(), width_ + kPadding, dim_}; }
  Heads out() { return {memory_.as(), width_ + kPadding, dim_}; }

 private:
  Type type_;
  int64_t rows_, width_, dim_;
  Guarded memory_;
};

struct Case {
  Type type;
  reference::Attention spec;
  double shift = 0;  // added to every score (about)
  uint64_t seed = 1;
  int64_t queries() const { return spec.cu_seqlens_q.back(); }
  int64_t keys() const { return spec.cu_seqlens_k.back(); }
  double scale() const { return spec.scale != 0 ? spec.scale : 1 / std::sqrt(spec.head_dim); }
};

Case make_case(Type type, int dim, int heads, int key_heads, Seqlens q, Seqlens k, int64_t window = -1,
               bool causal = true) {
  return {type, {dim, heads, key_heads, std::move(q), std::move(k), 0, window, causal}};
}

struct Inputs {
  Doubles q, k, v, grad_o;
};

Inputs make_inputs(const Case& c) {
  std::mt19937_64 random(c.seed);
  std::normal_distribution<double> normal;
  auto fill = [&](int64_t rows, int heads, double mean) {
    Doubles x(static_cast<size_t>(rows * heads * c.spec.head_dim));
    for (double& e : x) e = decode(c.type, encode(c.type, normal(random) + mean));
    return x;
  };
  // Means m and -m of q and k shift each score by -m^2 D scale.
  const double mean = std::sqrt(std::abs(c.shift) / (c.spec.head_dim * c.scale()));
  Inputs x;
  x.q = fill(c.queries(), c.spec.num_heads, mean);
  x.k = fill(c.keys(), c.spec.num_key_heads, c.shift < 0 ? -mean : mean);
  x.v = fill(c.keys(), c.spec.num_key_heads, 0.3);
  x.grad_o = fill(c.queries(), c.spec.num_heads, -0.2);
  return x;
}

struct Device {
  Tensor q, k, v, o, grad_o, grad_q, grad_k, grad_v;
  Guarded lse, cu_q, cu_k;
  AttentionShape shape;

  Device(const Case& c, const Inputs& x)
      : q(heads(c)),
        k(key_heads(c)),
        v(key_heads(c)),
        o(heads(c)),
        grad_o(heads(c)),
        grad_q(heads(c)),
        grad_k(key_heads(c)),
        grad_v(key_heads(c)),
        lse(static_cast<size_t>(c.queries() * c.spec.num_heads) * 4),
        cu_q(c.spec.cu_seqlens_q.size() * 4),
        cu_k(c.spec.cu_seqlens_k.size() * 4) {
    q.set(x.q), k.set(x.k), v.set(x.v), grad_o.set(x.grad_o);
    std::copy(c.spec.cu_seqlens_q.begin(), c.spec.cu_seqlens_q.end(), cu_q.as<int32_t>());
    std::copy(c.spec.cu_seqlens_k.begin(), c.spec.cu_seqlens_k.end(), cu_k.as<int32_t>());
    shape = {c.type,
             c.spec.head_dim,
             c.spec.num_heads,
             c.spec.num_key_heads,
             c.queries(),
             c.keys(),
             static_cast<int64_t>(c.spec.cu_seqlens_q.size()) - 1,
             cu_q.as<int32_t>(),
             cu_k.as<int32_t>(),
             static_cast<float>(c.spec.scale),
             c.spec.window,
             c.spec.causal};
  }
  static Tensor heads(const Case& c) { return Tensor(c.type, c.queries(), c.spec.num_heads, c.spec.head_dim); }
  static Tensor key_heads(const Case& c) { return Tensor(c.type, c.keys(), c.spec.num_key_heads, c.spec.head_dim); }

  void forward() { emulated_kernels().attention_forward({shape, q.in(), k.in(), v.in(), o.out(), lse.as<float>()}, nullptr); }
  void backward(bool deterministic) {
    const int64_t bytes = attention_backward_workspace_bytes(shape, deterministic);
    const Guarded workspace(static_cast<size_t>(bytes));
    emulated_kernels().attention_backward({shape, q.in(), k.in(), v.in(), o.in(), grad_o.in(), lse.as<float>(), grad_q.out(),
                                           grad_k.out(), grad_v.out(), deterministic, workspace.as(), bytes},
                                          nullptr);
  }
};

// The largest |x - y| / bound; infinite for what is not finite in one of them alone.
double worst(const Doubles& x, const Doubles& y, const Doubles& bound) {
  double worst = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    if (x[i] == y[i]) continue;
    const double ratio = std::abs(x[i] - y[i]) / bound[i];
    worst = std::max(worst, std::isfinite(ratio) ? ratio : INFINITY);
  }
  return worst;
}

Doubles magnitudes(Doubles x) {
  for (double& e : x) e = std::abs(e);
  return x;
}

// The largest relative error of a probability: of its score, its exponential and the rescalings.
double probability_error(const Case& c, const Inputs& x) {
  double longest = 0, q = 0, k = 0;
  for (size_t s = 0; s + 1 < c.spec.cu_seqlens_k.size(); ++s)
    longest = std::max<double>(longest, c.spec.cu_seqlens_k[s + 1] - c.spec.cu_seqlens_k[s]);
  auto largest_norm = [&](const Doubles& rows) {
    double largest = 0;
    for (size_t r = 0; r < rows.size(); r += static_cast<size_t>(c.spec.head_dim)) {
      double sum = 0;
      for (size_t d = 0; d < static_cast<size_t>(c.spec.head_dim); ++d) sum += rows[r + d] * rows[r + d];
      largest = std::max(largest, std::sqrt(sum));
    }
    return largest;
  };
  q = largest_norm(x.q), k = largest_norm(x.k);
  const double score = c.scale() * q * k, tiles = longest / 32 + 2;
  return 2 * c.spec.head_dim * kE * score + tiles * 8 * kE * (1 + score);
}

struct Bounds {
  Doubles q, k, v;
};
Bounds gradient_bounds(const Case& c, const Inputs& x, const reference::AttentionOutput& right,
                       const reference::AttentionGradients& grad) {
  const size_t dim = static_cast<size_t>(c.spec.head_dim);
  const double u = unit(c.type), p_error = probability_error(c, x),
               sum = 2 * kE * static_cast<double>(c.queries() * c.spec.num_heads + c.keys());
  const double step = smallest_unit(c.type), scale = c.scale();
  Bounds b{Doubles(x.q.size()), Doubles(x.k.size()), Doubles(x.k.size())};
  Doubles p;
  reference::for_each_row(c.spec, [&](const reference::Row& row) {
    const size_t at = static_cast<size_t>(row.query * c.spec.num_heads + row.head) * dim;
    probabilities(c.spec, x.q.data() + at, x.k, row, p);
    double delta = 0, delta_size = 0;
    for (size_t d = 0; d < dim; ++d)
      delta += x.grad_o[at + d] * right.o[at + d], delta_size += std::abs(x.grad_o[at + d] * right.o[at + d]);
    for (size_t j = 0; j < p.size(); ++j) {
      const size_t key =
          static_cast<size_t>((row.begin + static_cast<int64_t>(j)) * c.spec.num_key_heads + row.key_head) * dim;
      double grad_p = 0, grad_p_size = 0;
      for (size_t d = 0; d < dim; ++d)
        grad_p += x.grad_o[at + d] * x.v[key + d], grad_p_size += std::abs(x.grad_o[at + d] * x.v[key + d]);
      const double grad_s = std::abs(p[j] * (grad_p - delta)), n = 2 * static_cast<double>(dim) * kE;
      const double s_error = p[j] * (n * grad_p_size + (u + n) * delta_size) + grad_s * (u + p_error + sum) + step;
      for (size_t d = 0; d < dim; ++d) {
        b.q[at + d] += 1.01 * scale * s_error * std::abs(x.k[key + d]);
        b.k[key + d] += 1.01 * scale * s_error * std::abs(x.q[at + d]);
        b.v[key + d] += 1.01 * (p[j] * (u + p_error + sum) + step) * std::abs(x.grad_o[at + d]);
      }
    }
  });
  auto round = [&](Doubles& bound, const Doubles& values) {
    for (size_t i = 0; i < bound.size(); ++i) bound[i] += 1.01 * u * std::abs(values[i]) + step;
  };
  round(b.q, grad.q), round(b.k, grad.k), round(b.v, grad.v);
  return b;
}

// Forward and backward in both ways; backward is given o and lse as fp64 says, rounded.
void expect_right(const Case& c) {
  const Inputs x = make_inputs(c);
  const reference::AttentionOutput right = attention(c.spec, x.q, x.k, x.v),
                                   size = attention(c.spec, x.q, x.k, magnitudes(x.v));
  const double u = unit(c.type), p = probability_error(c, x), n = static_cast<double>(c.keys());
  Doubles bound, lse_bound;
  for (size_t i = 0; i < right.o.size(); ++i)
    bound.push_back(1.01 * ((u + 2 * p + 4 * n * kE) * size.o[i] + u * std::abs(right.o[i])) +
                    smallest_unit(c.type) * (1 + 4 * n));
  for (double lse : right.lse) lse_bound.push_back(p + 2 * n * kE + 4 * kE * (1 + std::abs(lse)));
  emulated::set_seed(c.seed);
  Device d(c, x);
  d.forward();
  EXPECT_LE(worst(d.o.get(), right.o, bound), 1);
  EXPECT_LE(worst(Doubles(d.lse.as<float>(), d.lse.as<float>() + right.lse.size()), right.lse, lse_bound), 1);

  const reference::AttentionGradients grad = attention_backward(c.spec, x.q, x.k, x.v, x.grad_o);
  const Bounds bounds = gradient_bounds(c, x, right, grad);
  for (bool deterministic : {false, true}) {
    Device b(c, x);
    b.o.set(right.o);
    for (size_t i = 0; i < right.lse.size(); ++i) b.lse.as<float>()[i] = static_cast<float>(right.lse[i]);
    b.backward(deterministic);
    EXPECT_LE(worst(b.grad_q.get(), grad.q, bounds.q), 1);
    EXPECT_LE(worst(b.grad_k.get(), grad.k, bounds.k), 1);
    EXPECT_LE(worst(b.grad_v.get(), grad.v, bounds.v), 1);
  }
}

class EmulatedAttention : public ::testing::Test {
 protected:
  explicit EmulatedAttention(int architecture = 80) { emulated::set_architecture(architecture); }
  ~EmulatedAttention() override { emulated::set_architecture(0); }
};
class EmulatedHopperAttention : public EmulatedAttention {
 protected:
  EmulatedHopperAttention() : EmulatedAttention(90) {}
#ifdef TRIREME_DEVICE_TESTS
  void SetUp() override {
    if (probe_device(0).compute_major != 9) GTEST_SKIP() << "this device is no Hopper GPU";
  }
#endif
};

constexpr Type kTypes[] = {Type::kBFloat16, Type::kFloat16};
constexpr int kDims[] = {64, 96, 128, 256};

TEST_F(EmulatedAttention, AllKernels) {
  for (Type type : kTypes)
    for (int dim : kDims) {
      SCOPED_TRACE(::testing::Message() << "type " << static_cast<int>(type) << " dim " << dim);
      expect_right(make_case(type, dim, 1, 1, {0, 1, 20, 20, 150}, {0, 1, 20, 33, 163}));
      expect_right(make_case(type, dim, 2, 1, {0, 35}, {0, 70}, -1, false));
    }
}

TEST_F(EmulatedAttention, Lengths) {
  for (int n : {1, 15, 16, 17, 63, 64, 65, 127, 128, 129}) {
    SCOPED_TRACE(n);
    expect_right(make_case(Type::kBFloat16, 64, 1, 1, {0, n}, {0, n}));
    expect_right(make_case(Type::kFloat16, 64, 1, 1, {0, n}, {0, n}, -1, false));
  }
}

Seqlens equal_lengths(int count, int length) {
  Seqlens cu{0};
  for (int i = 0; i < count; ++i) cu.push_back(cu.back() + length);
  return cu;
}

TEST_F(EmulatedAttention, Packed) {
  expect_right(make_case(Type::kBFloat16, 64, 4, 2, {0, 0, 5, 5, 134, 134, 136},
                         {0, 0, 5, 9, 138, 138, 140}));                          // keys without queries too
  expect_right(make_case(Type::kFloat16, 64, 2, 2, {0, 1, 80}, {0, 200, 330}));  // a cache before the queries
  expect_right(
      make_case(Type::kBFloat16, 64, 1, 1, equal_lengths(70, 3), equal_lengths(70, 3)));  // more than a warp has lanes
  expect_right(make_case(Type::kBFloat16, 64, 1, 1, {0, 40, 40}, {0, 90, 200}, -1, false));
}

TEST_F(EmulatedAttention, HeadGroups) {
  expect_right(make_case(Type::kBFloat16, 64, 6, 2, {0, 70}, {0, 70}));
  expect_right(make_case(Type::kFloat16, 96, 4, 1, {0, 33, 40}, {0, 33, 40}));
  expect_right(make_case(Type::kBFloat16, 256, 2, 1, {0, 90}, {0, 90}));
}

// grad_k and grad_v of many heads are summed up in parts.
TEST_F(EmulatedAttention, ManyHeadsOfAKeyHead) {
  expect_right(make_case(Type::kBFloat16, 64, 17, 1, {0, 3, 20}, {0, 3, 20}));
  expect_right(make_case(Type::kFloat16, 256, 18, 2, {0, 12}, {0, 12}));
  for (Type type : kTypes)
    for (int head_dim : kDims) expect_right(make_case(type, head_dim, 9, 1, {0, 5}, {0, 5}));
  expect_right(make_case(Type::kBFloat16, 96, 9, 1, {0, 0}, {0, 12}, -1, false));
}

TEST_F(EmulatedAttention, Windows) {
  for (int window : {1, 2, 40, 64, 65, 150, 299, 1000}) {
    SCOPED_TRACE(window);
    expect_right(make_case(Type::kBFloat16, 64, 1, 1, {0, 30, 230}, {0, 30, 290}, window));
  }
  expect_right(make_case(Type::kFloat16, 128, 2, 1, {0, 200}, {0, 200}, 17));
}

// Those before the first key see nothing: o = 0, lse = -inf, no gradient.
TEST_F(EmulatedAttention, QueriesWithoutKeys) {
  expect_right(make_case(Type::kBFloat16, 64, 2, 1, {0, 200, 230}, {0, 30, 30}));
  expect_right(make_case(Type::kBFloat16, 64, 1, 1, {0, 9}, {0, 0}, -1, false));
}

// Scores of about -110, so that exp of what is 0 where there is no key would be infinite.
TEST_F(EmulatedAttention, VeryNegativeScores) {
  for (Type type : kTypes)
    for (int n : {64, 200}) {
      SCOPED_TRACE(n);
      Case c = make_case(type, 64, 1, 1, {0, n}, {0, n});
      c.shift = -110;
      expect_right(c);
      c.spec.causal = false;
      expect_right(c);
    }
  Case c = make_case(Type::kFloat16, 128, 2, 1, {0, 1, 100}, {0, 65, 230});
  c.shift = -110;
  expect_right(c);
}

TEST_F(EmulatedAttention, Scale) {
  Case c = make_case(Type::kBFloat16, 64, 1, 1, {0, 50}, {0, 50});
  c.spec.scale = 0.4;
  expect_right(c);
}

// Backward of forward's own results, whose o is rounded once more: at most the bound of it again.
TEST_F(EmulatedAttention, ForwardThenBackward) {
  const Case c = make_case(Type::kBFloat16, 128, 4, 2, {0, 30, 100}, {0, 30, 100});
  const Inputs x = make_inputs(c);
  const reference::AttentionOutput right = attention(c.spec, x.q, x.k, x.v);
  const reference::AttentionGradients grad = attention_backward(c.spec, x.q, x.k, x.v, x.grad_o);
  Bounds bound = gradient_bounds(c, x, right, grad);
  for (Doubles* b : {&bound.q, &bound.k})
    for (double& e : *b) e *= 3;  // o is off by up to 2 u |p| |v| more
  Device d(c, x);
  d.forward();
  d.backward(false);
  EXPECT_LE(worst(d.grad_q.get(), grad.q, bound.q), 1);
  EXPECT_LE(worst(d.grad_k.get(), grad.k, bound.k), 1);
  EXPECT_LE(worst(d.grad_v.get(), grad.v, bound.v), 1);
}

void expect_any_order_right(Case c) {
  const Inputs x = make_inputs(c);
  std::vector<std::vector<uint16_t>> first;
  for (c.seed = 1; c.seed <= 4; ++c.seed) {
    emulated::set_seed(c.seed);
    Device d(c, x);
    d.forward();
    d.backward(true);
    const std::vector<std::vector<uint16_t>> bits{d.o.bits(), d.grad_q.bits(), d.grad_k.bits(), d.grad_v.bits()};
    if (first.empty()) first = bits;
    EXPECT_TRUE(bits == first) << "seed " << c.seed;
    d.backward(false);
    EXPECT_TRUE(d.grad_k.bits() == first[2] && d.grad_v.bits() == first[3]) << "seed " << c.seed;
  }
}

TEST_F(EmulatedAttention, OrderOfThreadsAndBlocks) { expect_any_order_right(make_case(Type::kBFloat16, 64, 2, 1, {0, 30, 190}, {0, 30, 290})); }

// What stands before and behind a segment in the pack, be it infinite, changes no bit.
void expect_neighbours_unseen(int dim, bool causal) {
  SCOPED_TRACE(::testing::Message() << "dim " << dim << (causal ? ", causal" : ", full"));
  const Case c = make_case(Type::kBFloat16, dim, 2, 1, {0, 9, 150, 163}, {0, 9, 150, 163}, -1, causal);
  const Inputs x = make_inputs(c);
  const auto with_neighbours = [&](double value) {
    Inputs y = x;
    for (Doubles* all : {&y.q, &y.k, &y.v, &y.grad_o}) {
      const auto width = static_cast<int64_t>(all->size()) / 163;
      std::fill(all->begin(), all->begin() + 9 * width, value);
      std::fill(all->begin() + 150 * width, all->end(), value);
    }
    Device d(c, y);
    std::vector<uint16_t> own;
    d.forward();
    for (bool deterministic : {true, false}) {  // two tiles of keys: the order of sums does not matter
      d.backward(deterministic);
      for (const Tensor* all : {&d.o, &d.grad_q, &d.grad_k, &d.grad_v}) {
        const std::vector<uint16_t> bits = all->bits();
        const auto width = static_cast<int64_t>(bits.size()) / 163;
        own.insert(own.end(), bits.begin() + 9 * width, bits.begin() + 150 * width);
      }
    }
    return own;
  };
  const std::vector<uint16_t> right = with_neighbours(1);
  EXPECT_TRUE(with_neighbours(INFINITY) == right);
  EXPECT_TRUE(with_neighbours(NAN) == right);
}

TEST_F(EmulatedAttention, NeighboursAreNotSeen) { expect_neighbours_unseen(64, false); }

// No work on tiles that are masked: 0 times what is no number would be none. Of 900 tokens a query sees 100 keys, those up to its own.
void expect_masked_tiles_unseen(int dim) {
  SCOPED_TRACE(dim);
  const Case c = make_case(Type::kBFloat16, dim, 1, 1, {0, 900}, {0, 900}, 100);
  Inputs x = make_inputs(c);
  for (Doubles* all : {&x.q, &x.k, &x.v, &x.grad_o}) {
    std::fill(all->begin(), all->begin() + 128 * dim, NAN);
    std::fill(all->begin() + 768 * dim, all->end(), NAN);
  }
  Device d(c, x);
  d.forward();
  for (bool deterministic : {true, false}) {
    d.backward(deterministic);
    for (const Tensor* all : {&d.o, &d.grad_q, &d.grad_k, &d.grad_v}) {
      const Doubles values = all->get();
      EXPECT_TRUE(std::all_of(values.begin() + 384 * dim, values.begin() + 512 * dim, [](double value) { return std::isfinite(value); }));
      EXPECT_TRUE(std::isnan(values[0]));
    }
  }
}

TEST_F(EmulatedAttention, MaskedTilesAreNotSeen) {
  for (int dim : {64, 256}) expect_masked_tiles_unseen(dim);
}

// --- Hopper ------------------------------------------------------------------------------------------------------------
// Tiles of 192 or 128 queries and 128 keys.

TEST_F(EmulatedHopperAttention, AllKernels) {
  for (Type type : kTypes)
    for (int dim : {64, 128}) {
      SCOPED_TRACE(::testing::Message() << "type " << static_cast<int>(type) << " dim " << dim);
      expect_right(make_case(type, dim, 1, 1, {0, 1, 20, 20, 220}, {0, 1, 20, 33, 300}));
      expect_right(make_case(type, dim, 2, 1, {0, 35, 40}, {0, 520, 525}, -1, false));
    }
}

TEST_F(EmulatedHopperAttention, Lengths) {
  for (int n : {1, 63, 64, 65, 127, 128, 129, 193, 257}) {
    SCOPED_TRACE(n);
    expect_right(make_case(Type::kBFloat16, n % 2 ? 64 : 128, 1, 1, {0, n}, {0, n}, -1, n % 4 != 1));
  }
}

TEST_F(EmulatedHopperAttention, Packed) {
  expect_right(make_case(Type::kBFloat16, 64, 4, 2, {0, 0, 5, 5, 134, 134, 136}, {0, 0, 5, 9, 138, 138, 140}));  // keys without queries too
  expect_right(make_case(Type::kFloat16, 128, 2, 2, {0, 1, 80}, {0, 200, 330}));                                 // a cache before the queries
  expect_right(make_case(Type::kBFloat16, 64, 1, 1, equal_lengths(40, 3), equal_lengths(40, 3)));
  expect_right(make_case(Type::kBFloat16, 128, 1, 1, {0, 40, 40}, {0, 90, 200}, -1, false));
  expect_right(make_case(Type::kBFloat16, 64, 1, 1, {0, 200, 230}, {0, 30, 30}));  // queries without keys
  expect_right(make_case(Type::kBFloat16, 64, 1, 1, {0, 9}, {0, 0}, -1, false));
}

TEST_F(EmulatedHopperAttention, ManyHeadsOfAKeyHead) {
  expect_right(make_case(Type::kBFloat16, 64, 17, 1, {0, 3, 20}, {0, 3, 20}));
  expect_right(make_case(Type::kFloat16, 128, 18, 2, {0, 12}, {0, 12}));
  expect_right(make_case(Type::kBFloat16, 128, 9, 1, {0, 5}, {0, 5}));
}

TEST_F(EmulatedHopperAttention, Windows) {
  for (int window : {1, 65, 150, 1000}) {
    SCOPED_TRACE(window);
    expect_right(make_case(Type::kBFloat16, window == 65 ? 128 : 64, 1, 1, {0, 30, 330}, {0, 30, 390}, window));
  }
}

TEST_F(EmulatedHopperAttention, VeryNegativeScoresAndScale) {
  Case c = make_case(Type::kFloat16, 128, 2, 1, {0, 1, 100}, {0, 65, 230});
  c.shift = -110;
  expect_right(c);
  c = make_case(Type::kBFloat16, 64, 1, 1, {0, 50}, {0, 50});
  c.spec.scale = 0.4;
  expect_right(c);
}

TEST_F(EmulatedHopperAttention, NeighboursAreNotSeen) {
  expect_neighbours_unseen(64, true);
  expect_neighbours_unseen(128, false);
}

TEST_F(EmulatedHopperAttention, MaskedTilesAreNotSeen) {
  for (int dim : {64, 128}) expect_masked_tiles_unseen(dim);
}

// Key heads that are one and the same in memory: no tensor map has them.
TEST_F(EmulatedHopperAttention, HeadsInOnePlace) {
  const Case c = make_case(Type::kBFloat16, 64, 2, 1, {0, 70}, {0, 70});
  const Inputs x = make_inputs(c);
  Device d(c, x);
  AttentionForward call{d.shape, d.q.in(), d.k.in(), d.v.in(), d.o.out(), nullptr};
  emulated::set_architecture(80);
  emulated_kernels().attention_forward(call, nullptr);
  const std::vector<uint16_t> right = d.o.bits();
  emulated::set_architecture(90);
  call.shape.num_key_heads = 2, call.k.head_stride = call.v.head_stride = 0;
  emulated_kernels().attention_forward(call, nullptr);
  EXPECT_TRUE(d.o.bits() == right);
}

TEST_F(EmulatedHopperAttention, OrderOfThreadsAndBlocks) { expect_any_order_right(make_case(Type::kBFloat16, 64, 2, 1, {0, 30, 290}, {0, 30, 290})); }

// --- decode ------------------------------------------------------------------------------------------------------------

// The keys of sequence s lie in pages of `page_rows` rows in some order; 0: each sequence in one page.
void expect_decode(Type type, int dim, int heads, int key_heads, const Seqlens& lengths, int num_queries, int page_rows,
                   int64_t window = -1, double shift = 0) {
  Seqlens cu_q{0}, cu_k{0};
  for (int32_t length : lengths) cu_q.push_back(cu_q.back() + num_queries), cu_k.push_back(cu_k.back() + length);
  Case c = make_case(type, dim, heads, key_heads, cu_q, cu_k, window);
  c.shift = shift;
  const Inputs x = make_inputs(c);
  const int32_t longest = *std::max_element(lengths.begin(), lengths.end());
  const int rows = page_rows > 0 ? page_rows : longest + 3,
            per_sequence = page_rows > 0 ? (longest + rows - 1) / rows : 1;
  const int num_pages = static_cast<int>(lengths.size()) * per_sequence,
            num_sequences = static_cast<int>(lengths.size());
  Guarded pages(static_cast<size_t>(num_pages) * 4), device_lengths(lengths.size() * 4);
  std::copy(lengths.begin(), lengths.end(), device_lengths.as<int32_t>());
  for (int i = 0; i < num_pages; ++i) pages.as<int32_t>()[i] = page_rows > 0 ? (i * 7 + 3) % num_pages : i;
  const size_t width = static_cast<size_t>(key_heads * dim);
  Doubles k(static_cast<size_t>(num_pages * rows) * width, NAN), v = k;  // rows of no key are never read
  for (int s = 0; s < num_sequences; ++s)
    for (int j = 0; j < lengths[static_cast<size_t>(s)]; ++j) {
      const size_t from = static_cast<size_t>(cu_k[static_cast<size_t>(s)] + j) * width;
      const size_t to = static_cast<size_t>(pages.as<int32_t>()[s * per_sequence + j / rows] * rows + j % rows) * width;
      std::copy_n(x.k.begin() + static_cast<int64_t>(from), width, k.begin() + static_cast<int64_t>(to));
      std::copy_n(x.v.begin() + static_cast<int64_t>(from), width, v.begin() + static_cast<int64_t>(to));
    }
  Tensor q(type, c.queries(), heads, dim), o(type, c.queries(), heads, dim),
      device_k(type, num_pages * rows, key_heads, dim), device_v(type, num_pages * rows, key_heads, dim);
  q.set(x.q), device_k.set(k), device_v.set(v);
  AttentionDecode call;
  call.type = type, call.head_dim = dim, call.num_heads = heads, call.num_key_heads = key_heads;
  call.num_sequences = num_sequences, call.num_queries = num_queries, call.window = window;
  call.q = q.in(), call.k = device_k.in(), call.v = device_v.in(), call.o = o.out();
  call.k_page_stride = call.v_page_stride = rows * call.k.row_stride;
  if (page_rows > 0) call.pages = pages.as<int32_t>(), call.page_rows = rows, call.pages_per_sequence = per_sequence;
  call.lengths = device_lengths.as<int32_t>(), call.max_length = longest;
  call.workspace_bytes = decode_attention_workspace_bytes(call);
  const Guarded workspace(static_cast<size_t>(call.workspace_bytes));
  call.workspace = workspace.as();
  emulated_kernels().decode_attention(call, nullptr);
  const reference::AttentionOutput right = attention(c.spec, x.q, x.k, x.v),
                                   size = attention(c.spec, x.q, x.k, magnitudes(x.v));
  const double u = unit(type), p = probability_error(c, x), n = static_cast<double>(longest);
  Doubles bound;
  for (size_t i = 0; i < right.o.size(); ++i)
    bound.push_back(1.01 * ((u + 2 * p + 4 * n * kE) * size.o[i] + u * std::abs(right.o[i])) +
                    smallest_unit(type) * (1 + 4 * n));
  EXPECT_LE(worst(o.get(), right.o, bound), 1);
}

TEST_F(EmulatedAttention, Decode) {
  for (Type type : kTypes)
    for (int dim : kDims) {
      SCOPED_TRACE(::testing::Message() << "type " << static_cast<int>(type) << " dim " << dim);
      expect_decode(type, dim, 4, 2, {1, 17, 130}, 1, 0);
      expect_decode(type, dim, 2, 2, {40, 3}, 3, 16);
    }
  expect_decode(Type::kBFloat16, 64, 40, 2, {700, 65}, 1, 16);         // more rows than a tile, parts of the keys
  expect_decode(Type::kBFloat16, 64, 2, 1, {0, 5, 300, 600}, 1, 0);    // an empty sequence
  expect_decode(Type::kFloat16, 64, 8, 2, {900, 64, 128}, 2, 64, 70);  // a window: parts without a key
  expect_decode(Type::kBFloat16, 64, 2, 1, {600, 129}, 1, 16, -1, -110);
}

// --- faults ------------------------------------------------------------------------------------------------------------

#ifndef TRIREME_DEVICE_TESTS
enum class Pass { kForward, kBackward, kDeterministicBackward };

int leave_out_each(const char* op, Pass pass, Device& d, int most = 1000) {
  SCOPED_TRACE(testing::Message() << "pass " << static_cast<int>(pass));
  const auto run = [&] {
    if (pass == Pass::kForward) d.forward();
    else d.backward(pass == Pass::kDeterministicBackward);
    return std::vector{d.o.bits(), d.grad_q.bits(), d.grad_k.bits(), d.grad_v.bits()};
  };
  return test::leave_out_each(op, run, most);
}

TEST_F(EmulatedAttention, EveryBarrierAndEveryWaitIsNeeded) {
  for (int dim : {64, 256})
    for (Pass pass : {Pass::kForward, Pass::kBackward, Pass::kDeterministicBackward}) {
      if (dim == 256 && pass == Pass::kForward) continue;  // as 64
      // Two tiles of keys, so that the order of sums does not matter.
      const Case c =
          make_case(Type::kBFloat16, dim, 1, 1, {0, dim == 64 ? 130 : 70}, {0, dim == 64 ? 130 : 70}, -1, false);
      Device d(c, make_inputs(c));
      emulated::set_seed(9);
      d.forward();
      SCOPED_TRACE(dim);
      EXPECT_GT(leave_out_each("barrier", pass, d), 2);
      EXPECT_GT(leave_out_each("copy_async_wait", pass, d), 2);
    }
}

// Tiles go around their places; there are two of keys, so that the order of sums does not matter.
TEST_F(EmulatedHopperAttention, EveryBarrierAndEveryWaitIsNeeded) {
  struct {
    Pass pass;
    int dim, queries, keys, barriers, group_waits;
  } const all[] = {{Pass::kForward, 64, 70, 384, 1, 6}, {Pass::kBackward, 128, 192, 256, 4, 7}, {Pass::kDeterministicBackward, 128, 128, 256, 1, 8}};
  for (const auto& one : all) {
    Case c = make_case(Type::kBFloat16, one.dim, 1, 1, {0, one.queries}, {0, one.keys}, -1, false);
    Device d(c, make_inputs(c));
    emulated::set_seed(9);
    d.forward();
    EXPECT_EQ(leave_out_each("barrier", one.pass, d), one.barriers);
    EXPECT_GT(leave_out_each("barrier_wait", one.pass, d), 3);
    EXPECT_EQ(leave_out_each("group_wait", one.pass, d, one.group_waits), one.group_waits);  // those before a place is filled again
  }
}

TEST_F(EmulatedHopperAttention, EveryPartOfClearingIsNeeded) {
  struct {
    Pass pass;
    int barriers, waits, fences;
  } const all[] = {{Pass::kForward, 2, 3, 1}, {Pass::kBackward, 5, 3, 4}, {Pass::kDeterministicBackward, 3, 2, 2}};
  for (const auto& one : all) {
    Case c = make_case(Type::kBFloat16, 128, 1, 1, {0, 70, 71}, {0, 100, 101}, -1, false);
    Inputs x = make_inputs(c);
    for (Doubles* all : {&x.q, &x.k, &x.v, &x.grad_o}) std::fill(all->end() - c.spec.head_dim, all->end(), NAN);  // of the other segment
    Device d(c, x);
    emulated::set_seed(9);
    d.forward();
    EXPECT_EQ(leave_out_each("barrier", one.pass, d), one.barriers);
    EXPECT_EQ(leave_out_each("barrier_wait", one.pass, d, one.waits), one.waits);  // before the tile is waited for once more
    EXPECT_EQ(leave_out_each("async_fence", one.pass, d), one.fences);
  }
}

// A row more than there are: the page behind the keys is touched.
TEST(EmulatedAttentionDeathTest, Overrun) {
  const Case c = make_case(Type::kBFloat16, 64, 1, 1, {0, 20}, {0, 20}, -1, false);
  Device d(c, make_inputs(c));
  d.cu_k.as<int32_t>()[1] = 21;
  EXPECT_DEATH(d.forward(), "");
}
#endif

template <typename F>
std::string refusal(const F& f) {
  try {
    f();
  } catch (const Refused& e) {
    return e.what();
  }
  return "";
}

TEST_F(EmulatedAttention, Refusals) {
  const Case c = make_case(Type::kBFloat16, 64, 4, 2, {0, 20}, {0, 20});
  Device d(c, make_inputs(c));
  AttentionForward good{d.shape, d.q.in(), d.k.in(), d.v.in(), d.o.out(), d.lse.as<float>()};
  auto refused = [&](auto change) {
    AttentionForward call = good;
    change(call);
    return refusal([&] { emulated_kernels().attention_forward(call, nullptr); });
  };
  EXPECT_EQ(refused([](auto&) {}), "");
  EXPECT_EQ(refused([](auto& a) { a.shape.type = Type::kFloat32; }), "attention: the type must be bf16 or fp16");
  EXPECT_EQ(refused([](auto& a) { a.shape.head_dim = 80; }), "attention: a head dim of 80 is none of 64, 96, 128, 256");
  EXPECT_EQ(refused([](auto& a) { a.shape.num_key_heads = 3; }), "attention: 4 heads are no multiple of 3 key heads");
  EXPECT_EQ(refused([](auto& a) { a.shape.causal = false, a.shape.window = 4; }),
            "attention: a window needs causal attention");
  EXPECT_EQ(refused([](auto& a) { a.shape.window = 0; }), "attention: a window of 0 keys");
  EXPECT_EQ(refused([](auto& a) { a.shape.scale = -1; }), "attention: a scale of -1.000000 is not positive");
  EXPECT_EQ(refused([](auto& a) { a.shape.num_keys = int64_t{1} << 31; }),
            "attention: a size of 2147483648 is not within 0 .. 2^29");
  EXPECT_EQ(refused([](auto& a) { a.shape.num_heads = a.shape.num_queries = 1 << 28, a.shape.num_key_heads = 1; }),
            "attention: 268435456 rows of 268435456 heads are more than a grid has blocks");
  EXPECT_EQ(refused([](auto& a) { a.k.data = static_cast<const char*>(a.k.data) + 2; }),
            "attention: k is not at a multiple of 16 bytes");
  EXPECT_EQ(refused([](auto& a) { a.v.row_stride = 130; }),
            "attention: v has strides of 130 and 64 elements, which are not both multiples of 16 bytes");
  EXPECT_EQ(refused([](auto& a) { a.o.data = nullptr; }), "attention: o is a null pointer");
  EXPECT_EQ(refused([](auto& a) { a.shape.cu_seqlens_k = nullptr; }), "attention: cu_seqlens is a null pointer");
  AttentionBackward backward{
      d.shape,        d.q.in(),       d.k.in(), d.v.in(), d.o.in(), d.grad_o.in(), d.lse.as<float>(), d.grad_q.out(),
      d.grad_k.out(), d.grad_v.out(), true,     nullptr,  100};
  EXPECT_EQ(refusal([&] { emulated_kernels().attention_backward(backward, nullptr); }),
            "attention: a workspace of 100 bytes, where 320 are needed");
}

}  // namespace
}  // namespace trireme::kernels
