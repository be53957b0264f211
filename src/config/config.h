// Every knob of Trireme, declared once: a struct member here and one line in fields() (keys.cpp) with key, unit, allowed
// values and meaning. Command line over file over default.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <variant>
#include <vector>

namespace trireme {

struct Config {
  struct {
    std::string dir, resume = "auto", device = "auto";
    int64_t seed = 0;
  } run;
  struct {
    std::string path, config, tokenizer, dtype = "auto", revision = "main", embedding = "device";
  } model;
  struct {
    std::vector<std::string> train, eval;
    double eval_fraction = 0;
    std::string format = "auto", prompt_field, completion_field, text_field, separator, learn = "completion", on_error = "stop";
    int64_t max_length = 2048;
    std::string truncation = "auto";
    bool packing = false, shuffle = true;
    std::string chat_template, template_args, cache;
    int64_t show = 0;
  } data;
  struct {
    std::string kind = "sft";
  } task;
  struct {
    int64_t steps = 0;
    double epochs = 0;
    int64_t stop_after = 0;
    std::string dtype = "auto";
    int64_t micro_batch_size = 1, accumulation = 1;
    std::string recompute = "none";
    int64_t mlp_tokens = 0;
    bool offload_activations = false, tf32 = false, deterministic = true;
    double max_grad_norm = 1.0, label_smoothing = 0, z_loss = 0;
    std::string gradients;
    int64_t threads = 0;
  } train;
  struct {
    std::string kind = "adamw";
    double lr = 2e-4, weight_decay = 0.0, beta1 = 0.9, beta2 = 0.999, epsilon = 1e-8, momentum = 0.9;
    bool masters = true, offload = false, paged = false;
  } optim;
  struct {
    std::string kind = "linear";
    double warmup_steps = 0, min_lr = 0;
  } schedule;
  struct {
    int64_t rank = 0;
    double alpha = 0, dropout = 0;
    std::vector<std::string> targets = {"all-linear"};
    bool rslora = false, dora = false, merge = false, requantize = false;
    std::string init = "random";
    int64_t loftq_iterations = 1;
    std::string path;
  } lora;
  struct {
    std::string base = "none";
    int64_t block_size = 0;
    std::string double_quant = "auto", compute_dtype = "auto";
    double threshold = -1;
    std::vector<std::string> skip;
  } quant;
  struct {
    int64_t data = 0, tensor = 1, pipeline = 1, virtual_stages = 0, zero = 0, shard_within = 0;
    std::string schedule = "1f1b", reduce = "step", order = "pipeline-data-tensor";
  } parallel;
  struct {
    double bucket_mb = 8, timeout_s = 1800;
    bool overlap = true, share_device = false;
  } comm;
  struct {
    double every = 0;
    int64_t keep = 2;
    bool async = true;
  } checkpoint;
  struct {
    double every = 0;
    std::string metric = "loss";
    int64_t patience = 0, micro_batch_size = 0;
    bool restore_best = true;
    std::string token_ids, logits;
  } eval;
  struct {
    std::string prompt, file, format = "text", system;
    bool chat = false, stream = true, graphs = true;
    int64_t max_tokens = 128, top_k = 0;
    double temperature = 0, top_p = 1, min_p = 0, repetition_penalty = 1;
    std::vector<std::string> stop;
  } generate;
  struct {
    bool offsets = false, special = true, generation_prompt = false, decode = false;
  } tokenize;
  struct {
    int64_t every = 1;
    std::string level = "info";
    bool trace = false;
  } log;
  struct {
    int64_t ranks = 0;
    double memory_gb = 0;
  } plan;
};

// A key of the configuration, bound to the member that holds its value.
struct Field {
  std::string key;   // section.name
  std::variant<std::string*, int64_t*, double*, bool*, std::vector<std::string>*> value;
  std::string unit;  // "" where it has none
  std::string meaning;
  std::vector<std::string> allowed;  // empty: any value of the type
  double min = -1e300, max = 1e300;  // of numbers

  const char* type() const;    // text, integer, number, true|false, list
  std::string text() const;    // the value as the INI file has it
  // Sets the value; returns what is wrong with `text`, or "".
  std::string set(const std::string& text) const;
};

// All keys, in the order of the printed configuration. The pointers go into `config`.
std::vector<Field> fields(Config& config);

struct CommandLine {
  std::string verb, config_file;
  std::vector<std::string> arguments;  // words that are no option, after the file
  bool help = false, version = false, dry_run = false, print_config = false;
  std::vector<std::string> given;      // keys that file or command line set
  bool is_given(const std::string& key) const;
};

// Reads `trireme VERB [CONFIG.ini] [--section.key=value ...]` into config. The word after the verb that ends in .ini is
// the file: lines `[section]` and `key = value`; '#' at the beginning of a line or after a space begins a comment, ';' a line of it; a value in
// double quotes is a JSON string. Lists have commas between their items, "\," is a comma within one. ConfigError lists everything that is wrong, with file and line: unknown keys and
// abbreviations (with the nearest known key), values of a wrong type or out of range, keys given twice, keys without a
// value, words that no verb takes, a file that cannot be read; and what `further` finds in the values (it sees what was
// found before it).
using FurtherCheck = std::function<void(const CommandLine& line, std::vector<std::string>& problems)>;
CommandLine parse_command_line(int argc, const char* const* argv, Config& config, const FurtherCheck& further = {});

// The configuration as a commented INI file that reads back to the same values.
std::string config_to_ini(Config config, bool comments);

// --help of a verb: its usage and every key of its sections. Empty verb: the list of verbs.
std::string help_text(const std::string& verb);

// The known word that `word` begins, the shortest, else the nearest by edit distance; "" where none is near.
std::string nearest(const std::string& word, const std::vector<std::string>& known);

std::string trim(const std::string& text);  // without spaces, tabs and carriage returns at both ends
std::string joined(const std::vector<std::string>& words, const char* between = ",");

}  // namespace trireme
