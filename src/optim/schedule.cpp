#include "optim/schedule.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "base/check.h"

namespace trireme {

ScheduleKind parse_schedule_kind(const std::string& name) {
  if (name == "constant") return ScheduleKind::kConstant;
  if (name == "linear") return ScheduleKind::kLinear;
  if (name == "cosine") return ScheduleKind::kCosine;
  if (name == "exponential") return ScheduleKind::kExponential;
  throw ConfigError("schedule.kind = " + name + ": allowed are constant, linear, cosine, exponential.");
}

Schedule::Schedule(ScheduleKind kind, double lr, int64_t total_steps, double warmup, double min_lr)
    : kind_(kind), lr_(lr), min_lr_(min_lr), total_steps_(total_steps) {
  TRIREME_CHECK(total_steps >= 1, total_steps);
  if (!(lr >= 0.0) || !std::isfinite(lr)) throw ConfigError(str("optim.lr = ", lr, ": it must be 0 or more."));
  if (!(min_lr >= 0.0 && min_lr <= lr))
    throw ConfigError(str("schedule.min_lr = ", min_lr, ": it must lie between 0 and optim.lr = ", lr, "."));
  if (!(warmup >= 0.0) || warmup > 1e15 || (warmup >= 1.0 && warmup != std::floor(warmup)))
    throw ConfigError(str("schedule.warmup_steps = ", warmup,
                          ": it must be a number of steps (0, 1, 2, ...) or a fraction of the run below 1."));
  if (warmup >= 1.0 && warmup >= static_cast<double>(total_steps))
    throw ConfigError(str("schedule.warmup_steps = ", warmup, ": the run has only ", total_steps,
                          " steps and would end before optim.lr is reached; lower it, or set a fraction of the run."));
  if (kind == ScheduleKind::kExponential && !(min_lr > 0.0))
    throw ConfigError(
        "schedule.kind = exponential falls from optim.lr to schedule.min_lr: set schedule.min_lr above 0.");
  // A fraction leaves one step to learn in: the first step of a warm-up has a rate of 0.
  const double steps = static_cast<double>(total_steps);
  warmup_steps_ = static_cast<int64_t>(warmup < 1.0 ? std::min(std::ceil(warmup * steps), steps - 1.0) : warmup);
}

double Schedule::operator()(int64_t step) const {
  TRIREME_CHECK(step >= 1, step);
  const int64_t done = step - 1;
  if (done < warmup_steps_) return lr_ * (static_cast<double>(done) / static_cast<double>(warmup_steps_));
  const double length = static_cast<double>(std::max<int64_t>(1, total_steps_ - warmup_steps_));
  const double p = std::min(1.0, static_cast<double>(done - warmup_steps_) / length);
  switch (kind_) {
    case ScheduleKind::kConstant:
      return lr_;
    case ScheduleKind::kLinear:
      return min_lr_ + (lr_ - min_lr_) * (1.0 - p);
    case ScheduleKind::kCosine:
      return min_lr_ + (lr_ - min_lr_) * 0.5 * (1.0 + std::cos(std::numbers::pi * p));
    case ScheduleKind::kExponential:
      return lr_ * std::pow(min_lr_ / lr_, p);
  }
  TRIREME_CHECK(false);
}

}  // namespace trireme
