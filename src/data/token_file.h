// Tokenised records on disk: an HDF5 file of contiguous datasets, read in place.
//   tokens  int32 [T]     learnt  uint8 [T]      offsets  int64 [R+1]: record r is tokens[offsets[r] .. offsets[r+1])
//   files   int32 [R], lines  int64 [R]: where record r came from       forms  uint8 [R]: DataForm
//   targets int64 [R]: learnt tokens of record r
//   attributes: trireme_tokens (format version), largest_id, skipped (records left out), files (JSON: names by number), origin
//   (JSON: what the key was made from)
// NAME.h5 is trusted only with NAME.json beside it, which is written last and holds size and hash of the HDF5 file, and the
// hash of its content: tokens, learnt and offsets alone.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "base/file.h"
#include "data/masking.h"

namespace trireme {

constexpr int kTokenFileVersion = 2;

// Called from time to time with bytes done and in all.
using TokenProgress = std::function<void(uint64_t done, uint64_t total)>;

struct TokenFileRequest {
  std::vector<DataFile> files;
  RecordOptions records;
  EncodeOptions encode;
  bool skip_bad = false;     // leave out records that are a DataError; the first few are logged
  std::string cache_folder;  // empty: default_token_cache()
  int num_threads = 0;       // 0: all cores
};

// $TRIREME_CACHE/tokens, else $XDG_CACHE_HOME/trireme/tokens, else ~/.cache/trireme/tokens.
std::string default_token_cache();

// Path of the token file for this content: it is looked up under the hash of (the files' bytes and limits, the options,
// tokenizer, template), and made where it is not there or broken. Processes that ask at the same time wait for the first one
// (a lock file). DataError: a bad record (skip_bad: no good one; a text file's text is never skipped). SystemError: the cache cannot be written.
std::string make_token_file(const TokenFileRequest& request, const Tokenizer& tokenizer,
                            const ChatTemplate* chat_template, const TokenProgress& progress = {});

// Files in the cache that no run has used for `age` are deleted, which is said; called whenever one is made, and by
// `trireme doctor` with an age without end. A run that reads a deleted file reads on.
constexpr std::chrono::seconds kTokenFileAge{30 * 86400};
struct TokenCacheUse {
  int files = 0, deleted_files = 0;  // token files
  uint64_t bytes = 0, deleted_bytes = 0;
};
TokenCacheUse prune_token_cache(const std::string& folder, std::chrono::seconds age);
void mark_token_file_used(const std::string& path);

// Is there a complete token file, equal to its recorded hash? `why` says what is wrong where not.
bool token_file_intact(const std::string& path, std::string* why);
// The hash of its content, as its manifest has it.
std::string token_file_content(const std::string& path);

// A token file mapped read-only. DataError where it is not one, or its parts contradict each other.
class TokenFile {
 public:
  // `names`: how its data files are called now, for source(); empty: as when it was made.
  explicit TokenFile(const std::string& path, std::vector<std::string> names = {});
  int64_t num_records() const { return num_records_; }
  int64_t num_tokens() const { return num_tokens_; }
  int64_t begin(int64_t record) const { return offsets_[record]; }
  int64_t end(int64_t record) const { return offsets_[record + 1]; }
  const int32_t* tokens() const { return tokens_; }
  const uint8_t* learnt() const { return learnt_; }
  int64_t targets(int64_t record) const { return targets_[record]; }
  int64_t largest_id() const { return largest_id_; }
  int64_t num_skipped() const { return num_skipped_; }
  DataForm form(int64_t record) const { return static_cast<DataForm>(forms_[record]); }
  std::string source(int64_t record) const;  // "file:line"
  const std::string& path() const { return path_; }

 private:
  std::string path_;
  MappedFile map_;
  int64_t num_records_ = 0, num_tokens_ = 0, largest_id_ = 0, num_skipped_ = 0;
  const int32_t* tokens_ = nullptr;
  const uint8_t* learnt_ = nullptr;
  const int64_t* offsets_ = nullptr;
  const int32_t* files_ = nullptr;
  const int64_t* lines_ = nullptr;
  const int64_t* targets_ = nullptr;
  const uint8_t* forms_ = nullptr;
  std::vector<std::string> names_;
};

}  // namespace trireme
