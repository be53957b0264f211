// Learning-rate schedules: a pure function of the step, so that nothing but the step has to be saved.
// Steps count from 1: step s has the rate that transformers' get_*_schedule gives to lr_lambda(s - 1), so with warm-up
// the first step has rate 0. Beyond the last step the rate stays at its end (transformers' cosine would rise again).
#pragma once

#include <cstdint>
#include <string>

namespace trireme {

// Between warm-up and the end, with p from 0 to 1:
//   constant     lr
//   linear       min_lr + (lr - min_lr) * (1 - p)
//   cosine       min_lr + (lr - min_lr) * (1 + cos(pi p)) / 2
//   exponential  lr * (min_lr / lr)^p; needs min_lr > 0
enum class ScheduleKind { kConstant, kLinear, kCosine, kExponential };
ScheduleKind parse_schedule_kind(const std::string& name);  // ConfigError lists the names

class Schedule {
 public:
  // warmup: a number of steps, or below 1 a fraction of total_steps (rounded up, as transformers, but never all). total_steps >= 1.
  // ConfigError: negative values, min_lr above lr, a warm-up that is no whole number of steps or longer than the
  // run, or an exponential schedule without min_lr.
  Schedule(ScheduleKind kind, double lr, int64_t total_steps, double warmup = 0.0, double min_lr = 0.0);

  double operator()(int64_t step) const;  // step from 1
  int64_t warmup_steps() const { return warmup_steps_; }

 private:
  ScheduleKind kind_;
  double lr_, min_lr_;
  int64_t total_steps_, warmup_steps_;
};

}  // namespace trireme
