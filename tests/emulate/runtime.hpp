// What the emulator and its runtime library share.
#pragma once

#include "emulate/cuda.hpp"

namespace lcodec::emulate {

constexpr unsigned char kRubbish = 0xA5;  // what memory holds until it is written
constexpr std::size_t kMaxSharedBytes = 227 * 1024;

void set_last_error(cudaError_t error);
// Dynamic shared memory that a launch of the kernel may ask for.
std::size_t granted_shared_bytes(const void* kernel);

}  // namespace lcodec::emulate
