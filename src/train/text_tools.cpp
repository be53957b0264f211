#include "base/tensor.h"

#include "train/text_tools.h"

#include <algorithm>
#include <filesystem>

#include "base/check.h"
#include "base/json.h"
#include "data/masking.h"

namespace trireme {

namespace fs = std::filesystem;

TextTools load_text_tools(const Config& config, const std::string& folder, const ModelConfig* model) {
  if (folder.empty()) throw ConfigError("no tokenizer: set model.tokenizer to a folder that holds tokenizer.json");
  TextTools tools{Tokenizer::load(folder), ChatTemplate::find(config.data.chat_template, folder)};
  if (model && tools.tokenizer.vocab_size() > model->vocab_size)
    throw DataError(str(tools.tokenizer.source(), ": the vocabulary has ", tools.tokenizer.vocab_size(),
                        " ids, but the embedding of the model (", model->source, ") has vocab_size ", model->vocab_size,
                        "; use the model's own tokenizer"));
  // The end token: tokenizer_config.json names it; else the model's config.json has its id.
  auto named = [&](const char* key) -> int64_t {
    std::string path = folder + "/tokenizer_config.json";
    if (!fs::exists(path)) return -1;
    Json json = read_json_file(path);
    if (!json.is_object() || !json.contains(key)) return -1;
    const Json& token = json[key].is_object() && json[key].contains("content") ? json[key]["content"] : json[key];
    if (!token.is_string()) return -1;
    return tools.tokenizer.token_to_id(token.get<std::string>()).value_or(-1);
  };
  // The id under `key` of the config.json beside the tokenizer, for verbs that have no model.
  auto configured = [&](const char* key) -> int64_t {
    std::string path = folder + "/config.json";
    Json json = !model && fs::exists(path) ? read_json_file(path) : Json();
    Json id = json.is_object() ? json.value(key, Json()) : Json();
    if (id.is_array() && !id.empty()) id = Json(id[0]);
    return id.is_number_integer() ? id.get<int64_t>() : -1;
  };
  tools.bos_id = named("bos_token");
  tools.eos_id = named("eos_token");
  if (tools.eos_id < 0) tools.eos_id = model && !model->eos_ids.empty() ? model->eos_ids.front() : configured("eos_token_id");
  if (tools.bos_id < 0) tools.bos_id = model && model->bos_id ? *model->bos_id : configured("bos_token_id");
  if (tools.eos_id < 0)
    for (const char* usual : {"<|endoftext|>", "</s>", "<|end_of_text|>", "<|im_end|>"})
      if (tools.eos_id < 0) tools.eos_id = tools.tokenizer.token_to_id(usual).value_or(-1);
  if (tools.chat) tools.chat->complete(tools.tokenizer, tools.bos_id, tools.eos_id);
  return tools;
}

std::optional<int64_t> end_of_turn(const Config& config, const TextTools& tools) {
  if (!tools.chat) return std::nullopt;
  EncodeOptions options;
  options.bos_id = tools.bos_id, options.eos_id = tools.eos_id, options.template_args = config.data.template_args;
  Record record;
  record.form = DataForm::kPromptCompletion;
  record.prompt = record.completion = "a";
  try {
    EncodedRecord turn = RecordEncoder(tools.tokenizer, &*tools.chat, options).encode(record, "the chat template");
    auto last = std::find(turn.learnt.rbegin(), turn.learnt.rend(), uint8_t{1});
    return turn.ids[static_cast<size_t>(turn.learnt.rend() - last) - 1];
  } catch (const DataError&) {  // a template of another purpose
    return std::nullopt;
  }
}

DataOptions data_options(const Config& config, const TextTools& tools, int64_t embedding_rows) {
  DataOptions options;
  const auto& d = config.data;
  options.train = d.train, options.eval = d.eval, options.eval_fraction = d.eval_fraction;
  options.format = d.format, options.learn = config.task.kind == "pretrain" ? "all" : d.learn;
  options.prompt_field = d.prompt_field, options.completion_field = d.completion_field, options.text_field = d.text_field;
  options.max_length = d.max_length, options.truncation = d.truncation, options.packing = d.packing;
  options.shuffle = d.shuffle, options.template_args = d.template_args, options.cache = d.cache;
  options.separator = d.separator, options.on_error = d.on_error;
  options.seed = static_cast<uint64_t>(config.run.seed);
  options.bos_id = tools.bos_id, options.eos_id = tools.eos_id;
  options.embedding_rows = embedding_rows;
  return options;
}

}  // namespace trireme
