#include <assert.h>
#include <errno.h>
#include <ggml.h>
#include <stdlib.h>
#include <string.h>

#include "kvstate_impl.h"

/* The state's bytes are copied as they are. */
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the state is read and written in place");

#define STATE_HEAD_BYTES 8

/* ---- Sizes ------------------------------------------------------------------------------------------------------- */

static size_t layer_k_bytes(const struct kvstate_layer *layer, uint32_t n_cells)
{
    return 12 + n_cells * layer->k_row_bytes;
}

/* Both forms of V have a head of 12 bytes and the same numbers. */
static size_t layer_v_bytes(const struct kvstate_layer *layer, uint32_t n_cells)
{
    return 12 + n_cells * layer->v_row_bytes;
}

/* Cells that a section has in a state of n_tokens that we put: full caches all, rings what an undisturbed run has
 * used. */
static uint32_t n_put_cells(const struct kvstate_group *group, uint32_t n_tokens)
{
    return group->window_tokens == 0 || n_tokens < group->n_cells ? n_tokens : group->n_cells;
}

/* The first token that a group of a prefix of n_tokens needs. */
static uint32_t first_needed(const struct kvstate_group *group, uint32_t n_tokens)
{
    return group->window_tokens == 0 ? 0 : n_tokens - min_u32(n_tokens, group->window_tokens);
}

/* The position that cell of a ring holds after n_tokens of an undisturbed run. */
static uint32_t ring_position(uint32_t n_cells, uint32_t n_tokens, uint32_t cell)
{
    uint32_t head = n_tokens % n_cells;

    if (n_tokens <= n_cells)
        return cell;
    return cell < head ? n_tokens - head + cell : n_tokens - head - n_cells + cell;
}

static int reserve(uint8_t **buffer, size_t *size, size_t wanted)
{
    uint8_t *grown;

    if (*size >= wanted)
        return 0;
    grown = realloc(*buffer, wanted);
    if (!grown)
        return -ENOMEM;
    *buffer = grown;
    *size = wanted;
    return 0;
}

/* ---- Reading a state --------------------------------------------------------------------------------------------- */

static int load_blob(kvstate *state)
{
    size_t size = llama_state_seq_get_size(state->context, 0);
    int r;

    if (size == 0)
        return -EIO;
    r = reserve(&state->blob, &state->blob_size, size);
    if (r < 0)
        return r;
    state->n_blob = llama_state_seq_get_data(state->context, state->blob, size, 0);
    return state->n_blob == size ? 0 : -EIO;
}

/* Reads the head of a section of known shape and steps over its layers. */
static int read_section(struct kvstate_reader *r, const struct kvstate_layout *layout, int group,
                        struct kvstate_section *section)
{
    const struct kvstate_group *g = group < 0 ? NULL : &layout->groups[group];
    uint32_t i, n_layers = g ? g->n_layers : 0;

    kvstate_read_section_head(r, section);
    if (section->n_cells == 0)
        return r->bad ? -EBADMSG : 0;
    if (section->n_layers != n_layers || (n_layers > 0 && section->v_transposed != layout->v_transposed))
        return -EBADMSG;
    for (i = 0; i < n_layers; i++)
        kvstate_skip(r, layer_k_bytes(&layout->layers[g->first_layer + i], section->n_cells));
    section->v_off = r->off;
    for (i = 0; i < n_layers; i++)
        kvstate_skip(r, layer_v_bytes(&layout->layers[g->first_layer + i], section->n_cells));
    return r->bad ? -EBADMSG : 0;
}

static void copy_v_cell(const struct kvstate_layout *layout, const struct kvstate_layer *layer, const uint8_t *v,
                        uint32_t n_cells, uint32_t cell, uint8_t *row)
{
    size_t bytes = kvstate_number_bytes(layout), i, n = layer->v_row_bytes / bytes;

    if (!layout->v_transposed) {
        memcpy(row, v + cell * layer->v_row_bytes, layer->v_row_bytes);
        return;
    }
    for (i = 0; i < n; i++)
        memcpy(row + i * bytes, v + (i * n_cells + cell) * bytes, bytes);
}

