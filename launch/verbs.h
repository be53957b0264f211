// What each verb does. Each returns the exit status; errors are thrown, main() prints them.
#pragma once

#include "comm/process.h"
#include "config/config.h"
#include "base/check.h"

namespace trireme {

ExitStatus verb_eval(const Config& config, const CommandLine& line, const Process& process);
ExitStatus verb_prepare(const Config& config, const CommandLine& line, const Process& process);
ExitStatus verb_tokenize(const Config& config, const CommandLine& line, const Process& process);
ExitStatus verb_export(const Config& config, const CommandLine& line, const Process& process);
ExitStatus verb_quantize(const Config& config, const CommandLine& line, const Process& process);
ExitStatus verb_generate(const Config& config, const CommandLine& line, const Process& process);
ExitStatus verb_plan(const Config& config, const CommandLine& line, const Process& process);
ExitStatus verb_doctor(const Config& config, const CommandLine& line, const Process& process);

}  // namespace trireme
