// trireme generate: answers to prompts from the command line, a file, or standard input. Rank 0 alone.
#include "base/tensor.h"

#include <filesystem>
#include <iostream>
#include <sstream>

#include <unistd.h>

#include "base/file.h"
#include "launch/verbs.h"
#include "serve/generate.h"
#include "train/build.h"

namespace trireme {
namespace {

struct Prompt {
  std::string text;   // as given
  Json messages;      // of a chat; null for plain text
};

// A line of a file or of standard input: JSON where it looks like it, else text.
Prompt read_prompt(const std::string& line, const std::string& place) {
  if (line.empty() || (line[0] != '"' && line[0] != '{')) return {line, nullptr};
  Json json = parse_json(line, place);
  if (json.is_string()) return {json.get<std::string>(), nullptr};
  if (json.contains("messages") && json["messages"].is_array()) return {"", json["messages"]};
  for (const char* key : {"prompt", "question", "instruction", "text"})
    if (json.contains(key) && json[key].is_string()) return {json[key].get<std::string>(), nullptr};
  throw DataError(str(place, ": the record has none of messages, prompt, question, instruction, text"));
}

std::vector<int64_t> encode(const Prompt& prompt, const Config& config, const TextTools& tools) {
  if (!config.generate.chat && prompt.messages.is_null()) return tools.tokenizer.encode_ids(prompt.text, true);
  if (!tools.chat)
    throw ConfigError("generate.chat needs a chat template and the model has none: set data.chat_template to alpaca, chatml, "
                      "gemma, llama3, mistral, phi3, or a file");
  Json messages = prompt.messages;
  if (messages.is_null()) {
    messages = Json::array();
    if (!config.generate.system.empty()) messages.push_back({{"role", "system"}, {"content", config.generate.system}});
    messages.push_back({{"role", "user"}, {"content", prompt.text}});
  } else if (!messages.empty() && messages.back().is_object() && messages.back().value("role", "") == "assistant") {
    messages.erase(messages.size() - 1);  // the answer that is asked for
  }
  Json arguments = config.data.template_args.empty() ? Json() : parse_json(config.data.template_args, "data.template_args");
  return tools.tokenizer.encode_ids(tools.chat->render(messages, nullptr, true, arguments), false);
}

// Whatever ends an answer by config.json, generation_config.json, the tokenizer or the chat template.
std::vector<int64_t> end_ids(const Config& config, const ModelSource& source, const TextTools& tools) {
  std::vector<int64_t> ids = source.config.eos_ids;
  std::string file = source.folder + "/generation_config.json";
  if (!source.folder.empty() && std::filesystem::exists(file)) {
    Json json = read_json_file(file);
    Json eos = json.is_object() ? json.value("eos_token_id", Json()) : Json();
    for (const Json& id : eos.is_array() ? eos : Json::array({eos}))
      if (id.is_number_integer()) ids.push_back(id.get<int64_t>());
  }
  if (tools.eos_id >= 0) ids.push_back(tools.eos_id);
  if (auto id = end_of_turn(config, tools)) ids.push_back(*id);
  return ids;
}

}  // namespace

ExitStatus verb_generate(const Config& config, const CommandLine& line, const Process& process) {
  check_config(config, line);
  const auto& g = config.generate;
  if (!g.file.empty() && (!g.prompt.empty() || !line.arguments.empty()))
    throw ConfigError("generate.file and a prompt are both given; give one");
  if (process.rank() != 0) return kExitDone;
  ModelSource source = find_model(config);
  TextTools tools = load_text_tools(config, source.tokenizer_folder, &source.config);
  auto model = build_model(config, source, weight_dtype(config, source), false);

  GenerateOptions options;
  options.sampling = {g.temperature, g.top_k, g.top_p, g.min_p, g.repetition_penalty, static_cast<uint64_t>(config.run.seed)};
  options.max_tokens = g.max_tokens;
  options.end_ids = end_ids(config, source, tools);
  options.stop = g.stop;
  uint64_t index = 0;
  auto answer = [&](const Prompt& prompt) {
    bool streams = g.format == "text" && g.stream;
    Answer a = generate(*model, tools.tokenizer, encode(prompt, config, tools), index++, options,
                        streams ? [](const std::string& text) { std::cout << text << std::flush; } : std::function<void(const std::string&)>());
    if (g.format == "json") {
      Json out;
      out["prompt"] = prompt.messages.is_null() ? Json(prompt.text) : prompt.messages;
      out["text"] = a.text;
      out["ids"] = a.ids;
      out["tokens"] = a.ids.size();
      out["finish_reason"] = a.finish_reason;
      std::cout << dump_json(out) << std::endl;
    } else {
      std::cout << (streams ? "" : a.text) << std::endl;
    }
  };
  if (!line.arguments.empty() || !g.prompt.empty()) {
    if (!g.prompt.empty()) answer({g.prompt, nullptr});
    for (const auto& text : line.arguments) answer({text, nullptr});
    return kExitDone;
  }
  std::istringstream file(g.file.empty() ? "" : read_file(g.file));
  std::istream& in = g.file.empty() ? std::cin : file;
  bool asks = g.file.empty() && ::isatty(0) == 1;
  std::string text;
  for (int64_t number = 1; (asks ? (std::cerr << "> " << std::flush, true) : true) && std::getline(in, text); ++number) {
    if (!text.empty() && text.back() == '\r') text.pop_back();
    if (!text.empty()) answer(read_prompt(text, str(g.file.empty() ? "standard input" : g.file, ":", number)));
  }
  return kExitDone;
}

}  // namespace trireme
