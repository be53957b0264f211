#include <sys/stat.h>

#include <algorithm>

#include "base/check.h"
#include "data/records.h"

namespace trireme {
namespace {

bool is_space(char c) { return c == ' ' || c == '\t' || c == '\r' || c == '\n'; }

bool is_blank(std::string_view line) {
  for (char c : line)
    if (!is_space(c)) return false;
  return true;
}

// Refuses what is known by its first bytes or its name, before a line of it is called broken.
void check_kind(const std::string& path, std::string_view bytes) {
  struct Kind {
    const char *begin, *what;
  };
  constexpr const char* kUtf16 = "UTF-16 text; convert it, for example with iconv -f UTF-16 -t UTF-8";
  constexpr Kind kKinds[] = {{"\x1F\x8B", "compressed by gzip; unpack it first (gunzip)"},
                             {"PK\x03\x04", "a zip archive; unpack it first"},
                             {"\x28\xB5\x2F\xFD", "compressed by zstd; unpack it first"},
                             {"PAR1\x15", "a Parquet file; write its rows to a .jsonl file, one JSON object a line"},
                             {"\xFF\xFE", kUtf16},
                             {"\xFE\xFF", kUtf16},
                             {kGitLfsPointer, "a pointer of git-lfs, the data itself was not downloaded; run git lfs pull"}};
  for (const Kind& kind : kKinds)
    if (bytes.starts_with(kind.begin)) throw DataError(str("data file '", path, "' is ", kind.what));
  if ((path.ends_with(".csv") || path.ends_with(".tsv")) && !bytes.starts_with('{') && !bytes.starts_with('['))
    throw DataError(str("data file '", path, "' is a table; what is read is .jsonl (a JSON object a line), .json (an array of "
                        "objects) and .txt (one document)"));
}

}  // namespace

RecordReader::RecordReader(const DataFile& file) : file_(file) {
  struct stat info;
  if (stat(file.path.c_str(), &info) != 0)
    throw DataError(str("data file '", file.path, "' cannot be opened: ", errno_text()));
  if (S_ISDIR(info.st_mode))
    throw DataError(str("data file '", file.path, "' is a folder; name the files in it"));
  if (info.st_size == 0) throw DataError(str("data file '", file.path, "' is empty"));
  map_.emplace(file.path);
  view_ = map_->view();
  check_kind(file.path, view_);
  if (view_.starts_with("\xEF\xBB\xBF")) at_ = 3;
  plain_text_ = file.path.ends_with(".txt");
  if (is_blank(view_.substr(at_))) throw DataError(str("data file '", file.path, "' holds no record, only blank lines"));
  if (plain_text_) return;
  size_t first = at_;
  while (is_space(view_[first])) ++first;
  array_ = view_[first] == '[';
}

void RecordReader::check_size(uint64_t bytes, int64_t line) const {
  if (bytes > kMaxRecordBytes)
    throw DataError(str(file_.path, ":", line, ": a record of more than ", kMaxRecordBytes >> 20,
                        " MB; split it, or is this one JSON value over many records? One record a line, or a JSON array "
                        "of records"));
}

std::optional<RawRecord> RecordReader::next() {
  if (ended_ || (file_.limit >= 0 && num_read_ >= file_.limit)) return std::nullopt;
  std::optional<RawRecord> record;
  if (plain_text_) {
    record = next_piece();
    ended_ = record->ends;
  } else {
    record = array_ ? next_element() : next_line();
  }
  if (record) {
    ++num_read_;
  } else {
    ended_ = true;
    if (num_read_ == 0) throw DataError(str("data file '", file_.path, "' holds no record: its JSON array is empty"));
  }
  return record;
}

RawRecord RecordReader::next_piece() {
  size_t end = std::min<size_t>(at_ + kTextPieceBytes, view_.size());
  if (end < view_.size()) {
    auto letter = [&](size_t i) { return !is_space(view_[i]); };
    auto between_words = [&](size_t i) { return view_[i] == ' ' && letter(i - 1) && letter(i + 1); };
    auto before_space = [&](size_t i) { return !letter(i) && letter(i - 1); };
    auto before_character = [&](size_t i) { return (static_cast<unsigned char>(view_[i]) & 0xC0) != 0x80; };
    auto back_to = [&](auto good) {
      for (size_t i = end - 1; i > at_ + kTextPieceBytes / 2; --i)
        if (good(i)) return end = i, true;
      return false;
    };
    back_to(between_words) || back_to(before_space) || back_to(before_character);
  }
  RawRecord piece{view_.substr(at_, end - at_), line_, num_read_ == 0, end == view_.size()};
  line_ += std::count(piece.text.begin(), piece.text.end(), '\n');
  at_ = end;
  return piece;
}

std::optional<RawRecord> RecordReader::next_line() {
  while (at_ < view_.size()) {
    size_t end = view_.substr(at_, kMaxRecordBytes + 2).find('\n');
    if (end == std::string_view::npos) end = view_.size() - at_;
    check_size(end, line_);
    std::string_view line = view_.substr(at_, end);
    at_ += end + 1;
    int64_t number = line_++;
    if (!is_blank(line)) return RawRecord{line, number};
  }
  return std::nullopt;
}

// Finds where an element of the top-level array ends by its brackets and strings alone; parse_record() then judges it.
std::optional<RawRecord> RecordReader::next_element() {
  auto fail = [&](const char* what) -> std::optional<RawRecord> {
    throw DataError(str(file_.path, ":", line_, ": not a JSON array of records: ", what));
  };
  auto skip_space = [&] {
    for (; at_ < view_.size() && is_space(view_[at_]); ++at_) line_ += view_[at_] == '\n';
  };
  skip_space();
  if (num_read_ == 0) {
    ++at_;  // the '['
    skip_space();
  } else if (at_ < view_.size() && view_[at_] == ',') {
    ++at_;
    skip_space();
    if (at_ < view_.size() && view_[at_] == ']') return fail("a comma before ']'");
  } else if (at_ < view_.size() && view_[at_] != ']') {
    return fail("a comma or ']' must follow a record");
  }
  if (at_ >= view_.size()) return fail("the file ends before ']'");
  if (view_[at_] == ']') {
    ++at_;
    skip_space();
    return at_ < view_.size() ? fail("something follows the array's ']'") : std::nullopt;
  }
  size_t begin = at_;
  int64_t line = line_, depth = 0;
  bool in_string = false, complete = false;
  for (; at_ < view_.size(); ++at_) {
    char c = view_[at_];
    line_ += c == '\n';
    check_size(at_ - begin, line);
    if (in_string) {
      if (c == '\\')
        ++at_;
      else if (c == '"')
        in_string = false;
      continue;
    }
    if (c == '"') in_string = true;
    if (c == '{' || c == '[') ++depth;
    if ((c == ',' || c == ']') && depth == 0)
      complete = true;
    else if ((c == '}' || c == ']') && --depth == 0)
      complete = true, ++at_;
    if (complete) break;
    if (depth < 0) return fail("an unexpected '}'");
  }
  if (!complete) return fail("the file ends within a record");
  return RawRecord{view_.substr(begin, at_ - begin), line};
}

}  // namespace trireme
