#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <filesystem>
#include <thread>

#include "base/check.h"
#include "base/hash.h"
#include "base/hdf5.h"
#include "base/log.h"
#include "data/chat_template.h"
#include "data/file_hash.h"
#include "data/token_file.h"

namespace trireme {
namespace {

constexpr size_t kBlockRecords = 4096;
constexpr uint64_t kBlockBytes = 16ull << 20;
constexpr uint64_t kCopyBytes = 4ull << 20;

// Held while a token file is made. Where the file system has no locks, two processes may do the same work twice; each
// renames a complete file, so the result is right all the same.
class FolderLock {
 public:
  explicit FolderLock(const std::string& path) : fd_(::open(path.c_str(), O_CREAT | O_RDWR | O_CLOEXEC, 0666)) {
    if (fd_ < 0) throw SystemError(str("cannot write the token cache ", path, ": ", errno_text(), "; set data.cache to another folder"));
    if (::flock(fd_, LOCK_EX | LOCK_NB) == 0 || errno != EWOULDBLOCK) return;
    log_info("waiting for another process that tokenises the same data");
    while (::flock(fd_, LOCK_EX) != 0 && errno == EINTR) {
    }
  }
  ~FolderLock() { ::close(fd_); }
  FolderLock(const FolderLock&) = delete;
  FolderLock& operator=(const FolderLock&) = delete;

 private:
  int fd_;
};

// A nameless file that takes what is too much for memory: contiguous datasets need their length before their values.
class Spill {
 public:
  explicit Spill(const std::string& path) : path_(path), fd_(::open(path.c_str(), O_CREAT | O_TRUNC | O_RDWR | O_CLOEXEC, 0600)) {
    if (fd_ < 0) throw SystemError(str("cannot write ", path, ": ", errno_text(), "; set data.cache to another folder"));
    ::unlink(path.c_str());
  }
  ~Spill() { ::close(fd_); }
  Spill(const Spill&) = delete;
  Spill& operator=(const Spill&) = delete;

  void append(const void* data, uint64_t bytes) {
    const char* at = static_cast<const char*>(data);
    while (bytes > 0) {
      ssize_t n = ::write(fd_, at, bytes);
      if (n < 0 && errno == EINTR) continue;
      if (n <= 0) throw SystemError(str("cannot write ", path_, ": ", errno_text(), "; set data.cache to another folder"));
      at += n, bytes -= static_cast<uint64_t>(n), size_ += static_cast<uint64_t>(n);
    }
  }
  void copy_to(Hdf5Dataset&& dataset) const {
    uint64_t width = hdf5_type_bytes(dataset.type());
    std::vector<char> buffer(kCopyBytes);
    for (uint64_t at = 0; at < size_;) {
      ssize_t n = ::pread(fd_, buffer.data(), std::min(kCopyBytes, size_ - at), static_cast<off_t>(at));
      if (n < 0 && errno == EINTR) continue;
      if (n <= 0 || static_cast<uint64_t>(n) % width != 0) throw SystemError(str("cannot read ", path_, ": ", errno_text()));
      dataset.write(buffer.data(), at / width, static_cast<uint64_t>(n) / width);
      at += static_cast<uint64_t>(n);
    }
  }
  uint64_t size() const { return size_; }

