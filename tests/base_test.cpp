#include "base/check.h"

#include <gtest/gtest.h>

#include "base/json.h"
#include "base/trace.h"
#include "scratch.h"

namespace trireme {
namespace {

TEST(Check, MessageHoldsConditionPlaceAndValues) {
  int got = 3;
  try {
    TRIREME_CHECK(got == 4, "got ", got);
    FAIL() << "did not throw";
  } catch (const InternalError& error) {
    EXPECT_NE(std::string(error.what()).find("got == 4: got 3"), std::string::npos) << error.what();
    EXPECT_EQ(error.status(), kExitFailure);
  }
}

// What the library's own parser builds, in the same order; and the two things that it lets pass are refused.
TEST(ParseJson, BuildsWhatTheLibraryBuilds) {
  std::string many = "{";
  for (int i = 0; i < 3000; ++i) many += str(i ? ", " : "", "\"key ", (i * 7919) % 3000, "\": ", i);
  for (const std::string& text : {std::string(R"([1, -2, 3.5, null, true, "a\u00e9", {}, [], {"a": {"b": [1, {"c": 2}], "d": {}}, "e": [[], [[]]]}])"),
                                  std::string("5"), std::string("\"x\""), std::string("null"), std::string(R"({"b": 1, "a": 18446744073709551615})"),
                                  std::string(100, '[') + std::string(100, ']'), many + "}"})
    EXPECT_EQ(parse_json(text, "s").dump(), Json::parse(text).dump());
  auto words = [](const std::string& text) {
    try {
      return parse_json(text, "s").dump();
    } catch (const DataError& error) {
      return std::string(error.what());
    }
  };
  EXPECT_EQ(words(R"({"a": 1, "b": {"a": 1, "a": 2}})"), "s: the key \"a\" stands twice in one object");
  EXPECT_EQ(words(R"([{"a": 1}, {"a": 2}])"), R"([{"a":1},{"a":2}])");
  EXPECT_EQ(words(std::string(101, '[')), "s: JSON nested deeper than 100 levels");
  const std::string long_text = std::string(200, 'x') + std::string(5000, 'y');  // a quote is missing, or it is a key twice
  EXPECT_EQ(words("[\"" + long_text), "s: not valid JSON at byte 5203: syntax error while parsing value - invalid string: missing closing quote; "
                                      "last read: '\"" + std::string(113, 'x') + " ... " + std::string(59, 'y') + "'");
  EXPECT_EQ(words("{\"" + long_text + "\": 1, \"" + long_text + "\": 2}"),
            "s: the key \"" + std::string(200, 'x') + " ... " + std::string(60, 'y') + "\" stands twice in one object");
  std::string wide = "[\"";
  for (int i = 0; i < 3000; ++i) wide += "\u00e9";
  EXPECT_NO_THROW(Json(words(wide)).dump()) << "cut within a character";
  EXPECT_EQ(words("[1]x").rfind("s: not valid JSON at byte 4: ", 0), 0u);
}

// A process that was stopped and goes on has its operations' beginnings moved, past their end where the clock was late.
TEST(Trace, IsJsonWhateverTheClocksSay) {
  const std::string folder = scratch_folder(), path = folder + "/trace.json";
  const auto now = std::chrono::steady_clock::now();
  open_trace(path, 3, "host");
  start_trace(now);
  trace_collective("all_reduce", "data", 8, now + std::chrono::milliseconds(700), now + std::chrono::milliseconds(200));
  trace_collective("all_reduce", "data", 8, now + std::chrono::milliseconds(300), now + std::chrono::milliseconds(500));
  close_trace();
  const Json events = read_json_file(path)["traceEvents"];
  std::vector<double> durations;
  for (const Json& event : events)
    if (event["ph"] == "X") durations.push_back(event["dur"].get<double>());
  EXPECT_EQ(durations, (std::vector<double>{0, 200e3}));
  std::filesystem::remove_all(folder);
}

}  // namespace
}  // namespace trireme
