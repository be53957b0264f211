// Every quoted #include of a room names a room below it, or itself.
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <regex>
#include <set>

namespace {

namespace fs = std::filesystem;

const std::map<std::string, std::set<std::string>> kMayInclude = {
    {"base", {}},
    {"config", {"base"}},
    {"comm", {"base"}},
    {"data", {"config", "base"}},
    {"ops", {"kernels", "base"}},
    {"quant", {"ops", "kernels", "base"}},
    {"optim", {"quant", "ops", "kernels", "base"}},
    {"model", {"quant", "ops", "config", "base"}},
    {"checkpoint", {"quant", "comm", "config", "base"}},
    {"parallel", {"checkpoint", "model", "optim", "quant", "ops", "comm", "base"}},
    {"tasks", {"model", "ops", "data", "base"}},
    {"eval", {"tasks", "model", "data", "comm", "base"}},
    {"serve", {"tasks", "model", "data", "ops", "base"}},
    {"train", {"eval", "serve", "tasks", "parallel", "checkpoint", "optim", "model", "quant", "data", "comm", "config", "ops", "base"}},
};

TEST(Layers, EveryIncludePointsDownward) {
  const char* source = std::getenv("TRIREME_SOURCE");
  ASSERT_NE(source, nullptr) << "ctest sets TRIREME_SOURCE";
  const std::regex include(R"re(^\s*#\s*include\s*"([^"/]+)/[^"]+")re");
  int seen = 0;
  for (const auto& entry : fs::recursive_directory_iterator(fs::path(source) / "src")) {
    if (!entry.is_regular_file()) continue;
    std::string room = entry.path().parent_path().filename().string();
    ASSERT_TRUE(kMayInclude.count(room)) << room << " is no room of the table";
    std::ifstream in(entry.path());
    std::smatch match;
    for (std::string line; std::getline(in, line);) {
      if (!std::regex_search(line, match, include)) continue;
      ++seen;
      std::string other = match[1];
      EXPECT_TRUE(other == room || kMayInclude.at(room).count(other)) << entry.path() << ": " << line;
    }
  }
  EXPECT_GT(seen, 100) << "the search found too few includes to mean anything";
}

}  // namespace
