#include <algorithm>
#include <cmath>

#include "base/check.h"
#include "data/dataset.h"

namespace trireme {
namespace {

// The q-th quantile of ascending values by nearest rank.
int64_t quantile(const std::vector<int64_t>& sorted, double q) {
  auto rank = static_cast<size_t>(std::ceil(q * static_cast<double>(sorted.size())));
  return sorted[std::clamp<size_t>(rank, 1, sorted.size()) - 1];
}

std::string example(const Dataset& dataset, int64_t index, const Tokenizer& tokenizer, bool color) {
  const Sample& s = dataset.samples()[static_cast<size_t>(index)];
  const TokenFile& file = dataset.file();
  std::string text;
  // Runs of equal learning are decoded together: single tokens may be half a character.
  for (int64_t begin = s.begin; begin < s.end;) {
    bool learnt = begin > s.begin && file.learnt()[begin];
    int64_t end = begin + 1;
    while (end < s.end && static_cast<bool>(file.learnt()[end]) == learnt) ++end;
    std::vector<int64_t> ids(file.tokens() + begin, file.tokens() + end);
    std::string part = tokenizer.decode(ids, false);
    if (learnt)
      text += part;
    else
      text += (color ? "\033[2m" : "⟦") + part + (color ? "\033[0m" : "⟧");
    begin = end;
  }
  return text;
}

}  // namespace

std::string data_report(const Dataset& dataset, const DataOptions& options, const Tokenizer& tokenizer, int show,
                        bool color) {
  const DatasetCounts& counts = dataset.counts();
  std::vector<int64_t> lengths;
  int64_t longer = 0;
  for (int64_t record : dataset.records()) {
    lengths.push_back(dataset.file().end(record) - dataset.file().begin(record));
    longer += lengths.back() > options.max_length;
  }
  std::sort(lengths.begin(), lengths.end());
  std::string report = counts.text() + "\n";
  report += "tokens a record (before truncation):";
  for (auto [name, q] : {std::pair{"min", 0.0}, {"5 %", 0.05}, {"25 %", 0.25}, {"50 %", 0.5}, {"75 %", 0.75},
                         {"95 %", 0.95}, {"99 %", 0.99}, {"max", 1.0}})
    report += str("  ", name, " ", quantile(lengths, q));
  char share[128];
  double filled = static_cast<double>(counts.tokens) /
                  (static_cast<double>(counts.rows) * static_cast<double>(options.max_length));
  snprintf(share, sizeof share, "\nlonger than data.max_length=%lld: %.2f %%;  rows filled: %.1f %%\n",
           static_cast<long long>(options.max_length), 100.0 * static_cast<double>(longer) / static_cast<double>(lengths.size()),
           100.0 * filled);
  report += share;
  if (show > 0) report += color ? "\nexamples (dimmed: not learnt)\n" : "\nexamples (in ⟦ ⟧: not learnt)\n";
  for (int64_t i = 0; i < std::min<int64_t>(show, dataset.num_samples()); ++i) {
    const Sample& s = dataset.samples()[static_cast<size_t>(i)];
    report += str("--- ", i + 1, ": ", dataset.file().source(s.record), ", ", s.end - s.begin, " tokens\n",
                  example(dataset, i, tokenizer, color), "\n");
  }
  return report;
}

}  // namespace trireme
