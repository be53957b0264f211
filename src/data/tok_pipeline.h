// The whole of a tokenizer.json.
#pragma once

#include <memory>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "data/tok_added.h"
#include "data/tok_components.h"
#include "data/tok_model.h"

namespace trireme::tok {

struct Pipeline {
  std::string source, hash;
  AddedTokens raw, normalized;  // those that are searched for before the normalizer, and after it
  Normalizer normalizer;
  PreTokenizer pre_tokenizer;
  std::unique_ptr<Model> model;
  std::vector<PostStep> post;
  std::vector<DecodeStepMaker> decoder;
  std::unordered_map<int64_t, std::string> tokens;
  std::unordered_map<std::string, int64_t> ids;
  std::unordered_set<int64_t> added, special;
  int64_t vocab_size = 0;
};
std::shared_ptr<const Pipeline> read_pipeline(std::string_view json, const std::string& source);

// Tokens on their way to text.
class DecodeState {
 public:
  DecodeState(std::shared_ptr<const Pipeline> pipeline, bool skip_special);
  void put(int64_t id);
  void finish();
  std::string take();  // the text so far

 private:
  class Sink : public DecodeStep {
   public:
    void put(std::string_view part, bool) override { text += part; }
    void finish() override {}
    std::string text;
  };
  std::shared_ptr<const Pipeline> pipeline_;
  bool skip_special_;
  Sink sink_;
  std::vector<std::unique_ptr<DecodeStep>> steps_;
};

}  // namespace trireme::tok
