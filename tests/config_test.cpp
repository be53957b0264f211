#include "config/config.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>

#include "base/check.h"
#include "scratch.h"

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
  static const struct Folder {
    std::string path = scratch_folder();
    ~Folder() { std::filesystem::remove_all(path); }
  } folder;
  std::string path = folder.path + "/test.ini";
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
  EXPECT_NE(refusal({"train", "--lr=1"}).find("unknown key lr; did you mean optim.lr?"), std::string::npos);
  for (const char* elsewhere : {"learning_rate", "lr_scheduler_type", "lr_scheduler", "warmup_ratio", "batch_size", "per_device_train_batch_size",
                                "per_device_eval_batch_size", "gradient_accumulation_steps", "num_train_epochs", "num_epochs", "max_steps",
                                "gradient_checkpointing", "bf16", "fp16", "output_dir", "max_seq_length", "sequence_len", "sample_packing",
                                "eval_steps", "save_steps", "save_total_limit", "logging_steps", "early_stopping_patience",
                                "resume_from_checkpoint", "lora_r", "lora_alpha", "lora_dropout", "target_modules", "lora_target_modules",
                                "use_rslora", "base_model", "model_name_or_path", "max_new_tokens"}) {
    const std::string text = refusal({"train", (std::string("--") + elsewhere + "=1").c_str()});
    const size_t begin = text.find("; did you mean ") + 15;
    ASSERT_LT(begin, text.size()) << text;
    const std::string key = text.substr(begin, text.find('?') - begin);
    EXPECT_EQ(refusal({"train", ("--" + key + "=@").c_str()}).find("unknown key"), std::string::npos) << text;
  }
  EXPECT_NE(refusal({"train", "--optim.learning_rate=1"}).find("unknown key optim.learning_rate; did you mean optim.lr?"), std::string::npos);
  EXPECT_NE(refusal({"trian"}).find("unknown verb trian; did you mean train?"), std::string::npos);
  // What was not written to its end, though another word has more letters in common.
  EXPECT_NE(refusal({"train", "--optim.eps=1"}).find("unknown key optim.eps; did you mean optim.epsilon?"), std::string::npos);
  EXPECT_NE(refusal({"train", "--optim.kind=adamw8"}).find("; did you mean adamw8bit?"), std::string::npos);
  EXPECT_NE(refusal({"train", "--optim.kind=adam"}).find("; did you mean adamw?"), std::string::npos);
}

TEST(Config, ReportsAllMistakesTogetherWithFileAndLine) {
  std::string path = ini("[train]\nsteps = many\n\n[data]\nmax_lenght = 4\n");
  std::string text = refusal({"train", path.c_str(), "--optim.beta1=2", "--task.kind=sfd"});
  EXPECT_NE(text.find(path + ":2: train.steps=many: an integer is expected"), std::string::npos) << text;
  EXPECT_NE(text.find(path + ":5: unknown key data.max_lenght; did you mean data.max_length?"), std::string::npos) << text;
  EXPECT_NE(text.find("optim.beta1=2: must be from 0 to 0.9999999"), std::string::npos) << text;
  EXPECT_NE(text.find("task.kind=sfd: allowed are sft, pretrain; did you mean sft?"), std::string::npos) << text;
}

TEST(Config, ASemicolonBeginsACommentOnlyOnALineOfItsOwn) {
  EXPECT_EQ(refusal({"train", ini("; = why\n[optim]\n  ; lr = 3\nlr = 1e-3\n[data]\nseparator = \" ; \"\n[generate]\nstop = ;,a;b\n").c_str()}), "accepted");
  const std::string path = ini("[optim]\nlr = 1e-3 ; why\n[run]\ndir = runs/a\t; b\n");
  const std::string advice = ": a comment behind a value begins with #; where the ; belongs to the value, put it in double quotes";
  EXPECT_EQ(refusal({"train", path.c_str()}), str(path, ":2: optim.lr=1e-3 ; why", advice, "\n", path, ":4: run.dir=runs/a\t; b", advice));
  Config config;
  config.data.separator = "a ; b";
  Config again;
  parse({"train", ini(config_to_ini(config, false)).c_str()}, again);
  EXPECT_EQ(again.data.separator, "a ; b");
}

