#include "daemon/rpc_arena.h"

#include <stdlib.h>

enum { ALIGN = 16, PIECE_MIN = 1024, PIECE_MAX = 1 << 20 };

struct arena_piece {
    struct arena_piece *next;
    size_t used, size; /* of what follows */
    _Alignas(ALIGN) uint8_t data[];
};

bool rpc_total_charge(struct rpc_total *t, uint64_t bytes)
{
    uint64_t now = atomic_load_explicit(&t->bytes, memory_order_relaxed);

    do {
        if (bytes > t->limit_bytes || now > t->limit_bytes - bytes)
            return false;
    } while (!atomic_compare_exchange_weak_explicit(&t->bytes, &now, now + bytes, memory_order_relaxed, memory_order_relaxed));
    return true;
}

void rpc_total_give(struct rpc_total *t, uint64_t bytes)
{
    atomic_fetch_sub_explicit(&t->bytes, bytes, memory_order_relaxed);
}

/* A piece with room for n bytes; the pieces of a message grow with it. */
static struct arena_piece *more(struct arena *a, size_t n)
{
    size_t size = a->pieces ? a->pieces->size * 2 : PIECE_MIN;
    struct arena_piece *p;

    size = size > PIECE_MAX ? PIECE_MAX : size;
    size = size > n ? size : n;
    size = size > a->left ? a->left : size;
    if (size < n)
        return NULL;
    if (!rpc_total_charge(a->total, size)) {
        a->over_total = true;
        return NULL;
    }
    p = malloc(sizeof(*p) + size);
    if (!p) {
        rpc_total_give(a->total, size);
        a->over_total = true;
        return NULL;
    }
    a->left -= size;
    a->n_charged += size;
    *p = (struct arena_piece){.next = a->pieces, .size = size};
    a->pieces = p;
    return p;
}

static void *arena_alloc(void *ctx, size_t n)
{
    struct arena *a = ctx;
    struct arena_piece *p = a->pieces;
    size_t rounded = (n + ALIGN - 1) / ALIGN * ALIGN;
    void *at;

    if (rounded < n)
        return NULL;
    if (!p || rounded > p->size - p->used)
        p = more(a, rounded);
    if (!p)
        return NULL;
    at = p->data + p->used;
    p->used += rounded;
    return at;
}

static void arena_free(void *ctx, void *p)
{
    (void)ctx;
    (void)p; /* all at once */
}

void *arena_unpack(struct arena *a, struct rpc_total *total, const ProtobufCMessageDescriptor *type, const uint8_t *body, size_t n)
{
    ProtobufCAllocator allocator = {arena_alloc, arena_free, a};

    *a = (struct arena){.total = total, .left = (uint64_t)n * ARENA_FACTOR + ARENA_FLOOR};
    return protobuf_c_message_unpack(type, &allocator, n, body);
}

void arena_deinit(struct arena *a)
{
    while (a->pieces) {
        struct arena_piece *p = a->pieces;

        a->pieces = p->next;
        free(p);
    }
    if (a->total)
        rpc_total_give(a->total, a->n_charged);
    *a = (struct arena){0};
}
