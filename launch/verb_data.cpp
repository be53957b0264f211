// trireme prepare and trireme tokenize: what the data becomes, before any training. Both work on rank 0 alone.
#include <unistd.h>

#include "base/tensor.h"

#include <iostream>

#include "base/log.h"
#include "checkpoint/hf_hub.h"
#include "data/masking.h"
#include "data/records.h"
#include "launch/verbs.h"
#include "train/build.h"

namespace trireme {

ExitStatus verb_prepare(const Config& config, const CommandLine& line, const Process& process) {
  check_config(config, line);
  if (config.data.train.empty()) throw ConfigError("data.train is not set: name one or more .jsonl, .json or .txt files");
  if (process.rank() != 0) return kExitDone;
  ModelSource source = find_model(config);
  TextTools tools = load_text_tools(config, source.tokenizer_folder, &source.config);
  DataOptions options = data_options(config, tools, source.config.vocab_size);
  options.check();
  auto show = static_cast<int>(config.data.show);
  for (Split split : {Split::kTrain, Split::kEval}) {
    auto dataset = Dataset::build(options, split, tools.tokenizer, tools.chat ? &*tools.chat : nullptr);
    if (!dataset) continue;
    std::cout << (split == Split::kTrain ? "training data\n" : "evaluation data\n")
              << data_report(*dataset, options, tools.tokenizer, show, ::isatty(1) == 1) << std::endl;
  }
  return kExitDone;
}

namespace {

Json ids_of(const Tokenizer& tokenizer, const Json& ids, const std::string& place) {
  std::vector<int64_t> values;
  for (const Json& id : ids) {
    if (!id.is_number_integer()) throw DataError(str(place, ": an array of ids is expected"));
    values.push_back(id.get<int64_t>());
  }
  Json out;
  out["text"] = tokenizer.decode(values, false);
  out["ids"] = ids;
  return out;
}

}  // namespace

ExitStatus verb_tokenize(const Config& config, const CommandLine&, const Process& process) {
  std::string folder = !config.model.tokenizer.empty() ? config.model.tokenizer : config.model.path;
  if (folder.empty()) throw ConfigError("model.path is not set: name a folder with a tokenizer.json");
  if (process.rank() != 0) return kExitDone;
  TextTools tools = load_text_tools(config, resolve_model_folder(folder), nullptr);
  EncodeOptions options;
  options.learn_all = config.data.learn == "all";
  options.bos_id = tools.bos_id;
  options.eos_id = tools.eos_id;
  options.template_args = config.data.template_args;
  const ChatTemplate* chat = tools.chat ? &*tools.chat : nullptr;
  RecordEncoder encoder(tools.tokenizer, chat, options);
  RecordOptions record_options;
  record_options.prompt_field = config.data.prompt_field;
  record_options.completion_field = config.data.completion_field;
  record_options.text_field = config.data.text_field;
  int64_t number = 0;
  for (std::string text; std::getline(std::cin, text);) {
    std::string place = str("standard input:", ++number);
    Json json = parse_json(text, place);
    Json out;
    if (config.tokenize.decode) {
      if (!json.is_array()) throw DataError(str(place, ": an array of ids is expected"));
      std::cout << dump_json(ids_of(tools.tokenizer, json, place)) << "\n";
      continue;
    }
    std::string whole;
    Encoding encoding;
    std::vector<int64_t> learnt;
    if (json.is_string()) {
      whole = json.get<std::string>();
      encoding = tools.tokenizer.encode(whole, config.tokenize.special);
      learnt.assign(encoding.ids.size(), 1);
    } else if (json.is_object() && json.contains("messages") && config.tokenize.generation_prompt) {
      if (!chat) throw ConfigError("tokenize.generation_prompt needs a chat template: set data.chat_template");
      whole = chat->render(json["messages"], json.contains("tools") ? json["tools"] : Json(), true,
                           options.template_args.empty() ? Json() : parse_json(options.template_args, "data.template_args"));
      encoding = tools.tokenizer.encode(whole, false);
      learnt.assign(encoding.ids.size(), 0);
    } else {
      EncodedRecord record = encoder.encode(make_record(json, record_options, place), place);
      whole = record.text;
      encoding.ids = record.ids;
      learnt.assign(record.learnt.begin(), record.learnt.end());
      if (config.tokenize.offsets) encoding.offsets = tools.tokenizer.encode(whole, false).offsets;
    }
    out["text"] = whole;
    out["ids"] = encoding.ids;
    out["loss"] = learnt;
    if (config.tokenize.offsets) out["offsets"] = encoding.offsets;
    std::cout << dump_json(out) << "\n";
  }
  std::cout.flush();
  return kExitDone;
}

}  // namespace trireme
