// Forms of records and the exact words for files that are wrong.
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

#include "base/check.h"
#include "data/records.h"
#include "tests/fuzz/jsonl_fuzz.cpp"

namespace trireme {
namespace {

class Records : public ::testing::Test {
 protected:
  void SetUp() override {
    folder_ = std::filesystem::temp_directory_path() / str("trireme_records_", ::getpid());
    std::filesystem::create_directories(folder_);
    before_ = std::filesystem::current_path();
    std::filesystem::current_path(folder_);  // so that messages name short paths
  }
  void TearDown() override {
    std::filesystem::current_path(before_);
    std::filesystem::remove_all(folder_);
  }
  static void write(const std::string& name, const std::string& text) { std::ofstream(name, std::ios::binary) << text; }

  std::filesystem::path folder_, before_;
};

template <typename ErrorType = DataError, typename Body>
std::string error_of(Body body) {
  try {
    body();
  } catch (const ErrorType& error) {
    return error.what();
  }
  return "no error";
}

std::vector<Record> read_all(const DataFile& file, const RecordOptions& options = {}) {
  std::vector<Record> records;
  RecordReader reader(file);
  while (auto raw = reader.next()) records.push_back(parse_record(raw->text, options, str(file.path, ":", raw->line)));
  return records;
}

std::string read_file_bytes(const std::filesystem::path& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

std::string first_error(const std::string& line, const RecordOptions& options = {}) {
  return error_of([&] { parse_record(line, options, "f.jsonl:1"); });
}

TEST_F(Records, RecognisesEveryForm) {
  write("all.jsonl",
        "\xEF\xBB\xBF"
        R"({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})"
        "\r\n\n"
        R"({"system": "s", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]})"
        "\n"
        R"({"instruction": "i", "input": "x", "output": "o", "system": "s", "history": [["q", "r"]]})"
        "\n"
        R"({"prompt": "p", "completion": "c", "text": null})"
        "\n"
        R"({"prompt": [{"role": "user", "content": "p"}], "completion": [{"role": "assistant", "content": "c"}]})"
        "\n"
        R"({"text": "t"})");
  auto r = read_all({"all.jsonl", -1});
  ASSERT_EQ(r.size(), 6u);
  EXPECT_EQ(r[0].form, DataForm::kMessages);
  EXPECT_EQ(r[0].messages[1]["content"], "b");
  EXPECT_EQ(r[1].form, DataForm::kShareGpt);
  EXPECT_EQ(r[1].messages.dump(),
            R"([{"role":"system","content":"s"},{"role":"user","content":"a"},{"role":"assistant","content":"b"}])");
  EXPECT_EQ(r[2].form, DataForm::kAlpaca);
  EXPECT_EQ(r[2].messages.dump(),
            R"([{"role":"system","content":"s"},{"role":"user","content":"q"},{"role":"assistant","content":"r"},)"
            R"({"role":"user","content":"i\nx","instruction":"i","input":"x"},{"role":"assistant","content":"o"}])");
  EXPECT_EQ(r[3].form, DataForm::kPromptCompletion);
  EXPECT_FALSE(r[3].is_chat());
  EXPECT_EQ(r[3].prompt + "|" + r[3].completion, "p|c");
  EXPECT_TRUE(r[4].is_chat());
  EXPECT_EQ(r[4].learnt, (std::vector<uint8_t>{0, 1}));
  EXPECT_EQ(r[5].form, DataForm::kText);
  EXPECT_EQ(r[5].text, "t");
}

TEST_F(Records, NamedFieldsAndForms) {
  RecordOptions gsm;
  gsm.prompt_field = "question", gsm.completion_field = "answer";
  Record r = parse_record(R"({"question": "q", "answer": "a", "messages": 1})", gsm, "f:1");
  EXPECT_EQ(r.prompt + "|" + r.completion, "q|a");
  RecordOptions text;
  text.text_field = "body";
  EXPECT_EQ(parse_record(R"({"body": "b"})", text, "f:1").text, "b");
  RecordOptions form;
  form.form = DataForm::kText;
  EXPECT_EQ(parse_record(R"({"messages": [], "text": "b"})", form, "f:1").text, "b");
  EXPECT_EQ(first_error(R"({"question": "q"})", gsm),
            "f.jsonl:1: no field 'answer' (data.completion_field); fields found: 'question'");
  EXPECT_EQ(first_error(R"({"a": "q"})", form), "f.jsonl:1: no field 'text' (data.format=text); fields found: 'a'");
}

TEST_F(Records, ContradictingKeys) {
  auto words = [](RecordOptions o) { return error_of<ConfigError>([&] { o.check(); }); };
  RecordOptions o;
  o.prompt_field = "q";
  EXPECT_EQ(words(o), "data.prompt_field is set without data.completion_field; set both or none");
  o.completion_field = "a", o.text_field = "t";
  EXPECT_EQ(words(o),
            "data.prompt_field and data.text_field exclude each other: a record is a prompt with its completion, or a text");
  o.text_field = "", o.form = DataForm::kAlpaca;
  EXPECT_EQ(words(o),
            "data.format=alpaca contradicts data.prompt_field; leave data.format out or set it to prompt_completion");
  EXPECT_EQ(error_of<ConfigError>([] { parse_data_form("csv"); }),
            "data.format=csv is not a form of data; allowed are auto, messages, sharegpt, alpaca, prompt_completion, text");
}

TEST_F(Records, FileWithLimit) {
  write("a.jsonl", "{\"text\":\"1\"}\n{\"text\":\"2\"}\n{\"text\":\"3\"}\n");
  write("b:7", "{\"text\":\"1\"}\n");
  EXPECT_EQ(read_all(parse_data_file("a.jsonl:2", "data.train")).size(), 2u);
  EXPECT_EQ(read_all(parse_data_file("a.jsonl:9", "data.train")).size(), 3u);
  EXPECT_EQ(parse_data_file("b:7", "data.train").path, "b:7");
  EXPECT_EQ(parse_data_file("a.jsonl:2", "data.train", 2).limit, 2);
  EXPECT_EQ(parse_data_file("a.jsonl:x", "data.train").path, "a.jsonl:x");
  EXPECT_EQ(error_of<ConfigError>([] { parse_data_file("a.jsonl:0", "data.eval"); }),
            "data.eval=a.jsonl:0 limits the file to 0 records; at least 1 is needed");
}

TEST_F(Records, JsonArray) {
  write("a.json", "\n[ {\"text\": \"]}\\\"[\"},\n\n  {\"text\": \"b\", \"x\": [1, {\"y\": []}]} ]\n");
  auto r = read_all({"a.json", -1});
  ASSERT_EQ(r.size(), 2u);
  EXPECT_EQ(r[0].text, "]}\"[");
  RecordReader reader({"a.json", -1});
  EXPECT_EQ(reader.next()->line, 2);
  EXPECT_EQ(reader.next()->line, 4);

  auto words = [](const std::string& text) {
    write("b.json", text);
    return error_of([] { read_all({"b.json", -1}); });
  };
  EXPECT_EQ(words("[{\"text\": \"a\"}"), "b.json:1: not a JSON array of records: the file ends before ']'");
  EXPECT_EQ(words("[{\"text\": \"a\"},\n {\"text\": \"a"), "b.json:2: not a JSON array of records: the file ends within a record");
  EXPECT_EQ(words("[{\"text\": \"a\"},]"), "b.json:1: not a JSON array of records: a comma before ']'");
  EXPECT_EQ(words("[{\"text\": \"a\"} {\"text\": \"b\"}]"),
            "b.json:1: not a JSON array of records: a comma or ']' must follow a record");
  EXPECT_EQ(words("[{\"text\": \"a\"}] x"), "b.json:1: not a JSON array of records: something follows the array's ']'");
  EXPECT_EQ(words("[]"), "data file 'b.json' holds no record: its JSON array is empty");
  EXPECT_EQ(words("[1]"), "b.json:1: a record must be an object, this is a number");
}

// A message says itself whether it is learnt, in the words of OpenAI and of Axolotl.
TEST_F(Records, MessagesThatAreNotLearnt) {
  Record r = parse_record(R"({"messages": [{"role": "user", "content": "a", "weight": 0}, {"role": "assistant", "content": "b", "weight": 0},
      {"role": "assistant", "content": "c", "train": false}, {"role": "assistant", "content": "d", "training": true, "weight": 1.0},
      {"role": "assistant", "content": "e", "weight": null}]})", {}, "f:1");
  EXPECT_EQ(r.learnt, (std::vector<uint8_t>{0, 0, 0, 1, 1}));
  EXPECT_EQ(r.messages[1].dump(), R"({"role":"assistant","content":"b"})");
  EXPECT_EQ(parse_record(R"({"conversations": [{"from": "gpt", "value": "a", "weight": 0}]})", {}, "f:1").learnt,
            std::vector<uint8_t>{0});
  EXPECT_EQ(first_error(R"({"messages": [{"role": "assistant", "content": "b", "weight": 0.5}]})"),
            "f.jsonl:1: messages[0]: field 'weight' is 0.5; allowed are 0, 1, true and false: a message is learnt or not");
}

TEST_F(Records, Prompts) {
  auto prompt = [](const std::string& json, const RecordOptions& options = {}) {
    Record r = make_prompt(Json::parse(json), options, "f:1");
    return r.is_chat() ? r.messages.dump() : r.prompt + r.text + "|" + r.completion;
  };
  EXPECT_EQ(prompt(R"({"prompt": "p"})"), "p|");
  EXPECT_EQ(prompt(R"({"prompt": "p", "completion": "c"})"), "p|");
  EXPECT_EQ(prompt(R"({"question": "q", "answer": "a"})"), "q|");
  EXPECT_EQ(prompt(R"({"text": "t"})"), "t|");
  RecordOptions named;
  named.prompt_field = "q", named.completion_field = "a";
  EXPECT_EQ(prompt(R"({"q": "x"})", named), "x|");
  const std::string user = R"([{"role":"user","content":"u"}])";
  EXPECT_EQ(prompt(R"({"prompt": [{"role": "user", "content": "u"}]})"), user);
  EXPECT_EQ(prompt(R"({"messages": [{"role": "user", "content": [{"type": "text", "text": "u"}]}]})"), user);
  EXPECT_EQ(prompt(R"({"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]})"), user);
  EXPECT_EQ(prompt(R"({"instruction": "u"})"), user);
  auto words = [](const std::string& json) { return error_of([&] { make_prompt(Json::parse(json), {}, "f:1"); }); };
  EXPECT_EQ(words(R"({"messages": [{"role": "assistant", "content": "a"}]})"),
            "f:1: nothing to answer: every message is of the assistant");
  EXPECT_EQ(words(R"({"messages": []})"), "f:1: field 'messages' is an empty list");
  EXPECT_EQ(words(R"({"messages": [{"role": 5}]})"), "f:1: messages[0]: field 'role' is a number; it must be a string");
}

