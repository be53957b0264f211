#include "base/tensor.h"

#include "train/same_job.h"

#include <algorithm>
#include <filesystem>
#include <map>
#include <sstream>

#include "base/counted.h"
#include "base/file.h"
#include "base/hash.h"
#include "checkpoint/hf_hub.h"
#include "comm/process.h"
#include "data/records.h"
#include "train/agreement.h"
#include "train/run_folder.h"

namespace trireme {
namespace {

namespace fs = std::filesystem;

constexpr char kVersion[] = "the version of trireme", kVerb[] = "the verb";
// Of a larger file pieces are compared, evenly spread: two fine-tunes of a model differ all through, in the layers that were trained.
constexpr uint64_t kWholeBytes = 16 << 20, kPieceBytes = 4096, kNumPieces = 1024;

using Facts = std::map<std::string, std::string>;  // what, and how it is on this rank

std::string short_hash(std::string_view bytes) { return hash_bytes(bytes).substr(0, 12); }

void add_file(Facts& facts, const std::string& what, const fs::path& path) {
  std::error_code error;
  if (!fs::is_regular_file(path, error)) return;
  if (fs::file_size(path, error) == 0) return void(facts[what] = "empty");
  const MappedFile file(path.string());
  std::string_view all = file.view();
  std::string pieces;
  if (all.size() > kWholeBytes)
    for (uint64_t i = 0; i < kNumPieces; ++i) pieces += all.substr((all.size() - kPieceBytes) / (kNumPieces - 1) * i, kPieceBytes);
  facts[what] = str("of ", all.size(), " bytes, hash ", short_hash(pieces.empty() ? all : pieces));
}

// A file, or of a folder what models and adapters are made of.
void add_files(Facts& facts, const std::string& key, const std::string& path) {
  std::error_code error;
  add_file(facts, str("the file of ", key), path);
  for (fs::directory_iterator entry(path, error), end; !error && entry != end; entry.increment(error))
    for (const char* kind : {".json", ".safetensors", ".jinja", ".txt", ".model"})
      if (entry->path().extension() == kind) add_file(facts, str(entry->path().filename().string(), " of ", key), entry->path());
}

// A path that cannot be had is none: whoever reads it says what is wrong.
template <typename Find>
std::string where_readable(const Find& find) {
  try {
    return find();
  } catch (const Error&) {
    return "";
  }
}

std::string folder_of(const std::string& name, const std::string& revision) {
  std::error_code error;
  return name.empty() || fs::exists(name, error) ? name : where_readable([&] { return resolve_model_folder(name, revision); });
}

Facts facts_of(const Config& config, const CommandLine& line) {
  Facts facts;
  facts[kVersion] = str(TRIREME_VERSION, " (build ", hash_file("/proc/self/exe").substr(0, 12), ")");
  facts[kVerb] = line.verb + (line.dry_run ? " --dry-run" : "") + (line.help ? " --help" : "") + (line.version ? " --version" : "") +
                      (line.print_config ? " --print-config" : "");
  if (!line.arguments.empty()) facts["the prompt"] = joined(line.arguments, " ");
  std::istringstream ini(config_to_ini(config, false));
  std::string section;
  for (std::string text; std::getline(ini, text);) {
    const size_t equals = text.find(" = ");
    if (text.starts_with("[")) section = text.substr(1, text.size() - 2);
    else if (equals != std::string::npos) facts[section + "." + text.substr(0, equals)] = text.substr(equals + 3);
  }
  if (line.verb == "train" || line.verb == "export" || line.verb == "quantize")  // others write nothing there
    facts["run.dir"] = fs::absolute(config.run.dir.empty() ? default_run_dir(line.config_file) : config.run.dir).lexically_normal().string();
  add_files(facts, "model.path", folder_of(config.model.path, config.model.revision));
  add_files(facts, "model.config", config.model.config);
  if (!config.model.config.empty())
    add_file(facts, "tokenizer.json beside model.config", fs::path(config.model.config).parent_path() / "tokenizer.json");
  add_files(facts, "model.tokenizer", folder_of(config.model.tokenizer, "main"));
  add_files(facts, "lora.path", config.lora.path);
  add_files(facts, "data.chat_template", config.data.chat_template);
  for (const auto& [key, files] : {std::pair("data.train", &config.data.train), {"data.eval", &config.data.eval}})
    for (const std::string& file : *files)
      add_file(facts, str(file, " of ", key), where_readable([&] { return parse_data_file(file, key, files->size()).path; }));
  return facts;
}

Facts parsed(const std::string& text) {
  Facts facts;
  const Json json = parse_json(text, "a rank's facts");
  for (const auto& [what, value] : json.at("facts").items()) facts[what] = value.get<std::string>();
  return facts;
}

// "KEY is A there, B here", for all that differ, or the first ones.
std::string differences(const Facts& there, const Facts& here) {
  std::vector<std::string> texts;
  auto value = [](const Facts& facts, const std::string& what) {
    const auto it = facts.find(what);
    return it == facts.end() ? "missing" : it->second.empty() ? "empty" : it->second;
  };
  for (const char* what : {kVersion, kVerb})  // then what else differs follows from it
    if (value(there, what) != value(here, what)) return str(what, " is ", value(there, what), " there, ", value(here, what), " here");
  Facts all = there;
  all.insert(here.begin(), here.end());
  for (const auto& [what, unused] : all)
    if (value(there, what) != value(here, what)) texts.push_back(str(what, " is ", value(there, what), " there, ", value(here, what), " here"));
  constexpr size_t kShown = 8;
  const size_t num_more = texts.size() - std::min(texts.size(), kShown);
  texts.resize(std::min(texts.size(), kShown));
  return joined(texts, "; ") + (num_more > 0 ? str("; and ", num_more, " more") : "");
}

}  // namespace

void check_same_job(const Communicator& world, const Config& config, const CommandLine& line) {
  if (world.size() == 1) return;
  std::string mine, facts;
  agree_on(world, [&] {
    const Facts all = facts_of(config, line);
    facts = dump_json(Json{{"facts", all}});
    mine = dump_json(Json{{"host", host_name()}, {"facts", all}});
  });
  const std::string hash = hash_bytes(facts), of_first = world.broadcast_bytes(hash);
  if (world.agree(hash != of_first) == 0) return;
  const std::vector<std::string> texts = world.gather_bytes(mine);
  agree_on(world, [&] {
    std::string sentence;
    size_t num_more = 0;
    for (size_t rank = 1; rank < texts.size(); ++rank) {
      const std::string differs = differences(parsed(texts[rank]), parsed(texts[0]));
      if (differs.empty()) continue;
      if (!sentence.empty()) ++num_more;
      else sentence = str("rank ", rank, " on ", parse_json(texts[rank], "").at("host").get<std::string>(), " differs from rank 0 on ", host_name(), ": ",
                          differs);
    }
    if (num_more > 0) sentence += str(" (and ", counted(static_cast<int64_t>(num_more), "more rank"), num_more == 1 ? " differs)" : " differ)");
    if (!sentence.empty()) throw ConfigError(sentence + ". Start all ranks of a job with the same program, configuration and files");
  });
}

}  // namespace trireme
