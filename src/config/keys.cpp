// The table of keys, and how a key's value is read and printed.
#include <algorithm>
#include <cmath>
#include <sstream>

#include "base/check.h"
#include "config/config.h"

namespace trireme {
namespace {

std::string number_text(double v) {
  for (int digits = 6; digits < 17; ++digits) {
    std::ostringstream out;
    out.precision(digits);
    out << v;
    if (std::stod(out.str()) == v) return out.str();
  }
  std::ostringstream out;
  out.precision(17);
  out << v;
  return out.str();
}

}  // namespace

std::string trim(const std::string& text) {
  size_t begin = text.find_first_not_of(" \t\r"), end = text.find_last_not_of(" \t\r");
  return begin == std::string::npos ? "" : text.substr(begin, end - begin + 1);
}

std::string joined(const std::vector<std::string>& words, const char* between) {
  std::string out;
  for (const auto& word : words) out += (out.empty() ? "" : between) + word;
  return out;
}

namespace {

// The items between commas; "\\," is a comma within one.
std::vector<std::string> items_of(const std::string& text) {
  std::vector<std::string> items(1);
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] == ',') items.emplace_back();
    else if (text.compare(i, 2, "\\,") == 0) items.back() += text[++i];
    else items.back() += text[i];
  }
  for (auto& item : items) item = trim(item);
  std::erase(items, "");
  return items;
}

}  // namespace

