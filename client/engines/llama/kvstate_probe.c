/* Finding out how a context keeps its cache. */
#include <errno.h>
#include <ggml.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kvstate_impl.h"

/* ---- Reading, within bounds ---- */

static uint64_t read_bytes(struct kvstate_reader *r, size_t n)
{
    uint64_t value = 0;

    if (r->bad || r->n - r->off < n) {
        r->bad = true;
        return 0;
    }
    memcpy(&value, r->data + r->off, n);
    r->off += n;
    return value;
}

uint32_t kvstate_read_u32(struct kvstate_reader *r)
{
    return (uint32_t)read_bytes(r, 4);
}

uint64_t kvstate_read_u64(struct kvstate_reader *r)
{
    return read_bytes(r, 8);
}

void kvstate_skip(struct kvstate_reader *r, uint64_t n)
{
    if (r->bad || r->n - r->off < n)
        r->bad = true;
    else
        r->off += n;
}

void kvstate_read_section_head(struct kvstate_reader *r, struct kvstate_section *section)
{
    uint32_t rotations;

    memset(section, 0, sizeof(*section));
    if (kvstate_read_u32(r) != 1)
        r->bad = true;
    section->n_cells = kvstate_read_u32(r);
    if (section->n_cells == 0)
        return;
    section->cells_off = r->off;
    kvstate_skip(r, (uint64_t)section->n_cells * KVSTATE_CELL_BYTES);
    section->v_transposed = kvstate_read_u32(r) != 0;
    section->n_layers = kvstate_read_u32(r);
    rotations = kvstate_read_u32(r);
    rotations |= kvstate_read_u32(r);
    if (rotations != 0)
        r->bad = true;
    section->k_off = r->off;
}

/* ---- The layout ---- */

/* A number of the model's metadata, <architecture>.<key>; fallback if there is none. */
static uint32_t model_number(const struct llama_model *model, const char *key, uint32_t fallback)
{
    char architecture[64], name[128], value[64];

    if (llama_model_meta_val_str(model, "general.architecture", architecture, sizeof(architecture)) <= 0)
        return fallback;
    snprintf(name, sizeof(name), "%s.%s", architecture, key);
    if (llama_model_meta_val_str(model, name, value, sizeof(value)) <= 0)
        return fallback;
    return (uint32_t)strtoul(value, NULL, 10);
}

/* Reads the heads of one layer's K (is_v: V) and of its single cell. */
static int probe_layer(struct kvstate_reader *r, bool is_v, bool transposed, bool *ret_f32, size_t *ret_row_bytes)
{
    uint32_t type = kvstate_read_u32(r);
    uint64_t row_bytes;

    if (is_v && transposed) {
        row_bytes = kvstate_read_u32(r);
        row_bytes *= kvstate_read_u32(r);
    } else {
        row_bytes = kvstate_read_u64(r);
    }
    kvstate_skip(r, row_bytes);
    if (r->bad || row_bytes == 0 || (type != GGML_TYPE_F16 && type != GGML_TYPE_F32))
        return -EBADMSG;
    *ret_f32 = type == GGML_TYPE_F32;
    *ret_row_bytes = row_bytes;
    return 0;
}

static int probe_section(struct kvstate_reader *r, struct kvstate_layout *layout, uint32_t max_layers)
{
    struct kvstate_section section;
    struct kvstate_group *group = &layout->groups[layout->n_groups];
    uint32_t i, first = layout->n_layers;
    bool f32;

    kvstate_read_section_head(r, &section);
    if (r->bad || section.n_cells != 1 || section.n_layers > max_layers - first)
        return -EBADMSG;
    for (i = first; i < first + section.n_layers; i++) {
        if (probe_layer(r, false, false, &f32, &layout->layers[i].k_row_bytes) < 0 || (i > 0 && f32 != layout->f32))
            return -EBADMSG;
        layout->f32 = f32;
        layout->layers[i].group = layout->n_groups;
    }
    for (i = first; i < first + section.n_layers; i++)
        if (probe_layer(r, true, section.v_transposed, &f32, &layout->layers[i].v_row_bytes) < 0 || f32 != layout->f32)
            return -EBADMSG;
    layout->section_group[layout->n_sections++] = section.n_layers > 0 ? (int)layout->n_groups : -1;
    if (section.n_layers == 0)
        return 0;
    layout->v_transposed = section.v_transposed;
    *group = (struct kvstate_group){.first_layer = first, .n_layers = section.n_layers};
    layout->n_groups++;
    layout->n_layers += section.n_layers;
    return 0;
}

static bool set_heads(const struct llama_model *model, const struct kvstate_layout *layout)
{
    uint32_t head = (uint32_t)(llama_model_n_embd(model) / llama_model_n_head(model));
    uint32_t dim_k = model_number(model, "attention.key_length", head),
             dim_v = model_number(model, "attention.value_length", head);
    uint32_t i;

    for (i = 0; i < layout->n_layers; i++) {
        struct kvstate_layer *layer = &layout->layers[i];
        bool sliding = layout->groups[layer->group].window_tokens > 0;
        size_t n_k = layer->k_row_bytes / kvstate_number_bytes(layout),
               n_v = layer->v_row_bytes / kvstate_number_bytes(layout);

        layer->dim_k = sliding ? model_number(model, "attention.key_length_swa", dim_k) : dim_k;
        layer->dim_v = sliding ? model_number(model, "attention.value_length_swa", dim_v) : dim_v;
        if (layer->dim_k == 0 || layer->dim_v == 0 || n_k % layer->dim_k != 0 || n_v % layer->dim_v != 0 ||
            n_k / layer->dim_k != n_v / layer->dim_v)
            return false;
        layer->n_kv_heads = (uint32_t)(n_k / layer->dim_k);
    }
    return true;
}

int kvstate_probe(kvstate *state, const struct llama_model *model, uint32_t n_ubatch, const char **ret_reason)
{
    struct kvstate_layout *layout = &state->layout;
    struct kvstate_reader r = {.data = state->blob, .n = state->n_blob};
    uint32_t max_layers = (uint32_t)llama_model_n_layer(model), window = (uint32_t)llama_model_n_swa(model);
    uint32_t n_cells = llama_n_ctx_seq(state->context), ring;

    layout->magic = kvstate_read_u32(&r);
    kvstate_read_u32(&r);
    do {
        if (layout->n_sections == KVSTATE_MAX_GROUPS || probe_section(&r, layout, max_layers) < 0) {
            *ret_reason =
                "the engine's state of a sequence is not K and V of attention layers in fp16 or fp32 "
                "(recurrent, hybrid, multi-head latent or sparse attention, quantised cache, several streams)";
            return -ENOTSUP;
        }
    } while (r.off < r.n);
    if (layout->n_layers == 0 || (layout->n_sections == 2 && window < 2)) {
        *ret_reason = "the model has more than one cache, and they are not full and sliding attention";
        return -ENOTSUP;
    }

    /* As libllama sizes its ring, if swa_full is off and there is one sequence. */
    ring = (min_u32(n_cells, window + n_ubatch) + 255) / 256 * 256;
    if (layout->section_group[0] >= 0)
        layout->groups[layout->section_group[0]].n_cells = n_cells;
    if (layout->n_sections == 2 && layout->section_group[1] >= 0) {
        layout->groups[layout->section_group[1]].window_tokens = window;
        layout->groups[layout->section_group[1]].n_cells = ring;
    }
    if (!set_heads(model, layout)) {
        *ret_reason = "the sizes of the model's attention heads do not fit its cache";
        return -ENOTSUP;
    }
    return 0;
}
