#include "config/config.h"

#include <algorithm>
#include <boost/program_options.hpp>
#include <cmath>
#include <fstream>
#include <limits>
#include <map>
#include <set>

#include "base/check.h"

namespace trireme {
namespace {

namespace po = boost::program_options;

std::string trim(const std::string& s) {
  size_t a = s.find_first_not_of(" \t\r"), b = s.find_last_not_of(" \t\r");
  return a == std::string::npos ? "" : s.substr(a, b - a + 1);
}

std::string number_text(double v) {
  for (int digits = 6; digits <= 17; ++digits) {
    std::ostringstream out;
    out.precision(digits);
    out << v;
    if (std::stod(out.str()) == v) return out.str();
  }
  return std::to_string(v);
}

std::string joined(const std::vector<std::string>& words, const char* between = ",") {
  std::string out;
  for (const auto& w : words) out += (out.empty() ? "" : between) + w;
  return out;
}

}  // namespace

const char* Field::type() const {
  static const char* names[] = {"text", "integer", "number", "true|false", "list"};
  return names[value.index()];
}

std::string Field::text() const {
  if (auto* s = std::get_if<std::string*>(&value)) return **s;
  if (auto* i = std::get_if<int64_t*>(&value)) return std::to_string(**i);
  if (auto* d = std::get_if<double*>(&value)) return number_text(**d);
  if (auto* b = std::get_if<bool*>(&value)) return **b ? "true" : "false";
  return joined(*std::get<std::vector<std::string>*>(value));
}

std::string Field::set(const std::string& given) const {
  const std::string word = trim(given);
  auto wrong = [&](const std::string& expected) { return str(key, "=", word, ": ", expected); };
  auto in_range = [&](double v) {
    return v >= min && v <= max ? std::string()
           : max >= 1e300       ? wrong(str("must be at least ", number_text(min)))
                                : wrong(str("must be from ", number_text(min), " to ", number_text(max)));
  };
  if (!allowed.empty() && std::find(allowed.begin(), allowed.end(), word) == allowed.end()) {
    std::string near = nearest(word, allowed);
    return wrong(str("allowed are ", joined(allowed, ", "), near.empty() ? "" : str("; did you mean ", near, "?")));
  }
  size_t used = 0;
  try {
    if (auto* i = std::get_if<int64_t*>(&value)) {
      int64_t v = std::stoll(word, &used);
      if (used != word.size()) return wrong("an integer is expected");
      if (auto problem = in_range(static_cast<double>(v)); !problem.empty()) return problem;
      **i = v;
      return "";
    }
    if (auto* d = std::get_if<double*>(&value)) {
      double v = std::stod(word, &used);
      if (used != word.size() || !std::isfinite(v)) return wrong("a number is expected");
      if (auto problem = in_range(v); !problem.empty()) return problem;
      **d = v;
      return "";
    }
  } catch (const std::logic_error&) {
    return wrong(str(std::holds_alternative<int64_t*>(value) ? "an integer" : "a number", " is expected"));
  }
  if (auto* b = std::get_if<bool*>(&value)) {
    if (word != "true" && word != "false") return wrong("true or false is expected");
    **b = word == "true";
  } else if (auto* list = std::get_if<std::vector<std::string>*>(&value)) {
    (*list)->clear();
    std::istringstream in(word);
    for (std::string item; std::getline(in, item, ',');)
      if (!trim(item).empty()) (*list)->push_back(trim(item));
  } else {
    *std::get<std::string*>(value) = word;
  }
  return "";
}

std::vector<Field> fields(Config& c) {
  using Words = std::vector<std::string>;
  const double inf = 1e300;
  return {
      {"run.dir", &c.run.dir, "folder", "where the run lives; empty: runs/<name of the configuration file>", {}},
      {"run.resume", &c.run.resume, "", "auto: go on from the newest checkpoint of run.dir; never: refuse a run folder that has one; or a checkpoint folder", {}},
      {"run.seed", &c.run.seed, "", "of initial weights, shuffling, dropout and sampling", {}, 0, 9e18},
      {"model.path", &c.model.path, "folder", "Hugging Face model folder, or a hub name that is in the local cache", {}},
      {"model.config", &c.model.config, "file", "config.json of a model with random weights, instead of model.path", {}},
      {"model.tokenizer", &c.model.tokenizer, "folder", "folder of tokenizer.json; empty: that of the model", {}},
      {"model.dtype", &c.model.dtype, "", "of the weights; auto: as stored (random weights: float32)", Words{"auto", "float32", "bfloat16", "float16", "float64"}},
      {"model.revision", &c.model.revision, "", "of a hub name", {}},
      {"data.train", &c.data.train, "files", "training records (.jsonl, .json, .txt), comma between; FILE:100 reads the first 100", {}},
      {"data.eval", &c.data.eval, "files", "evaluation records", {}},
      {"data.eval_fraction", &c.data.eval_fraction, "fraction", "of the training records set apart for evaluation, instead of data.eval", {}, 0, 0.9},
      {"data.format", &c.data.format, "", "form of the records; auto: seen from their fields", Words{"auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text"}},
      {"data.prompt_field", &c.data.prompt_field, "", "field that holds the prompt", {}},
      {"data.completion_field", &c.data.completion_field, "", "field that holds the completion", {}},
      {"data.text_field", &c.data.text_field, "", "field that holds the text", {}},
      {"data.learn", &c.data.learn, "", "completion: the assistant's text and its end token; all: every token", Words{"completion", "all"}},
      {"data.max_length", &c.data.max_length, "tokens", "longest sample, and length of a packed row", {}, 2, 1e9},
      {"data.truncation", &c.data.truncation, "", "what becomes of a longer sample; auto: chunk for text, right for others", Words{"auto", "right", "left", "drop", "error", "chunk"}},
      {"data.packing", &c.data.packing, "", "several samples in a row; none sees another", {}},
      {"data.shuffle", &c.data.shuffle, "", "a new order each epoch", {}},
      {"data.chat_template", &c.data.chat_template, "", "a file with Jinja text or a built-in name (alpaca, chatml, gemma, llama3, mistral, phi3); empty: that of the model", {}},
      {"data.template_args", &c.data.template_args, "JSON", "object of further variables for the template", {}},
      {"data.cache", &c.data.cache, "folder", "of tokenised data; empty: ~/.cache/trireme/tokens", {}},
      {"data.show", &c.data.show, "samples", "that prepare prints with their masks", {}, 0, 10000},
      {"task.kind", &c.task.kind, "", "what is learnt", Words{"sft", "pretrain"}},
      {"train.steps", &c.train.steps, "steps", "length of the run (or train.epochs)", {}, 0, 1e12},
      {"train.epochs", &c.train.epochs, "epochs", "length of the run (or train.steps)", {}, 0, 1e9},
      {"train.stop_after", &c.train.stop_after, "steps", "save and exit 75 after so many steps of this start; 0: never", {}, 0, 1e12},
      {"train.dtype", &c.train.dtype, "", "of weights and activations in training; 16-bit keeps fp32 master weights; auto: model.dtype", Words{"auto", "float32", "bfloat16", "float16", "float64"}},
      {"train.micro_batch_size", &c.train.micro_batch_size, "rows", "in one forward and backward of a rank", {}, 1, 1e6},
      {"train.accumulation", &c.train.accumulation, "micro-batches", "a step", {}, 1, 1e6},
      {"train.recompute", &c.train.recompute, "", "activations computed again in backward instead of kept", Words{"none", "selective", "full"}},
      {"train.max_grad_norm", &c.train.max_grad_norm, "", "clip the gradient to this norm; 0: never", {}, 0, inf},
      {"train.gradients", &c.train.gradients, "file", "safetensors file for the first step's gradients", {}},
      {"train.threads", &c.train.threads, "threads", "a rank; 0: cores / ranks on the host", {}, 0, 4096},
      {"optim.kind", &c.optim.kind, "", "", Words{"adamw"}},
      {"optim.lr", &c.optim.lr, "", "highest learning rate", {}, 0, 1e6},
      {"optim.weight_decay", &c.optim.weight_decay, "", "decoupled; matrices only", {}, 0, 1e6},
      {"optim.beta1", &c.optim.beta1, "", "decay of the mean gradient", {}, 0, 0.9999999},
      {"optim.beta2", &c.optim.beta2, "", "decay of the mean squared gradient", {}, 0, 0.9999999},
      {"optim.epsilon", &c.optim.epsilon, "", "", {}, 0, 1},
      {"schedule.kind", &c.schedule.kind, "", "of the learning rate", Words{"constant", "linear", "cosine", "exponential"}},
      {"schedule.warmup_steps", &c.schedule.warmup_steps, "steps", "of linear warm-up; below 1: a fraction of the run", {}, 0, 1e12},
      {"schedule.min_lr", &c.schedule.min_lr, "", "learning rate at the end", {}, 0, 1e6},
      {"lora.rank", &c.lora.rank, "", "of the adapters; 0: all weights are trained", {}, 0, 65536},
      {"lora.alpha", &c.lora.alpha, "", "scale = alpha / rank; 0: alpha = rank", {}, 0, 1e6},
      {"lora.dropout", &c.lora.dropout, "", "of the adapters' input", {}, 0, 0.99},
      {"lora.targets", &c.lora.targets, "", "all-linear, names (q_proj, ...) or one regular expression", {}},
      {"lora.rslora", &c.lora.rslora, "", "scale = alpha / sqrt(rank)", {}},
      {"lora.merge", &c.lora.merge, "", "export: add the adapter to the weights", {}},
      {"lora.path", &c.lora.path, "folder", "PEFT adapter to start from", {}},
      {"quant.base", &c.quant.base, "", "storage of frozen weights", Words{"none"}},
      {"parallel.data", &c.parallel.data, "ranks", "copies of the model; 0: all ranks that are left", {}, 0, 1e6},
      {"parallel.tensor", &c.parallel.tensor, "ranks", "a layer is cut over", {}, 1, 1},
      {"parallel.pipeline", &c.parallel.pipeline, "ranks", "the layers are cut over", {}, 1, 1},
      {"parallel.zero", &c.parallel.zero, "", "stage of sharded state", {}, 0, 0},
      {"comm.bucket_mb", &c.comm.bucket_mb, "MB", "of gradients reduced together", {}, 0.001, 1e6},
      {"comm.overlap", &c.comm.overlap, "", "reduce gradients while backward goes on", {}},
      {"checkpoint.every", &c.checkpoint.every, "steps", "below 1: a fraction of the run; 0: at evaluations and at the end", {}, 0, 1e12},
      {"checkpoint.keep", &c.checkpoint.keep, "checkpoints", "newest that stay, beside the best; 0: all", {}, 0, 1e6},
      {"checkpoint.async", &c.checkpoint.async, "", "write in the background", {}},
      {"eval.every", &c.eval.every, "steps", "below 1: a fraction of the run; 0: at the end only", {}, 0, 1e12},
      {"eval.metric", &c.eval.metric, "", "that decides which model is best", {}},
      {"eval.patience", &c.eval.patience, "evaluations", "without a better metric before training stops; 0: never", {}, 0, 1e9},
      {"eval.restore_best", &c.eval.restore_best, "", "export the best model, not the last", {}},
      {"eval.micro_batch_size", &c.eval.micro_batch_size, "rows", "0: train.micro_batch_size", {}, 0, 1e6},
      {"eval.token_ids", &c.eval.token_ids, "file", "JSON array of arrays of ids to evaluate, instead of data.eval", {}},
      {"eval.logits", &c.eval.logits, "file", "safetensors file for the logits of eval.token_ids", {}},
      {"generate.prompt", &c.generate.prompt, "text", "the prompt (also a plain argument)", {}},
      {"generate.file", &c.generate.file, "file", "of prompts: one a line, text or a JSON string or record", {}},
      {"generate.chat", &c.generate.chat, "", "put the prompt through the chat template", {}},
      {"generate.system", &c.generate.system, "text", "system message of the chat", {}},
      {"generate.max_tokens", &c.generate.max_tokens, "tokens", "at most, for each prompt", {}, 1, 1e9},
      {"generate.temperature", &c.generate.temperature, "", "0: the likeliest token", {}, 0, 1000},
      {"generate.top_k", &c.generate.top_k, "tokens", "to choose from; 0: all", {}, 0, 1e9},
      {"generate.top_p", &c.generate.top_p, "probability", "choose from the likeliest tokens that sum to it", {}, 1e-9, 1},
      {"generate.min_p", &c.generate.min_p, "probability", "relative to the likeliest, below which tokens are not chosen", {}, 0, 1},
      {"generate.repetition_penalty", &c.generate.repetition_penalty, "", "1: none", {}, 0.01, 100},
      {"generate.stop", &c.generate.stop, "list", "strings that end an answer", {}},
      {"generate.format", &c.generate.format, "", "json: one object a prompt", Words{"text", "json"}},
      {"generate.stream", &c.generate.stream, "", "print text as it comes", {}},
      {"tokenize.offsets", &c.tokenize.offsets, "", "print offsets", {}},
      {"tokenize.special", &c.tokenize.special, "", "add special tokens to plain text", {}},
      {"tokenize.generation_prompt", &c.tokenize.generation_prompt, "", "end a chat with the assistant's header", {}},
      {"tokenize.decode", &c.tokenize.decode, "", "lines are arrays of ids", {}},
      {"log.every", &c.log.every, "steps", "between progress lines in a log", {}, 1, 1e9},
      {"log.level", &c.log.level, "", "", Words{"debug", "info", "warn", "error"}},
  };
}

bool CommandLine::is_given(const std::string& key) const {
  return std::find(given.begin(), given.end(), key) != given.end();
}

std::string nearest(const std::string& word, const std::vector<std::string>& known) {
  std::string best;
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

const std::vector<std::pair<std::string, std::string>> kVerbs = {
    {"train", "train or fine-tune a model"},
    {"eval", "loss, perplexity and accuracy; logits to a file"},
    {"generate", "answer prompts"},
    {"prepare", "tokenise data and report its lengths and masks"},
    {"tokenize", "text or records to ids, and back"},
    {"export", "write a checkpoint or adapter as a Hugging Face folder"},
    {"plan", "parameters, memory and steps of a run, without running it"},
    {"doctor", "check this machine"},
};

const std::map<std::string, std::vector<std::string>> kSections = {
    {"train", {"run", "model", "data", "task", "train", "optim", "schedule", "lora", "quant", "parallel", "comm", "checkpoint", "eval", "log"}},
    {"plan", {"run", "model", "data", "task", "train", "optim", "schedule", "lora", "quant", "parallel", "comm", "checkpoint", "eval", "log"}},
    {"eval", {"run", "model", "data", "task", "train", "lora", "parallel", "eval", "log"}},
    {"generate", {"run", "model", "data", "lora", "generate", "log"}},
    {"prepare", {"model", "data", "task", "log"}},
    {"tokenize", {"model", "data", "tokenize", "log"}},
    {"export", {"run", "model", "lora", "log"}},
    {"doctor", {"run", "model", "log"}},
};

std::vector<std::string> known_keys() {
  Config scratch;
  std::vector<std::string> keys;
  for (const auto& f : fields(scratch)) keys.push_back(f.key);
  return keys;
}

std::string unknown_key(const std::string& key) {
  auto known = known_keys();
  std::string near = nearest(key, known);
  if (near.empty()) {  // somebody may know the name but not the section
    for (const auto& k : known)
      if (k.substr(k.find('.') + 1) == key) near = k;
  }
  return str("unknown key ", key, near.empty() ? "" : str("; did you mean ", near, "?"),
             "; trireme VERB --help lists all keys");
}

// One source of settings (the file, or the command line): sets the values and collects what is wrong.
void apply(const std::vector<po::option>& options, const std::string& where, const std::map<std::string, int>& lines,
           std::vector<Field>& table, CommandLine& line, std::vector<std::string>& problems) {
  std::set<std::string> seen;
  for (const auto& option : options) {
    const std::string& key = option.string_key;
    auto place = lines.find(key);
    std::string prefix = where.empty() ? "" : str(where, place == lines.end() ? "" : str(":", place->second), ": ");
    auto field = std::find_if(table.begin(), table.end(), [&](const Field& f) { return f.key == key; });
    if (option.unregistered || field == table.end()) {
      problems.push_back(prefix + unknown_key(key));
      continue;
    }
    if (!seen.insert(key).second) {
      problems.push_back(str(prefix, key, " is given twice"));
      continue;
    }
    std::string problem = field->set(option.value.empty() ? "" : option.value.front());
    if (!problem.empty()) problems.push_back(prefix + problem);
    if (!line.is_given(key)) line.given.push_back(key);
  }
}

}  // namespace

CommandLine parse_command_line(int argc, const char* const* argv, Config& config) {
  CommandLine line;
  std::vector<std::string> problems, words;
  po::options_description known;
  auto table = fields(config);
  for (const auto& f : table) known.add_options()(f.key.c_str(), po::value<std::string>(), "");

  std::vector<std::string> options;
  for (int i = 1; i < argc; ++i) {
    std::string word = argv[i];
    if (word == "--help" || word == "-h") line.help = true;
    else if (word == "--version") line.version = true;
    else if (word == "--dry-run") line.dry_run = true;
    else if (word == "--print-config") line.print_config = true;
    else if (word.rfind("--", 0) == 0 && word.size() > 2) {
      if (word.find('=') == std::string::npos && i + 1 < argc && std::string(argv[i + 1]).rfind("--", 0) != 0)
        word += str("=", argv[++i]);
      if (word.find('=') == std::string::npos) {
        std::string key = word.substr(2);
        bool exists = std::any_of(table.begin(), table.end(), [&](const Field& f) { return f.key == key; });
        problems.push_back(exists ? str("--", key, " needs a value: --", key, "=VALUE") : unknown_key(key));
      } else {
        options.push_back(word);
      }
    } else {
      words.push_back(word);
    }
  }
  if (!words.empty()) {
    line.verb = words[0];
    bool exists = std::any_of(kVerbs.begin(), kVerbs.end(), [&](const auto& v) { return v.first == line.verb; });
    if (!exists) {
      std::vector<std::string> verbs;
      for (const auto& v : kVerbs) verbs.push_back(v.first);
      std::string near = nearest(line.verb, verbs);
      throw ConfigError(str("unknown verb ", line.verb, near.empty() ? "" : str("; did you mean ", near, "?"),
                            "; verbs are ", joined(verbs, ", ")));
    }
    for (size_t i = 1; i < words.size(); ++i) {
      bool is_file = words[i].size() > 4 && words[i].substr(words[i].size() - 4) == ".ini";
      if (is_file && line.config_file.empty()) line.config_file = words[i];
      else line.arguments.push_back(words[i]);
    }
  }

  if (!line.config_file.empty()) {
    std::ifstream file(line.config_file);
    if (!file) {
      problems.push_back(str("cannot read the configuration ", line.config_file, ": ", errno_text()));
    } else {
      // Boost's parser knows no line numbers: a pass of our own tells where each key stands.
      std::map<std::string, int> lines;
      std::string section, text;
      int number = 0;
      while (std::getline(file, text)) {
        ++number;
        text = trim(text.substr(0, text.find('#')));
        if (text.size() > 2 && text.front() == '[' && text.back() == ']') section = text.substr(1, text.size() - 2) + ".";
        else if (size_t eq = text.find('='); eq != std::string::npos) lines.emplace(section + trim(text.substr(0, eq)), number);
        else if (!text.empty()) problems.push_back(str(line.config_file, ":", number, ": not 'key = value' nor '[section]': ", text));
      }
      file.clear();
      file.seekg(0);
      try {
        apply(po::parse_config_file(file, known, true).options, line.config_file, lines, table, line, problems);
      } catch (const po::error& error) {
        if (problems.empty()) problems.push_back(str(line.config_file, ": ", error.what()));
      }
    }
  }
  try {
    auto style = po::command_line_style::unix_style & ~po::command_line_style::allow_guessing;
    auto parsed = po::command_line_parser(options).options(known).style(style).allow_unregistered().run();
    apply(parsed.options, "", {}, table, line, problems);
  } catch (const po::error& error) {
    problems.push_back(error.what());
  }
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
    out += str(f.key.substr(f.key.find('.') + 1), " = ", f.text(), "\n");
  }
  return out;
}

