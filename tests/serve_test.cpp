// Sampling against its plain definition, and generation with a model whose answer is known beforehand. What the program says
// is compared with transformers in parity_generate_test.py.
#include "support.h"

#include <ATen/Parallel.h>

#include <cstdlib>
#include <map>
#include <set>

#include "base/check.h"
#include "serve/generate.h"

namespace trireme {
namespace {

// --- sampling --------------------------------------------------------------------------------------------------------

at::Tensor some_logits(int64_t count, int64_t seed) {
  std::vector<float> values;
  for (int64_t i = 0; i < count; ++i) values.push_back(static_cast<float>(4 * std::sin(static_cast<double>(i * i * 37 + seed * 101))));
  return at::tensor(values);
}

// Which ids stay and with what probability, id by id, straight from the definitions.
std::vector<double> by_definition(const at::Tensor& logits, const std::vector<int64_t>& seen, const SamplingOptions& o) {
  auto n = static_cast<size_t>(logits.numel());
  std::vector<double> x(n), p(n);
  std::vector<bool> in(n, true);
  for (size_t i = 0; i < n; ++i) {
    float value = logits.data_ptr<float>()[i];
    if (std::count(seen.begin(), seen.end(), static_cast<int64_t>(i)))
      value = value > 0 ? value / static_cast<float>(o.repetition_penalty) : value * static_cast<float>(o.repetition_penalty);
    x[i] = static_cast<double>(value) / o.temperature;
  }
  auto normalise = [&] {
    double sum = 0, largest = *std::max_element(x.begin(), x.end());
    for (size_t i = 0; i < n; ++i) sum += p[i] = in[i] ? std::exp(x[i] - largest) : 0;
    for (double& value : p) value /= sum;
  };
  if (o.top_k > 0)
    for (size_t i = 0; i < n; ++i) in[i] = std::count_if(x.begin(), x.end(), [&](double y) { return y > x[i]; }) < o.top_k;
  normalise();
  std::vector<double> before(n);  // probability of all that is likelier
  for (size_t i = 0; i < n; ++i)
    for (size_t j = 0; j < n; ++j)
      if (x[j] > x[i] || (x[j] == x[i] && j < i)) before[i] += p[j];
  for (size_t i = 0; i < n; ++i) in[i] = in[i] && (o.top_p >= 1 || before[i] < o.top_p);
  normalise();
  double largest = *std::max_element(p.begin(), p.end());
  for (size_t i = 0; i < n; ++i) in[i] = in[i] && p[i] >= o.min_p * largest;
  normalise();
  return p;
}

const SamplingOptions kSampling[] = {
    {0.7, 0, 1.0, 0.0, 1.0, 0},  {1.0, 5, 1.0, 0.0, 1.0, 0},  {1.3, 0, 0.8, 0.0, 1.0, 0},   {1.0, 0, 1.0, 0.1, 1.0, 0},
    {1.0, 0, 1.0, 0.0, 1.7, 0},  {0.9, 20, 0.9, 0.05, 1.2, 0}, {1.0, 1, 1.0, 0.0, 1.0, 0},  {1.0, 0, 1e-9, 0.0, 1.0, 0},
    {1.0, 0, 1.0, 1.0, 1.0, 0},  {50.0, 0, 0.5, 0.0, 0.8, 0}, {1e-6, 0, 1.0, 0.0, 1.0, 0}, {1.0, 1000, 1.0, 0.0, 1.0, 0},
};

TEST(Sampler, CandidatesAreThoseOfTheDefinition) {
  for (int64_t seed = 0; seed < 3; ++seed)
    for (const SamplingOptions& options : kSampling) {
      at::Tensor logits = some_logits(40, seed);
      const std::vector<int64_t> seen = {3, 9, 9, 39, 0};
      Candidates found = candidates(logits, seen, options);
      std::vector<double> expected = by_definition(logits, seen, options);
      std::vector<double> p(40, 0.0);
      for (size_t i = 0; i < found.ids.size(); ++i) {
        p[static_cast<size_t>(found.ids[i])] = found.probabilities[i];
        const bool cuts = options.top_k > 0 || options.top_p < 1 || options.min_p > 0;
        EXPECT_TRUE(i == 0 || !cuts || options.top_k == 1000 || found.probabilities[i] <= found.probabilities[i - 1]);
      }
      size_t kept = 0;
      for (size_t i = 0; i < 40; ++i) {
        EXPECT_NEAR(p[i], expected[i], 1e-6) << "temperature " << options.temperature << " id " << i;  // fp32 logits
        kept += expected[i] > 0;
      }
      EXPECT_TRUE(found.ids.size() == kept || options.temperature < 1e-3);  // at 1e-6 the others' probabilities are 0
    }
}

TEST(Sampler, LargeVocabulariesAreSortedInPieces) {
  at::Tensor logits = some_logits(3000, 1) * 0.2;
  std::vector<double> expected = by_definition(logits, {}, {1.0, 0, 0.9, 0.0, 1.0, 0});
  Candidates found = candidates(logits, {}, {1.0, 0, 0.9, 0.0, 1.0, 0});
  ASSERT_GT(found.ids.size(), 576u);  // the second piece ends there
  EXPECT_EQ(found.ids.size(), static_cast<size_t>(std::count_if(expected.begin(), expected.end(), [](double p) { return p > 0; })));
  EXPECT_TRUE(std::is_sorted(found.probabilities.rbegin(), found.probabilities.rend()));
  for (size_t i = 0; i < found.ids.size(); ++i) EXPECT_NEAR(found.probabilities[i], expected[static_cast<size_t>(found.ids[i])], 1e-9);
}

TEST(Sampler, EqualLogitsStayTogetherAndTheFirstWins) {
  at::Tensor logits = at::tensor(std::vector<float>{1, 3, 2, 3, 2, 0});
  EXPECT_EQ(candidates(logits, {}, {1.0, 3, 1.0, 0.0, 1.0, 0}).ids, std::vector<int64_t>({1, 3, 2, 4}));  // as transformers' top-k
  EXPECT_EQ(sample(logits, {}, {}, 0, 0), 1);
  EXPECT_EQ(sample(logits, {1}, {0.0, 0, 1.0, 0.0, 2.0, 0}, 0, 0), 3);
}

TEST(Sampler, DrawsByProbabilityAndRepeats) {
  at::Tensor logits = at::tensor(std::vector<float>{0.0f, 1.0f, 2.0f, -1.0f});
  SamplingOptions options{1.0, 3, 1.0, 0.0, 1.0, 0};
  Candidates expected = candidates(logits, {}, options);
  std::map<int64_t, int> drawn;
  std::vector<int64_t> first, again, other_seed, other_prompt;
  const int n = 20000;
  for (uint64_t i = 0; i < n; ++i) ++drawn[sample(logits, {}, options, 4, i)];
  for (size_t i = 0; i < 3; ++i) {
    double p = expected.probabilities[i];
    EXPECT_NEAR(drawn[expected.ids[i]], n * p, 5 * std::sqrt(n * p * (1 - p)));  // five standard deviations
  }
  EXPECT_EQ(drawn.size(), 3u);
  for (uint64_t i = 0; i < 64; ++i) {
    first.push_back(sample(logits, {}, options, 4, i));
    again.push_back(sample(logits, {}, options, 4, i));
    other_prompt.push_back(sample(logits, {}, options, 5, i));
    SamplingOptions seeded = options;
    seeded.seed = 1;
    other_seed.push_back(sample(logits, {}, seeded, 4, i));
  }
  EXPECT_EQ(first, again);
  EXPECT_NE(first, other_seed);
  EXPECT_NE(first, other_prompt);
}

TEST(Sampler, BrokenLogitsAreRefused) {
  const float inf = std::numeric_limits<float>::infinity();
  for (double temperature : {0.0, 1.0}) {
    SamplingOptions options;
    options.temperature = temperature;
    EXPECT_THROW(candidates(at::tensor(std::vector<float>{1, std::nanf(""), 2}), {}, options), DataError);
    EXPECT_THROW(candidates(at::tensor(std::vector<float>{1, inf}), {}, options), DataError);
    EXPECT_THROW(candidates(at::tensor(std::vector<float>{-inf, -inf}), {}, options), DataError);
    EXPECT_EQ(sample(at::tensor(std::vector<float>{-inf, 0}), {}, options, 0, 0), 1);
  }
}

// --- generation ------------------------------------------------------------------------------------------------------

constexpr int64_t kEnd = 2;  // <|im_end|> of the quickstart's tokenizer

GenerateOptions stopping_at(std::vector<std::string> stop) {
  GenerateOptions options;
  options.stop = std::move(stop);
  return options;
}

// A model without attention or MLP whose head holds, in the row of the token that shall follow t, the embedding of t.
class Scripted {
 public:
  explicit Scripted(const std::string& text) : tokenizer_(Tokenizer::load(std::string(std::getenv("TRIREME_SOURCE")) + "/configs/quickstart/model")) {
    at::set_num_threads(1);  // a few numbers a token: threads only wait for each other
    ids_ = tokenizer_.encode_ids(text, false);
    EXPECT_EQ(std::set<int64_t>(ids_.begin(), ids_.end()).size(), ids_.size()) << "a token twice: it cannot have two successors";
    ModelConfig config = model_config_from_json(
        {{"model_type", "llama"}, {"vocab_size", tokenizer_.vocab_size()}, {"hidden_size", 256}, {"intermediate_size", 8}, {"num_hidden_layers", 1},
         {"num_attention_heads", 2}, {"max_position_embeddings", 64}, {"initializer_range", 1.0}}, "config.json");
    model_ = std::make_unique<Transformer>(config, at::kFloat, 1);
    at::NoGradGuard no_grad;
    model_->blocks()[0].o.weight_OI.zero_();
    model_->blocks()[0].down.weight_OI.zero_();
    at::Tensor embedding = model_->parameters().front().value, head = model_->parameters().back().value;  // lm_head: no adapters
    head.zero_();
    std::vector<int64_t> chain = {kPrompt};
    chain.insert(chain.end(), ids_.begin(), ids_.end());
    chain.push_back(kEnd);
    for (size_t i = 0; i + 1 < chain.size(); ++i) head[chain[i + 1]].copy_(embedding[chain[i]]);
  }

