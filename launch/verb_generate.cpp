// trireme generate: answers to prompts from the command line, a file, or standard input. Rank 0 alone.
#include "base/tensor.h"

#include <filesystem>
#include <iostream>
#include <sstream>

#include <unistd.h>

#include "base/file.h"
#include "data/masking.h"
#include "launch/verbs.h"
#include "serve/generate.h"
#include "train/build.h"

namespace trireme {
namespace {

// A text as it stands, or with generate.chat as a user's message.
Record text_prompt(const std::string& text, const Config& config) {
  Record record;
  record.text = text;
  if (!config.generate.chat) return record;
  record.form = DataForm::kMessages;
  if (!config.generate.system.empty()) record.messages.push_back({{"role", "system"}, {"content", config.generate.system}});
  record.messages.push_back({{"role", "user"}, {"content", text}});
  return record;
}

// A line of a file or of standard input: a JSON string, a record of any data form, or else text.
Record read_prompt(const std::string& line, const std::string& place, const Config& config, const RecordOptions& options) {
  Json json;
  check_utf8(line, place);
  try {
    if (line[0] == '"' || line[0] == '{') json = parse_json(line, place);
  } catch (const DataError&) {  // no JSON: text that begins like it
  }
  if (json.is_object()) return make_prompt(std::move(json), options, place);
  return text_prompt(json.is_string() ? json.get<std::string>() : line, config);
}

// Whatever ends an answer by config.json, generation_config.json, the tokenizer or the chat template.
std::vector<int64_t> end_ids(const Config& config, const ModelSource& source, const TextTools& tools) {
  std::vector<int64_t> ids = source.config.eos_ids;
  std::string file = source.folder + "/generation_config.json";
  if (!source.folder.empty() && std::filesystem::exists(file))
    for (int64_t id : end_ids_from_json(read_json_file(file), file)) ids.push_back(id);
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
  if (g.chat && !tools.chat)
    throw ConfigError("generate.chat needs a chat template and the model has none: set data.chat_template to alpaca, chatml, "
                      "gemma, llama3, mistral, phi3, or a file");
  auto model = build_model(config, source, weight_dtype(config, source), false);

  GenerateOptions options;
  options.sampling = {g.temperature, g.top_k, g.top_p, g.min_p, g.repetition_penalty, static_cast<uint64_t>(config.run.seed)};
  options.max_tokens = g.max_tokens;
  options.end_ids = end_ids(config, source, tools);
  options.stop = g.stop;
  DataOptions data = data_options(config, tools, 0);
  RecordOptions records = record_options(data);
  RecordEncoder encoder(tools.tokenizer, tools.chat ? &*tools.chat : nullptr, encode_options(data));
  uint64_t index = 0;
  auto answer = [&](const Record& prompt, const std::string& place) {
    bool streams = g.format == "text" && g.stream;
    Answer a = generate(*model, tools.tokenizer, encoder.encode_prompt(prompt, place).ids, index++, options,
                        streams ? [](const std::string& text) { std::cout << text << std::flush; } : std::function<void(const std::string&)>());
    if (g.format == "json") {
      Json out;
      out["prompt"] = prompt.is_chat() ? prompt.messages : Json(prompt.text.empty() ? prompt.prompt : prompt.text);
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
    if (!g.prompt.empty()) answer(text_prompt(g.prompt, config), "generate.prompt");
    for (const auto& text : line.arguments) answer(text_prompt(text, config), "the prompt");
    return kExitDone;
  }
  std::istringstream file(g.file.empty() ? "" : read_file(g.file));
  std::istream& in = g.file.empty() ? std::cin : file;
  bool asks = g.file.empty() && ::isatty(0) == 1;
  std::string text;
  for (int64_t number = 1; (asks ? (std::cerr << "> " << std::flush, true) : true) && std::getline(in, text); ++number) {
    if (!text.empty() && text.back() == '\r') text.pop_back();
    std::string place = str(g.file.empty() ? "standard input" : g.file, ":", number);
    if (!text.empty()) answer(read_prompt(text, place, config, records), place);
  }
  return kExitDone;
}

}  // namespace trireme
