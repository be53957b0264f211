#include "base/tensor.h"

#include "model/linear_names.h"

#include <algorithm>
#include <regex>

#include "base/check.h"

namespace trireme {
namespace {

bool is_plain(const std::string& target) {
  return std::all_of(target.begin(), target.end(), [](unsigned char c) { return std::isalnum(c) || c == '_' || c == '.'; });
}

bool matches(const std::string& path, const std::string& target, const std::string& key) {
  if (target == "all-linear") return true;
  if (is_plain(target))
    return path == target || (path.size() > target.size() && path.ends_with("." + target));
  try {
    return std::regex_match(path, std::regex(target));
  } catch (const std::regex_error& error) {
    throw ConfigError(str(key, "=", target, ": not a regular expression: ", error.what()));
  }
}

}  // namespace

std::string last_name(const std::string& path) { return path.substr(path.rfind('.') + 1); }

std::set<Linear*> linears_named(Transformer& model, const std::vector<std::string>& names, const std::string& key) {
  const auto linears = model.linears();
  std::set<Linear*> chosen;
  for (const std::string& name : names) {
    bool any = false;
    for (Linear* l : linears)
      if (matches(l->path, name, key)) chosen.insert(l), any = true;
    if (any) continue;
    std::set<std::string> known;
    for (Linear* l : linears) known.insert(last_name(l->path));
    std::string list;
    for (const auto& n : known) list += (list.empty() ? "" : ", ") + n;
    throw ConfigError(str(key, "=", name, ": no linear layer has this name; there are ", list, ", or all-linear"));
  }
  return chosen;
}

}  // namespace trireme
