#include "config/config.h"

#include <gtest/gtest.h>

#include <fstream>

#include "base/check.h"

namespace trireme {
namespace {

CommandLine parse(std::vector<const char*> words, Config& config) {
  words.insert(words.begin(), "trireme");
  return parse_command_line(static_cast<int>(words.size()), words.data(), config);
}

std::string refusal(std::vector<const char*> words) {
  Config config;
  try {
    parse(std::move(words), config);
  } catch (const ConfigError& error) {
    return error.what();
  }
  return "accepted";
}

std::string ini(const std::string& text) {
  std::string path = testing::TempDir() + "trireme_config_test.ini";
  std::ofstream(path) << text;
  return path;
}

TEST(Config, CommandLineWinsOverFileOverDefault) {
  std::string path = ini("[optim]\nlr = 0.25 # why\nbeta1=0.5\n");
  Config config;
  auto line = parse({"train", path.c_str(), "--optim.lr=0.125"}, config);
  EXPECT_EQ(config.optim.lr, 0.125);
  EXPECT_EQ(config.optim.beta1, 0.5);
  EXPECT_EQ(config.optim.beta2, 0.999);
  EXPECT_TRUE(line.is_given("optim.beta1"));
  EXPECT_FALSE(line.is_given("optim.beta2"));
}

TEST(Config, RefusesUnknownKeysAndAbbreviationsWithTheNearest) {
  EXPECT_EQ(refusal({"train", "--optim.lrr=1"}), "unknown key optim.lrr; did you mean optim.lr?; trireme VERB --help lists all keys");
  EXPECT_NE(refusal({"train", "--optim.weight=1"}).find("unknown key optim.weight"), std::string::npos);
  EXPECT_NE(refusal({"train", "--train.micro_batch=1"}).find("did you mean train.micro_batch_size?"), std::string::npos);
  EXPECT_NE(refusal({"trian"}).find("unknown verb trian; did you mean train?"), std::string::npos);
}

TEST(Config, ReportsAllMistakesTogetherWithFileAndLine) {
  std::string path = ini("[train]\nsteps = many\n\n[data]\nmax_lenght = 4\n");
  std::string text = refusal({"train", path.c_str(), "--optim.beta1=2", "--task.kind=sfd"});
  EXPECT_NE(text.find(path + ":2: train.steps=many: an integer is expected"), std::string::npos) << text;
  EXPECT_NE(text.find(path + ":5: unknown key data.max_lenght; did you mean data.max_length?"), std::string::npos) << text;
  EXPECT_NE(text.find("optim.beta1=2: must be from 0 to 0.9999999"), std::string::npos) << text;
  EXPECT_NE(text.find("task.kind=sfd: allowed are sft, pretrain; did you mean sft?"), std::string::npos) << text;
}

TEST(Config, RefusesAKeyTwiceAndAKeyWithoutValue) {
  EXPECT_EQ(refusal({"train", "--run.seed=1", "--run.seed=2"}), "run.seed is given twice");
  EXPECT_EQ(refusal({"train", "--run.seed"}), "--run.seed needs a value: --run.seed=VALUE");
}

TEST(Config, NumbersAreDecimalAndFinite) {
  for (const char* word : {"0x10", "inf", "nan", "1e999", "1,5", "--1"})
    EXPECT_EQ(refusal({"train", str("--optim.lr=", word).c_str()}), str("optim.lr=", word, ": a number is expected"));
  EXPECT_EQ(refusal({"train", "--train.steps=0x10"}), "train.steps=0x10: an integer is expected");
  EXPECT_EQ(refusal({"train", "--optim.epsilon=0"}), "optim.epsilon=0: must be from 1e-30 to 1");  // 0/0 without a gradient
}

TEST(Config, EveryKeyHasAMeaning) {
  Config config;
  for (const auto& field : fields(config)) EXPECT_NE(field.meaning, "") << field.key;
}

TEST(Config, RefusesWordsThatNoVerbTakes) {
  EXPECT_EQ(refusal({"train", "run.cfg"}), "unexpected word run.cfg; trireme train takes one CONFIG.ini and --section.key=value");
  Config config;
  EXPECT_EQ(parse({"generate", "What is it?", "And --that?"}, config).arguments, (std::vector<std::string>{"What is it?", "And --that?"}));
}

TEST(Config, RefusesFilesThatCannotBeRead) {
  EXPECT_NE(refusal({"train", "/not/there.ini"}).find("/not/there.ini: cannot open"), std::string::npos);
  EXPECT_NE(refusal({"train", ini(std::string(2 << 20, 'x')).c_str()}).find("at most 1048576"), std::string::npos);
  std::string path = ini("[train]\nsteps\n");
  EXPECT_EQ(refusal({"train", path.c_str()}), path + ":2: not 'key = value' nor '[section]': steps");
  EXPECT_LT(refusal({"train", ("--task.kind=" + std::string(1 << 20, 'x')).c_str()}).size(), 300u);
}

TEST(Config, CommentsAndQuotesInAFile) {
  std::string path = ini("# a = b\n[data]\nprompt_field = a#b # why\ncompletion_field = \" c # d \" # why\ntext_field=\"a\" b\n"
                         "template_args = {\"x\": \"#\"}\n[generate]\nstop = \"\\n,end\"\n");
  Config config;
  parse({"train", path.c_str()}, config);
  EXPECT_EQ(config.data.prompt_field, "a#b");
  EXPECT_EQ(config.data.completion_field, " c # d ");
  EXPECT_EQ(config.data.text_field, "\"a\" b");
  EXPECT_EQ(config.data.template_args, "{\"x\": \"#\"}");
  EXPECT_EQ(config.generate.stop, (std::vector<std::string>{"\n", "end"}));
}

TEST(Config, PrintedConfigurationReadsBack) {
  Config config;
  config.optim.lr = 0.1;
  config.data.train = {"a.jsonl:5", "b.jsonl"};
  config.data.packing = true;
  config.data.text_field = " # \"\n ";
  config.data.template_args = "{\"x\": \"# \"}";
  config.generate.stop = {"\n"};
  std::string path = ini(config_to_ini(config, true));
  Config back;
  parse({"train", path.c_str()}, back);
  EXPECT_EQ(config_to_ini(back, false), config_to_ini(config, false));
  EXPECT_EQ(back.optim.lr, 0.1);
  EXPECT_EQ(back.data.text_field, config.data.text_field);
}

TEST(Config, HelpOfEveryVerbNamesEveryKeyOfItsSections) {
  for (const char* verb : {"train", "eval", "generate", "prepare", "tokenize", "export", "plan", "doctor"})
    EXPECT_NE(help_text(verb).find("--model.path="), std::string::npos) << verb;
  Config config;
  for (const auto& field : fields(config)) {
    if (field.key.rfind("generate", 0) == 0 || field.key.rfind("tokenize", 0) == 0) continue;
    EXPECT_NE(help_text("train").find("--" + field.key + "="), std::string::npos) << field.key;
  }
}

}  // namespace
}  // namespace trireme
