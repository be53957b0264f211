// Every device runs a kernel of this build and gives the right numbers; without a driver there is no device and no error.
#include <gtest/gtest.h>

#include <filesystem>

#include "kernels/kernels.h"

namespace trireme::kernels {
namespace {

TEST(Kernels, EveryDeviceRunsThisBuild) {
  int n = num_devices();
  if (n == 0) GTEST_SKIP() << "no CUDA device";
  for (int i = 0; i < n; ++i) {
    DeviceReport report = probe_device(i);
    EXPECT_EQ(report.failure, "") << "device " << i << ", " << report.name;
    EXPECT_GT(report.total_bytes, report.free_bytes);
  }
}

TEST(Kernels, ADeviceThatIsNotThereIsNamed) {
  DeviceReport report = probe_device(num_devices());
  EXPECT_NE(report.failure.find("cudaSetDevice: "), std::string::npos) << report.failure;
}

TEST(Kernels, NoDriverMeansNoDevice) {
  if (std::filesystem::exists("/dev/nvidiactl")) GTEST_SKIP() << "this machine has a driver";
  EXPECT_EQ(num_devices(), 0);
  EXPECT_EQ(versions().driver, 0);
  EXPECT_EQ(versions().runtime / 1000, 13);
}

}  // namespace
}  // namespace trireme::kernels
