// The samples of a run: views into a token file, truncated or cut to a length, packed into rows.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "data/batch.h"
#include "data/token_file.h"

namespace trireme {

// The keys data.*; each field is named like its key. The caller fills in what comes from elsewhere (last lines).
struct DataOptions {
  std::vector<std::string> train, eval;  // files, each 'path' or 'path:limit'
  double eval_fraction = 0;              // of the training records (of a text file's chunks), chosen by seed; not with `eval`
  std::string format = "auto";           // auto | messages | sharegpt | alpaca | prompt_completion | text
  std::string prompt_field, completion_field, text_field;
  std::string separator;                 // between prompt and completion where there is no chat template
  std::string on_error = "stop";         // stop | skip: what becomes of a record that cannot be used
  std::string learn = "completion";      // completion | all
  int64_t max_length = 2048;             // tokens of a row, and of a sample
  std::string truncation = "auto";       // auto | right | left | drop | error | chunk; see below
  bool packing = false;                  // several samples a row
  bool shuffle = true;
  std::string template_args;             // a JSON object for the chat template
  std::string cache;                     // folder of token files; empty: default_token_cache()
  // not keys of data.*
  uint64_t seed = 0;                     // run.seed
  int64_t bos_id = -1, eos_id = -1;      // of the tokenizer
  int64_t embedding_rows = 0;            // of the model; 0: unknown
  int num_threads = 0;                   // for tokenising; 0: all cores

  // ConfigError: values that are not allowed, keys that contradict each other, no training file. Touches no file.
  void check() const;
};

// What of the options concerns one record.
RecordOptions record_options(const DataOptions& options);  // ConfigError on keys that contradict each other
EncodeOptions encode_options(const DataOptions& options);

enum class Split { kTrain, kEval };

// What became of the records. A sample longer than max_length is
//   right, left  cut to its first or last max_length tokens      drop   left out      error   a DataError
//   chunk        cut into pieces of max_length, no token lost; a piece's last target is the next piece's first token
// auto: chunk for text records, right for all others. A sample that has nothing left to learn is left out.
struct DatasetCounts {
  int64_t records = 0, samples = 0, rows = 0;
  int64_t tokens = 0, learnt = 0;             // of the samples; learnt = number of targets
  int64_t truncated = 0, tokens_cut = 0;      // right and left: samples and the tokens they lost
  int64_t too_long = 0, nothing_left = 0;     // left out: drop; nothing to learn after truncation
  int64_t chunked = 0;                        // records that became several samples
  int64_t skipped = 0;                        // left out before tokenising: on_error=skip; of both splits together
  std::string text() const;                   // one or two lines for a person
};

// One sample: tokens [begin, end) of the token file.
struct Sample {
  int64_t begin, end;
  int64_t record;
  bool goes_on;  // tokens[end] belongs to the same document and is the last target
};

class Dataset {
 public:
  // Tokenises what the split needs (or finds it in the cache) and returns the token file's path; empty where there is no
  // such split. With several ranks: rank 0 first, a barrier, then open() everywhere with the path told.
  static std::string prepare(const DataOptions& options, Split split, const Tokenizer& tokenizer,
                             const ChatTemplate* chat_template, const TokenProgress& progress = {});
  // Reads samples in place. A pure function of (token file, options). DataError: no sample is left, a sample is too long
  // (truncation=error), eval_fraction leaves one side empty, an id outside the embedding.
  static std::shared_ptr<const Dataset> open(const DataOptions& options, Split split, const std::string& token_file);
  // Both in one call, for one process; null where there is no such split.
  static std::shared_ptr<const Dataset> build(const DataOptions& options, Split split, const Tokenizer& tokenizer,
                                              const ChatTemplate* chat_template, const TokenProgress& progress = {});

  int64_t num_rows() const { return static_cast<int64_t>(row_offsets_.size()) - 1; }
  int64_t num_samples() const { return static_cast<int64_t>(samples_.size()); }
  // Appends row `row` (in file order; the loader shuffles) to `batch`: one segment a sample. `epoch` enters sample_ids
  // (epoch * num_samples + sample), so that dropout differs from epoch to epoch.
  void append_row(int64_t row, int64_t epoch, SequenceBatch& batch) const;
  int64_t row_tokens(int64_t row) const;

  const DatasetCounts& counts() const { return counts_; }
  const std::vector<Sample>& samples() const { return samples_; }
  const TokenFile& file() const { return *file_; }
  const std::vector<int64_t>& records() const { return records_; }  // of the token file, that belong to the split
  // Identifies the rows and their order: the token file's content and the options that choose and cut samples. A resumed run
  // compares it.
  std::string fingerprint() const { return fingerprint_; }

 private:
  std::shared_ptr<const TokenFile> file_;
  std::vector<Sample> samples_;
  std::vector<int64_t> records_;
  std::vector<int64_t> row_offsets_, row_samples_;  // row r holds samples row_samples_[row_offsets_[r] ..)
  DatasetCounts counts_;
  std::string fingerprint_;
};

// What `trireme prepare` prints: counts, length percentiles, share truncated, learnt tokens, and the first `show` samples
// with tokens that are not learnt marked (dimmed where `color`, else in ⟦ ⟧).
std::string data_report(const Dataset& dataset, const DataOptions& options, const Tokenizer& tokenizer, int show,
                        bool color);

}  // namespace trireme
