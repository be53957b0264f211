// Training records from foreign files: JSONL, a JSON array of records, or plain text.
//   messages           {"messages": [{"role", "content", ...}], "tools"?}            (OpenAI, Hugging Face)
//   sharegpt           {"conversations": [{"from", "value"}], "system"?, "tools"?}
//   alpaca             {"instruction", "input"?, "output", "system"?, "history"?: [[user, assistant], ...]}
//   prompt_completion  {"prompt", "completion"}: two strings, or two lists of messages
//   text               {"text"}; a file that ends in .txt is one such record
// The form is recognised by its fields, in this order; null counts as absent.
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

// One entry of data.train or data.eval: a file and the number of records to take from its start.
struct DataFile {
  std::string path;
  int64_t limit = -1;  // -1: all
};

// 'path' or 'path:1000'; a name that exists as it stands is a path. ConfigError (names `key`) on a limit of 0.
DataFile parse_data_file(const std::string& text, const std::string& key);

enum class DataForm { kAuto, kMessages, kShareGpt, kAlpaca, kPromptCompletion, kText };
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
  DataForm form = DataForm::kText;  // never kAuto
  Json messages;                    // chat forms and lists of messages: [{role, content, ...}, ...]
  Json tools;                       // null where absent
  size_t first_learnt_message = 0;  // earlier messages are a prompt
  std::string prompt, completion;   // kPromptCompletion with strings
  std::string text;                 // kText
  bool is_chat() const { return !messages.is_null(); }
};

// The bytes of one record and where they stand; `text` lives as long as its reader.
struct RawRecord {
  std::string_view text;
  int64_t line = 1;
};

// Streams the records of one memory-mapped file. DataError: missing, a folder, empty, no record in it, an array that
// does not end, a record of more than kMaxRecordBytes. Blank lines and a byte-order mark are skipped.
class RecordReader {
 public:
  explicit RecordReader(const DataFile& file);
  std::optional<RawRecord> next();
  bool plain_text() const { return plain_text_; }  // a .txt file: the one record is the file
  const std::string& path() const { return file_.path; }
  uint64_t bytes_read() const { return at_; }

 private:
  std::optional<RawRecord> next_line();
  std::optional<RawRecord> next_element();
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

// DataError naming source and byte where `text` is not valid UTF-8.
void check_utf8(std::string_view text, const std::string& source);

}  // namespace trireme
