// trireme generate: answers to prompts from the command line, a file, or standard input. One copy of the
// model answers: rank 0, with the ranks that hold the other parts of it.
#include "base/tensor.h"

#include <filesystem>
#include <iostream>
#include <sstream>

#include <unistd.h>

#include "base/file.h"
#include "comm/watchdog.h"
#include "data/masking.h"
#include "launch/verbs.h"
#include "serve/generate.h"
#include "train/agreement.h"
#include "train/build.h"
#include "train/check_config.h"
#include "train/device.h"
#include "train/progress.h"
#include "train/text_tools.h"

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

// Rank 0 reads the prompts; the ranks that share its model are told each, and what ends them.
class SharedPrompts {
 public:
  explicit SharedPrompts(const Communicator& ranks) : ranks_(ranks) {}
  void give(const std::vector<int64_t>& ids) { ranks_.broadcast_bytes(dump_json({{"ids", ids}})); }
  void end(const Error* error) {
    ranks_.broadcast_bytes(dump_json(error ? Json{{"status", static_cast<int>(error->status())}, {"error", error->what()}} : Json::object()));
  }
  // The next prompt, none after the last. AgreedError: what went wrong on rank 0.
  std::optional<std::vector<int64_t>> next() {
    const Json turn = parse_json(ranks_.broadcast_bytes(""), "a prompt from rank 0");
    if (turn.contains("error")) throw AgreedError(static_cast<ExitStatus>(turn["status"].get<int>()), turn["error"].get<std::string>());
    if (!turn.contains("ids")) return std::nullopt;
    return turn["ids"].get<std::vector<int64_t>>();
  }

 private:
  Communicator ranks_;
};

constexpr char kSmallerModel[] = "set model.dtype=bfloat16, or share the model out: parallel.tensor, parallel.pipeline";

// What a cache for `max_tokens` of answer, as far as the model's context reaches, takes at least; ConfigError: more than is free.
void check_cache(const Transformer& model, int64_t max_tokens) {
  const auto needed = static_cast<uint64_t>(Decoding::cache_bytes(model, 1, std::min(max_tokens, model.config().max_positions - 1)));
  if (const uint64_t there = free_bytes(model.device()); needed > there)
    throw ConfigError(str("generate.max_tokens=", max_tokens, ": the KV cache of an answer takes ", bytes_text(static_cast<double>(needed)), ", and ", model.device().str(), " has ",
                          bytes_text(static_cast<double>(there)), " free beside the weights: lower generate.max_tokens, ", kSmallerModel));
}

