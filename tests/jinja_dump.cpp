// For template_parity_test.py: each line of stdin {"template", "context"} becomes {"output"} or {"error"} on stdout.
// With "messages" in place of a context the line goes through ChatTemplate and the answer has "learnt" spans, too.
#include <iostream>
#include <string>

#include "base/check.h"
#include "data/chat_template.h"
#include "data/jinja.h"

int main() {
  using trireme::Json;
  std::string line;
  while (std::getline(std::cin, line)) {
    Json answer = Json::object();
    try {
      Json request = Json::parse(line);
      if (request.contains("messages")) {
        auto chat = trireme::ChatTemplate::from_text(request["template"], "template");
        if (request.contains("builtin")) chat = trireme::ChatTemplate::load(request["builtin"], "");
        for (const auto& [name, value] : request["special"].items()) chat.set_special_token(name, value);
        if (request.contains("prompt")) {
          answer["output"] =
              chat.render(request["messages"], request["tools"], request["prompt"].get<bool>(), request["variables"]);
        } else {
          auto rendered = chat.render_learnt(request["messages"], request["tools"], request["variables"]);
          answer["output"] = rendered.text;
          answer["learnt"] = Json::array();
          for (const auto& span : rendered.learnt)
            answer["learnt"].push_back({rendered.text.substr(span.begin, span.end - span.begin), span.message});
        }
      } else {
        trireme::jinja::Template parsed(request["template"].get<std::string>(), "template");
        auto rendering = parsed.render(request["context"]);
        answer["output"] = rendering.text;
        answer["generations"] = rendering.generations;
      }
    } catch (const trireme::Error& error) {
      answer["error"] = error.what();
    }
    std::cout << answer.dump() << "\n";
  }
}
