#include "base/check.h"

#include <gtest/gtest.h>

#include "base/json.h"

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
  EXPECT_EQ(words("[1]x").rfind("s: not valid JSON at byte 4: ", 0), 0u);
}

}  // namespace
}  // namespace trireme