namespace {

// Whether `word` is what `allowed` says: itself, or where that ends in _N the same with a number from 1 to 999 in the place of N.
bool is_like(const std::string& word, const std::string& allowed) {
  if (!allowed.ends_with("_N")) return word == allowed;
  const size_t begin = allowed.size() - 1, digits = word.size() - std::min(begin, word.size());
  return digits >= 1 && digits <= 3 && word.starts_with(allowed.substr(0, begin)) && word[begin] != '0' && word.find_first_not_of("0123456789", begin) == std::string::npos;
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
  std::vector<std::string> items = *std::get<std::vector<std::string>*>(value);
  for (auto& item : items)
    for (size_t at = item.find(','); at != std::string::npos; at = item.find(',', at + 2)) item.insert(at, "\\");
  return joined(items);
}

std::string Field::set(const std::string& given) const {
  constexpr size_t kShown = 80;
  const std::string word = std::holds_alternative<std::string*>(value) ? given : trim(given);
  auto wrong = [&](const std::string& expected) {
    return str(key, "=", word.substr(0, kShown), word.size() > kShown ? "..." : "", ": ", expected);
  };
  auto in_range = [&](double v) {
    return v >= min && v <= max ? std::string()
           : max >= 1e300       ? wrong(str("must be at least ", number_text(min)))
                                : wrong(str("must be from ", number_text(min), " to ", number_text(max)));
  };
  if (!allowed.empty() && std::none_of(allowed.begin(), allowed.end(), [&](const std::string& a) { return is_like(word, a); })) {
    // Nearer by its letters is the CPU, which is not meant.
    std::string near = key == "run.device" && (word == "gpu" || word == "GPU") ? "cuda" : std::holds_alternative<std::string*>(value) ? nearest(word, allowed) : "";
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
      const bool decimal = word.find_first_not_of("0123456789+-.eE") == std::string::npos;  // stod knows 0x10, inf and nan
      if (used != word.size() || !decimal || !std::isfinite(v)) return wrong("a number is expected");
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
    **list = items_of(word);
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
      {"run.resume", &c.run.resume, "", "auto: go on from the newest checkpoint of run.dir; never: refuse a run folder that has one; or a checkpoint folder to begin at, what is later in run.dir being set aside", {}},
      {"run.device", &c.run.device, "", "that computes; auto: CUDA where a device is seen, one a rank, else the CPU", Words{"auto", "cpu", "cuda"}},
      {"run.seed", &c.run.seed, "", "of initial weights, shuffling, dropout and sampling", {}, 0, 9e18},
      {"model.path", &c.model.path, "folder", "Hugging Face model folder, or a hub name that is in the local cache", {}},
      {"model.config", &c.model.config, "file", "config.json of a model with random weights, instead of model.path", {}},
      {"model.tokenizer", &c.model.tokenizer, "folder", "folder of tokenizer.json; empty: that of the model", {}},
      {"model.dtype", &c.model.dtype, "", "of the weights; auto: as stored (random weights: float32)", Words{"auto", "float32", "bfloat16", "float16", "float64"}},
      {"model.revision", &c.model.revision, "", "of a hub name", {}},
      {"model.embedding", &c.model.embedding, "", "where the frozen table of the tokens' vectors is: host leaves it in host memory and sends a batch's rows to the device", Words{"device", "host"}},
      {"data.train", &c.data.train, "files", "training records (.jsonl, .json, .txt), comma between; FILE:100 reads the first 100", {}},
      {"data.eval", &c.data.eval, "files", "evaluation records", {}},
      {"data.eval_fraction", &c.data.eval_fraction, "fraction", "of the training records set apart for evaluation, instead of data.eval", {}, 0, 0.9},
      {"data.format", &c.data.format, "", "form of the records; auto: seen from their fields", Words{"auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text"}},
      {"data.prompt_field", &c.data.prompt_field, "", "field that holds the prompt", {}},
      {"data.completion_field", &c.data.completion_field, "", "field that holds the completion", {}},
      {"data.text_field", &c.data.text_field, "", "field that holds the text", {}},
      {"data.separator", &c.data.separator, "", "text between prompt and completion where there is no chat template, such as \"\\n\"", {}},
      {"data.learn", &c.data.learn, "", "completion: the assistant's text and its end token; all: every token, as task.kind=pretrain always does", Words{"completion", "all"}},
      {"data.max_length", &c.data.max_length, "tokens", "longest sample, and length of a packed row", {}, 2, 1e9},
      {"data.truncation", &c.data.truncation, "", "what becomes of a longer sample; auto: chunk for text, right for others", Words{"auto", "right", "left", "drop", "error", "chunk"}},
      {"data.on_error", &c.data.on_error, "", "a record that cannot be used ends the run, or is left out, counted and said", Words{"stop", "skip"}},
      {"data.packing", &c.data.packing, "", "several samples in a row; none sees another", {}},
      {"data.shuffle", &c.data.shuffle, "", "a new order each epoch", {}},
      {"data.chat_template", &c.data.chat_template, "", "a file with Jinja text or a built-in name (alpaca, chatml, gemma, llama3, mistral, phi3); empty: that of the model", {}},
      {"data.template_args", &c.data.template_args, "JSON", "object of further variables for the template; {\"date_string\": ...} keeps the day out of templates that write it", {}},
      {"data.cache", &c.data.cache, "folder", "of tokenised data; empty: ~/.cache/trireme/tokens; what no run has used for 30 days is deleted", {}},
      {"data.show", &c.data.show, "samples", "that prepare prints with their masks", {}, 0, 10000},
      {"task.kind", &c.task.kind, "", "sft: learn what data.learn says; pretrain: learn every token", Words{"sft", "pretrain"}},
      {"train.steps", &c.train.steps, "steps", "length of the run (or train.epochs)", {}, 0, 1e12},
      {"train.epochs", &c.train.epochs, "epochs", "length of the run (or train.steps)", {}, 0, 1e9},
      {"train.stop_after", &c.train.stop_after, "steps", "save and exit 75 after so many steps of this start; 0: never", {}, 0, 1e12},
      {"train.dtype", &c.train.dtype, "", "of weights and activations in training; 16-bit keeps fp32 master weights; auto: model.dtype, but bfloat16 for weights stored in float16", Words{"auto", "float32", "bfloat16", "float16", "float64"}},
      {"train.micro_batch_size", &c.train.micro_batch_size, "rows", "in one forward and backward of a rank", {}, 1, 1e6},
      {"train.accumulation", &c.train.accumulation, "micro-batches", "a step", {}, 1, 1e6},
      {"train.recompute", &c.train.recompute, "", "activations computed again in backward instead of kept", Words{"none", "selective", "full"}},
      {"train.offload_activations", &c.train.offload_activations, "", "with train.recompute=full what is kept between the blocks is in host memory, for weights on a device", {}},
      {"train.mlp_tokens", &c.train.mlp_tokens, "tokens", "a block's MLP goes through its tokens in pieces of so many, computed again in backward; 0: all at once", {}, 0, 1e9},
      {"train.tf32", &c.train.tf32, "", "float32 products on a device round what they multiply to 10 bits, several times as fast", {}},
      {"train.deterministic", &c.train.deterministic, "", "a device adds up in one order, and a step that is repeated has the same bits; false: attention's backward is faster", {}},
      {"train.max_grad_norm", &c.train.max_grad_norm, "", "clip the gradient to this norm; 0: never", {}, 0, inf},
      {"train.label_smoothing", &c.train.label_smoothing, "fraction", "of the target that training shares out evenly over all tokens; evaluation reports the plain loss", {}, 0, 0.99},
      {"train.z_loss", &c.train.z_loss, "", "times the square of the logits' log-sum-exp is added to a token's training loss, which keeps logits small; evaluation reports the plain loss", {}, 0, 1e6},
      {"train.gradients", &c.train.gradients, "file", "safetensors file for the first step's gradients, in float32", {}},
      {"train.threads", &c.train.threads, "threads", "a rank; 0: cores / ranks on the host", {}, 0, 4096},
      {"optim.kind", &c.optim.kind, "", "rule of the update: AdamW; AdamW with moments of 8 bits; Adafactor, whose learning rate is relative to the size of the weights; SGD with momentum; Lion, for learning rates of a third to a tenth of AdamW's", Words{"adamw", "adamw8bit", "adafactor", "sgd", "lion"}},
      {"optim.lr", &c.optim.lr, "", "highest learning rate", {}, 0, 1e6},
      {"optim.weight_decay", &c.optim.weight_decay, "", "decoupled, with optim.kind=sgd a part of the gradient; matrices only", {}, 0, 1e6},
      {"optim.beta1", &c.optim.beta1, "", "decay of the mean gradient", {}, 0, 0.9999999},
      {"optim.beta2", &c.optim.beta2, "", "decay of the mean squared gradient", {}, 0, 0.9999999},
      {"optim.epsilon", &c.optim.epsilon, "", "added to the root of the mean squared gradient", {}, 1e-30, 1},
      {"optim.momentum", &c.optim.momentum, "", "of optim.kind=sgd", {}, 0, 0.9999999},
      {"optim.masters", &c.optim.masters, "", "bfloat16 weights have a copy in float32 that is updated in their place; false: they do without, and round at random to one of their two neighbours", {}},
      {"optim.offload", &c.optim.offload, "", "moments and masters live in host memory, where the update is computed, for weights on a device", {}},
      {"optim.paged", &c.optim.paged, "", "moments and masters may leave a device that is full for host memory, and are back ahead of their update; of no effect on the CPU", {}},
      {"schedule.kind", &c.schedule.kind, "", "of the learning rate", Words{"constant", "linear", "cosine", "exponential"}},
      {"schedule.warmup_steps", &c.schedule.warmup_steps, "steps", "of linear warm-up; below 1: a fraction of the run", {}, 0, 1e12},
      {"schedule.min_lr", &c.schedule.min_lr, "", "learning rate at the end", {}, 0, 1e6},
      {"lora.rank", &c.lora.rank, "", "of the adapters; 0: all weights are trained", {}, 0, 65536},
      {"lora.alpha", &c.lora.alpha, "", "scale = alpha / rank; 0: alpha = rank", {}, 0, 1e6},
      {"lora.dropout", &c.lora.dropout, "", "of the adapters' input", {}, 0, 0.99},
      {"lora.targets", &c.lora.targets, "", "all-linear, names (q_proj, ...) or one regular expression", {}},
      {"lora.rslora", &c.lora.rslora, "", "scale = alpha / sqrt(rank)", {}},
      {"lora.dora", &c.lora.dora, "", "the norms of the adapted weight's rows are trained apart from their directions (DoRA)", {}},
      {"lora.init", &c.lora.init, "", "what adapters begin with; pissa: the largest singular directions of the weight, which the base then lacks; pissa_niter_N: those nearly, by N iterations, in a fraction of the time; loftq: those of what nf4 or fp4 lose of it", Words{"random", "pissa", "pissa_niter_N", "loftq"}},
      {"lora.loftq_iterations", &c.lora.loftq_iterations, "", "of quantizing and decomposing, with lora.init=loftq", {}, 1, 100},
      {"lora.merge", &c.lora.merge, "", "export: add the adapter to the weights", {}},
      {"lora.requantize", &c.lora.requantize, "", "export with lora.merge: the merged weights in quant.base again, and what that loses", {}},
      {"lora.path", &c.lora.path, "folder", "PEFT adapter to start from", {}},
      {"quant.base", &c.quant.base, "", "form of the frozen weights of linear layers; none: as model.path has them, which may be nf4, fp4 or int8; dense: the values of such; nf4, fp4: 4 bits in blocks (QLoRA); int8: rows of 8 bits (LLM.int8()); fp8: products of 8-bit floating point, on a device of compute capability 8.9 or newer", Words{"none", "dense", "nf4", "fp4", "int8", "fp8"}},
      {"quant.block_size", &c.quant.block_size, "values", "that share a scale, with nf4 and fp4; 0: 64, or what the model's folder has", Words{"0", "32", "64", "128", "256", "512", "1024", "2048", "4096"}},
      {"quant.double", &c.quant.double_quant, "", "the scales of nf4 and fp4 in 8 bits too: 4.127 bits a weight, not 4.5; auto: true, or as the model's folder has them", Words{"auto", "true", "false"}},
      {"quant.compute_dtype", &c.quant.compute_dtype, "", "of the products with weights in nf4 and fp4; auto: train.dtype", Words{"auto", "float32", "bfloat16", "float16"}},
      {"quant.threshold", &c.quant.threshold, "", "with int8: columns of inputs with a value so large are multiplied in 16 bits; 0: none; -1: 6, or what the model's folder says", {}, -1, 1e6},
      {"quant.skip", &c.quant.skip, "", "layers whose weights stay as they are: names (down_proj, ...) or one regular expression", {}},
      {"parallel.data", &c.parallel.data, "ranks", "copies of the model; 0: all ranks that are left", {}, 0, 1e6},
      {"parallel.tensor", &c.parallel.tensor, "ranks", "that a layer's matrices are cut over, and between them the rows; neighbours in rank", {}, 1, 1e6},
      {"parallel.pipeline", &c.parallel.pipeline, "ranks", "that the layers are dealt out over; micro-batches pass through them", {}, 1, 1024},
      {"parallel.order", &c.parallel.order, "", "of the axes, the outermost first; neighbours in rank differ in the last",
       Words{"pipeline-data-tensor", "pipeline-tensor-data", "data-pipeline-tensor", "data-tensor-pipeline", "tensor-pipeline-data", "tensor-data-pipeline"}},
      {"parallel.schedule", &c.parallel.schedule, "", "order of forwards and backwards in the pipeline", Words{"1f1b", "gpipe", "interleaved", "zb-h1", "zb-v"}},
      {"parallel.virtual_stages", &c.parallel.virtual_stages, "chunks", "of layers that a rank of the pipeline holds; 0: 2 for interleaved and zb-v, else 1", {}, 0, 64},
      {"parallel.zero", &c.parallel.zero, "", "what copies share out among them: 1 optimizer state, 2 gradients too, 3 weights too", {}, 0, 3},
      {"parallel.shard_within", &c.parallel.shard_within, "copies", "with parallel.zero: neighbours that share out, such as those of a host; the others have the same again; 0: all share out", {}, 0, 1e6},
      {"parallel.reduce", &c.parallel.reduce, "", "when gradients are summed over ranks; micro_batch: with parallel.zero 2 and 3, saves memory under accumulation, rounds otherwise", Words{"step", "micro_batch"}},
      {"comm.bucket_mb", &c.comm.bucket_mb, "MB", "of gradients reduced together", {}, 0.001, 1e6},
      {"comm.timeout_s", &c.comm.timeout_s, "seconds", "that ranks wait for one another before the job is ended, ten times that where they save; 0: for ever", {}, 0, 1e9},
      {"comm.overlap", &c.comm.overlap, "", "exchange gradients, and weights with parallel.zero=3, while the ranks compute", {}},
      {"comm.share_device", &c.comm.share_device, "", "ranks of one host may use the same GPU: for tests, slow", {}},
      {"checkpoint.every", &c.checkpoint.every, "steps", "below 1: a fraction of the run; 0: at evaluations and at the end", {}, 0, 1e12},
      {"checkpoint.keep", &c.checkpoint.keep, "checkpoints", "newest that stay, beside the best; 0: all", {}, 0, 1e6},
      {"checkpoint.async", &c.checkpoint.async, "", "write in the background, from a copy in memory", {}},
      {"eval.every", &c.eval.every, "steps", "below 1: a fraction of the run; 0: at the end only", {}, 0, 1e12},
      {"eval.metric", &c.eval.metric, "", "that decides which model is best", {}},
      {"eval.patience", &c.eval.patience, "evaluations", "without a better metric before training stops; 0: never", {}, 0, 1e9},
      {"eval.restore_best", &c.eval.restore_best, "", "export the best model, not the last", {}},
      {"eval.micro_batch_size", &c.eval.micro_batch_size, "rows", "in one forward of a rank; 0: as many as have 2,048 tokens together", {}, 0, 1e6},
      {"eval.token_ids", &c.eval.token_ids, "file", "JSON array of arrays of ids to evaluate, instead of data.eval", {}},
      {"eval.logits", &c.eval.logits, "file", "safetensors file for the logits of eval.token_ids", {}},
      {"generate.prompt", &c.generate.prompt, "text", "the prompt (also a plain argument)", {}},
      {"generate.file", &c.generate.file, "file", "of prompts: one a line, text or a JSON string or record", {}},
      {"generate.chat", &c.generate.chat, "", "ask a text as a user's message, through the chat template; records are asked in the form they are trained in", {}},
      {"generate.system", &c.generate.system, "text", "system message of the chat", {}},
      {"generate.max_tokens", &c.generate.max_tokens, "tokens", "at most, for each prompt", {}, 1, 1e9},
      {"generate.temperature", &c.generate.temperature, "", "0: the likeliest token", {}, 0, 1000},
      {"generate.top_k", &c.generate.top_k, "tokens", "to choose from; 0: all", {}, 0, 1e9},
      {"generate.top_p", &c.generate.top_p, "probability", "choose from the likeliest tokens that sum to it", {}, 1e-9, 1},
      {"generate.min_p", &c.generate.min_p, "probability", "relative to the likeliest, below which tokens are not chosen", {}, 0, 1},
      {"generate.repetition_penalty", &c.generate.repetition_penalty, "", "1: none", {}, 0.01, 100},
      {"generate.stop", &c.generate.stop, "list", "strings that end an answer", {}},
      {"generate.format", &c.generate.format, "", "text: the answers alone; json: one object a prompt", Words{"text", "json"}},
      {"generate.stream", &c.generate.stream, "", "print text as it comes", {}},
      {"generate.graphs", &c.generate.graphs, "", "on a device: record what it does for a token once (a CUDA graph) and launch that for the next ones; not with int8, whose outliers the host looks for", {}},
      {"tokenize.offsets", &c.tokenize.offsets, "", "print offsets", {}},
      {"tokenize.special", &c.tokenize.special, "", "add special tokens to plain text", {}},
      {"tokenize.generation_prompt", &c.tokenize.generation_prompt, "", "end a chat with the assistant's header", {}},
      {"tokenize.decode", &c.tokenize.decode, "", "lines are arrays of ids", {}},
      {"log.every", &c.log.every, "steps", "between progress lines in a log", {}, 1, 1e9},
      {"log.level", &c.log.level, "", "least that is printed", Words{"info", "warn", "error"}},
      {"log.trace", &c.log.trace, "", "write trace/rank-N.json: when each rank computes, communicates and waits (Chrome, Perfetto)", {}},
      {"plan.ranks", &c.plan.ranks, "ranks", "to plan for, none of which is started; rows are full then, as without data.train; 0: those of this job", {}, 0, 1e6},
      {"plan.memory_gb", &c.plan.memory_gb, "GB", "(10^9 bytes) that a rank may use: of its device, or with run.device=cpu of its host; 0: what is free here", {}, 0, 1e9},
  };
}

}  // namespace trireme