std::string help_text(const std::string& verb) {
  if (verb.empty()) {
    std::string out = "trireme VERB [CONFIG.ini] [--section.key=value ...] [--dry-run] [--print-config] [--help] [--version]\n\n";
    for (const auto& [name, what] : kVerbs) out += str("  ", name, std::string(10 - name.size(), ' '), what, "\n");
    return out + "\ntrireme VERB --help lists the keys of a verb.\n";
  }
  std::string out;
  for (const auto& [name, what] : kVerbs)
    if (name == verb) out = str("trireme ", name, " [CONFIG.ini] [--section.key=value ...]: ", what, "\n\n");
  Config defaults;
  const auto& sections = kSections.at(verb);
  for (const auto& f : fields(defaults)) {
    if (std::find(sections.begin(), sections.end(), f.key.substr(0, f.key.find('.'))) == sections.end()) continue;
    out += str("  --", f.key, "=", f.text().empty() ? f.unit.empty() ? f.type() : f.unit : f.text(), "\n      ", f.type(),
               f.unit.empty() ? "" : str(", ", f.unit), f.meaning.empty() ? "" : ": ", f.meaning,
               f.allowed.empty() ? "" : str(" [", joined(f.allowed, " | "), "]"), "\n");
  }
  return out;
}

}  // namespace trireme
