// Threads for loops whose parts are independent.
#pragma once

#include <cstdint>
#include <functional>

namespace fastcam {

// Calls f(begin, end) over parts of [0, n), each a multiple of `grain` long (the last may be shorter), on at most
// `threads` threads, the caller's included. Parts are handed out as threads become free, so f must not care which
// thread runs it. The first exception that f throws is thrown again here. Inside another parallel_for, or while another
// caller holds the threads, it runs serially.
void parallel_for(int64_t n, int64_t grain, int threads, const std::function<void(int64_t, int64_t)>& f);

}  // namespace fastcam
