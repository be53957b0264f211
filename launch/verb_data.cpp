// trireme prepare and trireme tokenize: what the data becomes, before any training. Both work on rank 0 alone.
#include <unistd.h>

#include "base/tensor.h"

#include <charconv>
#include <iostream>

#include "base/log.h"
#include "checkpoint/hf_hub.h"
#include "data/masking.h"
#include "data/records.h"
#include "launch/verbs.h"
#include "train/build.h"
#include "train/check_config.h"
#include "train/progress.h"
#include "train/text_tools.h"

namespace trireme {

ExitStatus verb_prepare(const Config& config, const CommandLine& line, const Process& process) {
  bool has_model = !config.model.path.empty() || !config.model.config.empty();
  if (has_model || config.model.tokenizer.empty()) check_config(config, line);
  if (config.data.train.empty()) throw ConfigError("data.train is not set: name one or more .jsonl, .json or .txt files");
  if (process.rank() != 0) return kExitDone;
  ModelSource source;
  if (has_model) source = find_model(config);
  else source.tokenizer_folder = resolve_model_folder(config.model.tokenizer, "main", {false, true}, "model.tokenizer");
  TextTools tools = load_text_tools(config, source.tokenizer_folder, has_model ? &source.config : nullptr);
  DataOptions options = data_options(config, tools, has_model ? source.config.vocab_size : 0);
  options.check();
  auto show = static_cast<int>(config.data.show);
  for (Split split : {Split::kTrain, Split::kEval}) {
    Progress progress(true, process.size() == 1);
    auto dataset = Dataset::build(options, split, tools.tokenizer, tools.chat ? &*tools.chat : nullptr, [&](uint64_t done, uint64_t total) {
      if (total > (64 << 20)) progress.show(str("tokenising: ", done >> 20, " of ", total >> 20, " MB"), 1, 1, done == total);
    });
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
    if (id.get<double>() < 0 || id.get<double>() >= static_cast<double>(tokenizer.vocab_size()))
      throw DataError(str(place, ": ", dump_json(id), " is no id of this tokenizer; ids are 0 to ", tokenizer.vocab_size() - 1));
    values.push_back(id.get<int64_t>());
  }
  Json out;
  out["text"] = tokenizer.decode(values, false);
  out["ids"] = ids;
  return out;
}

void append(std::string& out, int64_t value) {
  char digits[20];
  out.append(digits, std::to_chars(digits, digits + sizeof digits, value).ptr);
}
void append(std::string& out, const std::pair<int64_t, int64_t>& range) {
  append(out += '[', range.first);
  append(out += ',', range.second);
  out += ']';
}
// As JSON, straight into the text: a tree of JSON values of as many numbers takes longer to make than the tokens.
void append_list(std::string& out, const auto& values) {
  out += '[';
  for (size_t i = 0; i < values.size(); ++i) append(i ? out += ',' : out, values[i]);
  out += ']';
}

}  // namespace

ExitStatus verb_tokenize(const Config& config, const CommandLine&, const Process& process) {
  bool own = !config.model.tokenizer.empty();
  const std::string& folder = own ? config.model.tokenizer : config.model.path;
  if (folder.empty()) throw ConfigError("model.path is not set: name a folder with a tokenizer.json");
  if (process.rank() != 0) return kExitDone;
  TextTools tools = load_text_tools(config, resolve_model_folder(folder, own ? "main" : config.model.revision, {false, true}, own ? "model.tokenizer" : "model.path"), nullptr);
  DataOptions data = data_options(config, tools, 0);
  RecordOptions records = record_options(data);
  EncodeOptions options = encode_options(data);
  options.offsets = config.tokenize.offsets;
  options.special = config.tokenize.special;
  RecordEncoder encoder(tools.tokenizer, tools.chat ? &*tools.chat : nullptr, options);
  int64_t number = 0;
  std::string out;
  for (std::string text; std::getline(std::cin, text);) {
    std::string place = str("standard input:", ++number);
    check_utf8(text, place);
    Json json = parse_json(text, place);
    if (config.tokenize.decode) {
      if (!json.is_array()) throw DataError(str(place, ": an array of ids is expected"));
      std::cout << dump_json(ids_of(tools.tokenizer, json, place)) << "\n";
      continue;
    }
    EncodedRecord record;
    if (json.is_string()) {  // tokens of a text as it stands: no end token is added
      record.text = json.get<std::string>();
      if (config.tokenize.offsets) {
        Encoding encoding = tools.tokenizer.encode(record.text, config.tokenize.special);
        record.ids = std::move(encoding.ids);
        record.offsets = std::move(encoding.offsets);
      } else {
        record.ids = tools.tokenizer.encode_ids(record.text, config.tokenize.special);
      }
      record.learnt.assign(record.ids.size(), 1);
      if (!record.learnt.empty()) record.learnt[0] = 0;
    } else if (config.tokenize.generation_prompt) {
      record = encoder.encode_prompt(make_prompt(json, records, place), place);
    } else {
      record = encoder.encode(make_record(json, records, place), place);
    }
    out.assign("{\"text\":").append(dump_json(Json(record.text))).append(",\"ids\":");
    append_list(out, record.ids);
    append_list(out.append(",\"loss\":"), record.learnt);
    if (config.tokenize.offsets) append_list(out.append(",\"offsets\":"), record.offsets);
    std::cout << out.append("}\n");
  }
  std::cout.flush();
  return kExitDone;
}

}  // namespace trireme
