// Steps recorded from a stream. Of torch's CUDA half only the allocator's interface is used, through virtual functions: the program does
// not link that half.
#include "base/tensor.h"

#include "launch/cuda_graph.h"

#include <c10/core/impl/VirtualGuardImpl.h>
#ifdef TRIREME_CUDA
#include <c10/cuda/CUDACachingAllocator.h>
#include <cuda_runtime.h>
#endif

#include "base/check.h"
#include "ops/step_graph.h"

namespace trireme {

#ifdef TRIREME_CUDA
namespace {

void check(cudaError_t error, const char* call) {
  if (error != cudaSuccess)
    throw SystemError(str(call, ": ", cudaGetErrorString(error), " (", cudaGetErrorName(error), "), while a step was made a CUDA graph; generate.graphs=false does without"));
}

c10::cuda::CUDACachingAllocator::CUDAAllocator& allocator() {
  return *static_cast<c10::cuda::CUDACachingAllocator::CUDAAllocator*>(c10::GetAllocator(at::kCUDA));
}

class CudaGraph final : public StepGraph {
 public:
  explicit CudaGraph(at::Device device) : device_(device), guard_(at::kCUDA) {
    static c10::CaptureId_t count = 0;
    pool_ = {0, ++count};  // as torch numbers pools that are asked for
  }
  ~CudaGraph() override {
    if (graph_) cudaGraphExecDestroy(graph_);
    if (recorded_) allocator().releasePool(device_.index(), pool_);
  }

  void record(const std::function<void()>& step) override {
    TRIREME_CHECK(!recorded_, "a graph is recorded once");
    recorded_ = true;
    // Not from the stream that everybody uses, which cannot be recorded. Whatever was launched there ends first: nothing else is recorded.
    const c10::Stream before = guard_.getStream(device_), own = guard_.getStreamFromGlobalPool(device_, false);
    const auto stream = static_cast<cudaStream_t>(guard_.getStreamNativeHandle(own));
    guard_.synchronizeStream(before);
    allocator().beginAllocateToPool(device_.index(), pool_, [stream](cudaStream_t asking) { return asking == stream; });
    guard_.exchangeStream(own);
    cudaGraph_t launches = nullptr;
    const auto end = [&] {
      const cudaError_t error = cudaStreamEndCapture(stream, &launches);
      guard_.exchangeStream(before);
      allocator().endAllocateToPool(device_.index(), pool_);
      return error;
    };
    try {
      check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
      step();
    } catch (...) {
      end();
      if (launches) cudaGraphDestroy(launches);
      throw;
    }
    check(end(), "cudaStreamEndCapture");
    const cudaError_t error = cudaGraphInstantiate(&graph_, launches, 0);
    cudaGraphDestroy(launches);
    check(error, "cudaGraphInstantiate");
  }

  void replay() override {
    check(cudaGraphLaunch(graph_, static_cast<cudaStream_t>(guard_.getStreamNativeHandle(guard_.getStream(device_)))), "cudaGraphLaunch");
  }

 private:
  at::Device device_;
  c10::impl::VirtualGuardImpl guard_;
  c10::MempoolId_t pool_;
  bool recorded_ = false;
  cudaGraphExec_t graph_ = nullptr;
};

}  // namespace

void offer_cuda_graphs() {
  set_step_graphs(at::kCUDA, [](at::Device device) -> std::unique_ptr<StepGraph> { return std::make_unique<CudaGraph>(device); });
}
#else
void offer_cuda_graphs() {}
#endif

}  // namespace trireme
