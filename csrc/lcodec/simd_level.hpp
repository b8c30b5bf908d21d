#pragma once

namespace lcodec {

enum class SimdLevel { baseline, avx2, avx512 };

}  // namespace lcodec
