// Jinja templates, equal to Python's jinja2 3.1 as transformers sets it up for chat templates: trim_blocks,
// lstrip_blocks, ImmutableSandboxedEnvironment (nothing a template touches can be changed but namespaces), break and
// continue,
// {% generation %} blocks, tojson without HTML escapes, raise_exception, strftime_now. Absent on purpose: whatever
// reads other templates (include, import, extends) and integers beyond 64 bits; both are refused with a message.
// Templates are hostile: every loop, string and recursion is charged to a budget.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/json.h"

namespace trireme::jinja {

struct Node;

struct Limits {
  uint64_t max_steps = 1'000'000;           // evaluated nodes, iterated items, bytes / 64 of strings made or read: seconds
  uint64_t max_string_bytes = 64ull << 20;  // of one string and of the output
  uint64_t max_total_bytes = 1ull << 30;    // of all strings made by one rendering
  int max_depth = 1000;                     // nested statements, expressions and macro calls
};

constexpr size_t kMaxTemplateBytes = 4ull << 20;

struct Rendering {
  std::string text;
  std::vector<std::pair<size_t, size_t>> generations;  // byte spans of {% generation %} blocks in `text`
  bool nested_generation = false;                      // a block stood inside a macro or a set block: it has no span
};

// A parsed template. Immutable; render() is thread-safe.
class Template {
 public:
  // `name` begins every message. DataError: not Jinja, not UTF-8, nested too deeply, too large; names the line.
  Template(const std::string& text, std::string name);
  ~Template();

  // `variables`: an object. DataError "<name> line <n>: <message>": what Python would raise (its words, where a
  // template can be expected to cause it), raise_exception's message, or a limit. `steps`, where given: raised by the steps
  // taken, also by a rendering that fails.
  Rendering render(const Json& variables, const Limits& limits = {}, uint64_t* steps = nullptr) const;

  bool has_generation() const { return has_generation_; }
  const std::string& name() const { return name_; }

 private:
  std::string name_;
  std::vector<std::unique_ptr<Node>> body_;
  bool has_generation_ = false;
};

}  // namespace trireme::jinja