  Answer answer(GenerateOptions options, std::string* streamed = nullptr, std::vector<int64_t> prompt = {kPrompt}) {
    options.end_ids = {kEnd};
    auto on_text = [&](const std::string& text) { *streamed += text; };
    return generate(*model_, tokenizer_, prompt, 0, options, streamed ? std::function<void(const std::string&)>(on_text) : nullptr);
  }
  const std::vector<int64_t>& ids() const { return ids_; }
  const Tokenizer& tokenizer() const { return tokenizer_; }
  Transformer& model() { return *model_; }

  static constexpr int64_t kPrompt = 1;  // a special token, which no text holds

 private:
  Tokenizer tokenizer_;
  std::vector<int64_t> ids_;
  std::unique_ptr<Transformer> model_;
};

const std::string kText = "Oars:übung😀 macht, hop twice 47 ranks? Żo!";

TEST(Generate, StopsAtTheEndTokenAndStreamsTheText) {
  Scripted script(kText);
  std::string streamed;
  Answer answer = script.answer({}, &streamed);
  EXPECT_EQ(answer.text, kText);
  EXPECT_EQ(streamed, kText);
  EXPECT_EQ(answer.ids, script.ids());
  EXPECT_EQ(answer.finish_reason, "stop");
  EXPECT_GT(script.ids().size(), 15u);
}

TEST(Generate, EveryStopTextCutsAndNothingOfItIsStreamed) {
  Scripted script(kText);
  const size_t size = kText.size();
  for (size_t begin = 0; begin < size; begin += 4)
    for (size_t length : {1u, 5u, 11u}) {
      const std::string stop = kText.substr(begin, length);
      std::string streamed;
      Answer answer = script.answer(stopping_at({stop, "never said"}), &streamed);
      EXPECT_EQ(answer.text, kText.substr(0, kText.find(stop))) << stop;
      EXPECT_EQ(streamed, answer.text) << stop;
      EXPECT_EQ(answer.finish_reason, "stop");
    }
  std::string streamed;  // the first of several; one that only begins is given out in the end
  EXPECT_EQ(script.answer(stopping_at({"macht", "twice", "g😀"}), &streamed).text, kText.substr(0, kText.find("g😀")));
  streamed.clear();
  EXPECT_EQ(script.answer(stopping_at({"o! And"}), &streamed).text, kText);
  EXPECT_EQ(streamed, kText);
}

TEST(Generate, MaxTokensCutsAlsoWithinACharacter) {
  Scripted script(kText);
  for (int64_t n = 1; n <= static_cast<int64_t>(script.ids().size()); ++n) {
    std::string streamed;
    GenerateOptions options;
    options.max_tokens = n;
    Answer answer = script.answer(options, &streamed);
    std::vector<int64_t> expected(script.ids().begin(), script.ids().begin() + n);
    EXPECT_EQ(answer.ids, expected);
    EXPECT_EQ(answer.text, script.tokenizer().decode(expected, true));
    EXPECT_EQ(streamed, answer.text);
    EXPECT_EQ(answer.finish_reason, "length");
  }
}

TEST(Generate, TheContextEndsTheAnswerAndALongerPromptIsRefused) {
  Scripted script(kText);
  std::vector<int64_t> prompt(60, 5);
  prompt.push_back(Scripted::kPrompt);
  Answer answer = script.answer({}, nullptr, prompt);
  EXPECT_EQ(answer.ids.size(), 3u);  // 64 - 61
  EXPECT_EQ(answer.finish_reason, "length");
  auto words = [&](const std::vector<int64_t>& ids) -> std::string {
    try {
      script.answer({}, nullptr, ids);
    } catch (const DataError& error) {
      return error.what();
    }
    return "accepted";
  };
  EXPECT_EQ(words(std::vector<int64_t>(64, 5)),
            "prompt 1 has 64 tokens; the model's context (max_position_embeddings) is 64, one of which the answer needs");
  EXPECT_EQ(words({}), "prompt 1 is empty");
  EXPECT_THROW(script.answer(stopping_at({""})), ConfigError);
}

// In 16 bits prompts are filled up to a number of rows; nothing of that may be seen afterwards.
TEST(Generate, AnswersAreTheLikeliestOfTheWholeForward) {
  const Tokenizer tokenizer = Tokenizer::load(std::string(std::getenv("TRIREME_SOURCE")) + "/configs/quickstart/model");
  const ModelConfig config = model_config_from_json(
      {{"model_type", "llama"}, {"vocab_size", tokenizer.vocab_size()}, {"hidden_size", 64}, {"intermediate_size", 96}, {"num_hidden_layers", 2},
       {"num_attention_heads", 4}, {"max_position_embeddings", 128}, {"initializer_range", 0.3}}, "config.json");
  for (at::ScalarType dtype : {at::kFloat, at::kBFloat16, at::kHalf})
    for (int64_t length : {1, 5, 70}) {
      Transformer model(config, dtype, 1);
      std::vector<int64_t> ids;
      for (int64_t i = 0; i < length; ++i) ids.push_back(100 + i * 7 % 500);
      GenerateOptions options;
      options.max_tokens = 8;
      for (int64_t id : generate(model, tokenizer, ids, 0, options).ids) {
        at::NoGradGuard no_grad;
        const auto n = static_cast<int64_t>(ids.size());
        ModelInput input;
        input.tokens_T = at::tensor(ids, at::kLong);
        input.positions_T = at::arange(n, at::kLong);
        input.cu_seqlens = {0, n};
        at::Tensor logits = model.logits(model.forward(input))[n - 1];
        // Logits are of size 3 to 10; what is rounded away may turn two that are nearly the same.
        const double lost = logits.max().item<double>() - logits[id].item<double>();
        EXPECT_LE(lost, dtype == at::kFloat ? 1e-4 : 0.25) << dtype << " after " << n;
        ids.push_back(id);
      }
    }
}

TEST(Generate, ADamagedModelIsRefused) {
  Scripted script(kText);
  at::NoGradGuard no_grad;
  script.model().blocks()[0].input_norm.weight_C.fill_(std::nan(""));
  EXPECT_THROW(script.answer({}), DataError);
}

}  // namespace
}  // namespace trireme
