// Encoding on one thread. bench_tokenizer_speed TOKENIZER.json TEXTS.jsonl (a JSON string a line): seconds of CPU time
// for all texts, first with a tokenizer just loaded, then again with what its word cache kept, for ids alone and with
// offsets. Prints one JSON object; benchmarks/tokenizer_speed.py runs it beside Hugging Face's tokenizers.
#include <ctime>
#include <fstream>
#include <iostream>
#include <vector>

#include "base/json.h"
#include "data/tokenizer.h"

namespace {

double cpu_seconds() {
  timespec now{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

// Seconds of both passes, number and sum of all ids.
template <typename Encode>
trireme::Json passes(const char* path, const std::vector<std::string>& texts, Encode encode) {
  trireme::Json out;
  double begin = cpu_seconds();
  auto tokenizer = trireme::Tokenizer::load(path);
  out["load"] = cpu_seconds() - begin;
  for (const char* pass : {"first", "second"}) {
    int64_t count = 0, sum = 0;
    begin = cpu_seconds();
    for (const std::string& text : texts) {
      auto ids = encode(tokenizer, text);
      count += static_cast<int64_t>(ids.size());
      for (int64_t id : ids) sum += id;
    }
    out[pass] = cpu_seconds() - begin;
    out["tokens"] = count;
    out["sum"] = sum;
  }
  return out;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::cerr << "usage: bench_tokenizer_speed TOKENIZER.json TEXTS.jsonl\n";
    return 2;
  }
  std::vector<std::string> texts;
  std::ifstream file(argv[2]);
  for (std::string line; std::getline(file, line);)
    texts.push_back(trireme::parse_json(line, argv[2]).get<std::string>());
  using trireme::Tokenizer;
  trireme::Json out;
  out["ids"] = passes(argv[1], texts, [](const Tokenizer& t, const std::string& s) { return t.encode_ids(s, false); });
  out["offsets"] =
      passes(argv[1], texts, [](const Tokenizer& t, const std::string& s) { return t.encode(s, false).ids; });
  std::cout << trireme::dump_json(out) << "\n";
}
