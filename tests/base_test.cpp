#include "base/check.h"

#include <gtest/gtest.h>
#include <sys/resource.h>

#include <csignal>
#include <filesystem>

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

// What the library's own parser builds, in the same order; and what it lets pass is refused.
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
  EXPECT_EQ(words("[\"\xC3\xA9\xFF\xE4\""), "s: not valid JSON at byte 5: syntax error while parsing value - invalid string: ill-formed UTF-8 byte; last read: '\"\xC3\xA9\\xff'") << "a terminal is given no bytes";
  EXPECT_EQ(words(std::string("[1]\0", 4)), "s: not valid JSON at byte 4: a NUL byte") << "the library takes it for the end";
  EXPECT_EQ(words(std::string("[1\0, 2]", 7)).rfind("s: not valid JSON at byte 3: ", 0), 0u);
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

// Between two flushes of its owner, such as while it evaluates for an hour.
TEST(Trace, DoesNotGrowInMemory) {
  const std::string folder = scratch_folder(), path = folder + "/trace.json";
  start_time_spent();
  open_trace(path, 0, "host");
  start_trace(std::chrono::steady_clock::now());
  constexpr size_t kLeast = 80;  // bytes of an event
  size_t num_events = 0;
  for (; num_events < 3 * kTraceBuffer / kLeast; ++num_events) {
    const auto now = std::chrono::steady_clock::now();
    trace_collective("all_reduce", "data", 8, now, now);
  }
  EXPECT_LT(std::filesystem::file_size(path), 1000u);
  { Span span(TimeKind::kCompute, "forward"); }
  EXPECT_GT(std::filesystem::file_size(path), num_events * kLeast);
  close_trace();
  EXPECT_GT(read_json_file(path)["traceEvents"].size(), num_events);
  std::filesystem::remove_all(folder);
}

TEST(Trace, OfAFullDiskEndsWithAWarningAndStaysWhole) {
  const std::string folder = scratch_folder(), path = folder + "/trace.json";
  const auto begin = std::chrono::steady_clock::now();
  open_trace(path, 0, "host");
  start_trace(begin);
  auto add = [&](int n) {
    for (int i = 0; i < n; ++i) trace_collective("all_reduce", "data", 8, begin, begin + std::chrono::milliseconds(1));
    flush_trace();
  };
  add(10);
  rlimit limit{};
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &limit), 0);
  const rlimit small{4096, limit.rlim_max};
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &small), 0);
  testing::internal::CaptureStderr();
  add(100);
  const std::string said = testing::internal::GetCapturedStderr();
  setrlimit(RLIMIT_FSIZE, &limit);
  std::signal(SIGXFSZ, handler);
  EXPECT_NE(said.find("warning: cannot write the trace " + path + ": File too large; nothing more is recorded\n"), std::string::npos) << said;
  add(10);
  close_trace();
  size_t num_spans = 0;
  const Json events = read_json_file(path)["traceEvents"];
  for (const Json& event : events) num_spans += event["ph"] == "X";
  EXPECT_EQ(num_spans, 10u);
  std::filesystem::remove_all(folder);
}

}  // namespace
}  // namespace trireme
