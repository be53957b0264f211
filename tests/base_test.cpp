#include "base/check.h"

#include <gtest/gtest.h>

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

}  // namespace
}  // namespace trireme
