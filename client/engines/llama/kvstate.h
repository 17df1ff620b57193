/* K and V of one sequence, out of a llama_context and into it.
 *
 * libllama hands out a sequence's cache only as an opaque state (llama_state_seq_get_data). This module knows the
 * bytes of that state as of b11434 and checks every field that it relies on, so that another version is refused and
 * not misread. All integers are little-endian:
 *
 *   u32 magic, i32 sequence
 *   a section for the full-attention layers, then, if the model has them, one for the sliding layers:
 *     u32 streams (1), u32 cells
 *     cells x { i32 position, u32 sequences (1), i32 sequence }      in the order of cells in memory
 *     u32 V transposed, u32 layers, u32 rotation of K, u32 rotation of V
 *     layers x { i32 ggml type, u64 bytes a row, cells x row }                  K
 *     layers x { i32 ggml type, u64 bytes a row, cells x row }                  V, not transposed (flash attention)
 *  or layers x { i32 ggml type, u32 bytes a number, u32 numbers a cell, numbers x cells x number }     V, transposed
 *
 * The state holds every cell of the full layers, of the sliding ones only the last window. So new K and V are to be
 * taken out after each micro-batch of at most one window.
 *
 * Layers are numbered as in the state: the full ones in model order, then the sliding ones in model order.
 *
 * Exactness. A sum's last bits depend on the order of its terms, here on the cells that tokens are in. kvstate_put()
 * puts each token where an undisturbed run has it: cell = position in the full cache, position modulo the ring's size
 * in the sliding one. Where that cannot be arranged, because libllama starts looking for free cells elsewhere,
 * kvstate_is_exact() says so; the result is then right, but not equal bit by bit. */
#ifndef KVD_LLAMA_KVSTATE_H
#define KVD_LLAMA_KVSTATE_H

#include <llama.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define KVSTATE_MAX_GROUPS 2

struct kvstate_layer {
    uint32_t group;
    uint32_t n_kv_heads;
    uint32_t dim_k, dim_v;
    size_t k_row_bytes, v_row_bytes; /* of one token: [n_kv_heads][dim] */
};

struct kvstate_group {
    uint32_t window_tokens; /* 0: full attention */
    uint32_t n_cells;       /* size of its cache; a ring if window_tokens > 0 */
    uint32_t first_layer, n_layers;
};

struct kvstate_layout {
    bool f32;          /* numbers are float, else fp16 */
    bool v_transposed; /* in the state; never in what this module hands out */
    uint32_t n_layers;
    struct kvstate_layer *layers;
    uint32_t n_groups;
    struct kvstate_group groups[KVSTATE_MAX_GROUPS];
    /* State sections may exist for groups without layers; group of a section, or -1. */
    uint32_t n_sections;
    int section_group[KVSTATE_MAX_GROUPS];
    uint32_t magic;
};

/* Where K and V of tokens [first_token, first_token + n) of a layer are: row-major, rows k_row_bytes and v_row_bytes
 * long. */
struct kvstate_rows {
    uint8_t *k, *v;
    uint32_t first_token;
};

typedef struct kvstate kvstate;

/* Finds out how the context keeps its cache, by computing one token, which is removed again; the context's memory is
 * then empty. n_ubatch: as the context was made with. context must stay valid as long as the result, which is freed
 * with kvstate_destroy(). Errors: -ENOTSUP with a reason, a constant sentence, in *ret_reason (recurrent or hybrid
 * models, keys without values, several streams, quantised caches, unknown bytes), -EIO (the engine failed), -ENOMEM. */
int kvstate_create(struct llama_context *context, uint32_t n_ubatch, kvstate **ret, const char **ret_reason);
kvstate *kvstate_destroy(kvstate *state);

/* Valid as long as the state. */
const struct kvstate_layout *kvstate_get_layout(const kvstate *state);

/* Copies K and V of tokens [first, first + n) of sequence 0 out of the context. *ret_rows: one a layer, all with
 * first_token == first; memory of state, valid until its next call. Errors: -ENODATA (a token is not in the cache:
 * beyond its end, or out of a sliding window), -EBADMSG (bytes that differ from the layout), -EIO, -ENOMEM. */
int kvstate_take(kvstate *state, uint32_t first, uint32_t n, const struct kvstate_rows **ret_rows);

/* Puts a prefix of n_tokens tokens into the context as sequence 0, whatever was there: begin, let the caller fill all
 * rows that it got, commit. Full layers: first_token 0, n_tokens rows. Sliding layers: the last min(n_tokens, window)
 * tokens. Errors of begin: -E2BIG (more than the cache holds), -ENOMEM; of commit: -EIO (libllama refused; the
 * sequence is empty). */
int kvstate_put_begin(kvstate *state, uint32_t n_tokens, const struct kvstate_rows **ret_rows);
int kvstate_put_commit(kvstate *state);

/* True if a prefix of n_tokens that is put leaves every later token in the cell that it has in a run without put. */
bool kvstate_is_exact(const struct kvstate_layout *layout, uint32_t n_tokens);

#endif
