#include "kernels/attn/attn_vec_avx2.h"
#include "kernels/codec/codec_vec_avx2.h"

#define ATTN_CODEC codec_ops_avx2
#include "kernels/attn/attn_part.h"

const struct attn_ops attn_ops_avx2 = {"avx2", vector_partial};