/* Copies the tokens [first, first + n) of a section into the rows of its layers. */
static int take_section(kvstate *state, const struct kvstate_group *group, const struct kvstate_section *section,
                        uint32_t first, uint32_t n)
{
    const uint8_t *blob = state->blob, *cells = blob + section->cells_off;
    const uint8_t *k = blob + section->k_off, *v = blob + section->v_off;
    uint32_t i, cell, n_found = 0;

    for (cell = 0; cell < section->n_cells; cell++) {
        uint32_t position;

        memcpy(&position, cells + (size_t)cell * KVSTATE_CELL_BYTES, 4);
        n_found += position - first < n;
    }
    if (n_found != n)
        return -ENODATA;

    for (i = 0; i < group->n_layers; i++) {
        const struct kvstate_layer *layer = &state->layout.layers[group->first_layer + i];
        const struct kvstate_rows *rows = &state->rows[group->first_layer + i];

        for (cell = 0; cell < section->n_cells; cell++) {
            uint32_t position;

            memcpy(&position, cells + (size_t)cell * KVSTATE_CELL_BYTES, 4);
            if (position - first >= n)
                continue;
            memcpy(rows->k + (position - first) * layer->k_row_bytes, k + 12 + cell * layer->k_row_bytes,
                   layer->k_row_bytes);
            copy_v_cell(&state->layout, layer, v + 12, section->n_cells, cell,
                        rows->v + (position - first) * layer->v_row_bytes);
        }
        k += layer_k_bytes(layer, section->n_cells);
        v += layer_v_bytes(layer, section->n_cells);
    }
    return 0;
}

int kvstate_take(kvstate *state, uint32_t first, uint32_t n, const struct kvstate_rows **ret_rows)
{
    const struct kvstate_layout *layout = &state->layout;
    struct kvstate_reader r;
    size_t off = 0;
    uint32_t i;
    int result;

    for (i = 0; i < layout->n_layers; i++)
        off += n * (layout->layers[i].k_row_bytes + layout->layers[i].v_row_bytes);
    result = reserve(&state->scratch, &state->scratch_size, off);
    if (result < 0)
        return result;
    result = load_blob(state);
    if (result < 0)
        return result;

    for (i = 0, off = 0; i < layout->n_layers; i++) {
        state->rows[i].k = state->scratch + off;
        off += n * layout->layers[i].k_row_bytes;
        state->rows[i].v = state->scratch + off;
        off += n * layout->layers[i].v_row_bytes;
        state->rows[i].first_token = first;
    }
    r = (struct kvstate_reader){.data = state->blob, .n = state->n_blob};
    if (kvstate_read_u32(&r) != layout->magic || kvstate_read_u32(&r) != 0)
        return -EBADMSG;
    for (i = 0; i < layout->n_sections; i++) {
        struct kvstate_section section;

        result = read_section(&r, layout, layout->section_group[i], &section);
        if (result >= 0 && layout->section_group[i] >= 0)
            result = take_section(state, &layout->groups[layout->section_group[i]], &section, first, n);
        if (result < 0)
            return result;
    }
    if (r.off != r.n)
        return -EBADMSG;
    *ret_rows = state->rows;
    return 0;
}

/* ---- Writing a state --------------------------------------------------------------------------------------------- */

static void write_u32(uint8_t **p, uint32_t value)
{
    memcpy(*p, &value, 4);
    *p += 4;
}

static size_t put_section_bytes(const struct kvstate_layout *layout, const struct kvstate_group *group,
                                uint32_t n_cells)
{
    size_t bytes = 8 + (size_t)n_cells * KVSTATE_CELL_BYTES + 16;
    uint32_t i;

    for (i = 0; group && i < group->n_layers; i++) {
        bytes += layer_k_bytes(&layout->layers[group->first_layer + i], n_cells);
        bytes += layer_v_bytes(&layout->layers[group->first_layer + i], n_cells);
    }
    return bytes;
}

