#include "daemon/wire.h"

#include <errno.h>
#include <sys/mman.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(p, n) ((void)(p), (void)(n))
#define ASAN_UNPOISON_MEMORY_REGION(p, n) ((void)(p), (void)(n))
#endif

enum { ALIGN = 16, KEEP_BYTES = 1 << 20 };

static void *wire_alloc(void *ctx, size_t n)
{
    struct wire *w = ctx;
    size_t rounded = (n + ALIGN - 1) / ALIGN * ALIGN;
    uint8_t *p = w->base + w->used;

    /* A gap after each piece is a red zone where the build has them. */
    if (rounded < n || rounded + ALIGN > WIRE_BYTES - w->used)
        return NULL;
    w->used += rounded + ALIGN;
    if (w->used > w->high)
        w->high = w->used;
    ASAN_UNPOISON_MEMORY_REGION(p, n);
    return p;
}

static void wire_free(void *ctx, void *p)
{
    (void)ctx;
    (void)p; /* the whole region is forgotten at once */
}

int wire_init(struct wire *w)
{
    void *p = mmap(NULL, WIRE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

    if (p == MAP_FAILED)
        return -ENOMEM;
    *w = (struct wire){.allocator = {wire_alloc, wire_free, w}, .base = p};
    ASAN_POISON_MEMORY_REGION(p, WIRE_BYTES);
    return 0;
}

void wire_deinit(struct wire *w)
{
    if (w->base) {
        ASAN_UNPOISON_MEMORY_REGION(w->base, WIRE_BYTES);
        munmap(w->base, WIRE_BYTES);
    }
    w->base = NULL;
}

void *wire_unpack(struct wire *w, const ProtobufCMessageDescriptor *type, const uint8_t *body, size_t n)
{
    if (w->high > KEEP_BYTES) { /* one large message does not keep its pages for ever */
        madvise(w->base, WIRE_BYTES, MADV_DONTNEED);
        w->high = 0;
    }
    ASAN_POISON_MEMORY_REGION(w->base, w->used);
    w->used = 0;
    return protobuf_c_message_unpack(type, &w->allocator, n, body);
}
