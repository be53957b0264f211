// Command line, file, help: the ways in and out of a configuration.
#include "config/config.h"

#include <algorithm>
#include <boost/program_options.hpp>
#include <map>
#include <optional>
#include <set>
#include <string_view>

#include "base/check.h"
#include "base/file.h"
#include "base/json.h"

namespace po = boost::program_options;

namespace trireme {

bool CommandLine::is_given(const std::string& key) const {
  return std::find(given.begin(), given.end(), key) != given.end();
}

std::string nearest(const std::string& word, const std::vector<std::string>& known) {
  std::string best;
  if (word.size() > 100) return best;
  for (const auto& k : known)  // what was not written to its end
    if (word.size() > 2 && k.starts_with(word) && (best.empty() || k.size() < best.size())) best = k;
  if (!best.empty()) return best;
  size_t best_distance = std::max<size_t>(2, word.size() / 3) + 1;
  for (const auto& k : known) {
    std::vector<size_t> row(k.size() + 1);
    for (size_t j = 0; j <= k.size(); ++j) row[j] = j;
    for (size_t i = 1; i <= word.size(); ++i) {
      size_t diagonal = row[0];
      row[0] = i;
      for (size_t j = 1; j <= k.size(); ++j) {
        size_t up = row[j];
        row[j] = std::min({up + 1, row[j - 1] + 1, diagonal + (word[i - 1] != k[j - 1])});
        diagonal = up;
      }
    }
    if (row.back() < best_distance) best_distance = row.back(), best = k;
  }
  return best;
}

namespace {

struct Verb {
  const char *name, *what;
  std::vector<std::string> reads, leaves = {};  // sections and single keys; keys of those sections that it has no use for
  bool has(const std::string& key) const {
    auto listed = [&](const auto& list, const std::string& name) { return std::find(list.begin(), list.end(), name) != list.end(); };
    return (listed(reads, key) || listed(reads, key.substr(0, key.find('.')))) && !listed(leaves, key);
  }
};
const std::vector<std::string> kRunSections = {"run", "model", "data", "task", "train", "optim", "schedule", "lora", "quant",
                                               "parallel", "comm", "checkpoint", "eval", "log"};
const std::vector<std::string> kNotInRuns = {"data.show", "lora.merge", "lora.requantize", "eval.token_ids", "eval.logits"};
const std::vector<Verb> kVerbs = {
    {"train", "train or fine-tune a model", kRunSections, kNotInRuns},
    {"eval", "loss, perplexity and accuracy; logits to a file",
     {"run.seed", "run.device", "model", "data", "task", "train.threads", "train.tf32", "lora.path", "quant", "parallel.data", "parallel.tensor", "parallel.pipeline", "parallel.order",
      "comm.timeout_s", "eval.micro_batch_size", "eval.token_ids", "eval.logits", "log"}, {"log.trace"}},
    {"generate", "answer prompts", {"run.seed", "run.device", "model", "data", "train.threads", "train.tf32", "lora.path", "quant", "parallel.data", "parallel.tensor", "parallel.pipeline", "parallel.order",
      "generate", "log"}, {"log.trace"}},
    {"prepare", "tokenise data and report its lengths and masks", {"run.seed", "model", "data", "task", "log"}, {"log.trace"}},
    {"tokenize", "text or records to ids, and back", {"model", "data", "task", "tokenize", "log"}, {"log.trace"}},
    {"export", "write a checkpoint or adapter as a Hugging Face folder",
     {"run", "model", "data.chat_template", "data.template_args", "train.dtype", "train.threads", "lora", "quant", "log"}, {"log.trace"}},
    {"quantize", "write a model with its linear layers in 4 or 8 bits, as bitsandbytes does", {"run.dir", "model", "quant", "train.threads", "log"}, {"model.config", "model.embedding", "log.trace"}},
    {"plan", "parameters, memory and steps of a run, without running it",
     {"run", "model", "data", "task", "train", "optim", "schedule", "lora", "quant", "parallel", "comm", "checkpoint", "eval", "log", "plan"}, kNotInRuns},
    {"doctor", "check this machine", {"run.dir", "data.cache", "log"}, {"log.trace"}},
};

const Verb* find_verb(const std::string& name) {
  auto found = std::find_if(kVerbs.begin(), kVerbs.end(), [&](const Verb& v) { return v.name == name; });
  return found == kVerbs.end() ? nullptr : &*found;
}

// Why `verb` takes no such key; empty where it reads the key.
std::string not_of_verb(const std::string& verb, const std::string& key) {
  const Verb* found = find_verb(verb);
  if (!found || found->has(key)) return "";
  std::vector<std::string> others;
  for (const Verb& v : kVerbs)
    if (v.has(key)) others.push_back(v.name);
  return str(key, " is read by ", joined(others, ", "), ", not by ", verb, ": leave it out (a configuration file may hold it)");
}

std::vector<std::string> known_keys() {
  Config scratch;
  std::vector<std::string> keys;
  for (const auto& f : fields(scratch)) keys.push_back(f.key);
  return keys;
}

std::string unknown_key(const std::string& key) {
  // What the keys are called in transformers, PEFT, TRL and Axolotl.
  static const std::map<std::string_view, const char*> kElsewhere = {
      {"learning_rate", "optim.lr"}, {"lr_scheduler_type", "schedule.kind"}, {"lr_scheduler", "schedule.kind"},
      {"warmup_ratio", "schedule.warmup_steps"}, {"batch_size", "train.micro_batch_size"},
      {"per_device_train_batch_size", "train.micro_batch_size"}, {"per_device_eval_batch_size", "eval.micro_batch_size"},
      {"gradient_accumulation_steps", "train.accumulation"}, {"num_train_epochs", "train.epochs"}, {"num_epochs", "train.epochs"},
      {"max_steps", "train.steps"}, {"gradient_checkpointing", "train.recompute"}, {"bf16", "train.dtype"}, {"fp16", "train.dtype"},
      {"output_dir", "run.dir"}, {"max_seq_length", "data.max_length"}, {"sequence_len", "data.max_length"},
      {"sample_packing", "data.packing"}, {"eval_steps", "eval.every"}, {"save_steps", "checkpoint.every"},
      {"save_total_limit", "checkpoint.keep"}, {"logging_steps", "log.every"}, {"early_stopping_patience", "eval.patience"},
      {"resume_from_checkpoint", "run.resume"}, {"lora_r", "lora.rank"}, {"lora_alpha", "lora.alpha"}, {"lora_dropout", "lora.dropout"},
      {"target_modules", "lora.targets"}, {"lora_target_modules", "lora.targets"}, {"use_rslora", "lora.rslora"},
      {"base_model", "model.path"}, {"model_name_or_path", "model.path"}, {"max_new_tokens", "generate.max_tokens"}};
  std::vector<std::string> known = known_keys(), named;  // named: who knows the name may not know the section
  for (const auto& k : known)
    if (k.substr(k.find('.')) == "." + key.substr(key.rfind('.') + 1)) named.push_back(k);
  const auto elsewhere = kElsewhere.find(std::string_view(key).substr(key.rfind('.') + 1));
  std::string near = elsewhere != kElsewhere.end() ? elsewhere->second : nearest(key, named.empty() ? known : named);
  if (near.empty() && !named.empty()) near = named.front();
  return str("unknown key ", key.substr(0, 80), near.empty() ? "" : str("; did you mean ", near, "?"),
             "; trireme VERB --help lists all keys");
}

// One source of settings (the file, or the command line): sets the values and collects what is wrong.
class Settings {
 public:
  // `verb`: whose keys alone are allowed; empty: all are.
  Settings(std::vector<Field>& table, CommandLine& line, std::vector<std::string>& problems, const std::string& verb = "")
      : table_(table), line_(line), problems_(problems), verb_(verb) {}

