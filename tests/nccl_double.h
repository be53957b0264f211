// A test double of a device and of NCCL, in host memory: tensors of device type PrivateUse1, streams, events, and the
// table of NCCL's functions between the MPI ranks of the test. It is as strict as the real ones and as late:
//   - what enters a stream is executed by a thread of its own, after a while; memory given is garbage until then
//   - a call only hands its job over (ncclInProgress): before ncclCommGetAsyncError says success the kernel is not in its
//     stream and the next call is refused
//   - kernels of one communicator run in the order of their calls; a send ends only when its receive runs
//   - a message to oneself outside one group with its receive is refused, different sizes are an error
//   - sums are taken in the opposite order of the ranks
#pragma once

#include <string>

#include "base/tensor.h"
#include "comm/nccl_api.h"

namespace trireme::test {

void install_nccl_double();  // collective over MPI_COMM_WORLD, once

at::Tensor to_device(const at::Tensor& cpu);
at::Tensor to_host(const at::Tensor& device);
at::Tensor device_part(const at::Tensor& device, int64_t begin, int64_t size);

void pause_device(bool pause);        // streams stand still; communicators are made all the same
void pause_calls(bool pause);         // what has been called does not reach a stream, and no communicator is made
void set_device_uuid(char first);     // of this rank's device
void fail_next_kernel(int result);    // it hangs, and its communicator reports this
void fail_next_init(int result);
c10::Stream new_stream();
c10::Stream exchange_stream(c10::Stream stream);  // sets this thread's current one, returns the last

struct NcclCounts {
  int made = 0, destroyed = 0, aborted = 0;  // communicators
  int kernels = 0;                           // launched
};
NcclCounts nccl_counts();

}  // namespace trireme::test
