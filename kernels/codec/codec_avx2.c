#include "kernels/codec/codec_vec_avx2.h"

#include "kernels/codec/codec_rows.h"

const struct codec_ops codec_ops_avx2 = {"avx2", vec_encode, vec_decode};
