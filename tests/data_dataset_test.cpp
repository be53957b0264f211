// Samples, truncation, packed rows, the token cache.
#include <sys/wait.h>

#include <algorithm>
#include <numeric>
#include <set>

#include "base/hash.h"
#include "data/chat_template.h"
#include "data/file_hash.h"
#include "tests/data_fixture.h"

namespace trireme {
namespace {

using Datasets = DataTest;

SequenceBatch row(const Dataset& dataset, int64_t r) {
  SequenceBatch batch;
  dataset.append_row(r, 0, batch);
  return batch;
}

TEST_F(Datasets, TargetsAreShifted) {
  write("train.jsonl", "{\"prompt\": \"ab\", \"completion\": \"cd\"}\n");
  SequenceBatch b = row(*build(), 0);
  EXPECT_EQ(text_of(b.tokens), "abcd<eos>");
  const int64_t c = b.tokens[2], d = b.tokens[3];
  EXPECT_EQ(b.targets, (std::vector<int64_t>{kIgnoreTarget, c, d, kTestEos, kIgnoreTarget}));
  EXPECT_EQ(b.positions, (std::vector<int64_t>{0, 1, 2, 3, 4}));
  EXPECT_EQ(b.cu_seqlens, (std::vector<int64_t>{0, 5}));
}

TEST_F(Datasets, Truncation) {
  write("train.jsonl", "{\"prompt\": \"ab\", \"completion\": \"c\"}\n{\"prompt\": \"abcd\", \"completion\": \"efgh\"}\n"
                       "{\"prompt\": \"abcdefgh\", \"completion\": \"i\"}\n");
  options_.max_length = 6;
  auto texts = [&](const char* truncation) {
    options_.truncation = truncation;
    auto dataset = build();
    std::string text;
    int64_t learnt = 0;
    for (int64_t r = 0; r < dataset->num_rows(); ++r) {
      const SequenceBatch batch = row(*dataset, r);
      text += text_of(batch.tokens) + "|";
      learnt += std::count_if(batch.targets.begin(), batch.targets.end(), [](int64_t t) { return t != kIgnoreTarget; });
    }
    EXPECT_EQ(learnt, dataset->counts().learnt) << truncation;  // nothing beyond the cut
    return text + dataset->counts().text();
  };
  EXPECT_EQ(texts("right"),
            "abc<eos>|abcdef|3 records, 2 samples in 2 rows, 10 tokens, 4 learnt (40.0 %); 1 sample (50.0 %) truncated, 3 tokens "
            "cut; 1 sample left out: nothing to learn after truncation");
  EXPECT_EQ(texts("auto"), texts("right"));
  EXPECT_EQ(texts("left"),
            "abc<eos>|defgh<eos>|efghi<eos>|3 records, 3 samples in 3 rows, 16 tokens, 9 learnt (56.2 %); 2 samples (66.7 %) "
            "truncated, 7 tokens cut");
  EXPECT_EQ(texts("drop"),
            "abc<eos>|3 records, 1 sample in 1 row, 4 tokens, 2 learnt (50.0 %); 2 records left out: longer than "
            "data.max_length");
  EXPECT_EQ(error_of([&] { texts("error"); }),
            "train.jsonl:2: the record has 9 tokens, more than data.max_length=6; raise it or choose data.truncation=right, left, "
            "drop or chunk");
  options_.max_length = 2;
  write("train.jsonl", "{\"prompt\": \"abcd\", \"completion\": \"efgh\"}\n");
  EXPECT_EQ(error_of([&] { texts("right"); }),
            "no sample is left of 1 record: all are longer than data.max_length=2 and have nothing to learn when cut; raise "
            "data.max_length");
}

// Text is cut into pieces so that every token but the document's first is a target once.
TEST_F(Datasets, LongTextLosesNoToken) {
  for (bool packing : {false, true})
    for (int64_t length : {4, 5, 8, 9, 13}) {
      std::string document;
      for (int64_t i = 0; i < length; ++i) document += static_cast<char>('a' + i);
      write("train.txt", document);
      options_.train = {"train.txt"};
      options_.max_length = 4;
      options_.packing = packing;
      auto dataset = build();
      std::multiset<int64_t> targets;
      for (int64_t r = 0; r < dataset->num_rows(); ++r) {
        SequenceBatch b = row(*dataset, r);
        EXPECT_LE(b.num_tokens(), 4);
        for (int64_t t : b.targets)
          if (t != kIgnoreTarget) targets.insert(t);
      }
      auto ids = tokenizer_.encode_ids(document, false);
      std::multiset<int64_t> expected(ids.begin() + 1, ids.end());
      expected.insert(kTestEos);
      EXPECT_EQ(targets, expected) << length;
      EXPECT_EQ(dataset->counts().learnt, length);
      EXPECT_EQ(dataset->counts().nothing_left, 0);
    }
}

TEST_F(Datasets, PackedRowsHoldTheSameSegments) {
  write_pairs("train.jsonl", 40, [](int64_t i) { return 1 + i % 13; });
  options_.max_length = 32;
  auto plain = build();
  options_.packing = true;
  auto packed = build();
  EXPECT_EQ(plain->num_rows(), 40);
  EXPECT_LT(packed->num_rows(), 20);
  std::vector<SequenceBatch> samples(40);
  for (int64_t r = 0; r < 40; ++r) samples[static_cast<size_t>(r)] = row(*plain, r);
  std::set<int64_t> seen;
  for (int64_t r = 0; r < packed->num_rows(); ++r) {
    SequenceBatch b = row(*packed, r);
    EXPECT_LE(b.num_tokens(), 32);
    EXPECT_EQ(b.num_tokens(), packed->row_tokens(r));
    for (int64_t s = 0; s < b.num_segments(); ++s) {
      int64_t id = b.sample_ids[static_cast<size_t>(s)];
      EXPECT_TRUE(seen.insert(id).second);
      const SequenceBatch& sample = samples[static_cast<size_t>(id)];
      auto part = [&](const std::vector<int64_t>& v) {
        return std::vector<int64_t>(v.begin() + b.cu_seqlens[static_cast<size_t>(s)],
                                    v.begin() + b.cu_seqlens[static_cast<size_t>(s) + 1]);
      };
      EXPECT_EQ(part(b.tokens), sample.tokens);
      EXPECT_EQ(part(b.targets), sample.targets);
      std::vector<int64_t> from_zero(sample.tokens.size());
      std::iota(from_zero.begin(), from_zero.end(), int64_t{0});
      EXPECT_EQ(part(b.positions), from_zero);
    }
  }
  EXPECT_EQ(seen.size(), 40u);
  EXPECT_NE(plain->fingerprint(), packed->fingerprint());
}

TEST_F(Datasets, EvalFractionDivides) {
  write_pairs("train.jsonl", 200, [](int64_t) { return 2; });
  options_.eval_fraction = 0.25;
  auto texts = [&](Split split) {
    auto dataset = build(split);
    std::set<std::string> all;
    for (int64_t r = 0; r < dataset->num_rows(); ++r) all.insert(text_of(row(*dataset, r).tokens));
    return all;
  };
  auto train = texts(Split::kTrain), eval = texts(Split::kEval);
  EXPECT_EQ(train.size() + eval.size(), 200u);
  EXPECT_GT(eval.size(), 30u);
  EXPECT_LT(eval.size(), 70u);
  for (const auto& text : eval) EXPECT_EQ(train.count(text), 0u);
  options_.seed = 1;
  EXPECT_NE(texts(Split::kEval), eval);
  options_.eval_fraction = 1e-9;
  EXPECT_EQ(error_of([&] { build(Split::kEval); }),
            "data.eval_fraction=1e-09 leaves no record for evaluation out of 200; change it or name files with data.eval");
  options_.eval_fraction = 0;
  EXPECT_EQ(build(Split::kEval), nullptr);
}

// A text file is tokenised in pieces, joined to the tokens of the whole, and divided by chunks.
TEST_F(Datasets, TextFile) {
  std::string text;
  for (int64_t i = 0; text.size() < 2 * kTextPieceBytes + 1000; ++i) text += str("word", i, i % 7 ? " " : "\n");
  write("train.txt", text);
  options_.train = {"train.txt"};
  options_.max_length = 1000;
  auto whole = build();
  std::vector<int64_t> expected = tokenizer_.encode_ids(text, false), got;
  expected.push_back(kTestEos);
  const TokenFile& file = whole->file();
  got.assign(file.tokens(), file.tokens() + file.num_tokens());
  EXPECT_EQ(file.num_records(), 1);
  EXPECT_TRUE(got == expected);  // half a million: no use in printing them
  EXPECT_EQ(whole->counts().learnt, static_cast<int64_t>(expected.size()) - 1);

  options_.eval_fraction = 0.1;
  auto train = build(), eval = build(Split::kEval);
  EXPECT_EQ(train->num_samples() + eval->num_samples(), whole->num_samples());
  EXPECT_GT(eval->num_samples(), 25);
  EXPECT_LT(eval->num_samples(), 90);
  EXPECT_EQ(train->counts().learnt + eval->counts().learnt, whole->counts().learnt);
  std::set<int64_t> begins;
  for (const auto& part : {train, eval})
    for (const Sample& s : part->samples()) EXPECT_TRUE(begins.insert(s.begin).second);
  options_.eval_fraction = 1e-9;
  EXPECT_EQ(error_of([&] { build(Split::kEval); }), str("data.eval_fraction=1e-09 leaves no record for evaluation out of ",
            whole->num_samples(), "; change it or name files with data.eval"));
}

TEST_F(Datasets, BadRecordsAreLeftOutOnDemand) {
  const std::string good = "{\"prompt\": \"a\", \"completion\": \"b\"}\n", bad = "{broken\n{\"text\": 5}\n";
  write("train.jsonl", good + bad + good);
  EXPECT_EQ(error_of([&] { build(); }).rfind("train.jsonl:2: not valid JSON", 0), 0u);
  options_.on_error = "skip";
  for (int start = 0; start < 2; ++start)  // tokenised, then found in the cache
    EXPECT_EQ(build()->counts().text(),
              "2 records, 2 samples in 2 rows, 6 tokens, 4 learnt (66.7 %); 2 records left out: cannot be used "
              "(data.on_error=skip)");
  write("train.jsonl", bad);
  EXPECT_EQ(error_of([&] { build(); }).rfind("no record is left: data.on_error=skip left out all 2. The first: train.jsonl:1: not valid "
            "JSON", 0), 0u);
  write("train.txt", "caf\xE9");
  options_.train = {"train.txt"};
  EXPECT_EQ(error_of([&] { build(); }).rfind("train.txt:1: invalid UTF-8", 0), 0u);  // half a document is no document
}

// What a resumed run compares: the tokens, not where they came from or when they were made.
TEST_F(Datasets, FingerprintIsOfTheContent) {
  write_pairs("train.jsonl", 20, [](int64_t i) { return 1 + i; });
  std::string fingerprint = build()->fingerprint();
  std::filesystem::rename("train.jsonl", "other.jsonl");
  std::filesystem::remove_all("cache");
  options_.train = {"other.jsonl"};
  EXPECT_EQ(build()->fingerprint(), fingerprint);
  options_.format = "prompt_completion";  // another name in the cache, the same tokens
  EXPECT_EQ(build()->fingerprint(), fingerprint);
  options_.learn = "all";
  EXPECT_NE(build()->fingerprint(), fingerprint);
  options_.learn = "completion", options_.seed = 1;
  EXPECT_NE(build()->fingerprint(), fingerprint);
  options_.seed = 0, options_.max_length = 9;
  EXPECT_NE(build()->fingerprint(), fingerprint);
}

TEST_F(Datasets, HashesAreRemembered) {
  auto set = [](const std::string& text, int seconds_ago) {
    write("big", text);
    std::filesystem::last_write_time("big", std::filesystem::file_time_type::clock::now() - std::chrono::seconds(seconds_ago));
    return std::filesystem::last_write_time("big");
  };
  std::filesystem::create_directory("cache");
  auto then = set("abc", 100);
  EXPECT_EQ(remembered_hash("big", "cache"), hash_bytes("abc"));
  set("xyz", 100);
  std::filesystem::last_write_time("big", then);  // it looks as it did: not read again
  EXPECT_EQ(remembered_hash("big", "cache"), hash_bytes("abc"));
  set("xyz", 50);
  EXPECT_EQ(remembered_hash("big", "cache"), hash_bytes("xyz"));
  then = set("new", 0);  // too young to be remembered
  EXPECT_EQ(remembered_hash("big", "cache"), hash_bytes("new"));
  write("big", "old");
  std::filesystem::last_write_time("big", then);
  EXPECT_EQ(remembered_hash("big", "cache"), hash_bytes("old"));
  EXPECT_EQ(remembered_hash("big", "nowhere"), hash_bytes("old"));
}

TEST_F(Datasets, KeysAreChecked) {
  auto words = [&](auto change) {
    DataOptions o = options_;
    change(o);
    return error_of<ConfigError>([&] { o.check(); });
  };
  EXPECT_EQ(words([](auto& o) { o.train.clear(); }), "data.train names no file; give one or more files of records");
  EXPECT_EQ(words([](auto& o) { o.truncation = "middle"; }),
            "data.truncation=middle is not known; allowed are auto, right, left, drop, error, chunk");
  EXPECT_EQ(words([](auto& o) { o.learn = "answers"; }), "data.learn=answers is not known; allowed are completion, all");
  EXPECT_EQ(words([](auto& o) { o.max_length = 1; }),
            "data.max_length=1 is too short; at least 2 tokens are needed to learn one");
  EXPECT_EQ(words([](auto& o) { o.eval_fraction = 1; }),
            "data.eval_fraction=1 is not a fraction; allowed is 0 up to, but not, 1");
  EXPECT_EQ(words([](auto& o) { o.eval_fraction = 0.5, o.eval = {"e"}; }),
            "data.eval and data.eval_fraction exclude each other; evaluation data is its own files, or a part of data.train");
}

TEST_F(Datasets, CacheIsUsedAndRepaired) {
  write_pairs("train.jsonl", 20, [](int64_t i) { return 1 + i; });
  int calls = 0;
  auto make = [&] {
    calls = 0;
    return Dataset::prepare(options_, Split::kTrain, tokenizer_, nullptr, [&](uint64_t done, uint64_t total) {
      ++calls;
      EXPECT_LE(done, total);
    });
  };
  std::string path = make(), why;
  EXPECT_EQ(calls, 1);
  EXPECT_TRUE(token_file_intact(path, &why)) << why;
  EXPECT_EQ(make(), path);
  EXPECT_EQ(calls, 0);  // found, not made again
  auto size = std::filesystem::file_size(path);

  {  // one bit, somewhere in the middle
    std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
    file.seekg(static_cast<std::streamoff>(size / 2));
    char c = static_cast<char>(file.get() ^ 4);
    file.seekp(static_cast<std::streamoff>(size / 2));
    file.put(c);
  }
  EXPECT_FALSE(token_file_intact(path, &why));
  EXPECT_EQ(why, "its content does not match its hash");
  EXPECT_EQ(make(), path);
  EXPECT_EQ(calls, 1);
  EXPECT_TRUE(token_file_intact(path, &why)) << why;

  std::filesystem::resize_file(path, size - 100);
  EXPECT_FALSE(token_file_intact(path, &why));
  EXPECT_EQ(why, str("it has ", size - 100, " bytes instead of ", size));
  make();
  EXPECT_EQ(calls, 1);
  std::filesystem::remove(path.substr(0, path.size() - 3) + ".json");  // never committed
  make();
  EXPECT_EQ(calls, 1);
  EXPECT_EQ(text_of(row(*Dataset::open(options_, Split::kTrain, path), 2).tokens), "p2ccc<eos>");

  // What decides the tokens decides the name; what does not, does not.
  options_.max_length = 7, options_.packing = true, options_.seed = 9;
  EXPECT_EQ(make(), path);
  options_.learn = "all";
  EXPECT_NE(make(), path);
  options_.learn = "completion", options_.train = {"train.jsonl:5"};
  EXPECT_NE(make(), path);
  std::filesystem::rename("train.jsonl", "other.jsonl");
  options_.train = {"other.jsonl"};
  EXPECT_EQ(make(), path);
  std::ofstream("other.jsonl", std::ios::app) << "{\"prompt\": \"x\", \"completion\": \"y\"}\n";
  EXPECT_NE(make(), path);
  options_.cache = "other.jsonl/cache";
  EXPECT_EQ(error_of<SystemError>([&] { make(); }).rfind("cannot create the token cache other.jsonl/cache: ", 0), 0u);
}

TEST_F(Datasets, ProcessesAtTheSameTimeShareOneFile) {
  write_pairs("train.jsonl", 2000, [](int64_t i) { return 1 + i % 40; });
  std::vector<pid_t> children;
  for (int i = 0; i < 3; ++i)
    if (pid_t child = ::fork(); child == 0) {
      int status = 1;
      bool worked = false;
      try {
        auto dataset = Dataset::build(options_, Split::kTrain, tokenizer_, nullptr, [&](uint64_t, uint64_t) { worked = true; });
        bool right = dataset->num_rows() == 2000 && text_of(row(*dataset, 39).tokens) == "p39" + std::string(40, 'c') + "<eos>";
        status = !right ? 2 : worked ? 10 : 0;
      } catch (const std::exception& error) {
        fprintf(stderr, "%s\n", error.what());
      }
      ::_exit(status);
    } else {
      children.push_back(child);
    }
  int num_worked = 0;
  for (pid_t child : children) {
    int status = 0;
    ::waitpid(child, &status, 0);
    ASSERT_TRUE(WIFEXITED(status));
    num_worked += WEXITSTATUS(status) == 10;
    EXPECT_TRUE(WEXITSTATUS(status) == 0 || WEXITSTATUS(status) == 10) << WEXITSTATUS(status);
  }
  EXPECT_EQ(num_worked, 1);  // the others waited
  int files = 0;
  for (const auto& entry : std::filesystem::directory_iterator("cache")) files += entry.path().extension() != ".lock" && entry.path().extension() != ".hash";
  EXPECT_EQ(files, 2);  // the token file and its manifest; nothing temporary is left
}

TEST_F(Datasets, FirstBadRecordIsNamed) {
  std::string text;
  for (int i = 1; i <= 600; ++i) text += i == 70 || i == 300 || i == 599 ? "{broken\n" : "{\"prompt\": \"a\", \"completion\": \"b\"}\n";
  write("train.jsonl", text);
  options_.num_threads = 4;
  std::string words = error_of([&] { build(); });
  EXPECT_EQ(words.rfind("train.jsonl:70", 0), 0u) << words;
  for (const auto& entry : std::filesystem::directory_iterator("cache")) EXPECT_TRUE(entry.path().extension() == ".lock" || entry.path().extension() == ".hash") << entry;
}

TEST_F(Datasets, IdsOutsideTheEmbedding) {
  write("train.jsonl", "{\"prompt\": \"a\", \"completion\": \"b\"}\n{\"prompt\": \"a\", \"completion\": \"~\"}\n");
  auto dataset = build();
  options_.embedding_rows = dataset->file().largest_id();
  EXPECT_EQ(error_of([&] { build(); }),
            "train.jsonl:2: token id 97 is outside the model's embedding of 97 rows; tokenizer and model do not belong together");
  options_.embedding_rows = 98;
  EXPECT_EQ(build()->num_rows(), 2);
}

TEST_F(Datasets, Report) {
  write_pairs("train.jsonl", 99, [](int64_t i) { return 1 + i; });
  options_.max_length = 54;
  std::string report = data_report(*build(), options_, tokenizer_, 2, false);
  EXPECT_NE(report.find("99 records, 99 samples in 99 rows"), std::string::npos) << report;
  EXPECT_NE(report.find("min 4  5 % 8  25 % 29  50 % 54  75 % 79  95 % 99  99 % 103  max 103"), std::string::npos) << report;
  EXPECT_NE(report.find("longer than data.max_length=54: 49.49 %"), std::string::npos) << report;
  EXPECT_NE(report.find("--- 1: train.jsonl:1, 4 tokens\n⟦p0⟧c<eos>\n"), std::string::npos) << report;
  EXPECT_NE(report.find("--- 2: train.jsonl:2, 5 tokens\n⟦p1⟧cc<eos>\n"), std::string::npos) << report;
  EXPECT_EQ(report.find("--- 3"), std::string::npos) << report;
  // Of all records, also of those that are left out.
  options_.truncation = "drop";
  report = data_report(*build(), options_, tokenizer_, 0, false);
  EXPECT_NE(report.find("99 % 103  max 103"), std::string::npos) << report;
  EXPECT_NE(report.find("longer than data.max_length=54: 49.49 %"), std::string::npos) << report;
  options_.truncation = "auto";
  EXPECT_NE(data_report(*build(), options_, tokenizer_, 1, true).find("\033[2mp0\033[0mc<eos>"), std::string::npos);
}

}  // namespace
}  // namespace trireme
