/* Descriptions of spaces: refused with a reason, or made; what is made has layouts that agree with themselves, and the same
 * description always has the same fingerprint.
 * | block u16 | vocab u16 | digest | dtype | n_groups | n_layers | windows ... | layers: heads, dim_k, dim_v, group, codecs ... | */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "store/space.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static const char *const texts[] = {NULL, "", "raw", "kc4", "kc4:grid=e2m1", "tq4", "tq3", "uq4", "uq4:rule=even,rotate=off",
                                    "fp8", "int8", "f32", "zip", "kc4:", ":", "uq4:rule=", "tq4:x=1", "kc4:grid=int,grid=int"};
enum { N_TEXTS = sizeof(texts) / sizeof(texts[0]), LAYERS = 40 };

struct input {
    const uint8_t *data;
    size_t size;
};

static uint8_t next(struct input *in)
{
    if (in->size == 0)
        return 0;
    in->size--;
    return *in->data++;
}

/* Mostly small, now and then one that overflows. */
static uint32_t number(struct input *in)
{
    uint32_t v = next(in);

    if (v < 250)
        return v;
    return v == 250 ? UINT32_MAX : v == 251 ? 1u << 31 : (uint32_t)next(in) << 8 << (v - 252) * 8;
}

static const char *text(struct input *in)
{
    return texts[next(in) % N_TEXTS];
}

static void check_layout(const struct payload_layout *layout)
{
    uint64_t end = 0;

    if (!layout || layout->bytes == 0 || layout->bytes > PAYLOAD_BYTES_MAX || layout->bytes % 64)
        abort();
    for (uint32_t i = 0; i < layout->n_parts; i++) {
        if (layout->parts[i].off != end)
            abort();
        end += (uint64_t)layout->parts[i].tile.bytes * layout->parts[i].n_kv_heads;
    }
    if (end != layout->bytes)
        abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input in = {data, size};
    struct space_layer_desc layers[LAYERS];
    uint32_t windows[SPACE_GROUPS_MAX + 2];
    struct space_desc desc = {.model = "m", .revision = "", .rope = "", .shard = ""};
    struct space *space, *again;
    struct key_hasher *hasher;
    const char *why = NULL;
    char model[300];
    size_t n_model;
    int r;

    desc.block_tokens = number(&in);
    desc.vocab_tokens = number(&in);
    desc.digest_bytes = next(&in);
    desc.dtype = next(&in) % 5;
    desc.n_groups = next(&in) % (SPACE_GROUPS_MAX + 2);
    desc.n_layers = next(&in) % LAYERS;
    n_model = number(&in) % sizeof(model);
    memset(model, 'm', sizeof(model));
    model[n_model] = '\0';
    desc.model = model;
    for (uint32_t i = 0; i < desc.n_groups; i++)
        windows[i] = number(&in);
    for (uint32_t i = 0; i < desc.n_layers; i++) {
        layers[i] = (struct space_layer_desc){.n_kv_heads = number(&in), .dim_k = number(&in) * 16, .dim_v = number(&in) * 16};
        layers[i].group = next(&in);
        layers[i].codec_k = text(&in);
        layers[i].codec_v = text(&in);
        layers[i].codec_first_k = text(&in);
        layers[i].codec_first_v = text(&in);
    }
    desc.window_tokens = windows;
    desc.layers = layers;
    if (key_hasher_create(&hasher) < 0)
        abort();
    r = space_create(&desc, "domain", hasher, &space, &why);
    if (r < 0) {
        if (r == -EINVAL && (!why || !*why))
            abort();
        key_hasher_destroy(hasher);
        return 0;
    }
    for (uint32_t g = 0; g < space->n_groups; g++) {
        check_layout(space_layout(space, g, false));
        check_layout(space_layout(space, g, true));
    }
    if (space_create(&desc, "domain", hasher, &again, &why) < 0 || memcmp(space->fingerprint, again->fingerprint, KEY_BYTES) != 0)
        abort();
    again = space_destroy(again);
    if (space_create(&desc, "other", hasher, &again, &why) < 0 || memcmp(space->fingerprint, again->fingerprint, KEY_BYTES) == 0)
        abort();
    space_destroy(again);
    space_destroy(space);
    key_hasher_destroy(hasher);
    return 0;
}
