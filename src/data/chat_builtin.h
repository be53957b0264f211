// Chat templates of our own, after the families' published formats.
#pragma once

#include <string>
#include <vector>

namespace trireme {

struct BuiltinTemplate {
  const char* name;
  const char* text;
};

const std::vector<BuiltinTemplate>& builtin_templates();

}  // namespace trireme