/* Writes all of a section but its numbers. A section without layers has the cells of a full cache. *ret_k, *ret_v: the
 * first layer's head. Returns what follows. */
static uint8_t *write_section(const struct kvstate_layout *layout, const struct kvstate_group *group, uint32_t n_tokens,
                              uint8_t *p, uint8_t **ret_k, uint8_t **ret_v)
{
    uint32_t cell, i, n_layers = group ? group->n_layers : 0;
    uint32_t n_cells = group ? n_put_cells(group, n_tokens) : n_tokens;
    uint32_t type = layout->f32 ? GGML_TYPE_F32 : GGML_TYPE_F16;

    write_u32(&p, 1);
    write_u32(&p, n_cells);
    for (cell = 0; cell < n_cells; cell++) {
        write_u32(&p, ring_position(n_cells, n_tokens, cell));
        write_u32(&p, 1);
        write_u32(&p, 0);
    }
    write_u32(&p, layout->v_transposed);
    write_u32(&p, n_layers);
    write_u32(&p, 0);
    write_u32(&p, 0);
    *ret_k = p;
    for (i = 0; i < n_layers; i++) {
        const struct kvstate_layer *layer = &layout->layers[group->first_layer + i];
        uint64_t row = layer->k_row_bytes;

        memcpy(p, &type, 4);
        memcpy(p + 4, &row, 8);
        p += layer_k_bytes(layer, n_cells);
    }
    *ret_v = p;
    for (i = 0; i < n_layers; i++) {
        const struct kvstate_layer *layer = &layout->layers[group->first_layer + i];
        uint64_t row = layer->v_row_bytes;
        uint32_t number = (uint32_t)kvstate_number_bytes(layout), n_numbers = (uint32_t)(layer->v_row_bytes / number);

        memcpy(p, &type, 4);
        if (layout->v_transposed) {
            memcpy(p + 4, &number, 4);
            memcpy(p + 8, &n_numbers, 4);
        } else {
            memcpy(p + 4, &row, 8);
        }
        p += layer_v_bytes(layer, n_cells);
    }
    return p;
}

/* Bytes of scratch that a put needs: rows that are not in the state as they are handed out. */
static size_t put_scratch_bytes(const struct kvstate_layout *layout, uint32_t n_tokens)
{
    size_t bytes = 0;
    uint32_t i;

    for (i = 0; i < layout->n_layers; i++) {
        const struct kvstate_layer *layer = &layout->layers[i];
        const struct kvstate_group *group = &layout->groups[layer->group];
        uint32_t n_rows = n_tokens - first_needed(group, n_tokens);

        if (group->window_tokens > 0)
            bytes += n_rows * layer->k_row_bytes;
        if (group->window_tokens > 0 || layout->v_transposed)
            bytes += n_rows * layer->v_row_bytes;
    }
    return bytes;
}

/* Says where the caller is to put the rows of a group's layers. Returns the scratch that is left. */
static uint8_t *place_rows(kvstate *state, const struct kvstate_group *group, uint32_t n_tokens, uint8_t *k, uint8_t *v,
                           uint8_t *scratch)
{
    const struct kvstate_layout *layout = &state->layout;
    uint32_t i, n_cells = n_put_cells(group, n_tokens), first = first_needed(group, n_tokens);

    for (i = group->first_layer; i < group->first_layer + group->n_layers; i++) {
        const struct kvstate_layer *layer = &layout->layers[i];
        struct kvstate_rows *rows = &state->rows[i];

        *rows = (struct kvstate_rows){k + 12, v + 12, first};
        if (group->window_tokens > 0) {
            rows->k = scratch;
            scratch += (n_tokens - first) * layer->k_row_bytes;
        }
        if (group->window_tokens > 0 || layout->v_transposed) {
            rows->v = scratch;
            scratch += (n_tokens - first) * layer->v_row_bytes;
        }
        k += layer_k_bytes(layer, n_cells);
        v += layer_v_bytes(layer, n_cells);
    }
    return scratch;
}