// Cut between words, and nothing is lost.
TEST_F(Records, TextFilesAreReadInPieces) {
  write("short.txt", "{\"not\": json}\n\nsecond paragraph\n");
  RecordReader reader({"short.txt", -1});
  EXPECT_TRUE(reader.plain_text());
  RawRecord only = *reader.next();
  EXPECT_EQ(only.text, "{\"not\": json}\n\nsecond paragraph\n");
  EXPECT_TRUE(only.begins && only.ends);
  EXPECT_FALSE(reader.next());
  write("mark.txt", "\xEF\xBB\xBFtext");  // a byte order mark is none of it
  EXPECT_EQ(RecordReader({"mark.txt", -1}).next()->text, "text");

  const uint64_t whole = kTextPieceBytes * 5 / 2;
  for (const std::string unit : {"words of  prose\n\n", "line\nby\n\nline\n", "\xE2\x82\xAC", "x"}) {
    std::string text;
    while (text.size() < whole) text += unit;
    write("long.txt", text);
    RecordReader pieces({"long.txt", -1});
    std::string joined;
    int64_t num_pieces = 0;
    while (auto piece = pieces.next()) {
      EXPECT_EQ(piece->begins, num_pieces++ == 0);
      EXPECT_EQ(piece->line, 1 + std::count(joined.begin(), joined.end(), '\n'));
      EXPECT_LE(piece->text.size(), kTextPieceBytes);
      EXPECT_NO_THROW(make_text_piece(*piece, "long.txt"));
      if (unit[0] == 'w' && !piece->begins) {
        EXPECT_TRUE(piece->text.starts_with(" of") && joined.ends_with("words")) << piece->text.substr(0, 20);
      }
      if (unit[0] == 'l' && !piece->begins) {
        EXPECT_TRUE(piece->text[0] == '\n' && joined.back() != '\n');
      }
      joined += piece->text;
      EXPECT_EQ(piece->ends, joined.size() == text.size());
    }
    EXPECT_EQ(num_pieces, 3) << unit;
    EXPECT_EQ(joined, text);
  }
  write("latin.txt", "one\ntwo\ncaf\xE9\n");
  EXPECT_EQ(error_of([] { make_text_piece(*RecordReader({"latin.txt", -1}).next(), "latin.txt"); }),
            "latin.txt:3: invalid UTF-8 (byte 0xe9 at position 4); convert the file, for example with iconv -f LATIN1 -t UTF-8");
  EXPECT_EQ(error_of<ConfigError>([] { parse_data_file("a.txt:10", "data.train"); }),
            "data.train=a.txt:10 limits the records of a text file, which is one document; leave the limit out, or make it "
            "records: a .jsonl file of {\"text\": ...}");
}

