// One build of every kernel: for the instruction set that the compiler is told, and the number type SELECTRA_REAL.
#include "conv_backward.h"
#include "cross.h"
#include "rates.h"
#include "scan_backward_tasks.h"
#include "scan_forward.h"
#include "step.h"

namespace selectra {

extern const Kernels SELECTRA_KERNELS;
const Kernels SELECTRA_KERNELS = {
    kLanes, scan_forward,            scan_backward,            conv_forward, conv_backward,
    step,   SELECTRA_CROSS(forward), SELECTRA_CROSS(backward), rate};

}  // namespace selectra
