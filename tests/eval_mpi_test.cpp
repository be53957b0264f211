// Evaluation over ranks: sums of all rows, and one error for all where one rank fails.
#include "base/tensor.h"

#include "comm/process.h"
#include "eval/evaluate.h"
#include "tests/data_fixture.h"
#include "train/agreement.h"

namespace trireme {
namespace {

Process& process() {
  static Process process;
  return process;
}

class CountRows : public Task {
 public:
  explicit CountRows(bool fails) : fails_(fails) {}
  TaskResult run(Transformer&, const ModelInput& input, double) const override {
    if (fails_) throw DataError("the last rank's rows are bad");
    TaskResult result;
    result.sums = {{"count", at::scalar_tensor(static_cast<double>(input.cu_seqlens.size() - 1), at::kDouble)}};
    return result;
  }
  std::map<std::string, double> metrics(const std::map<std::string, double>& sums) const override {
    if (sums.at("count") > 10) throw DataError("more than 10 rows");
    return sums;
  }
  bool larger_is_better(const std::string&) const override { return true; }

 private:
  bool fails_;
};

class Evaluation : public DataTest {
 protected:
  std::map<std::string, double> run(int64_t num_rows, bool fails) {
    write_pairs("train.jsonl", num_rows, [](int64_t) { return 2; });
    const Communicator world = Communicator::world();
    Transformer model(read_model_config(str(std::getenv("TRIREME_SOURCE"), "/configs/quickstart/model/config.json")), at::kFloat, 0,
                      Weights::kUninitialized);
    return evaluate(model, CountRows(fails), build(), 2, world, world, [&](const auto& part) { agree_on(world, part); });
  }
};

TEST_F(Evaluation, EveryRowCountsOnce) {
  process();
  EXPECT_EQ(run(7, false).at("count"), 7);
}

TEST_F(Evaluation, OneErrorOfAllRanks) {
  const int last = process().size() - 1;
  EXPECT_EQ(error_of<AgreedError>([&] { run(7, process().rank() == last); }),
            str(last == 0 ? "" : str("[rank ", last, "] "), "the last rank's rows are bad"));
  EXPECT_EQ(error_of<AgreedError>([&] { run(11, false); }), "more than 10 rows");
}

}  // namespace
}  // namespace trireme