  void set(const std::string& place, const std::string& key, const std::string& value) {
    auto field = std::find_if(table_.begin(), table_.end(), [&](const Field& f) { return f.key == key; });
    if (field == table_.end()) return problems_.push_back(place + unknown_key(key));
    if (std::string problem = not_of_verb(verb_, key); !problem.empty()) return problems_.push_back(place + problem);
    if (!seen_.insert(key).second) return problems_.push_back(str(place, key, " is given twice"));
    if (std::string problem = field->set(value); !problem.empty()) problems_.push_back(place + problem);
    if (!line_.is_given(key)) line_.given.push_back(key);
  }

 private:
  std::vector<Field>& table_;
  CommandLine& line_;
  std::vector<std::string>& problems_;
  const std::string verb_;
  std::set<std::string> seen_;
};

std::string without_comment(const std::string& line) {
  for (size_t at = line.find('#'); at != std::string::npos; at = line.find('#', at + 1))
    if (at == 0 || line[at - 1] == ' ' || line[at - 1] == '\t') return line.substr(0, at);
  return line;
}

// A value in double quotes, with or without a comment behind it; nullopt where it is no such.
std::optional<std::string> quoted(const std::string& value) {
  if (value.empty() || value[0] != '"') return std::nullopt;
  size_t end = 1;
  while (end < value.size() && value[end] != '"') end += value[end] == '\\' ? 2 : 1;
  if (end >= value.size() || !trim(without_comment(" " + value.substr(end + 1))).empty()) return std::nullopt;
  Json text = Json::parse(value.substr(0, end + 1), nullptr, false);
  return text.is_string() ? std::optional(text.get<std::string>()) : std::nullopt;
}

void read_ini(const std::string& path, Settings settings, std::vector<std::string>& problems) {
  constexpr uint64_t kMaxBytes = 1 << 20;
  std::string text, section;
  try {
    text = read_file(path, kMaxBytes);
  } catch (const DataError& error) {
    return problems.push_back(str("the configuration ", path, ": ", error.what()));
  }
  std::istringstream lines(text.starts_with("\xEF\xBB\xBF") ? text.substr(3) : text);
  int number = 0;
  for (std::string raw; std::getline(lines, raw);) {
    std::string line = trim(without_comment(raw)), place = str(path, ":", ++number, ": ");
    size_t equals = raw.find('=');
    if (line.empty() || line.front() == ';') continue;
    if (line.size() > 2 && line.front() == '[' && line.back() == ']')
      section = trim(line.substr(1, line.size() - 2)) + ".";
    else if (line.find('=') == std::string::npos)
      problems.push_back(str(place, "not 'key = value' nor '[section]': ", line.substr(0, 80)));
    else {
      const std::string key = section + trim(raw.substr(0, equals)), value = trim(line.substr(line.find('=') + 1));
      const auto text = quoted(trim(raw.substr(equals + 1)));
      if (!text && (value.find(" ;") != std::string::npos || value.find("\t;") != std::string::npos))
        problems.push_back(str(place, key, "=", value.substr(0, 80), ": a comment behind a value begins with #; where the ; belongs to "
                               "the value, put it in double quotes"));
      else settings.set(place, key, text.value_or(value));
    }
  }
}

// What an INI line has to hold so that read_ini gives `text` back.
std::string ini_value(const std::string& text) {
  bool plain = text == trim(text) && text.find_first_of("#;\n") == std::string::npos && text.rfind('"', 0) != 0;
  return plain ? text : Json(text).dump(-1, ' ', false, Json::error_handler_t::replace);
}

}  // namespace

CommandLine parse_command_line(int argc, const char* const* argv, Config& config, const FurtherCheck& further) {
  CommandLine line;
  std::vector<std::string> problems, words;
  auto table = fields(config);
  po::options_description known;
  for (const Field& f : table) known.add_options()(f.key.c_str(), po::value<std::string>(), "");
  std::vector<std::string> options, cleared;  // words --key=value; keys of --key=
  for (int i = 1; i < argc; ++i) {
    std::string word = argv[i];
    if (word == "--help" || word == "-h") line.help = true;
    else if (word == "--version") line.version = true;
    else if (word == "--dry-run") line.dry_run = true;
    else if (word == "--print-config") line.print_config = true;
    else if (word.rfind("--", 0) == 0 && word.size() > 2) {
      if (word.find('=') == word.size() - 1) cleared.push_back(word.substr(2, word.size() - 3));  // Boost refuses an empty value
      else if (word.find('=') != std::string::npos) options.push_back(word);
      else if (i + 1 < argc && std::string(argv[i + 1]).rfind("--", 0) != 0) options.push_back(str(word, "=", argv[++i]));
      else if (known.find_nothrow(word.substr(2), false))
        problems.push_back(str(word, " needs a value: ", word, "=VALUE"));
      else problems.push_back(unknown_key(word.substr(2)));
    } else {
      words.push_back(word);
    }
  }
  if (!words.empty()) {
    line.verb = words[0];
    std::vector<std::string> verbs;
    for (const Verb& v : kVerbs) verbs.push_back(v.name);
    if (std::find(verbs.begin(), verbs.end(), line.verb) == verbs.end()) {
      std::string near = nearest(line.verb, verbs);
      throw ConfigError(str("unknown verb ", line.verb, near.empty() ? "" : str("; did you mean ", near, "?"),
                            "; verbs are ", joined(verbs, ", ")));
    }
    for (size_t i = 1; i < words.size(); ++i) {
      if (words[i].ends_with(".ini") && line.config_file.empty()) line.config_file = words[i];
      else if (line.verb == "generate") line.arguments.push_back(words[i]);
      else problems.push_back(str("unexpected word ", words[i], "; trireme ", line.verb, " takes one CONFIG.ini and --section.key=value"));
    }
  }
  if (!line.config_file.empty()) read_ini(line.config_file, Settings(table, line, problems), problems);
  Settings from_line(table, line, problems, line.print_config ? "" : line.verb);  // what is printed is a file
  for (const auto& key : cleared) from_line.set("", key, "");
  auto style = po::command_line_style::unix_style & ~po::command_line_style::allow_guessing;
  for (const po::option& o : po::command_line_parser(options).options(known).style(style).allow_unregistered().run().options)
    from_line.set("", o.string_key, o.value.empty() ? "" : o.value.front());
  if (further && !line.help && !line.version && !line.print_config) further(line, problems);
  if (!problems.empty()) throw ConfigError(joined(problems, "\n"));
  return line;
}

std::string config_to_ini(Config config, bool comments) {
  std::string out, section;
  for (const auto& f : fields(config)) {
    std::string s = f.key.substr(0, f.key.find('.'));
    if (s != section) out += str(section.empty() ? "" : "\n", "[", section = s, "]\n");
    if (comments) {
      out += str("# ", f.type(), f.unit.empty() ? "" : str(" (", f.unit, ")"), f.meaning.empty() ? "" : ": ", f.meaning);
      if (!f.allowed.empty()) out += str(" [", joined(f.allowed, " | "), "]");
      out += "\n";
    }
    out += str(f.key.substr(f.key.find('.') + 1), " = ", ini_value(f.text()), "\n");
  }
  return out;
}

std::string help_text(const std::string& verb) {
  std::string out;
  if (verb.empty()) {
    out = "trireme VERB [CONFIG.ini] [--section.key=value ...] [--dry-run] [--print-config] [--help] [--version]\n\n";
    for (const Verb& v : kVerbs) out += str("  ", v.name, std::string(10 - std::string(v.name).size(), ' '), v.what, "\n");
    return out + "\ntrireme VERB --help lists the keys of a verb.\n";
  }
  const Verb& v = *find_verb(verb);
  out = str("trireme ", v.name, " [CONFIG.ini] [--section.key=value ...]: ", v.what, "\n\n");
  Config defaults;
  for (const auto& f : fields(defaults)) {
    if (!v.has(f.key)) continue;
    out += str("  --", f.key, "=", f.text().empty() ? f.unit.empty() ? f.type() : f.unit : f.text(), "\n      ", f.type(),
               f.unit.empty() ? "" : str(", ", f.unit), f.meaning.empty() ? "" : ": ", f.meaning,
               f.allowed.empty() ? "" : str(" [", joined(f.allowed, " | "), "]"), "\n");
  }
  return out;
}

}  // namespace trireme
