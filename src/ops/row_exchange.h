// What ranks exchange around a matrix product when each has a part of the rows between the products (tensor parallelism with
// sequence parallelism; Korthikanti et al. 2022): the product goes on with the rows that are there while others travel, as by
// Wang et al. 2023, "Overlap Communication with Dependent Computation via Decomposition". How rows travel is parallel/'s.
#pragma once

#include "base/tensor.h"

namespace trireme {

// [T, C], of which some rows are here and the others on their way. A whole tensor converts to it: all are here.
class ArrivingRows {
 public:
  ArrivingRows(at::Tensor all_TC) : all_TC_(std::move(all_TC)) {}
  // `here`: rows first .. first + t of `all_TC`, which must not be looked at before `wait` returns. `wait` is called once.
  ArrivingRows(at::Tensor all_TC, at::Tensor here_tC, int64_t first, std::function<void()> wait)
      : all_TC_(std::move(all_TC)), journey_(std::make_shared<Journey>(Journey{std::move(here_tC), first, std::move(wait)})) {}

  const at::Tensor& wait() const;  // all rows, when they are here
  const at::Tensor& promised() const { return all_TC_; }  // for its sizes, dtype and place in the graph
  // f(number of the first, rows) for rows that together are all of them: those that are here, then, behind wait(), the others.
  void in_order(const std::function<void(int64_t first, const at::Tensor& rows)>& f) const;

 private:
  struct Journey {
    at::Tensor here_tC;  // undefined when all are here
    int64_t first;
    std::function<void()> wait;
  };
  at::Tensor all_TC_;
  std::shared_ptr<Journey> journey_;  // of all copies
};

// Behind a product whose inputs are sliced over n ranks, so that each has a part of the sum: [T, O] -> [T / n, O].
struct RowSum {
  int64_t num_ranks = 1;
  // In how many pieces a product with so many rows a rank is made and summed, each while the one before travels.
  std::function<int64_t(int64_t rows, bool on_device)> num_pieces;
  // Begins to add up partial [n t, O] over the ranks; part [t, O] gets the r-th of n parts of the sum, on rank r, by the time
  // that the function returned has returned.
  std::function<std::function<void()>(const at::Tensor& part, const at::Tensor& partial)> start;
  std::function<ArrivingRows(const at::Tensor& part)> gather;  // for backward: the ranks' rows
};

}  // namespace trireme
