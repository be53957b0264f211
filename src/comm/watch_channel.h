// How the watchdogs of the ranks talk, past whatever the ranks are stuck in: small messages on an MPI communicator of
// their own, sent and looked for but never waited for. One thread at a time.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace trireme {

class WatchChannel {
 public:
  enum Kind { kHeartbeat, kLate, kTell, kReport };
  struct Message {
    int from;
    Kind kind;
    std::string text;
  };

  // Collective over the world: begins when all ranks are there. SystemError that names those which have not come `patience_s`
  // after rank 0.
  explicit WatchChannel(double patience_s);
  ~WatchChannel();
  const std::vector<std::string>& hosts() const;  // by rank

  void post(int to, Kind kind, std::string text);
  // The same, but left out while the last one has not been taken: a rank that is stopped is not buried under them.
  void beat(int to, const std::string& text);
  std::optional<Message> receive();
  // At the end of the program, again and again until it is true: all ranks are there and no message is under way.
  bool close();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace trireme
