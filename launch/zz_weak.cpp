#include "launch/verbs.h"
namespace trireme {
__attribute__((weak)) ExitStatus verb_generate(const Config&, const CommandLine&, const Process&) { return kExitDone; }
__attribute__((weak)) ExitStatus verb_doctor(const Config&, const CommandLine&, const Process&) { return kExitDone; }
}
