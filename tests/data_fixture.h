// A tokenizer of single characters and a folder of its own for tests of the data room.
#pragma once

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

#include "base/check.h"
#include "base/json.h"
#include "data/dataset.h"

namespace trireme {

enum TestIds : int64_t { kTestEos = 0, kTestStart = 1, kTestEnd = 2, kTestBos = 3 };

// Every printable ASCII character, the space and the newline is one token. `post_processed`: <bos> before a text and
// <eos> after it.
inline Tokenizer character_tokenizer(bool post_processed = false) {
  Json vocab = Json::object(), added = Json::array();
  int64_t id = 0;
  for (const char* special : {"<eos>", "<|im_start|>", "<|im_end|>", "<bos>"}) {
    added.push_back({{"id", id}, {"content", special}, {"single_word", false}, {"lstrip", false}, {"rstrip", false},
                     {"normalized", false}, {"special", true}});
    vocab[special] = id++;
  }
  for (char c = '!'; c <= '~'; ++c) vocab[std::string(1, c)] = id++;
  vocab["\u0120"] = id++;  // the byte-level spellings of space and newline
  vocab["\u010A"] = id++;
  Json json = {{"version", "1.0"}, {"truncation", nullptr}, {"padding", nullptr}, {"added_tokens", added}, {"normalizer", nullptr},
               {"pre_tokenizer", {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}, {"use_regex", true}}},
               {"post_processor", nullptr},
               {"decoder", {{"type", "ByteLevel"}, {"add_prefix_space", true}, {"trim_offsets", true}, {"use_regex", true}}},
               {"model", {{"type", "BPE"}, {"dropout", nullptr}, {"unk_token", nullptr}, {"continuing_subword_prefix", nullptr},
                          {"end_of_word_suffix", nullptr}, {"fuse_unk", false}, {"byte_fallback", false}, {"vocab", vocab},
                          {"merges", Json::array()}}}};
  if (post_processed) {
    auto special = [](const char* name) { return Json{{"SpecialToken", {{"id", name}, {"type_id", 0}}}}; };
    auto entry = [](const char* name, int64_t id) {
      return Json{{"id", name}, {"ids", Json::array({id})}, {"tokens", Json::array({name})}};
    };
    Json text = {{"Sequence", {{"id", "A"}, {"type_id", 0}}}}, second = {{"Sequence", {{"id", "B"}, {"type_id", 1}}}};
    json["post_processor"] = {{"type", "TemplateProcessing"},
                              {"single", Json::array({special("<bos>"), text, special("<eos>")})},
                              {"pair", Json::array({special("<bos>"), text, second, special("<eos>")})},
                              {"special_tokens", {{"<bos>", entry("<bos>", kTestBos)}, {"<eos>", entry("<eos>", kTestEos)}}}};
  }
  return Tokenizer::parse(dump_json(json), "characters");
}

class DataTest : public ::testing::Test {
 protected:
  void SetUp() override {
    folder_ = std::filesystem::temp_directory_path() / str("trireme_data_", ::getpid());
    std::filesystem::create_directories(folder_);
    before_ = std::filesystem::current_path();
    std::filesystem::current_path(folder_);  // so that messages name short paths
    options_.train = {"train.jsonl"};
    options_.cache = "cache";
    options_.eos_id = kTestEos;
    options_.bos_id = kTestBos;
    options_.shuffle = false;
    options_.num_threads = 2;
  }
  void TearDown() override {
    std::filesystem::current_path(before_);
    std::filesystem::remove_all(folder_);
  }

  static void write(const std::string& name, const std::string& text) { std::ofstream(name, std::ios::binary) << text; }
  // Records "p<i>" -> `completion_length(i)` times 'c'.
  template <typename Length>
  static void write_pairs(const std::string& name, int64_t num, Length completion_length) {
    std::string text;
    for (int64_t i = 0; i < num; ++i)
      text += str("{\"prompt\": \"p", i, "\", \"completion\": \"", std::string(static_cast<size_t>(completion_length(i)), 'c'), "\"}\n");
    write(name, text);
  }
  std::shared_ptr<const Dataset> build(Split split = Split::kTrain) {
    return Dataset::build(options_, split, tokenizer_, nullptr);
  }
  template <typename ErrorType = DataError, typename Body>
  static std::string error_of(Body body) {
    try {
      body();
    } catch (const ErrorType& error) {
      return error.what();
    }
    return "no error";
  }
  std::string text_of(const std::vector<int64_t>& ids) const { return tokenizer_.decode(ids, false); }

  std::filesystem::path folder_, before_;
  Tokenizer tokenizer_ = character_tokenizer();
  DataOptions options_;
};

}  // namespace trireme