int kvstate_put_begin(kvstate *state, uint32_t n_tokens, const struct kvstate_rows **ret_rows)
{
    const struct kvstate_layout *layout = &state->layout;
    size_t bytes = STATE_HEAD_BYTES;
    uint8_t *p, *k, *v, *scratch;
    uint32_t i;
    int r;

    for (i = 0; i < layout->n_sections; i++) {
        int g = layout->section_group[i];
        const struct kvstate_group *group = g < 0 ? NULL : &layout->groups[g];

        if (group && group->window_tokens == 0 && n_tokens > group->n_cells)
            return -E2BIG;
        bytes += put_section_bytes(layout, group, group ? n_put_cells(group, n_tokens) : n_tokens);
    }
    r = reserve(&state->blob, &state->blob_size, bytes);
    if (r >= 0)
        r = reserve(&state->scratch, &state->scratch_size, put_scratch_bytes(layout, n_tokens));
    if (r < 0)
        return r;

    p = state->blob;
    scratch = state->scratch;
    write_u32(&p, layout->magic);
    write_u32(&p, 0);
    for (i = 0; i < layout->n_sections; i++) {
        int g = layout->section_group[i];
        const struct kvstate_group *group = g < 0 ? NULL : &layout->groups[g];

        p = write_section(layout, group, n_tokens, p, &k, &v);
        if (group)
            scratch = place_rows(state, group, n_tokens, k, v, scratch);
    }
    state->n_blob = (size_t)(p - state->blob);
    assert(state->n_blob == bytes);
    state->n_put = n_tokens;
    *ret_rows = state->rows;
    return 0;
}

/* Copies a ring's rows to their cells. Cells whose token is out of the window get zeros: they are there only because
 * an undisturbed run has them too, and are never attended. */
static void fill_ring_k(const struct kvstate_group *group, const struct kvstate_layer *layer,
                        const struct kvstate_rows *rows, uint32_t n_tokens, uint8_t *k)
{
    uint32_t cell, n_cells = n_put_cells(group, n_tokens);

    for (cell = 0; cell < n_cells; cell++) {
        uint32_t position = ring_position(n_cells, n_tokens, cell);
        uint8_t *row = k + cell * layer->k_row_bytes;

        if (position < rows->first_token)
            memset(row, 0, layer->k_row_bytes);
        else
            memcpy(row, rows->k + (position - rows->first_token) * layer->k_row_bytes, layer->k_row_bytes);
    }
}

static void fill_v(const struct kvstate_layout *layout, const struct kvstate_group *group,
                   const struct kvstate_layer *layer, const struct kvstate_rows *rows, uint32_t n_tokens, uint8_t *v)
{
    uint32_t cell, n_cells = n_put_cells(group, n_tokens);
    size_t i, bytes = kvstate_number_bytes(layout), n = layer->v_row_bytes / bytes;

    for (cell = 0; cell < n_cells; cell++) {
        uint32_t position = ring_position(n_cells, n_tokens, cell);
        const uint8_t *row = rows->v + ((size_t)position - rows->first_token) * layer->v_row_bytes;
        bool outside = position < rows->first_token;

        if (!layout->v_transposed && outside)
            memset(v + cell * layer->v_row_bytes, 0, layer->v_row_bytes);
        else if (!layout->v_transposed)
            memcpy(v + cell * layer->v_row_bytes, row, layer->v_row_bytes);
        else
            for (i = 0; i < n; i++)
                if (outside)
                    memset(v + (i * n_cells + cell) * bytes, 0, bytes);
                else
                    memcpy(v + (i * n_cells + cell) * bytes, row + i * bytes, bytes);
    }
}

