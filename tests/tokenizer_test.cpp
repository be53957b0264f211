// The tokenizer by itself; that it gives what Hugging Face's does is tests/tokenizer_parity_test.py.
#include "data/tokenizer.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <functional>
#include <map>
#include <random>
#include <thread>

#include "base/check.h"
#include "base/file.h"
#include "base/json.h"
#include "data/tok_regex.h"
#include "data/tok_text.h"
#include "tests/fuzz/tokenizer_fuzz.cpp"

namespace trireme {
namespace {

using Ids = std::vector<int64_t>;
using Offsets = std::vector<std::pair<int64_t, int64_t>>;

// A BPE with the characters given and then the merges, "a b" each; ids in this order.
Json bpe(const std::vector<std::string>& characters, const std::vector<std::string>& merges) {
  Json model = {{"type", "BPE"}, {"vocab", Json::object()}, {"merges", Json::array()}};
  auto add = [&](const std::string& token) {
    if (!model["vocab"].contains(token)) model["vocab"][token] = static_cast<int64_t>(model["vocab"].size());
  };
  for (const auto& c : characters) add(c);
  for (const auto& merge : merges) {
    size_t space = merge.find(' ');
    add(merge.substr(0, space) + merge.substr(space + 1));
    model["merges"].push_back(merge);
  }
  return {{"version", "1.0"},
          {"added_tokens", Json::array()},
          {"normalizer", nullptr},
          {"pre_tokenizer", nullptr},
          {"post_processor", nullptr},
          {"decoder", nullptr},
          {"model", model}};
}

// All bytes (the id is the byte), then "he", "ll", "hell", "hello", " w" (256 ...).
Json byte_level() {
  std::vector<std::string> bytes;
  for (int b = 0; b < 256; ++b) bytes.push_back(tok::byte_char(static_cast<unsigned char>(b)));
  Json json = bpe(bytes, {"h e", "l l", "he ll", "hell o", "\u0120 w"});
  json["pre_tokenizer"] = {{"type", "ByteLevel"}, {"add_prefix_space", false}};
  json["decoder"] = {{"type", "ByteLevel"}};
  return json;
}

Tokenizer parse(const Json& json) { return Tokenizer::parse(dump_json(json), "t.json"); }

Json added(int64_t id, const std::string& content, const Json& flags = Json::object()) {
  Json out = {{"id", id}, {"content", content}};
  out.update(flags);
  return out;
}

TEST(Tokenizer, FindsAddedTokensByTheirFlags) {
  Json json = byte_level();
  json["normalizer"] = {{"type", "Lowercase"}};
  json["added_tokens"] = {added(300, "<a>", {{"lstrip", true}, {"special", true}}),
                          added(301, "<b>", {{"rstrip", true}, {"special", true}}),
                          added(302, "<b><b>", {{"special", true}}),
                          added(303, "word", {{"single_word", true}, {"normalized", false}}),
                          added(304, "NORM", {{"normalized", true}}),
                          added(305, "RAW", {{"normalized", false}})};
  Tokenizer t = parse(json);
  EXPECT_EQ(t.encode("x \n<a> y", false).ids, (Ids{'x', 300, ' ', 'y'}));
  EXPECT_EQ(t.encode("x \n<a> y", false).offsets, (Offsets{{0, 1}, {1, 6}, {6, 7}, {7, 8}}));
  EXPECT_EQ(t.encode("x <b> \u3000y", false).ids, (Ids{'x', ' ', 301, 'y'}));
  EXPECT_EQ(t.encode("<b> <a>", false).offsets, (Offsets{{0, 4}, {4, 7}})) << "the space is taken once";
  EXPECT_EQ(t.encode("<b><b><b>", false).ids, (Ids{302, 301})) << "the leftmost, then the longest";
  EXPECT_EQ(t.encode("word-words", false).ids, (Ids{303, '-', 'w', 'o', 'r', 'd', 's'}));
  EXPECT_EQ(t.encode("éword", false).ids, (Ids{0xC3, 0xA9, 'w', 'o', 'r', 'd'})) << "é is a part of a word";
  EXPECT_EQ(t.encode("nOrM", false).ids, (Ids{304}));
  EXPECT_EQ(t.encode("RAWraw", false).ids, (Ids{305, 'r', 'a', 'w'}));
  EXPECT_TRUE(t.is_special(300));
  EXPECT_FALSE(t.is_special(303));
  EXPECT_EQ(t.vocab_size(), 306);
  EXPECT_EQ(t.decode(Ids{'x', 300, 'y'}, true), "xy");
  EXPECT_EQ(t.decode(Ids{'x', 300, 'y'}, false), "x<a>y");
}

TEST(Tokenizer, TakesWholeWordsWhereMergesAreIgnored) {
  Json json = byte_level();
  json["model"]["vocab"]["hex"] = 400;  // no merge makes it
  EXPECT_EQ(parse(json).encode_ids("hex hello", false), (Ids{256, 'x', ' ', 259}));
  json["model"]["ignore_merges"] = true;
  EXPECT_EQ(parse(json).encode_ids("hex hello", false), (Ids{400, ' ', 259}));
}

TEST(Tokenizer, SpellsUnknownCharactersAsBytes) {
  Json json = bpe({"a", "<unk>", "<0xC3>", "<0xA9>"}, {});
  json["model"]["byte_fallback"] = true;
  EXPECT_EQ(parse(json).encode("aéè", false).ids, (Ids{0, 2, 3})) << "è has bytes without a token, and none is unknown";
  json["model"]["unk_token"] = "<unk>";
  EXPECT_EQ(parse(json).encode("aéèè", false).ids, (Ids{0, 2, 3, 1, 1}));
  EXPECT_EQ(parse(json).encode("aéèè", false).offsets, (Offsets{{0, 1}, {1, 2}, {1, 2}, {2, 3}, {3, 4}}));
  json["model"]["fuse_unk"] = true;
  EXPECT_EQ(parse(json).encode("aéèè", false).offsets, (Offsets{{0, 1}, {1, 2}, {1, 2}, {2, 4}}));
}

// Byte-pair encoding as it is written down: the pair of the lowest rank, the leftmost of equals, until there is none.
Ids plain_bpe(const Json& json, const std::string& text) {
  const Json& vocab = json["model"]["vocab"];
  std::map<std::pair<std::string, std::string>, size_t> ranks;
  for (const Json& merge : json["model"]["merges"]) {
    auto both = merge.get<std::string>();
    ranks.emplace(std::pair(both.substr(0, both.find(' ')), both.substr(both.find(' ') + 1)), ranks.size());
  }
  std::vector<std::string> symbols;
  for (size_t i = 0; i < text.size(); i += tok::char_length(text, i))
    symbols.push_back(text.substr(i, tok::char_length(text, i)));
  while (true) {
    size_t best = ranks.size(), at = 0;
    for (size_t i = 0; i + 1 < symbols.size(); ++i) {
      auto it = ranks.find({symbols[i], symbols[i + 1]});
      if (it != ranks.end() && it->second < best) best = it->second, at = i;
    }
    if (best == ranks.size()) break;
    symbols[at] += symbols[at + 1];
    symbols.erase(symbols.begin() + static_cast<std::ptrdiff_t>(at) + 1);
  }
  Ids ids;
  for (const auto& s : symbols) ids.push_back(vocab[s].get<int64_t>());
  return ids;
}

// Words short and long, in the cache and not, texts cut at ▁ and not.
TEST(Tokenizer, MergesAsThePlainLoop) {
  const std::string mark = "\u2581";
  for (bool across : {false, true}) {
    Json json = bpe({"<unk>", "a", "b", "c", mark}, {"a b", "c a", "b c", mark + " a", "ab c", mark + " " + mark, "c c",
                                                     "ab ab", mark + "a bc", "a a", "abc abc"});
    if (across) json["model"]["merges"].push_back("c " + mark), json["model"]["vocab"]["c" + mark] = 99;
    json["model"]["unk_token"] = "<unk>";
    Tokenizer t = parse(json);
    std::mt19937 random(1);
    for (int round = 0; round < 3000; ++round) {
      std::string text;
      for (size_t n = random() % (round % 10 == 0 ? 200 : 20); n > 0; --n) {
        size_t pick = random() % 7;
        text += pick < 2 ? "a" : pick < 4 ? "b" : pick < 6 ? "c" : mark;
      }
      Ids expected = plain_bpe(json, text);
      ASSERT_EQ(t.encode_ids(text, false), expected) << text;
      ASSERT_EQ(t.encode(text, false).ids, expected) << text;
    }
  }
}

TEST(Tokenizer, KeepsTheCachesOfTwoTokenizersAndOfThreadsApart) {
  Json other = byte_level();
  other["model"]["merges"].erase(3);
  Tokenizer a = parse(byte_level()), b = parse(other);
  auto check = [&] {
    for (int i = 0; i < 3; ++i) {
      ASSERT_EQ(a.encode_ids("hello", false), (Ids{259}));
      ASSERT_EQ(b.encode_ids("hello", false), (Ids{258, 'o'}));
    }
  };
  std::thread one(check), two(check);
  one.join();
  two.join();
  std::string text;  // more words than the cache holds, each of them twice
  Ids expected;
  for (int turn = 0; turn < 2; ++turn)
    for (int i = 0; i < 100'000; ++i) {
      std::string word = " " + std::to_string(i * 7919);
      text += word;
      for (char c : word) expected.push_back(c);
    }
  EXPECT_EQ(a.encode_ids(text, false), expected);
}

TEST(Tokenizer, ScansTheKnownPatternsAsTheRegexEngine) {
  const std::vector<std::string> parts = {
      "a",  "B", "é",  "ſ",  "\u0301", "日",   "1",      "½",      "'",      "s",        "T",      "ll", "LL", "'re",
      "'ſ", " ", "  ", "\t", "\n",     "\r\n", "\u00a0", "\u3000", "\u2028", "\xC2\x85", "\u180e", "-",  "_",  "👍"};
  std::mt19937 random(2);
  for (const char* pattern : {tok::kGpt2Pattern, tok::kLlama3Pattern, tok::kQwen2Pattern}) {
    tok::Regex by_hand(pattern, "t"), engine(pattern, "t", false);
    for (int round = 0; round < 20'000; ++round) {
      std::string text;
      for (size_t n = 1 + random() % 9; n > 0; --n) text += parts[random() % parts.size()];
      std::vector<tok::Span> a, b;
      by_hand.matches(text, 0, a);
      engine.matches(text, 0, b);
      ASSERT_EQ(a.size(), b.size()) << pattern << " on " << dump_json(Json(text));
      for (size_t i = 0; i < a.size(); ++i)
        ASSERT_TRUE(a[i].first == b[i].first && a[i].last == b[i].last) << pattern << " on " << dump_json(Json(text));
    }
  }
}

TEST(Tokenizer, StreamsWhatDecodeGives) {
  Json sentencepiece = bpe({"<unk>", "a", "\u2581"}, {"\u2581 a"});
  for (int b = 0; b < 256; ++b)
    sentencepiece["model"]["vocab"][str("<0x", "0123456789ABCDEF"[b / 16], "0123456789ABCDEF"[b % 16], ">")] = 10 + b;
  sentencepiece["decoder"] = {{"type", "Sequence"},
                              {"decoders",
                               {{{"type", "Replace"}, {"pattern", {{"String", "\u2581"}}}, {"content", " "}},
                                {{"type", "ByteFallback"}},
                                {{"type", "Fuse"}},
                                {{"type", "Strip"}, {"content", " "}, {"start", 1}, {"stop", 0}}}}};
  std::mt19937 random(3);
  for (bool byte_tokens : {false, true}) {
    Tokenizer t = parse(byte_tokens ? sentencepiece : byte_level());
    StreamDecoder stream(t, false);  // used again and again
    for (int round = 0; round < 5000; ++round) {
      static const int kBytes[] = {0xF0, 0x9F, 0x98, 0x80, 0xC3, 0xA9, 0xE2, 0x82, 0xED, 0xA0, 'a', 0xFF};
      Ids ids;
      for (size_t n = random() % 8; n > 0; --n) {
        int64_t byte = kBytes[random() % 12];
        ids.push_back(!byte_tokens ? byte : random() % 4 ? 10 + byte : static_cast<int64_t>(random() % 4));
      }
      std::string text;
      for (int64_t id : ids) text += stream.push(id);
      text += stream.finish();
      ASSERT_EQ(text, t.decode(ids, false));
      ASSERT_TRUE(tok::valid_utf8(text));
    }
  }
  Tokenizer t = parse(byte_level());
  EXPECT_EQ(t.decode(Ids{0xF0, 0x9F, 'a', 0xE2, 0x82}, false), "\uFFFDa\uFFFD") << "a broken part is one U+FFFD";
  EXPECT_EQ(t.decode(Ids{0xED, 0xA0, 0x80}, false), "\uFFFD\uFFFD\uFFFD") << "a surrogate is no character";
  StreamDecoder stream(t, false);
  EXPECT_EQ(stream.push(0xC3), "");
  EXPECT_EQ(stream.push(0xA9), "é") << "as soon as it is whole";
  EXPECT_EQ(stream.push(0xE2), "");
  EXPECT_EQ(stream.push('x'), "\uFFFDx") << "as soon as it cannot become whole";
  Tokenizer s = parse(sentencepiece);
  EXPECT_EQ(s.decode(Ids{3, 10 + 0xC3, 10 + 0xA9, 10 + 0xC3, 1}, false), "a\uFFFD\uFFFD\uFFFDa")
      << "one a token, é too";
}

TEST(Tokenizer, IgnoresTruncationAndPadding) {
  Json json = byte_level();
  json["truncation"] = {{"max_length", 2}, {"strategy", "LongestFirst"}, {"stride", 0}, {"direction", "Right"}};
  json["padding"] = {{"strategy", {{"Fixed", 8}}}, {"pad_id", 0}};
  EXPECT_EQ(parse(json).encode_ids("abc", true), (Ids{'a', 'b', 'c'}));
}

TEST(Tokenizer, PutsSpecialTokensAroundATextWhereAsked) {
  Json json = byte_level();
  json["post_processor"] = {{"type", "Sequence"},
                            {"processors",
                             {{{"type", "RobertaProcessing"},
                               {"cls", {"A", 'A'}},
                               {"sep", {"B", 'B'}},
                               {"trim_offsets", true},
                               {"add_prefix_space", false}},
                              {{"type", "BertProcessing"}, {"cls", {"C", 'C'}}, {"sep", {"D", 'D'}}}}}};
  Tokenizer t = parse(json);
  Encoding e = t.encode(" wa", true);
  EXPECT_EQ(e.ids, (Ids{'C', 'A', 260, 'a', 'B', 'D'}));
  EXPECT_EQ(e.offsets, (Offsets{{0, 0}, {0, 0}, {1, 2}, {2, 3}, {0, 0}, {0, 0}}));
  EXPECT_EQ(e.special, (std::vector<uint8_t>{1, 1, 0, 0, 1, 1}));
  EXPECT_EQ(t.encode_ids(" wa", true), e.ids);
  EXPECT_EQ(t.encode_ids(" wa", false), (Ids{260, 'a'}));
}

TEST(Tokenizer, RefusesTextThatIsNotUtf8) {
  Tokenizer t = parse(byte_level());
  for (const char* text : {"\xFF", "\xC3", "\xED\xA0\x80", "\xC0\xAF", "\xF4\x90\x80\x80"}) {
    EXPECT_THROW(t.encode(text, false), DataError);
    EXPECT_THROW(t.encode_ids(text, false), DataError);
  }
}

// What is wrong with a file, and words of the message that says so.
TEST(Tokenizer, RefusesWrongFilesInWords) {
  const Json good = byte_level();
  auto refused = [&](const std::function<void(Json&)>& change) {
    Json json = good;
    change(json);
    try {
      parse(json);
    } catch (const DataError& e) {
      return std::string(e.what());
    }
    return std::string("accepted");
  };
  const std::vector<std::pair<std::string, std::function<void(Json&)>>> cases = {
      {"\"model\" is missing", [](Json& j) { j.erase("model"); }},
      {"the model \"Unigram\" is not supported; supported are BPE and WordPiece",
       [](Json& j) {
         j["model"] = {{"type", "Unigram"}};
       }},
      {"the normalizer \"Precompiled\" is not supported",
       [](Json& j) {
         j["normalizer"] = {{"type", "Precompiled"}};
       }},
      {"the pre_tokenizer \"UnicodeScripts\" is not supported",
       [](Json& j) {
         j["pre_tokenizer"] = {{"type", "UnicodeScripts"}};
       }},
      {"the post_processor \"Odd\" is not supported",
       [](Json& j) {
         j["post_processor"] = {{"type", "Odd"}};
       }},
      {"the decoder \"CTC\" is not supported",
       [](Json& j) {
         j["decoder"] = {{"type", "CTC"}};
       }},
      {"\"dropout\" is set, which is not supported", [](Json& j) { j["model"]["dropout"] = 0.5; }},
      {"\"vocab\" must be an object", [](Json& j) { j["model"]["vocab"] = Json::array(); }},
      {"ids are integers of 0 to 100000000", [](Json& j) { j["model"]["vocab"]["x1"] = 1e30; }},
      {"ids are integers of 0 to 100000000", [](Json& j) { j["model"]["vocab"]["x1"] = -1; }},
      {"ids are integers of 0 to 100000000", [](Json& j) { j["model"]["vocab"]["x1"] = "1"; }},
      {"have the same id 65", [](Json& j) { j["model"]["vocab"]["x1"] = 65; }},
      {"\"merges\" must be a list", [](Json& j) { j["model"]["merges"] = 1; }},
      {"merge 5 (\"ab\") is no pair", [](Json& j) { j["model"]["merges"].push_back("ab"); }},
      {"merge 5 must be a pair of tokens",
       [](Json& j) {
         j["model"]["merges"].push_back({1, 2});
       }},
      {"merge 5 names the token \"ab\", which is not in the vocabulary",
       [](Json& j) { j["model"]["merges"].push_back("a b"); }},
      {"unk_token \"?!\" is not in the vocabulary", [](Json& j) { j["model"]["unk_token"] = "?!"; }},
      {"\"byte_fallback\" must be true or false", [](Json& j) { j["model"]["byte_fallback"] = "yes"; }},
      {"\"added_tokens\" must be a list", [](Json& j) { j["added_tokens"] = "x"; }},
      {"the key \"content\" is missing",
       [](Json& j) {
         j["added_tokens"] = {{{"id", 1}}};
       }},
      {"the id of the added token \"x\" is 99999999999",
       [](Json& j) { j["added_tokens"] = Json::array({added(99999999999, "x")}); }},
      {"post_processor: no token has the id 999",
       [](Json& j) {
         j["post_processor"] = {{"type", "BertProcessing"}, {"cls", {"x", 1}}, {"sep", {"y", 999}}};
       }},
      {"must hold the sequence A once",
       [](Json& j) {
         j["post_processor"] = {{"type", "TemplateProcessing"}, {"single", Json::array()}};
       }},
      {"is wrong or not supported",
       [](Json& j) {
         j["pre_tokenizer"] = {{"type", "Split"}, {"pattern", {{"Regex", "(("}}}, {"behavior", "Removed"}};
       }},
      {"an intersection of sets (&&)",
       [](Json& j) {
         j["normalizer"] = {{"type", "Replace"}, {"pattern", {{"Regex", "[a&&b]"}}}, {"content", ""}};
       }},
      {"behavior \"Odd\" is not known",
       [](Json& j) {
         j["pre_tokenizer"] = {{"type", "Split"}, {"pattern", {{"String", "x"}}}, {"behavior", "Odd"}};
       }},
      {"\"normalizers\" must be a list",
       [](Json& j) {
         j["normalizer"] = {{"type", "Sequence"}};
       }},
      {"normalizer must be an object", [](Json& j) { j["normalizer"] = 3; }},
      {"must be one character",
       [](Json& j) {
         j["pre_tokenizer"] = {{"type", "CharDelimiterSplit"}, {"delimiter", "ab"}};
       }},
      {"JSON nested deeper than 100 levels", [](Json& j) {
         for (int i = 0; i < 200; ++i) {
           Json outer = {{"type", "Sequence"}, {"normalizers", Json::array()}};
           outer["normalizers"].push_back(std::move(j["normalizer"]));
           j["normalizer"] = std::move(outer);
         }
       }}};
  ASSERT_EQ(refused([](Json&) {}), "accepted");
  for (const auto& [words, change] : cases) {
    std::string message = refused(change);
    EXPECT_NE(message.find(words), std::string::npos) << "wanted: " << words << "\nfound:  " << message;
    EXPECT_EQ(message.find("t.json"), 0u) << message;
  }
  EXPECT_THROW(Tokenizer::parse(std::string(100'000, '['), "t.json"), DataError);
  EXPECT_THROW(Tokenizer::load("/nowhere"), DataError);
}

// A pattern that runs on and on ends in a message; merges in a ring end because each makes the text shorter.
TEST(Tokenizer, EndsWithHostileFiles) {
  Json json = byte_level();
  json["pre_tokenizer"] = {{"type", "Split"}, {"pattern", {{"Regex", "(a|aa)+$"}}}, {"behavior", "Isolated"}};
  Tokenizer slow = parse(json);
  EXPECT_THROW(slow.encode_ids(std::string(200, 'a') + "b", false), DataError);
  Json growing = byte_level();
  growing["normalizer"] = {{"type", "Sequence"}, {"normalizers", Json::array()}};
  for (int i = 0; i < 90; ++i)
    growing["normalizer"]["normalizers"].push_back(
        {{"type", "Replace"}, {"pattern", {{"String", "a"}}}, {"content", "aa"}});
  EXPECT_THROW(parse(growing).encode_ids("a", false), DataError);
  EXPECT_NO_THROW(parse(growing).encode_ids("b", false));
  Json ring = bpe({"a", ""}, {"a a", "aa a", "a aa"});
  ring["model"]["merges"].push_back({"", "a"});
  ring["model"]["merges"].push_back({"a", ""});
  EXPECT_EQ(parse(ring).encode_ids("aaaa", false), (Ids{2, 2}));
}

// The seeds and past finds of tests/fuzz/tokenizer_fuzz.cpp.
TEST(Tokenizer, FuzzCorpus) {
  const char* source = std::getenv("TRIREME_SOURCE");
  ASSERT_TRUE(source) << "TRIREME_SOURCE names the repository";
  int count = 0;
  for (const auto& entry : std::filesystem::directory_iterator(str(source, "/tests/fuzz/corpus/tokenizer"))) {
    std::string bytes = read_file(entry.path().string());
    EXPECT_NO_THROW(LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size()))
        << entry.path();
    ++count;
  }
  EXPECT_GE(count, 14);
}

}  // namespace
}  // namespace trireme
