// Which linear layers of a model a list of names means, as PEFT's target_modules and bitsandbytes' skipped ones.
#pragma once

#include <set>

#include "model/transformer.h"

namespace trireme {

// The layers that any of these matches: "all-linear" every one; a name a path that is equal to it or ends in ".name" (q_proj,
// layers.0.mlp.up_proj); what holds other characters than letters, digits, _ and '.', a regular expression that must match the whole
// path. ConfigError, which names `key`: it matches nothing (the names there are are listed), or is no regular expression.
std::set<Linear*> linears_named(Transformer& model, const std::vector<std::string>& names, const std::string& key);

std::string last_name(const std::string& path);  // of model.layers.0.self_attn.q_proj: q_proj

}  // namespace trireme
