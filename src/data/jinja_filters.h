// The two halves of the table of filters.
#pragma once

#include <string>
#include <unordered_map>

#include "data/jinja_runtime.h"

namespace trireme::jinja {

using Filter = Value (*)(Runtime&, const Value&, const Args&);
using FilterTable = std::unordered_map<std::string, Filter>;

const FilterTable& text_filters();
const FilterTable& sequence_filters();

}  // namespace trireme::jinja
