#include "eval/token_ids.h"

#include "base/check.h"

namespace trireme {

std::vector<SequenceBatch> token_ids_from_json(const Json& json, int64_t vocab_size, const std::string& source) {
  constexpr size_t kShown = 80;
  if (!json.is_array() || json.empty()) throw DataError(str(source, ": an array of arrays of ids is expected"));
  std::vector<SequenceBatch> out;
  for (size_t i = 0; i < json.size(); ++i) {
    if (!json[i].is_array() || json[i].empty()) throw DataError(str(source, ": element ", i, " is no array of ids, or empty"));
    SequenceBatch batch;
    for (const Json& id : json[i]) {
      if (!id.is_number_integer() || id.get<double>() < 0 || id.get<double>() >= static_cast<double>(vocab_size))
        throw DataError(str(source, ": element ", i, " has ", dump_json(id).substr(0, kShown), "; ids are 0 to ", vocab_size - 1));
      batch.tokens.push_back(id.get<int64_t>());
      batch.positions.push_back(batch.num_tokens() - 1);
    }
    batch.targets.assign(batch.tokens.begin() + 1, batch.tokens.end());
    batch.targets.push_back(kIgnoreTarget);
    batch.cu_seqlens = {0, batch.num_tokens()};
    batch.sample_ids = {static_cast<int64_t>(i)};
    out.push_back(std::move(batch));
  }
  return out;
}

}  // namespace trireme
