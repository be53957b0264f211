// The one place that catches: prints the error once, ends the job with the right status.
#include "base/tensor.h"

#include <ATen/Parallel.h>

#include <csignal>
#include <cstdlib>
#include <fstream>
#include <iostream>

#include "base/error_text.h"
#include "base/log.h"
#include "comm/watchdog.h"
#include "launch/cuda_device.h"
#include "launch/verbs.h"
#include "train/agreement.h"
#include "train/check_config.h"
#include "train/same_job.h"
#include "train/signals.h"
#include "train/trainer.h"

namespace trireme {
namespace {

bool trains(const CommandLine& line) { return line.verb == "train" || line.verb == "plan"; }

ExitStatus run_verb(const Config& config, const CommandLine& line, const Process& process) {
  if (line.verb == "plan") return verb_plan(config, line, process);
  if (line.verb == "train") return run_training(config, line, process, line.dry_run);
  if (line.dry_run) throw ConfigError(str("--dry-run belongs to train; trireme ", line.verb, " has no plan to show"));
  if (line.verb == "eval") return verb_eval(config, line, process);
  if (line.verb == "prepare") return verb_prepare(config, line, process);
  if (line.verb == "tokenize") return verb_tokenize(config, line, process);
  if (line.verb == "quantize") return verb_quantize(config, line, process);
  if (line.verb == "export") return verb_export(config, line, process);
  if (line.verb == "generate") return verb_generate(config, line, process);
  return verb_doctor(config, line, process);
}

ExitStatus start(int argc, char** argv, const Process& process) {
  Config config;
  CommandLine line;
  agree_on(Communicator::world(), [&] {  // a rank on another host, or in another folder, may not find the files
    line = parse_command_line(argc, argv, config, [&](const CommandLine& given, std::vector<std::string>& problems) {
      if (!trains(given)) return;
      find_conflicts(config, given, planned_ranks(config, given, process.size()), problems);
      find_missing(config, given, problems);
    });
    if (line.verb.empty() && !line.help && !line.version) throw ConfigError("no verb is given\n\n" + help_text(""));
  });
  if (process.size() > 1) check_same_job(Communicator::world(), config, line);
  if (line.version || line.help || line.print_config) {
    if (process.rank() == 0)
      std::cout << (line.version ? "trireme " TRIREME_VERSION "\n" : line.help ? help_text(line.verb) : config_to_ini(config, true));
    return kExitDone;
  }
  if (process.size() > 1) set_comm_timeout(config.comm.timeout_s);
  set_log_level(config.log.level == "warn" ? LogLevel::kWarn : config.log.level == "error" ? LogLevel::kError : LogLevel::kInfo);
  int threads = config.train.threads > 0 ? static_cast<int>(config.train.threads) : 0;
  if (threads == 0 && !std::getenv("OMP_NUM_THREADS")) threads = process.load().threads_per_rank;
  if (threads > 0) at::set_num_threads(threads);
  set_share_device(config.comm.share_device);
  try {
    return run_verb(config, line, process);
  } catch (const AgreedError&) {
    throw;
  } catch (const ConfigError& error) {  // from the configuration alone, before any file was opened: the same on all ranks
    throw AgreedError(error.status(), error.what());
  }
}

// For run_local.sh: an mpirun that is told to stop while its ranks save or end returns a status of its own.
void tell_launcher(ExitStatus status) {
  const char* file = std::getenv("TRIREME_STATUS_FILE");
  if (file != nullptr && status == kExitStopped) std::ofstream(file, std::ios::app) << status << "\n";
}

}  // namespace
}  // namespace trireme

int main(int argc, char** argv) {
  using namespace trireme;
  std::ios::sync_with_stdio(false);  // lines of standard input are otherwise read a character at a time
  std::signal(SIGXFSZ, SIG_IGN);  // a file beyond `ulimit -f` is then an error with words, like a full disk
  offer_cuda();
  if (argc > 1 && std::string(argv[1]) == "train") install_stop_signals();  // MPI takes a while to start
  std::optional<Process> process;
  auto fail = [&](ExitStatus status, const std::string& message, bool agreed) -> int {
    if (!agreed || !process || process->rank() == 0) log_message(LogLevel::kError, message);
    if (!agreed && (!process || process->size() > 1)) Process::abort(status);  // without a process: MPI may have started all the same
    if (process && process->rank() == 0) tell_launcher(status);
    return status;
  };
  try {
    process.emplace(&argc, &argv);
    const ExitStatus status = start(argc, argv, *process);
    if (!std::cout.flush()) throw SystemError("standard output cannot be written to its end: its disk is full, or its reader has gone");
    if (process->rank() == 0) tell_launcher(status);
    return status;
  } catch (const AgreedError& error) {
    return fail(error.status(), error.what(), true);
  } catch (const Error& error) {
    return fail(error.status(), error.what(), false);
  } catch (const std::exception& error) {
    return fail(kExitFailure, text_of(error), false);
  }
}
