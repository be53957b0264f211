// Training records from foreign files: JSONL, a JSON array of records, or plain text.
//   messages           {"messages": [{"role", "content", ...}], "tools"?}            (OpenAI, Hugging Face)
//   sharegpt           {"conversations": [{"from", "value"}], "system"?, "tools"?}
//   alpaca             {"instruction", "input"?, "output", "system"?, "history"?: [[user, assistant], ...]}; the user's
//                      message holds both by a line break between, and each as a field for templates that tell them apart
//   prompt_completion  {"prompt", "completion"}: two strings, or two lists of messages
//   text               {"text"}
// A file that ends in .txt is one document: its text is read in pieces that are tokenised apart and joined again.
// The form is recognised by its fields, in this order; null counts as absent. A message of the assistant with "weight": 0
// (OpenAI), "train": false or "training": false (Axolotl) is not learnt.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/file.h"
#include "base/json.h"

namespace trireme {

constexpr uint64_t kMaxRecordBytes = 10ull << 20;  // of one JSONL line or array element
constexpr uint64_t kTextPieceBytes = 256ull << 10;  // of a text file, at most

// One entry of data.train or data.eval: a file and the number of records to take from its start.
struct DataFile {
  std::string path;
  int64_t limit = -1;  // -1: all
};

// 'path' or 'path:1000'; a name that exists as it stands is a path. ConfigError (names `key`) on a limit of 0, or of a .txt file;
// DataError on a file that is not there where `key` names several: was a comma in a name meant as such?
DataFile parse_data_file(const std::string& text, const std::string& key, size_t num_files = 1);

enum class DataForm { kAuto, kMessages, kShareGpt, kAlpaca, kPromptCompletion, kText, kTextFile };
DataForm parse_data_form(const std::string& name);  // ConfigError (data.format) lists the names
const char* data_form_name(DataForm form);

// How records are read: data.format, data.prompt_field, data.completion_field, data.text_field.
struct RecordOptions {
  DataForm form = DataForm::kAuto;
  std::string prompt_field, completion_field;  // both or none; two strings of any record
  std::string text_field;
  void check() const;  // ConfigError on keys that contradict each other
};

struct Record {
  DataForm form = DataForm::kText;  // never kAuto; kTextFile: a text file's piece
  Json messages;                    // chat forms and lists of messages: [{role, content, ...}, ...]
  Json tools;                       // null where absent
  std::vector<uint8_t> learnt;      // one a message: 0 where it is not learnt, as a prompt's
  std::string prompt, completion;   // kPromptCompletion with strings
  std::string text;                 // kText, kTextFile
  bool begins = true, ends = true;  // of a text file's pieces: is it the first, the last
  bool is_chat() const { return !messages.is_null(); }
};

// The bytes of one record and where they stand; `text` lives as long as its reader.
struct RawRecord {
  std::string_view text;
  int64_t line = 1;
  bool begins = true, ends = true;  // of a text file's pieces
};

// Streams the records of one memory-mapped file. DataError: missing, a folder, empty, no record in it, an array that
// does not end, a record of more than kMaxRecordBytes. Blank lines and a byte-order mark are skipped. A text file is cut
// between a word and the space before the next one, where no tokenizer joins characters; only in a text without such spaces
// elsewhere. (A tokenizer that puts a space before every text has one token more at each cut.)
class RecordReader {
 public:
  explicit RecordReader(const DataFile& file);
  std::optional<RawRecord> next();
  bool plain_text() const { return plain_text_; }  // a .txt file
  const std::string& path() const { return file_.path; }
  uint64_t bytes_read() const { return at_; }

 private:
  std::optional<RawRecord> next_line();
  std::optional<RawRecord> next_element();
  RawRecord next_piece();
  void check_size(uint64_t bytes, int64_t line) const;

  DataFile file_;
  std::optional<MappedFile> map_;
  std::string_view view_;
  size_t at_ = 0;
  int64_t line_ = 1, num_read_ = 0;
  bool plain_text_ = false, array_ = false, ended_ = false;
};

// One record from JSON text. `source` is "file:line" and begins every message. DataError: invalid UTF-8, not JSON, not an
// object, no usable field (lists the fields found and the forms accepted), a field of a wrong type.
Record parse_record(std::string_view text, const RecordOptions& options, const std::string& source);
// The same for JSON that is already parsed.
Record make_record(Json value, const RecordOptions& options, const std::string& source);
// A piece of the text file `path` that begins in line `line`.
Record make_text_piece(const RawRecord& piece, const std::string& path);
// A record to be answered: its completion, output or last answer may be absent and is left out. {"question"} is a prompt too.
Record make_prompt(Json value, const RecordOptions& options, const std::string& source);

// DataError naming source and byte where `text` is not valid UTF-8.
void check_utf8(std::string_view text, const std::string& source);

}  // namespace trireme
