#include "data/dataset.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "base/check.h"
#include "base/counted.h"
#include "base/hash.h"
#include "base/random.h"
#include "data/packing.h"

namespace trireme {
namespace {

enum class Truncation { kRight, kLeft, kDrop, kError, kChunk };

Truncation truncation_of(const DataOptions& options, DataForm form) {
  if (options.truncation == "right") return Truncation::kRight;
  if (options.truncation == "left") return Truncation::kLeft;
  if (options.truncation == "drop") return Truncation::kDrop;
  if (options.truncation == "error") return Truncation::kError;
  if (options.truncation == "chunk") return Truncation::kChunk;
  return form == DataForm::kText || form == DataForm::kTextFile ? Truncation::kChunk : Truncation::kRight;
}

int64_t num_targets(const TokenFile& file, const Sample& s) {
  int64_t begin = file.begin(s.record), end = file.end(s.record);
  if (s.begin == begin && s.end == end) return file.targets(s.record);
  if (file.targets(s.record) == end - begin - 1) return s.end - s.begin - (s.goes_on ? 0 : 1);  // all are learnt
  const uint8_t* learnt = file.learnt();
  return std::count(learnt + s.begin + 1, learnt + s.end + (s.goes_on ? 1 : 0), uint8_t{1});
}

// Whether a record of the training files, or a text file's chunk (from 1), belongs to the evaluation split.
bool held_out(const DataOptions& options, int64_t record, int64_t chunk = 0) {
  auto index = static_cast<uint64_t>(record) + (static_cast<uint64_t>(chunk) << 40);
  return random_uniform(options.seed, RandomStream::kSplit, index) < options.eval_fraction;
}

std::vector<DataFile> files_of(const DataOptions& options, Split split) {
  bool eval_files = split == Split::kEval && !options.eval.empty();
  std::vector<DataFile> files;
  const auto& texts = eval_files ? options.eval : options.train;
  for (const std::string& text : texts) files.push_back(parse_data_file(text, eval_files ? "data.eval" : "data.train", texts.size()));
  return files;
}

bool has_split(const DataOptions& options, Split split) {
  return split == Split::kTrain || !options.eval.empty() || options.eval_fraction > 0;
}

void check_ids(const TokenFile& file, int64_t rows) {
  if (rows <= 0 || file.largest_id() < rows) return;
  for (int64_t r = 0; r < file.num_records(); ++r)
    for (int64_t t = file.begin(r); t < file.end(r); ++t)
      if (file.tokens()[t] < 0 || file.tokens()[t] >= rows)
        throw DataError(str(file.source(r), ": token id ", file.tokens()[t], " is outside the model's embedding of ", rows,
                            " rows; tokenizer and model do not belong together"));
}

std::string percent(int64_t part, int64_t whole) {
  char text[32];
  snprintf(text, sizeof text, "%.1f %%", whole > 0 ? 100.0 * static_cast<double>(part) / static_cast<double>(whole) : 0.0);
  return text;
}

}  // namespace

void DataOptions::check() const {
  auto one_of = [](const char* key, const std::string& value, std::initializer_list<const char*> allowed) {
    std::string names;
    for (const char* name : allowed) {
      if (value == name) return;
      names += str(names.empty() ? "" : ", ", name);
    }
    throw ConfigError(str(key, "=", value, " is not known; allowed are ", names));
  };
  if (train.empty()) throw ConfigError("data.train names no file; give one or more files of records");
  one_of("data.learn", learn, {"completion", "all"});
  one_of("data.on_error", on_error, {"stop", "skip"});
  one_of("data.truncation", truncation, {"auto", "right", "left", "drop", "error", "chunk"});
  record_options(*this);
  if (max_length < 2) throw ConfigError(str("data.max_length=", max_length, " is too short; at least 2 tokens are needed to learn one"));
  if (!(eval_fraction >= 0 && eval_fraction < 1))
    throw ConfigError(str("data.eval_fraction=", eval_fraction, " is not a fraction; allowed is 0 up to, but not, 1"));
  if (eval_fraction > 0 && !eval.empty())
    throw ConfigError("data.eval and data.eval_fraction exclude each other; evaluation data is its own files, or a part of "
                      "data.train");
  for (Split split : {Split::kTrain, Split::kEval}) files_of(*this, split);
}

RecordOptions record_options(const DataOptions& options) {
  RecordOptions records{parse_data_form(options.format), options.prompt_field, options.completion_field, options.text_field};
  records.check();
  return records;
}

EncodeOptions encode_options(const DataOptions& options) {
  return {options.learn == "all", options.bos_id, options.eos_id, options.embedding_rows, options.template_args,
          options.separator};
}

std::string DatasetCounts::text() const {
  std::string s = str(counted(records, "record"), ", ", counted(samples, "sample"), " in ", counted(rows, "row"), ", ", counted(tokens, "token"),
                      ", ", learnt, " learnt (", percent(learnt, tokens), ")");
  if (truncated) s += str("; ", counted(truncated, "sample"), " (", percent(truncated, samples), ") truncated, ", counted(tokens_cut, "token"), " cut");
  if (chunked) s += str("; ", counted(chunked, "record"), " cut into several samples");
  if (too_long) s += str("; ", counted(too_long, "record"), " left out: longer than data.max_length");
  if (skipped) s += str("; ", counted(skipped, "record"), " left out: cannot be used (data.on_error=skip)");
  if (nothing_left) s += str("; ", counted(nothing_left, "sample"), " left out: nothing to learn after truncation");
  return s;
}

std::string Dataset::prepare(const DataOptions& options, Split split, const Tokenizer& tokenizer,
                             const ChatTemplate* chat_template, const TokenProgress& progress) {
  options.check();
  if (!has_split(options, split)) return {};
  TokenFileRequest request;
  request.files = files_of(options, split);
  request.records = record_options(options);
  request.encode = encode_options(options);
  request.skip_bad = options.on_error == "skip";
  request.cache_folder = options.cache;
  request.num_threads = options.num_threads;
  return make_token_file(request, tokenizer, chat_template, progress);
}

std::shared_ptr<const Dataset> Dataset::open(const DataOptions& options, Split split, const std::string& token_file) {
  options.check();
  auto dataset = std::make_shared<Dataset>();
  std::vector<std::string> names;  // the token file's are those of whoever made it, of another copy of the data perhaps
  for (const DataFile& data : files_of(options, split)) names.push_back(data.path);
  auto file = std::make_shared<TokenFile>(token_file, std::move(names));
  dataset->file_ = file;
  check_ids(*file, options.embedding_rows);
  DatasetCounts& counts = dataset->counts_;
  const int64_t limit = options.max_length;
  bool divided = options.eval.empty() && options.eval_fraction > 0;

  auto add = [&](const Sample& sample) {
    int64_t learnt = num_targets(*file, sample);
    if (learnt == 0) return false;
    counts.tokens += sample.end - sample.begin;
    counts.learnt += learnt;
    dataset->samples_.push_back(sample);
    return true;
  };
  int64_t divided_from = file->num_records();
  for (int64_t r = 0; r < file->num_records(); ++r) {
    int64_t begin = file->begin(r), end = file->end(r), length = end - begin;
    Truncation how = truncation_of(options, file->form(r));
    // A text file is divided by its chunks: it is one record, and most often the only one.
    bool by_chunk = divided && file->form(r) == DataForm::kTextFile && how == Truncation::kChunk && length > limit;
    if (divided && !by_chunk && held_out(options, r) != (split == Split::kEval)) continue;
    ++counts.records;
    divided_from -= by_chunk;
    dataset->records_.push_back(r);
    if (length <= limit) {
      counts.nothing_left += !add({begin, end, r, false});
    } else if (how == Truncation::kError) {
      throw DataError(str(file->source(r), ": the record has ", length, " tokens, more than data.max_length=", limit,
                          "; raise it or choose data.truncation=right, left, drop or chunk"));
    } else if (how == Truncation::kDrop) {
      ++counts.too_long;
    } else if (how == Truncation::kChunk) {
      ++counts.chunked;
      // A last token alone is a target of the piece before it already.
      for (int64_t at = begin, chunk = 1; end - at > 1; at += limit, ++chunk) {
        divided_from += by_chunk;
        if (!by_chunk || held_out(options, r, chunk) == (split == Split::kEval))
          counts.nothing_left += !add({at, std::min(at + limit, end), r, at + limit < end});
      }
    } else {
      int64_t first = how == Truncation::kRight ? begin : end - limit;
      if (add({first, first + limit, r, false}))
        ++counts.truncated, counts.tokens_cut += length - limit;
      else
        ++counts.nothing_left;
    }
  }
  counts.samples = dataset->num_samples();
  counts.skipped = file->num_skipped();
  if (counts.samples + counts.too_long + counts.nothing_left == 0)
    throw DataError(str("data.eval_fraction=", options.eval_fraction, " leaves no record for ",
                        split == Split::kEval ? "evaluation" : "training", " out of ", divided_from,
                        "; change it or name files with data.eval"));
  if (counts.samples == 0)
    throw DataError(str("no sample is left of ", counted(counts.records, "record"), ": all are longer than data.max_length=", limit,
                        " and have nothing to learn when cut; raise data.max_length"));

  if (options.packing) {
    std::vector<int64_t> lengths;
    for (const Sample& s : dataset->samples_) lengths.push_back(s.end - s.begin);
    PackedRows packed = pack_samples(lengths, limit, options.shuffle, options.seed);
    dataset->row_offsets_ = std::move(packed.offsets);
    dataset->row_samples_ = std::move(packed.samples);
  } else {
    dataset->row_samples_.resize(dataset->samples_.size());
    std::iota(dataset->row_samples_.begin(), dataset->row_samples_.end(), int64_t{0});
    dataset->row_offsets_.resize(dataset->samples_.size() + 1);
    std::iota(dataset->row_offsets_.begin(), dataset->row_offsets_.end(), int64_t{0});
  }
  counts.rows = dataset->num_rows();
  dataset->fingerprint_ =
      hash_bytes(str(token_file_content(token_file), '|', limit, '|', options.truncation, '|', options.packing, '|', options.packing && options.shuffle,
                     '|', options.seed, '|', divided ? options.eval_fraction : 0.0, '|', static_cast<int>(split)));
  return dataset;
}

std::shared_ptr<const Dataset> Dataset::build(const DataOptions& options, Split split, const Tokenizer& tokenizer,
                                              const ChatTemplate* chat_template, const TokenProgress& progress) {
  std::string path = prepare(options, split, tokenizer, chat_template, progress);
  return path.empty() ? nullptr : open(options, split, path);
}

int64_t Dataset::row_tokens(int64_t row) const {
  int64_t tokens = 0;
  for (int64_t i = row_offsets_[static_cast<size_t>(row)]; i < row_offsets_[static_cast<size_t>(row) + 1]; ++i) {
    const Sample& s = samples_[static_cast<size_t>(row_samples_[static_cast<size_t>(i)])];
    tokens += s.end - s.begin;
  }
  return tokens;
}

void Dataset::append_row(int64_t row, int64_t epoch, SequenceBatch& batch) const {
  TRIREME_CHECK(row >= 0 && row < num_rows(), row, " of ", num_rows());
  if (batch.cu_seqlens.empty()) batch.cu_seqlens.push_back(0);
  for (int64_t i = row_offsets_[static_cast<size_t>(row)]; i < row_offsets_[static_cast<size_t>(row) + 1]; ++i) {
    int64_t sample = row_samples_[static_cast<size_t>(i)];
    const Sample& s = samples_[static_cast<size_t>(sample)];
    const int32_t* tokens = file_->tokens();
    const uint8_t* learnt = file_->learnt();
    for (int64_t t = s.begin; t < s.end; ++t) {
      bool has_next = t + 1 < s.end || s.goes_on;
      batch.tokens.push_back(tokens[t]);
      batch.targets.push_back(has_next && learnt[t + 1] ? tokens[t + 1] : kIgnoreTarget);
      batch.positions.push_back(t - s.begin);
    }
    batch.cu_seqlens.push_back(batch.num_tokens());
    batch.sample_ids.push_back(epoch * num_samples() + sample);
  }
}

}  // namespace trireme
