// The background thread that moves non-blocking collectives on while the rank computes.
#pragma once

namespace trireme {

// On by default; it sleeps while nothing is in flight or a thread waits (and so moves everything on itself).
void set_progress_thread(bool on);

}  // namespace trireme