 private:
  std::string path_;
  int fd_;
  uint64_t size_ = 0;
};

// What is known of the records but their tokens.
struct Index {
  std::vector<int64_t> offsets{0}, lines, targets;
  std::vector<int32_t> files;
  std::vector<uint8_t> forms;
  int64_t largest_id = 0, skipped = 0;
};

struct Encoded {
  EncodedRecord record;
  DataForm form = DataForm::kText;
  std::string skipped;  // why, where it is
};

// Encodes a block on several threads. Of several bad records the first in the file is reported, whoever finds it; those
// after a bad one are left alone: a template that loops would be met once a record.
std::vector<Encoded> encode_block(const std::vector<RawRecord>& block, const RecordReader& reader,
                                  const TokenFileRequest& request, const RecordEncoder& encoder) {
  std::vector<Encoded> results(block.size());
  std::vector<std::exception_ptr> errors(block.size());
  std::atomic<size_t> next{0}, end{block.size()};
  bool skips = request.skip_bad && !reader.plain_text();
  auto work = [&] {
    for (size_t i; (i = next.fetch_add(1)) < end;) {
      try {
        std::string source = str(reader.path(), ":", block[i].line);
        Record record = reader.plain_text() ? make_text_piece(block[i], reader.path())
                                            : parse_record(block[i].text, request.records, source);
        results[i].form = record.form;
        results[i].record = encoder.encode(record, source);
        results[i].record.text = {};
        results[i].record.offsets = {};
      } catch (const DataError& error) {
        if (skips) {
          results[i].skipped = error.what();
          continue;
        }
        errors[i] = std::current_exception();
        for (size_t now = end; i < now && !end.compare_exchange_weak(now, i);) {
        }
      } catch (...) {
        errors[i] = std::current_exception();
        for (size_t now = end; i < now && !end.compare_exchange_weak(now, i);) {
        }
      }
    }
  };
  size_t wanted = request.num_threads > 0 ? static_cast<size_t>(request.num_threads) : std::thread::hardware_concurrency();
  size_t worth = std::max<size_t>(block.size() / (reader.plain_text() ? 1 : 16), 1);
  size_t num_threads = std::clamp<size_t>(wanted, 1, worth);
  std::vector<std::thread> threads;
  for (size_t t = 1; t < num_threads; ++t) threads.emplace_back(work);
  work();
  for (auto& thread : threads) thread.join();
  for (auto& error : errors)
    if (error) std::rethrow_exception(error);
  return results;
}

// Nothing at the end, and where reading fails: then `error` says how.
std::optional<RawRecord> next_record(RecordReader& reader, std::exception_ptr& error) {
  try {
    return reader.next();
  } catch (...) {
    error = std::current_exception();
  }
  return std::nullopt;
}

void encode_files(const TokenFileRequest& request, const RecordEncoder& encoder, const TokenProgress& progress,
                  Spill& tokens, Spill& learnt, Index& index) {
  uint64_t total = 0, done = 0;
  for (const DataFile& file : request.files) {
    std::error_code error;
    uint64_t bytes = std::filesystem::file_size(file.path, error);
    total += error ? 0 : bytes;
  }
  std::vector<int32_t> ids;
  std::string first_skipped;
  for (size_t f = 0; f < request.files.size(); ++f) {
    RecordReader reader(request.files[f]);
    std::exception_ptr reading;  // told only after the records before it were found good
    for (bool more = true; more;) {
      std::vector<RawRecord> block;
      for (uint64_t bytes = 0; block.size() < kBlockRecords && bytes < kBlockBytes;) {
        std::optional<RawRecord> raw = next_record(reader, reading);
        more = raw.has_value();
        if (!more) break;
        bytes += raw->text.size();
        block.push_back(*raw);
      }
      std::vector<Encoded> encoded = encode_block(block, reader, request, encoder);
      if (reading) std::rethrow_exception(reading);
      for (size_t i = 0; i < encoded.size(); ++i) {
        if (!encoded[i].skipped.empty()) {
          if (index.skipped++ < 5) log_warn("left out: " + encoded[i].skipped);
          if (first_skipped.empty()) first_skipped = encoded[i].skipped;
          continue;
        }
        const EncodedRecord& record = encoded[i].record;
        ids.assign(record.ids.begin(), record.ids.end());
        tokens.append(ids.data(), ids.size() * sizeof(int32_t));
        learnt.append(record.learnt.data(), record.learnt.size());
        if (block[i].begins) {  // else it goes on with the record that the piece before began
          index.offsets.push_back(index.offsets.back());
          index.lines.push_back(block[i].line);
          index.files.push_back(static_cast<int32_t>(f));
          index.forms.push_back(static_cast<uint8_t>(encoded[i].form));
          index.targets.push_back(0);
        }
        index.offsets.back() += static_cast<int64_t>(ids.size());
        index.targets.back() += std::count(record.learnt.begin(), record.learnt.end(), uint8_t{1});
        for (int32_t id : ids) index.largest_id = std::max<int64_t>(index.largest_id, id);
      }
      if (progress) progress(done + reader.bytes_read(), total);
    }
    std::error_code error;
    done += std::filesystem::file_size(request.files[f].path, error);
  }
  if (index.lines.empty())
    throw DataError(str("no record is left: data.on_error=skip left out all ", index.skipped, ". The first: ", first_skipped));
}

// Everything that decides the tokens, and nothing else: names of files do not.
Json content_of(const TokenFileRequest& request, const std::string& folder, const Tokenizer& tokenizer,
                const ChatTemplate* chat_template) {
  Json files = Json::array();
  for (const DataFile& file : request.files) {
    RecordReader check(file);  // a missing or empty file is told in its words
    files.push_back({{"hash", remembered_hash(file.path, folder)}, {"limit", file.limit}, {"plain_text", check.plain_text()}});
  }
  return {{"version", kTokenFileVersion},
          {"files", files},
          {"format", data_form_name(request.records.form)},
          {"prompt_field", request.records.prompt_field},
          {"completion_field", request.records.completion_field},
          {"text_field", request.records.text_field},
          {"separator", request.encode.separator},
          {"skip_bad", request.skip_bad},
          {"learn_all", request.encode.learn_all},
          {"bos_id", request.encode.bos_id},
          {"eos_id", request.encode.eos_id},
          {"tokenizer", tokenizer.content_hash()},
          {"chat_template", chat_template ? chat_template->hash() : ""},
          {"template_args", chat_template ? request.encode.template_args : ""}};
}

void write_token_file(const std::string& path, const TokenFileRequest& request, const Json& content,
                      const RecordEncoder& encoder, const TokenProgress& progress) {
  std::string stem = str(path, ".", ::getpid());
  Spill tokens(stem + ".tokens"), learnt(stem + ".learnt");
  Index index;
  encode_files(request, encoder, progress, tokens, learnt, index);

  Json names = Json::array();
  for (const DataFile& file : request.files) names.push_back(file.path);
  std::string temporary = stem + ".tmp";
  try {
    Hdf5File file = Hdf5File::create(temporary);
    uint64_t records = index.lines.size();
    tokens.copy_to(file.create_dataset("tokens", Hdf5Type::kInt32, {tokens.size() / sizeof(int32_t)}));
    learnt.copy_to(file.create_dataset("learnt", Hdf5Type::kUint8, {learnt.size()}));
    file.create_dataset("offsets", Hdf5Type::kInt64, {records + 1}).write_all(index.offsets);
    file.create_dataset("files", Hdf5Type::kInt32, {records}).write_all(index.files);
    file.create_dataset("lines", Hdf5Type::kInt64, {records}).write_all(index.lines);
    file.create_dataset("forms", Hdf5Type::kUint8, {records}).write_all(index.forms);
    file.create_dataset("targets", Hdf5Type::kInt64, {records}).write_all(index.targets);
    file.set_attribute("trireme_tokens", std::to_string(kTokenFileVersion));
    file.set_attribute("largest_id", std::to_string(index.largest_id));
    file.set_attribute("skipped", std::to_string(index.skipped));
    file.set_attribute("files", dump_json(names));
    file.set_attribute("origin", dump_json(content));
    file.close();
    fsync_path(temporary);
    TokenFile written(temporary);
    auto count = static_cast<uint64_t>(written.num_tokens());
    std::string hashes = hash_bytes(written.tokens(), count * sizeof(int32_t)) + hash_bytes(written.learnt(), count) +
                         hash_bytes(index.offsets.data(), index.offsets.size() * sizeof(int64_t));
    Json manifest = {{"bytes", std::filesystem::file_size(temporary)}, {"hash", hash_file(temporary)},
                     {"content", hash_bytes(hashes)}, {"files", names}, {"origin", content}};
    std::filesystem::rename(temporary, path);
    write_file_atomic(path.substr(0, path.size() - 3) + ".json", dump_json_pretty(manifest));
  } catch (...) {
    ::unlink(temporary.c_str());
    throw;
  }
}

}  // namespace

std::string make_token_file(const TokenFileRequest& request, const Tokenizer& tokenizer,
                            const ChatTemplate* chat_template, const TokenProgress& progress) {
  RecordEncoder encoder(tokenizer, chat_template, request.encode);
  std::string folder = request.cache_folder.empty() ? default_token_cache() : request.cache_folder;
  Json content = content_of(request, folder, tokenizer, chat_template);
  std::error_code error;
  std::filesystem::create_directories(folder, error);
  if (error)
    throw SystemError(str("cannot create the token cache ", folder, ": ", error.message(), "; set data.cache to another folder"));
  std::string path = folder + "/" + hash_bytes(dump_json(content)) + ".h5", why;
  auto found = [&] {
    if (!std::filesystem::exists(path, error) || !token_file_intact(path, &why)) return false;
    mark_token_file_used(path);
    return true;
  };
  if (found()) return path;
  FolderLock lock(path.substr(0, path.size() - 3) + ".lock");
  if (found()) return path;
  if (std::filesystem::exists(path, error)) log_warn(str("token file ", path, " is broken (", why, "); making it again"));
  write_token_file(path, request, content, encoder, progress);
  prune_token_cache(folder, kTokenFileAge);
  return path;
}

}  // namespace trireme