int kvstate_put_commit(kvstate *state)
{
    const struct kvstate_layout *layout = &state->layout;
    struct kvstate_reader r = {.data = state->blob, .n = state->n_blob, .off = STATE_HEAD_BYTES};
    uint32_t s, i;

    for (s = 0; s < layout->n_sections; s++) {
        int g = layout->section_group[s];
        const struct kvstate_group *group = &layout->groups[g < 0 ? 0 : g];
        struct kvstate_section section;
        uint8_t *k, *v;

        if (read_section(&r, layout, g, &section) < 0)
            return -EIO;
        if (g < 0)
            continue;
        k = state->blob + section.k_off;
        v = state->blob + section.v_off;
        for (i = group->first_layer; i < group->first_layer + group->n_layers; i++) {
            const struct kvstate_layer *layer = &layout->layers[i];

            if (group->window_tokens > 0)
                fill_ring_k(group, layer, &state->rows[i], state->n_put, k + 12);
            if (group->window_tokens > 0 || layout->v_transposed)
                fill_v(layout, group, layer, &state->rows[i], state->n_put, v + 12);
            k += layer_k_bytes(layer, section.n_cells);
            v += layer_v_bytes(layer, section.n_cells);
        }
    }

    /* From an empty memory libllama fills cells from the first one on, in the order of the state. */
    llama_memory_clear(llama_get_memory(state->context), false);
    if (llama_state_seq_set_data(state->context, state->blob, state->n_blob, 0) != state->n_blob) {
        llama_memory_clear(llama_get_memory(state->context), true);
        return -EIO;
    }
    return 0;
}

/* After a put, libllama looks for free cells from the end of the ring, that is from its start. An undisturbed run
 * continues at position modulo size. Both find the same cell unless one before it can be used, which holds a token
 * that no later token needs. */
bool kvstate_is_exact(const struct kvstate_layout *layout, uint32_t n_tokens)
{
    uint32_t i;

    for (i = 0; i < layout->n_groups; i++) {
        const struct kvstate_group *group = &layout->groups[i];

        if (group->window_tokens > 0 && n_tokens > group->n_cells && n_tokens % group->n_cells >= group->window_tokens)
            return false;
    }
    return true;
}

/* ---- Life ---- */

int kvstate_create(struct llama_context *context, uint32_t n_ubatch, kvstate **ret, const char **ret_reason)
{
    const struct llama_model *model = llama_get_model(context);
    llama_token token = llama_vocab_bos(llama_model_get_vocab(model));
    uint32_t n_layers = (uint32_t)llama_model_n_layer(model);
    kvstate *state;
    int r;

    if (llama_model_is_recurrent(model) || llama_model_is_hybrid(model) || llama_model_has_encoder(model) ||
        !llama_get_memory(context)) {
        *ret_reason = "the model keeps something other than K and V of tokens (recurrent, hybrid, or with an encoder)";
        return -ENOTSUP;
    }
    if (llama_n_seq_max(context) != 1) {
        *ret_reason = "the context has more than one sequence";
        return -ENOTSUP;
    }
    state = calloc(1, sizeof(*state));
    if (!state)
        return -ENOMEM;
    state->context = context;
    state->layout.layers = calloc(n_layers, sizeof(*state->layout.layers));
    state->rows = calloc(n_layers, sizeof(*state->rows));
    r = state->layout.layers && state->rows ? 0 : -ENOMEM;
    if (r >= 0) {
        token = token < 0 ? 0 : token;
        llama_memory_clear(llama_get_memory(context), true);
        r = llama_decode(context, llama_batch_get_one(&token, 1)) == 0 ? load_blob(state) : -EIO;
    }
    if (r >= 0)
        r = kvstate_probe(state, model, n_ubatch, ret_reason);
    llama_memory_clear(llama_get_memory(context), true);
    if (r < 0) {
        kvstate_destroy(state);
        return r;
    }
    *ret = state;
    return 0;
}

kvstate *kvstate_destroy(kvstate *state)
{
    if (state) {
        free(state->layout.layers);
        free(state->rows);
        free(state->blob);
        free(state->scratch);
        free(state);
    }
    return NULL;
}

const struct kvstate_layout *kvstate_get_layout(const kvstate *state)
{
    return &state->layout;
}