TEST(Config, RefusesTheKeysOfAnotherVerbOnTheCommandLineOnly) {
  EXPECT_EQ(refusal({"generate", "--optim.lr=3"}),
            "optim.lr is read by train, plan, not by generate: leave it out (a configuration file may hold it)");
  EXPECT_EQ(refusal({"train", "--lora.merge=true"}), "lora.merge is read by export, not by train: leave it out (a configuration file may hold it)");
  std::string path = ini("[optim]\nlr = 3\n");
  EXPECT_EQ(refusal({"generate", path.c_str()}), "accepted");
  EXPECT_EQ(refusal({"generate", "--print-config", "--optim.lr=3"}), "accepted");
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
  config.data.train = {"a.jsonl:5", "b,c.jsonl", "\xC3\xA9.jsonl"};
  config.schedule.min_lr = 1.0 / 3;
  config.run.seed = 9000000000000000000;
  config.data.packing = true;
  config.data.text_field = " # \"\n ";
  config.data.template_args = "{\"x\": \"# \"}";
  config.generate.stop = {"\n"};
  std::string path = ini(config_to_ini(config, true));
  Config back;
  parse({"train", path.c_str()}, back);
  EXPECT_EQ(config_to_ini(back, false), config_to_ini(config, false));
  EXPECT_EQ(back.optim.lr, 0.1);
  EXPECT_EQ(back.schedule.min_lr, 1.0 / 3);
  EXPECT_EQ(back.run.seed, config.run.seed);
  EXPECT_EQ(back.data.train, config.data.train);
  EXPECT_EQ(back.data.text_field, config.data.text_field);
}

TEST(Config, ValuesAtTheEdges) {
  const char* integer = ": an integer is expected";
  const char* number = ": a number is expected";
  const std::string of_init = ": allowed are random, pissa, pissa_niter_N, loftq; did you mean pissa_niter_N?";
  const std::pair<const char*, std::string> cases[] = {
      {"--train.steps=", integer}, {"--train.steps=5.5", integer}, {"--train.steps=1e3", integer}, {"--train.steps=0x10", integer},
      {"--train.steps=5 5", integer}, {"--train.steps=99999999999999999999", integer}, {"--train.steps=\xD9\xA3", integer},
      {"--train.steps=-1", ": must be from 0 to 1e+12"}, {"--run.seed=9223372036854775807", ": must be from 0 to 9e+18"},
      {"--optim.lr=", number}, {"--optim.lr=1e999", number}, {"--optim.lr=1,5", number}, {"--optim.lr=nan", number},
      {"--optim.lr=-inf", number}, {"--optim.lr=1e-4x", number}, {"--optim.lr=-1e-9", ": must be from 0 to 1e+06"},
      {"--data.packing=", ": true or false is expected"}, {"--data.packing=True", ": true or false is expected"},
      {"--run.device=gpu", ": allowed are auto, cpu, cuda; did you mean cuda?"}, {"--run.device=cdu", ": allowed are auto, cpu, cuda; did you mean cpu?"},
      {"--data.learn=", ": allowed are completion, all"}, 
      {"--lora.init=pissa_niter_N", of_init}, {"--lora.init=pissa_niter_", of_init}, {"--lora.init=pissa_niter_0", of_init}, {"--lora.init=pissa_niter_1000", of_init},
      {"--lora.init=pissa_niter_16x", of_init}, {"--lora.init=pissa_niter", of_init},
      {"--quant.block_size=16", ": allowed are 0, 32, 64, 128, 256, 512, 1024, 2048, 4096"}, {"--quant.block_size=33", ": allowed are 0, 32, 64, 128, 256, 512, 1024, 2048, 4096"},
      {"--data.truncation=Left", ": allowed are auto, right, left, drop, error, chunk; did you mean left?"}};
  for (const auto& [word, problem] : cases) EXPECT_EQ(refusal({"train", word}), std::string(word).substr(2) + problem) << word;

  Config config;
  parse({"train", "--optim.lr=-0", "--schedule.min_lr=1E-5", "--train.steps= 7 ", "--data.train= a b.jsonl , ,c\\,d.jsonl,",
         "--data.eval", "x.jsonl:3", "--run.dir=a=b"}, config);
  parse({"generate", "--generate.stop=", "--generate.system=  \xC3\xA9 # no comment "}, config);
  EXPECT_EQ(config.optim.lr, 0.0);
  EXPECT_EQ(config.schedule.min_lr, 1e-5);
  EXPECT_EQ(config.train.steps, 7);
  EXPECT_EQ(config.data.train, (std::vector<std::string>{"a b.jsonl", "c,d.jsonl"}));
  EXPECT_EQ(config.generate.stop, std::vector<std::string>{});
  EXPECT_EQ(config.generate.system, "  \xC3\xA9 # no comment ");
  EXPECT_EQ(config.data.eval, std::vector<std::string>{"x.jsonl:3"});
  EXPECT_EQ(config.run.dir, "a=b");
  parse({"train", "--lora.init=pissa_niter_16"}, config);
  EXPECT_EQ(config.lora.init, "pissa_niter_16");
  parse({"generate", "--generate.prompt=1+1=", "--data.separator==", "--model.path", "x="}, config);
  EXPECT_EQ(config.generate.prompt, "1+1=");
  EXPECT_EQ(config.data.separator, "=");
  EXPECT_EQ(config.model.path, "x=");
}

