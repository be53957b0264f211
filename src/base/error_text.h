// The words of any exception for a user: one sentence, no stack trace.
#pragma once

#include <new>
#include <string>

#include "base/check.h"
#include "base/tensor.h"

namespace trireme {

inline std::string text_of(const std::exception& error) {
  const std::string out_of_memory =
      "out of memory: lower train.micro_batch_size, eval.micro_batch_size, generate.max_tokens or data.max_length, set train.recompute=full, or start fewer ranks";
  if (dynamic_cast<const std::bad_alloc*>(&error)) return out_of_memory;
  const auto* libtorch = dynamic_cast<const c10::Error*>(&error);
  if (!libtorch) return error.what();
  const std::string text = libtorch->what_without_backtrace();
  for (const char* words : {"DefaultCPUAllocator", "out of memory"})
    if (text.find(words) != std::string::npos) return out_of_memory;
  return "libtorch: " + text.substr(0, text.find('\n'));
}

}  // namespace trireme