// `copy`: the ranks that hold one copy of the model together.
void answer_prompts(const Config& config, const CommandLine& line, const MeshComms& comms, const Communicator& copy) {
  const auto& g = config.generate;
  ModelSource source;
  std::optional<TextTools> tools;
  std::unique_ptr<Transformer> model;
  RecordOptions records;
  std::optional<RecordEncoder> encoder;
  agree_on(copy, [&] {
    const at::Device device = choose_device(config, copy);
    source = find_model(config);
    check_dtype(config, weight_dtype(config, source), device.type(), "model.dtype");
    if (!device.is_cpu()) say_kernel_gaps(kernel_gaps(source.config, weight_dtype(config, source)));
    tools.emplace(load_text_tools(config, source.tokenizer_folder, &source.config));
    if (g.chat && !tools->chat)
      throw ConfigError("generate.chat needs a chat template and the model has none: set data.chat_template to alpaca, chatml, "
                        "gemma, llama3, mistral, phi3, or a file");
    model = build_model(config, source, weight_dtype(config, source), false, device, false, forward_cut(source.config, comms));
    if (!device.is_cpu()) check_cache(*model, g.max_tokens);
    const DataOptions data = data_options(config, *tools, 0);
    records = record_options(data);
    encoder.emplace(tools->tokenizer, tools->chat ? &*tools->chat : nullptr, encode_options(data));
  });

  GenerateOptions options;
  options.sampling = {g.temperature, g.top_k, g.top_p, g.min_p, g.repetition_penalty, static_cast<uint64_t>(config.run.seed)};
  options.max_tokens = g.max_tokens;
  options.end_ids = end_ids(config, source, *tools);
  options.stop = g.stop;
  options.graphs = g.graphs && config.quant.base != "int8" && source.config.quantization != "int8";  // whose outliers the host looks for
  SharedPrompts shared(copy);
  uint64_t index = 0;
  Generator generator(*model, tools->tokenizer, options);
  auto generate_next = [&](const std::vector<int64_t>& ids, const std::function<void(const std::string&)>& on_text) {
    try {
      Answer answer;
      const auto held = [&] {
        std::vector<NamedBytes> all = bytes_of(model->parameters());
        const auto size = static_cast<int64_t>(ids.size());
        all.emplace_back(str("the KV cache of a prompt of ", size, " tokens and its answer"),
                         Decoding::cache_bytes(*model, size, std::min(g.max_tokens, source.config.max_positions - size)));
        return all;
      };
      name_out_of_memory(model->device(), held, str("Lower generate.max_tokens, shorten the prompt, ", kSmallerModel), [&] { answer = generator.answer(ids, index++, on_text); });
      return answer;
    } catch (const DataError& error) {  // about the prompt: of all ranks
      throw AgreedError(error.status(), error.what());
    } catch (const ConfigError& error) {
      throw AgreedError(error.status(), error.what());
    }
  };
  if (copy.rank() != 0) {
    while (auto ids = shared.next()) generate_next(*ids, {});
    return;
  }
  auto answer = [&](const Record& prompt, const std::string& place) {
    bool streams = g.format == "text" && g.stream;
    const std::vector<int64_t> ids = encoder->encode_prompt(prompt, place).ids;
    shared.give(ids);
    Answer a = generate_next(ids, streams ? [](const std::string& text) { std::cout << text << std::flush; } : std::function<void(const std::string&)>());
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
  auto answer_all = [&] {
    if (!line.arguments.empty() || !g.prompt.empty()) {
      if (!g.prompt.empty()) answer(text_prompt(g.prompt, config), "generate.prompt");
      for (const auto& text : line.arguments) answer(text_prompt(text, config), "the prompt");
      return;
    }
    std::istringstream file(g.file.empty() ? "" : read_file(g.file));
    std::istream& in = g.file.empty() ? std::cin : file;
    bool asks = g.file.empty() && ::isatty(0) == 1;
    std::string text;
    bool any = false;
    for (int64_t number = 1; (asks ? (std::cerr << "> " << std::flush, true) : true) && std::getline(in, text); ++number) {
      if (!text.empty() && text.back() == '\r') text.pop_back();
      std::string place = str(g.file.empty() ? "standard input" : g.file, ":", number);
      if (text.empty()) continue;
      answer(read_prompt(text, place, config, records), place);
      any = true;
    }
    if (!any && !g.file.empty()) throw DataError(str(g.file, " holds no prompt: one a line is expected"));
  };
  try {
    answer_all();
  } catch (const AgreedError&) {
    throw;
  } catch (const Error& error) {
    shared.end(&error);
    throw;
  }
  shared.end(nullptr);
}

}  // namespace

ExitStatus verb_generate(const Config& config, const CommandLine& line, const Process& process) {
  check_config(config, line);
  if (!config.generate.file.empty() && (!config.generate.prompt.empty() || !line.arguments.empty()))
    throw ConfigError("generate.file and a prompt are both given; give one");
  const MeshComms comms(mesh_of(config, process.size()), Communicator::world());
  const Communicator copy = comms.world.split(comms.coords.data, process.rank(), "copy");
  CommTimeoutPause pause(process.rank() != 0);  // rank 0 waits for whoever asks
  agree_on(comms.world, [&] {
    if (comms.coords.data == 0) answer_prompts(config, line, comms, copy);
  });
  return kExitDone;
}

}  // namespace trireme