TEST(Config, FilesFromOtherSystems) {
  Config config;
  parse({"train", ini("\xEF\xBB\xBF[ data ] # why\r\n  train = b.jsonl\r\n\r\n\t# c\r\nchat_template =\r\n[run]\r\nseed=3").c_str()}, config);
  EXPECT_EQ(config.data.train, std::vector<std::string>{"b.jsonl"});
  EXPECT_EQ(config.data.chat_template, "");
  EXPECT_EQ(config.run.seed, 3);
  std::string path = ini("[data]\n[]\nseed=1\nrun.seed=1\n\"seed\"=1\n[run]\nseed=\"4\"\n[run]\nseed=5\n");
  EXPECT_EQ(refusal({"train", path.c_str()}),
            path + ":2: not 'key = value' nor '[section]': []\n" + path + ":3: unknown key data.seed; did you mean run.seed?; trireme VERB --help lists all keys\n" +
                path + ":4: unknown key data.run.seed; did you mean run.seed?; trireme VERB --help lists all keys\n" + path +
                ":5: unknown key data.\"seed\"; trireme VERB --help lists all keys\n" + path + ":9: run.seed is given twice");
}

TEST(Config, FurtherChecksJoinTheOthers) {
  Config config;
  const char* words[] = {"trireme", "train", "--optim.lrr=1", "--train.steps=2"};
  auto further = [&](const CommandLine& line, std::vector<std::string>& problems) {
    EXPECT_TRUE(line.is_given("train.steps"));
    EXPECT_EQ(config.train.steps, 2);
    EXPECT_EQ(problems.size(), 1u);
    problems.push_back("and more");
  };
  try {
    parse_command_line(4, words, config, further);
    FAIL();
  } catch (const ConfigError& error) {
    EXPECT_TRUE(std::string(error.what()).ends_with("all keys\nand more")) << error.what();
  }
  EXPECT_TRUE(refusal({"--help", "--optim.lrr=1"}).starts_with("unknown key optim.lrr"));
}

TEST(Config, HelpOfAVerbNamesWhatItReads) {
  Config config;
  const std::vector<std::string> unread = {"generate", "tokenize", "data.show", "lora.merge", "lora.requantize", "eval.token_ids", "eval.logits"};
  const std::pair<const char*, std::vector<std::string>> reads[] = {
      {"train", {}}, {"plan", {}},
      {"eval", {"run.seed", "run.device", "model", "data", "task", "train.threads", "lora.path", "parallel.data", "parallel.tensor", "parallel.pipeline",
                "parallel.order", "quant", "train.tf32", "comm.timeout_s", "eval.micro_batch_size", "eval.token_ids", "eval.logits", "log"}},
      {"generate", {"run.seed", "run.device", "model", "data", "train.threads", "lora.path", "parallel.data", "parallel.tensor", "parallel.pipeline", "parallel.order",
                    "quant", "train.tf32", "generate", "log"}},
      {"prepare", {"run.seed", "model", "data", "task", "log"}},
      {"tokenize", {"model", "data", "task", "tokenize", "log"}},
      {"quantize", {"run.dir", "model.path", "model.tokenizer", "model.dtype", "model.revision", "quant", "train.threads", "log"}},
      {"export", {"run", "model", "data.chat_template", "data.template_args", "train.dtype", "train.threads", "lora", "quant", "log"}},
      {"doctor", {"run.dir", "data.cache", "log"}}};
  for (const auto& [verb, list] : reads) {
    std::string text = help_text(verb);
    EXPECT_NE(help_text("").find(str("\n  ", verb, " ")), std::string::npos) << verb;
    for (const auto& field : fields(config)) {
      auto in = [&](const std::vector<std::string>& names) {
        return std::count(names.begin(), names.end(), field.key.substr(0, field.key.find('.'))) + std::count(names.begin(), names.end(), field.key) > 0;
      };
      const bool of_runs = !in(unread) && (std::string(verb) == "plan" || !field.key.starts_with("plan."));
      const bool wanted = list.empty() ? of_runs : in(list) && field.key != "log.trace";
      size_t at = text.find("\n  --" + field.key + "=");
      EXPECT_EQ(at != std::string::npos, wanted) << verb << " " << field.key;
      if (at != std::string::npos && !field.meaning.empty()) {
        EXPECT_NE(text.find(field.meaning, at), std::string::npos) << field.key;
      }
    }
  }
}

}  // namespace
}  // namespace trireme
