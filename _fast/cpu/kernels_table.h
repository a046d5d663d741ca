/* The body of every kernels_<level>.c, which chooses the target first: compiles the kernels for it and
 * defines the table named AE_KERNELS. */
#include "simd.h"

#include "impl_attention.h"
#include "impl_elementwise.h"
#include "impl_head.h"
#include "impl_linear.h"
#include "impl_norm.h"
#include "impl_pack_whole.h"
#include "impl_peak.h"
#include "impl_quantize.h"
#include "impl_rope.h"
#include "impl_sample.h"

const ae_kernels AE_KERNELS = {
    .ops =
        {
            [AE_EMBED] = k_embed,
            [AE_RMS_NORM] = k_rms_norm,
            [AE_LINEAR] = k_linear,
            [AE_ROPE_KV] = k_rope_kv,
            [AE_ATTENTION] = k_attention,
            [AE_SELECT] = k_select,
            [AE_ALL_REDUCE] = ae_all_reduce,
            [AE_ALL_GATHER] = ae_all_gather,
            [AE_QUANTIZE] = k_quantize,
            [AE_HEAD] = k_head,
        },
    .sample = k_sample,
    .peak = k_peak,
    .pack_whole = pack_whole,
};
