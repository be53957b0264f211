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

}  // namespace
}  // namespace trireme
