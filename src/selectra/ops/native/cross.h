// The scans of `count` routes through one grid, one call each, in the build that the compiler is told: see Kernels.
#pragma once

#include "call.h"

#define SELECTRA_JOINED(what, build) cross_##what##_##build
#define SELECTRA_JOIN(what, build) SELECTRA_JOINED(what, build)
#define SELECTRA_CROSS(what) SELECTRA_JOIN(what, SELECTRA_KERNELS)

namespace selectra {

int SELECTRA_CROSS(forward)(const ScanCall* routes, int64_t count);
int SELECTRA_CROSS(backward)(const ScanBackwardCall* routes, int64_t count);

}  // namespace selectra
