#include "optim/adafactor.h"

#include "ops/device.h"
#include "ops/op_support.h"
#include "optim/clip.h"

namespace trireme {
namespace {

constexpr double kDecay = -0.8, kLeastScale = 1e-3;

template <typename A>
constexpr double kEpsilon = std::numeric_limits<A>::epsilon();

bool is_matrix(at::IntArrayRef whole) { return whole.size() > 1; }
int64_t num_sums(at::IntArrayRef whole) { return (is_matrix(whole) ? whole[0] + whole[1] : 0) + 1; }

std::vector<int64_t> whole_of(const OptimTensor& t) { return t.whole_shape.empty() ? std::vector<int64_t>{t.weight.numel()} : t.whole_shape; }

}  // namespace

Adafactor::Adafactor(const std::vector<OptimTensor>& tensors, const AcrossRanks& ranks)
    : ranks_(ranks), device_(tensors.empty() ? ranks.device : tensors[0].weight.device()) {
  if (ranks_.tensors.empty())
    for (const OptimTensor& t : tensors) ranks_.tensors[t.name] = whole_of(t);
  std::map<std::string, std::pair<size_t, size_t>> places;
  int64_t size = 0;
  for (const auto& [name, whole] : ranks_.tensors) {
    places[name] = {static_cast<size_t>(size), places.size()};
    size += num_sums(whole);
  }
  const auto sums_options = at::TensorOptions(at::kDouble).device(device_);
  sums_ = at::zeros({size}, sums_options), norms_ = at::zeros({static_cast<int64_t>(places.size())}, sums_options);
  means_ = at::zeros({static_cast<int64_t>(tensors.size())}, sums_options);
  for (const OptimTensor& t : tensors) {
    const std::vector<int64_t> whole = whole_of(t);
    TRIREME_CHECK(whole.size() <= 2 && t.weight.device() == device_ && ranks_.tensors.at(t.name) == whole, t.name, at::IntArrayRef(whole), t.weight.device().str());
    Part part;
    part.of = t;
    part.is_matrix = is_matrix(whole);
    std::tie(part.sums, part.number) = places.at(t.name);
    part.num_columns = whole.empty() ? 1 : whole.back(), part.num_rows = part.is_matrix ? whole[0] : 1;
    part.width = std::max<int64_t>(1, std::min(part.num_columns, t.places.run));
    part.row = t.places.offset / std::max<int64_t>(1, part.num_columns), part.column = t.places.offset % std::max<int64_t>(1, part.num_columns);
    if (!part.is_matrix) part.width = std::max<int64_t>(1, part.num_columns - part.column);
    const auto options = t.grad.options();
    if (part.is_matrix) part.rows = at::zeros({part.num_rows}, options), part.columns = at::zeros({part.num_columns}, options);
    else part.squares = at::zeros_like(t.grad);
    parts_.push_back(std::move(part));
  }
}

// The sum of f(chunk, row, column, begin, count) over the rows of a part: its elements from `begin` on stand there in the whole.
// The order of sums depends on the part alone.
template <typename F>
double Adafactor::over_rows(const Part& part, const F& f) const {
  const int64_t size = part.of.weight.numel(), first = part.of.places.first, in_row = first % part.width;
  const RowChunks chunks((in_row + size + part.width - 1) / part.width);
  std::vector<double> sums(static_cast<size_t>(chunks.count));
  at::parallel_for(0, chunks.count, 1, [&](int64_t first_chunk, int64_t last_chunk) {
    for (int64_t chunk = first_chunk; chunk < last_chunk; ++chunk)
      for (int64_t r = chunks.begin(chunk); r < chunks.end(chunk); ++r) {
        const int64_t begin = std::max<int64_t>(0, r * part.width - in_row), end = std::min(size, (r + 1) * part.width - in_row);
        sums[static_cast<size_t>(chunk)] += f(chunk, part.row + first / part.width + r, part.column + (first + begin) % part.width, begin, end - begin);
      }
  });
  double sum = 0;
  for (double x : sums) sum += x;
  return sum;
}

// u before it is scaled, of which `to` may be null, and the sum of its squares.
template <typename A>
double Adafactor::directions(const Part& part, A* to) const {
  const A *const g = part.of.grad.data_ptr<A>(), scale = static_cast<A>(grad_scale_), least = static_cast<A>(kEpsilon<A> * kEpsilon<A>);
  const double mean = std::max(part.mean, kEpsilon<A>);
  return over_rows(part, [&](int64_t, int64_t row, int64_t column, int64_t begin, int64_t count) {
    const A* const of_columns = part.is_matrix ? part.columns.data_ptr<A>() + column : part.squares.data_ptr<A>() + begin;
    const A of_row = part.is_matrix ? static_cast<A>(part.rows.data_ptr<A>()[row] / mean) : A(1);
    double sum = 0;
    for (int64_t i = 0; i < count; ++i) {
      const A u = g[begin + i] * scale / std::sqrt(std::max(of_row * of_columns[i], least));
      if (to) to[begin + i] = u;
      sum += static_cast<double>(u) * static_cast<double>(u);
    }
    return sum;
  });
}

void Adafactor::measure(const std::vector<at::Tensor>& weights, double lr, double grad_scale, int64_t step) {
  grad_scale_ = grad_scale;
  const double t = static_cast<double>(step), mix = std::pow(t, kDecay), largest = std::min(lr, 1 / std::sqrt(t));
  sums_.zero_(), norms_.zero_();
  double *const sums = sums_.data_ptr<double>(), *const norms = norms_.data_ptr<double>();
  const auto with_type = [](const Part& part, const auto& f) { part.of.grad.scalar_type() == at::kDouble ? f(double{}) : f(float{}); };
  for (size_t i = 0; i < parts_.size(); ++i) {
    const Part& part = parts_[i];
    if (!part.of.counts) continue;
    double* const of_rows = sums + part.sums;
    if (part.is_matrix) {
      double* const of_columns = of_rows + part.num_rows;
      at::Tensor partial = at::zeros({RowChunks(part.of.weight.numel() / part.width + 2).count, part.num_columns}, at::kDouble);
      with_type(part, [&](auto zero) {
        using A = decltype(zero);
        const A *const g = part.of.grad.data_ptr<A>(), scale = static_cast<A>(grad_scale);
        over_rows(part, [&](int64_t chunk, int64_t row, int64_t column, int64_t begin, int64_t count) {
          double* const to = partial.data_ptr<double>() + chunk * part.num_columns + column;
          double sum = 0;
          for (int64_t c = 0; c < count; ++c) {
            const A x = g[begin + c] * scale;
            const double square = static_cast<double>(x) * static_cast<double>(x);
            to[c] += square, sum += square;
          }
          of_rows[row] += sum;
          return 0.0;
        });
      });
      for (int64_t chunk = 0; chunk < partial.size(0); ++chunk)
        for (int64_t c = 0; c < part.num_columns; ++c) of_columns[c] += partial.data_ptr<double>()[chunk * part.num_columns + c];
    }
    of_rows[part.is_matrix ? part.num_rows + part.num_columns : 0] += squared_norm(weights[i]);
  }
  if (ranks_.sum) ranks_.sum(sums_);
  for (Part& part : parts_)
    with_type(part, [&](auto zero) {
      using A = decltype(zero);
      const auto take = [&](A* mean, const auto& square) { *mean += static_cast<A>((static_cast<double>(square) - static_cast<double>(*mean)) * mix); };
      if (part.is_matrix) {
        A *const rows = part.rows.data_ptr<A>(), *const columns = part.columns.data_ptr<A>();
        const double* const from = sums + part.sums;
        part.mean = 0;
        for (int64_t r = 0; r < part.num_rows; ++r) {
          take(rows + r, from[r] / static_cast<double>(part.num_columns));
          part.mean += static_cast<double>(rows[r]) / static_cast<double>(part.num_rows);
        }
        for (int64_t c = 0; c < part.num_columns; ++c) take(columns + c, from[part.num_rows + c] / static_cast<double>(part.num_rows));
      } else {
        A *const squares = part.squares.data_ptr<A>(), *const g = part.of.grad.data_ptr<A>();
        for (int64_t i = 0; i < part.of.grad.numel(); ++i) {
          const A x = g[i] * static_cast<A>(grad_scale);
          take(squares + i, x * x);
        }
      }
      const double squares = directions<A>(part, nullptr);
      if (part.of.counts) norms[part.number] += squares;
    });
  if (ranks_.sum) ranks_.sum(norms_);
  for (Part& part : parts_) {
    const auto size = static_cast<double>(part.num_rows * part.num_columns);
    const double of_weight = std::sqrt(sums[part.sums + static_cast<size_t>(part.is_matrix ? part.num_rows + part.num_columns : 0)] / size);
    part.rate = std::max(kLeastScale, of_weight) * largest / std::max(1.0, std::sqrt(norms[part.number] / size));
  }
}

bool Adafactor::by_kernels() const { return parts_.empty() ? !device_.is_cpu() : kernels_of(parts_[0].of.weight) != nullptr; }

void Adafactor::step(std::vector<kernels::Adafactor> calls, const std::function<void(const std::function<void(const StatePiece&)>&)>& in_pieces) {
  int64_t workspace_size = 0;
  for (size_t i = 0; i < calls.size(); ++i) {
    const Part& part = parts_[i];
    kernels::Adafactor& call = calls[i];
    const double t = static_cast<double>(call.step);
    const auto floats = [](const at::Tensor& x) { return static_cast<float*>(data_of(x)); };
    call.num_rows = part.is_matrix ? part.num_rows : 0, call.num_columns = part.num_columns;
    call.rows = floats(part.rows), call.columns = floats(part.columns), call.squares = floats(part.squares);
    call.sums = sums_.data_ptr<double>() + part.sums, call.norm = norms_.data_ptr<double>() + part.number, call.mean_of_rows = means_.data_ptr<double>() + i;
    call.mix = std::pow(t, kDecay), call.largest_rate = std::min(call.lr, 1 / std::sqrt(t));
    workspace_size = std::max(workspace_size, kernels::adafactor_workspace(call));
  }
  const at::Tensor workspace = at::empty({workspace_size}, sums_.options());
  for (kernels::Adafactor& call : calls) call.workspace = static_cast<double*>(data_of(workspace));
  const auto part_of = [&](const StatePiece& piece) {
    kernels::Adafactor call = calls[piece.tensor];
    call.size = piece.end - piece.begin;
    call.places.first += piece.begin;
    call.weight = static_cast<char*>(call.weight) + piece.begin * static_cast<int64_t>(parts_[piece.tensor].of.weight.element_size());
    call.grad += piece.begin;
    if (call.master) call.master += piece.begin;
    if (call.squares) call.squares += piece.begin;
    return call;
  };
  sums_.zero_(), norms_.zero_();
  const kernels::Kernels* k = calls.empty() ? nullptr : kernels_of(parts_[0].of.weight);
  const kernels::Stream stream = stream_of(sums_);
  in_pieces([&](const StatePiece& piece) {
    if (parts_[piece.tensor].of.counts) k->adafactor_sums(part_of(piece), stream);
  });
  if (ranks_.sum) ranks_.sum(sums_);
  for (size_t i = 0; i < calls.size(); ++i) {
    k->adafactor_means(calls[i], stream);
    if (parts_[i].of.counts) k->adafactor_norm(calls[i], stream);
  }
  if (ranks_.sum) ranks_.sum(norms_);
  in_pieces([&](const StatePiece& piece) { k->adafactor_update(part_of(piece), stream); });
}

at::Tensor Adafactor::direction(size_t tensor) const {
  const Part& part = parts_[tensor];
  at::Tensor u = at::empty_like(part.of.grad);
  u.scalar_type() == at::kDouble ? directions(part, u.data_ptr<double>()) : directions(part, u.data_ptr<float>());
  return u;
}

std::vector<OptimState> Adafactor::state() const {
  std::vector<OptimState> all;
  for (size_t i = 0; i < parts_.size(); ++i) {
    const Part& part = parts_[i];
    if (part.is_matrix) {
      all.push_back({i, part.of.name, "row_var", part.rows, 1, true});
      all.push_back({i, part.of.name, "col_var", part.columns, 1, true});
    } else {
      all.push_back({i, part.of.name, "variance", part.squares});
    }
  }
  return all;
}

uint64_t Adafactor::state_bytes(at::ScalarType dtype, int64_t elements, at::IntArrayRef whole) {
  return (is_matrix(whole) ? static_cast<uint64_t>(whole[0] + whole[1]) : static_cast<uint64_t>(elements)) * c10::elementSize(compute_dtype(dtype));
}

uint64_t Adafactor::workspace_bytes(int64_t elements, at::IntArrayRef whole) {
  kernels::Adafactor part{};
  part.size = elements;
  if (is_matrix(whole)) part.num_rows = whole[0], part.num_columns = whole[1];
  return static_cast<uint64_t>(kernels::adafactor_workspace(part)) * sizeof(double);
}

uint64_t Adafactor::sums_bytes(at::IntArrayRef whole) { return static_cast<uint64_t>(num_sums(whole) + 1) * sizeof(double); }

}  // namespace trireme
