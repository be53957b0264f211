// Whether the ranks of a job are of one mind before they read anything large.
#pragma once

#include "comm/communicator.h"
#include "config/config.h"

namespace trireme {

// Every rank must be the same build, with the same command and values of all keys, and see the same files: of model.path,
// model.config, model.tokenizer, lora.path, data.chat_template, data.train and data.eval (names, sizes and hashes; of files
// above 16 MiB, such as weights, the hash of their beginning and end). Else every rank throws an AgreedError, a wrong
// configuration, that names the first rank that differs from rank 0, in what, and both values. A group of one is not looked at.
void check_same_job(const Communicator& world, const Config& config, const CommandLine& line);

}  // namespace trireme