TEST_F(Records, BrokenFiles) {
  auto words = [](const std::string& path) { return error_of([&] { read_all({path, -1}); }); };
  EXPECT_EQ(words("none.jsonl"), "data file 'none.jsonl' cannot be opened: No such file or directory");
  write("empty.jsonl", "");
  EXPECT_EQ(words("empty.jsonl"), "data file 'empty.jsonl' is empty");
  write("blank.jsonl", "\n  \n");
  EXPECT_EQ(words("blank.jsonl"), "data file 'blank.jsonl' holds no record, only blank lines");
  std::filesystem::create_directory("folder");
  EXPECT_EQ(words("folder"), "data file 'folder' is a folder; name the files in it");

  std::string good = "{\"text\": \"a\"}\n", six = good + good + good + good + good + good;
  write("seven.jsonl", six + "{\"text\": \"a\"\n" + good);
  std::string broken = words("seven.jsonl");
  EXPECT_EQ(broken.rfind("seven.jsonl:7", 0), 0u) << broken;
  EXPECT_NE(broken.find("JSON"), std::string::npos) << broken;
  write("gaps.jsonl", "\n" + good + "\n \n{\"text\": 1}\n");
  EXPECT_EQ(words("gaps.jsonl"), "gaps.jsonl:5: field 'text' is a number; it must be a string");
  write("latin.jsonl", six + "{\"text\": \"caf\xE9\"}\n");
  EXPECT_EQ(words("latin.jsonl"),
            "latin.jsonl:7: invalid UTF-8 (byte 0xe9 at position 14); convert the file, for example with iconv -f LATIN1 -t "
            "UTF-8");
  write("long.jsonl", good + "{\"text\": \"" + std::string(kMaxRecordBytes, 'x') + "\"}\n");
  EXPECT_EQ(words("long.jsonl"),
            "long.jsonl:2: a record of more than 10 MB; split it, or is this one JSON value over many records? One record a "
            "line, or a JSON array of records");
  write("long.json", "[" + good + ", {\"text\": \"" + std::string(kMaxRecordBytes, 'x') + "\"}]");
  EXPECT_EQ(words("long.json").rfind("long.json:2: a record of more than 10 MB", 0), 0u) << words("long.json");
}

