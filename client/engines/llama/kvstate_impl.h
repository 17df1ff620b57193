/* What the parts of kvstate share: reading a state with its bounds. */
#ifndef KVD_LLAMA_KVSTATE_IMPL_H
#define KVD_LLAMA_KVSTATE_IMPL_H

#include "kvstate.h"

#define KVSTATE_CELL_BYTES 12 /* position, number of sequences, sequence */

struct kvstate {
    struct llama_context *context;
    struct kvstate_layout layout;
    struct kvstate_rows *rows;
    uint8_t *blob; /* the state */
    size_t n_blob, blob_size;
    uint8_t *scratch; /* what is handed out and is not part of the state */
    size_t scratch_size;
    uint32_t n_put; /* tokens of the put that has begun */
};

/* One section of a state, as offsets into it. */
struct kvstate_section {
    uint32_t n_cells, n_layers;
    bool v_transposed;
    size_t cells_off, k_off, v_off; /* k_off, v_off: of the first layer's head */
};

struct kvstate_reader {
    const uint8_t *data;
    size_t n, off;
    bool bad; /* a read beyond the end; all later ones give 0 */
};

uint32_t kvstate_read_u32(struct kvstate_reader *r);
uint64_t kvstate_read_u64(struct kvstate_reader *r);
void kvstate_skip(struct kvstate_reader *r, uint64_t n);
/* Reads a section up to its layers. A section without cells ends there. Sets bad on anything but one stream and no
 * rotation. */
void kvstate_read_section_head(struct kvstate_reader *r, struct kvstate_section *section);

/* Understands the state of a sequence of one token and fills in the layout, whose layers have room for all of the
 * model's. Returns 0, or -ENOTSUP with a reason. */
int kvstate_probe(kvstate *state, const struct llama_model *model, uint32_t n_ubatch, const char **ret_reason);

static inline size_t kvstate_number_bytes(const struct kvstate_layout *layout)
{
    return layout->f32 ? 4 : 2;
}

static inline uint32_t min_u32(uint32_t a, uint32_t b)
{
    return a < b ? a : b;
}

#endif
