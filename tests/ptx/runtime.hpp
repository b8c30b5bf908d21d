// What the stand-in for CUDA's runtime knows of kernels.
#pragma once

#include <string>
#include <vector>

#include "ptx/program.hpp"

namespace lcodec::ptx {

std::vector<std::string> kernel_names();
std::string kernel_source(const std::string& name);
// Parses and takes other text for a kernel.
void replace_source(const std::string& name, const std::string& source);

struct Coverage {
  std::string kernel;
  std::uint64_t launches;
  std::size_t executed, instructions;
  std::vector<std::string> never;  // places in the source of which nothing was executed
};
// Of the kernels that were launched.
std::vector<Coverage> coverage();

// Forgets a failure, which otherwise stays, as on a device, and adopted memory.
void reset();

}  // namespace lcodec::ptx