TEST_F(Records, FilesOfAnotherKind) {
  auto words = [](const std::string& name, const std::string& bytes) {
    write(name, bytes);
    return error_of([&] { read_all({name, -1}); });
  };
  for (const char* name : {"a.jsonl", "a.txt"}) {
    std::string is = str("data file '", name, "' is ");
    EXPECT_EQ(words(name, "\x1F\x8B\x08 x"), is + "compressed by gzip; unpack it first (gunzip)");
    EXPECT_EQ(words(name, "PK\x03\x04 x"), is + "a zip archive; unpack it first");
    EXPECT_EQ(words(name, "\x28\xB5\x2F\xFDx"), is + "compressed by zstd; unpack it first");
    EXPECT_EQ(words(name, "PAR1\x15 x"), is + "a Parquet file; write its rows to a .jsonl file, one JSON object a line");
    for (const char* mark : {"\xFF\xFE", "\xFE\xFF"})
      EXPECT_EQ(words(name, std::string(mark) + "{"), is + "UTF-16 text; convert it, for example with iconv -f UTF-16 -t UTF-8");
    EXPECT_EQ(words(name, "version https://git-lfs.github.com/spec/v1\n"),
              is + "a pointer of git-lfs, the data itself was not downloaded; run git lfs pull");
  }
  EXPECT_EQ(words("a.csv", "text\n1\n"), "data file 'a.csv' is a table; what is read is .jsonl (a JSON object a line), .json (an "
                                         "array of objects) and .txt (one document)");
  EXPECT_EQ(words("b.csv", "{\"text\": \"a\"}\n"), "no error");
}

