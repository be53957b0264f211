// `trireme plan`: of this job's run, or of ranks that are not started.
#include "base/tensor.h"

#include "base/log.h"
#include "comm/communicator.h"
#include "launch/verbs.h"
#include "ops/attention_device.h"
#include "train/agreement.h"
#include "train/check_config.h"
#include "train/device.h"
#include "train/plan.h"
#include "train/trainer.h"

namespace trireme {

ExitStatus verb_plan(const Config& config, const CommandLine& line, const Process& process) {
  if (config.plan.ranks == 0 && !config.data.train.empty()) return run_training(config, line, process, true);
  agree_on(Communicator::world(), [&] {  // neither data nor weights are read: rows are full
    const ModelSource source = find_model(config);
    const at::ScalarType dtype = train_dtype(config, source);
    const Mesh mesh = mesh_of(config, planned_ranks(config, line, process.size()));
    const int64_t row = std::min(config.data.max_length, source.config.max_positions), accumulation = config.train.accumulation;
    PlannedData planned{row, static_cast<double>(row), 0, config.train.micro_batch_size * accumulation * mesh.num_data(), config.train.steps, accumulation};
    if (!config.data.eval.empty() || config.data.eval_fraction > 0) planned.longest_eval_row = row;
    planned.device = planned_device(config);
    check_dtype(config, dtype, planned.device);
    if (config.data.max_length > row) log_info(str("plan: rows of ", row, " tokens, the model's max_position_embeddings; data.max_length=", config.data.max_length, " is more"));
    const Plan plan = make_plan(config, source.config, dtype, mesh, planned);
    const auto room = planned_room(config, config.plan.ranks > 0 ? 1 : process.local_size());
    log_info(str(plan.text(), "\n", fit_text(plan, config, source.config, dtype, room)));
    if (room && (!plan.of_device() || has_attention_kernels(dtype, source.config.head_dim))) log_info(longest_row_text(plan, config, source.config, dtype, *room));
    if (planned.device != at::kCPU) say_kernel_gaps(kernel_gaps(config, source.config, dtype, mesh));
  });
  return kExitDone;
}

}  // namespace trireme