TEST_F(Records, Utf8) {
  auto bad = [](const std::string& text) { return error_of([&] { check_utf8(text, "f:1"); }) != "no error"; };
  EXPECT_FALSE(bad("a\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80\xEF\xBF\xBF"));
  for (const char* text : {"\x80", "\xC0\x80", "\xC1\xBF", "\xC3", "\xE0\x80\x80", "\xED\xA0\x80", "\xE2\x82", "\xF0\x80\x80\x80",
                           "\xF4\x90\x80\x80", "\xF5\x80\x80\x80", "\xFF"})
    EXPECT_TRUE(bad(text)) << testing::PrintToString(std::string(text));
}

TEST_F(Records, WrongTypesAndFields) {
  EXPECT_EQ(first_error(R"({"id": 1, "body": "x"})"),
            "f.jsonl:1: no usable field; fields found: 'id', 'body'; accepted are \"messages\" (a list of {role, content}), "
            "\"conversations\" (a list of {from, value}), \"prompt\" and \"completion\", \"instruction\" and \"output\", "
            "\"text\"; or name the fields with data.prompt_field and data.completion_field, or data.text_field");
  EXPECT_EQ(first_error("[]"), "f.jsonl:1: a record must be an object, this is a list");
  EXPECT_EQ(first_error(R"({"text": 5})"), "f.jsonl:1: field 'text' is a number; it must be a string");
  EXPECT_EQ(first_error(R"({"messages": "a"})"), "f.jsonl:1: field 'messages' is a string; it must be a list");
  EXPECT_EQ(first_error(R"({"messages": []})"), "f.jsonl:1: field 'messages' is an empty list");
  EXPECT_EQ(first_error(R"({"messages": [1]})"), "f.jsonl:1: messages[0] is a number; it must be an object");
  EXPECT_EQ(first_error(R"({"messages": [{"content": "a"}]})"), "f.jsonl:1: messages[0] has no 'role' (or 'from')");
  EXPECT_EQ(first_error(R"({"messages": [{"role": "user"}]})"), "f.jsonl:1: messages[0] has no 'content'");
  EXPECT_EQ(first_error(R"({"messages": [{"role": "user", "content": null}]})"),
            "f.jsonl:1: messages[0] has 'content' null and no 'tool_calls'");
  EXPECT_EQ(first_error(R"({"messages": [{"role": "user", "content": 3}]})"),
            "f.jsonl:1: messages[0]: field 'content' is a number; it must be a string");
  EXPECT_EQ(first_error(R"({"messages": [{"role": "user", "content": [{"type": "image"}]}]})"),
            "f.jsonl:1: messages[0].content has a part that is not text; only {\"type\": \"text\", \"text\": ...} is supported");
  EXPECT_EQ(first_error(R"({"messages": [{"role": "user", "content": [{"type": "image", "text": "a cat"}]}]})"),
            "f.jsonl:1: messages[0].content has a part that is not text; only {\"type\": \"text\", \"text\": ...} is supported");
  EXPECT_EQ(first_error(R"({"conversations": [{"from": "human"}]})"), "f.jsonl:1: conversations[0] has no 'value'");
  EXPECT_EQ(first_error(R"({"messages": [{"role": "user", "content": "a"}], "tools": {"name": "f"}})"),
            "f.jsonl:1: field 'tools' is an object; it must be a list");
  EXPECT_EQ(first_error(R"({"conversations": [{"from": "alien", "value": "x"}]})"),
            "f.jsonl:1: conversations[0] has from 'alien'; known are human, user, gpt, assistant, chatgpt, bard, bing, model, "
            "system, function_call, observation, tool");
  EXPECT_EQ(first_error(R"({"prompt": "p", "completion": ["c"]})"),
            "f.jsonl:1: field 'completion' is a list; it must be a string");
  EXPECT_EQ(first_error(R"({"instruction": "p", "output": "o", "history": [["a"]]})"),
            "f.jsonl:1: every entry of 'history' must be a list of two strings");
  EXPECT_EQ(first_error(R"({"instruction": "p", "output": "o", "history": [["a", "b", "c"]]})"),
            "f.jsonl:1: every entry of 'history' must be a list of two strings");
}

// Python's json.dumps writes them, and nothing else in the line need be wrong.
TEST_F(Records, NumbersThatJsonDoesNotHave) {
  const std::string way_out = ", a number that JSON does not have; write null in its place, or leave the field out (Python's "
                              "json.dumps refuses it with allow_nan=False)";
  EXPECT_EQ(first_error(R"({"text": "NaN: \"", "score": NaN})"), "f.jsonl:1: field 'score' is NaN" + way_out);
  EXPECT_EQ(first_error(R"({"a": {"b": [1, -Infinity]}, "text": "x"})"), "f.jsonl:1: field 'b' is -Infinity" + way_out);
  EXPECT_EQ(first_error(R"({"text": "NaN)").find("a number that JSON"), std::string::npos);
}

TEST_F(Records, FuzzCorpus) {
  const char* source = std::getenv("TRIREME_SOURCE");
  if (!source) GTEST_SKIP() << "TRIREME_SOURCE does not name the source tree";
  int num_files = 0;
  for (const auto& entry : std::filesystem::directory_iterator(std::string(source) + "/tests/fuzz/corpus/jsonl")) {
    std::string bytes = read_file_bytes(entry.path());
    EXPECT_NO_THROW(LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size())) << entry.path();
    ++num_files;
  }
  EXPECT_GT(num_files, 10);
}

}  // namespace
}  // namespace trireme
