/* Requests that are computed as one: their shared blocks once for all, the rest of each by itself.
 *
 * The chains of the members are a tree, which begins with the block that all have first:
 *
 *   A: a b c d          segment 1   a b      rows of A, B, C
 *   B: a b c e f   -->  segment 2   c        rows of A, B
 *   C: a b              segment 3   d        rows of A
 *                       segment 4   e f      rows of B
 *
 * so that each block is read once, whoever needs it (cascade: Juravsky et al., Hydragen, 2024; Ye et al., FlashInfer, 2025, section 3.1). Finding
 * the tree costs one comparison a member and block.
 *
 * Leases: the tenant's own table of the attention threads is one more page to the evictor (proto/lookup.h has the protocol). All words of
 * a job share one fence. What was not retired until then stays until the job gives the words back, whatever its worker does. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/attend-internal.h"
#include "daemon/fault.h"

static uint32_t common(const struct attend_request *a, const struct attend_request *b, uint32_t from, uint32_t to)
{
    to = b->n_refs < to ? b->n_refs : to;
    while (from < to && a->refs[from] == b->refs[from])
        from++;
    return from;
}

/* ---- who is in ---- */

static uint32_t words_free(struct attend_tenant *t)
{
    uint32_t n;

    pthread_mutex_lock(&t->words_lock);
    n = t->n_free;
    pthread_mutex_unlock(&t->words_lock);
    return n;
}

/* Moves those whose blocks find no lease words any more to the end. Counts what is not shared with the first, which is enough. */
static uint32_t choose_members(struct attend_tenant *t, struct attend_request **members, uint32_t n)
{
    uint64_t room = words_free(t), used = members[0]->n_refs;
    uint32_t in = 1, at = 1;

    if (used > room)
        return 0;
    while (at < n) {
        struct attend_request *rq = members[at];
        uint64_t more = rq->n_refs - common(members[0], rq, 0, members[0]->n_refs);

        if (used + more > room) {
            members[at] = members[--n];
            members[n] = rq;
            continue;
        }
        used += more;
        members[in++] = members[at++];
    }
    return in;
}

/* ---- the tree ---- */

struct sorting {
    struct attend_request *const *members;
    uint32_t at;
};

static int compare_at(const void *a, const void *b, void *ctx)
{
    const struct sorting *s = ctx;
    uint64_t x = s->members[*(const uint32_t *)a]->refs[s->at], y = s->members[*(const uint32_t *)b]->refs[s->at];

    return x < y ? -1 : x > y;
}

/* Adds the segments of order[lo, hi), whose chains are the same before `from`. There are at most two a member. */
static void add_segments(struct attend_job *j, uint32_t lo, uint32_t hi, uint32_t from)
{
    const struct attend_request *first = j->members[j->order[lo]];
    struct sorting sorting = {.members = j->members};
    uint32_t to = first->n_refs, rows = 0;

    for (uint32_t i = lo; i < hi; i++) {
        to = common(first, j->members[j->order[i]], from, to);
        rows += j->members[j->order[i]]->n_rows;
    }
    if (to > from) {
        j->segments[j->n_segments++] = (struct attend_segment){
            .from = from, .n = to - from, .member0 = lo, .n_members = hi - lo, .n_rows = rows, .block0 = j->n_blocks};
        j->n_blocks += to - from;
    }
    for (uint32_t i = lo; i < hi; i++) /* those that end here go to the front and are done */
        if (j->members[j->order[i]]->n_refs == to) {
            uint32_t ended = j->order[i];

            j->order[i] = j->order[lo];
            j->order[lo++] = ended;
        }
    if (lo == hi)
        return;
    sorting.at = to;
    qsort_r(j->order + lo, hi - lo, sizeof(*j->order), compare_at, &sorting);
    while (lo < hi) {
        uint32_t end = lo + 1;

        while (end < hi && compare_at(&j->order[lo], &j->order[end], &sorting) == 0)
            end++;
        add_segments(j, lo, end, to);
        lo = end;
    }
}

/* ---- leases ---- */

static void fail_members(struct attend_job *j, const struct attend_segment *s, enum ring_reason reason, uint64_t block)
{
    for (uint32_t i = 0; i < s->n_members; i++)
        attend_request_fail(j->members[j->order[s->member0 + i]], reason, block, 0);
}

static int take_words(struct attend_job *j)
{
    struct attend_tenant *t = j->tenant;
    int r = -EAGAIN;

    pthread_mutex_lock(&t->words_lock);
    if (t->n_free >= j->n_blocks && !FAULT_DUE("attend-lease")) {
        t->n_free -= j->n_blocks;
        memcpy(j->words, t->free_words + t->n_free, j->n_blocks * sizeof(*j->words));
        j->n_words = j->n_blocks;
        r = 0;
    }
    pthread_mutex_unlock(&t->words_lock);
    return r;
}

static void give_words(struct attend_job *j)
{
    struct attend_tenant *t = j->tenant;

    for (uint32_t i = 0; i < j->n_words; i++) /* release: what was read under the lease was read before */
        atomic_store_explicit(&t->words[j->words[i]], 0, memory_order_release);
    pthread_mutex_lock(&t->words_lock);
    memcpy(t->free_words + t->n_free, j->words, j->n_words * sizeof(*j->words));
    t->n_free += j->n_words;
    pthread_mutex_unlock(&t->words_lock);
    j->n_words = 0;
}

/* A confirmed entry's block: is it what the segment's members say it is? */
static void take_block(struct attend_job *j, const struct attend_segment *s, uint32_t at, const struct lookup_hit *hit)
{
    const struct shm_entry *e = &cache_view(j->tenant->cache)->entries[hit->entry];
    const struct attend_kind *k = &j->kind;
    bool first = atomic_load_explicit(&e->flags, memory_order_relaxed) & SHM_ENTRY_FIRST;
    const struct payload_layout *layout = space_layout(k->space, k->group, first);
    struct attend_block *b = &j->blocks[s->block0 + at];

    if (atomic_load_explicit(&e->space, memory_order_relaxed) != k->space->id ||
        atomic_load_explicit(&e->group, memory_order_relaxed) != k->group ||
        atomic_load_explicit(&e->bytes, memory_order_relaxed) != layout->bytes) {
        fail_members(j, s, RING_FOREIGN, s->from + at);
        return;
    }
    b->payload = cache_leased_at(j->tenant->cache, atomic_load_explicit(&e->host, memory_order_relaxed));
    b->first = first;
    if (!b->payload)
        fail_members(j, s, RING_STALE, s->from + at);
}

/* Leases every block of every segment: all words, one fence, all generations again. */
static void lease_blocks(struct attend_job *j, struct lookup_hit *hits, uint32_t *place)
{
    const struct lookup_view *view = cache_view(j->tenant->cache);
    uint32_t n = 0, word = 0;

    for (uint32_t i = 0; i < j->n_segments; i++) {
        const struct attend_segment *s = &j->segments[i];
        const struct attend_request *rq = j->members[j->order[s->member0]];

        for (uint32_t k = 0; k < s->n; k++) {
            uint64_t ref = rq->refs[s->from + k];

            place[s->block0 + k] = UINT32_MAX;
            if (ref == 0)
                continue;
            if (shm_ref_entry(ref) >= view->n_entries || shm_ref_gen(ref) < 2 || shm_ref_gen(ref) % 2) {
                fail_members(j, s, RING_STALE, s->from + k);
                continue;
            }
            atomic_store_explicit(&j->tenant->words[j->words[word++]], ref, memory_order_relaxed);
            hits[n].entry = shm_ref_entry(ref);
            hits[n].gen = shm_ref_gen(ref);
            place[s->block0 + k] = n++;
        }
    }
    for (uint32_t at = 0; at < n; at++) { /* from the first that failed on again; gen 0 says that it did */
        at += (uint32_t)lookup_confirm(view, hits + at, n - at);
        if (at < n)
            hits[at].gen = 0;
    }
    for (uint32_t i = 0; i < j->n_segments; i++) {
        const struct attend_segment *s = &j->segments[i];

        for (uint32_t k = 0; k < s->n; k++) {
            uint32_t at = place[s->block0 + k];

            if (at != UINT32_MAX && hits[at].gen)
                take_block(j, s, k, &hits[at]);
            else if (at != UINT32_MAX)
                fail_members(j, s, RING_STALE, s->from + k);
        }
    }
}

static int lease_all(struct attend_job *j)
{
    struct lookup_hit *hits = malloc((j->n_blocks ? j->n_blocks : 1) * sizeof(*hits));
    uint32_t *place = malloc((j->n_blocks ? j->n_blocks : 1) * sizeof(*place));
    int r = -ENOMEM;

    j->blocks = calloc(j->n_blocks ? j->n_blocks : 1, sizeof(*j->blocks));
    j->words = malloc((j->n_blocks ? j->n_blocks : 1) * sizeof(*j->words));
    if (hits && place && j->blocks && j->words)
        r = take_words(j);
    if (r == 0)
        lease_blocks(j, hits, place);
    free(hits);
    free(place);
    return r;
}

/* ---- pieces ---- */

/* How a segment is cut: so that a piece takes about a slice. */
struct cut {
    uint32_t heads, blocks, rows;
};

static struct cut cut_of(const struct attend_job *j, const struct attend_segment *s, double nsec_per_unit, uint64_t slice_usec)
{
    const struct attend_kind *k = &j->kind;
    uint32_t n_chunks = (s->n_rows + ATTEND_ROWS_MAX - 1) / ATTEND_ROWS_MAX;
    struct cut c = {.heads = 1, .blocks = s->n, .rows = (s->n_rows + n_chunks - 1) / n_chunks};
    double slice = (double)slice_usec * 1000,
           head = attend_units((uint64_t)s->n * k->space->block_tokens, 1, c.rows, k->dim_k + k->params.dim_o) * nsec_per_unit;

    if (head > slice) {
        double n = head / slice;
        uint32_t n_runs = n < s->n ? (uint32_t)n + 1 : s->n;

        c.blocks = (s->n + n_runs - 1) / n_runs;
    } else if (head * k->n_kv_heads <= slice) {
        c.heads = k->n_kv_heads;
    } else {
        c.heads = (uint32_t)(slice / head);
    }
    if (c.blocks > ATTEND_PIECE_BLOCKS_MAX)
        c.blocks = ATTEND_PIECE_BLOCKS_MAX;
    return c;
}

static uint32_t parts(uint32_t n, uint32_t each)
{
    return (n + each - 1) / each;
}

static int add_pieces(struct attend_job *j, uint32_t segment, const struct cut *c)
{
    const struct attend_segment *s = &j->segments[segment];
    uint64_t n = (uint64_t)parts(s->n, c->blocks) * parts(j->kind.n_kv_heads, c->heads) * parts(s->n_rows, c->rows);
    struct attend_piece *grown;

    if (n + j->n_pieces > UINT32_MAX / sizeof(*grown))
        return -ENOMEM;
    grown = realloc(j->pieces, (j->n_pieces + n) * sizeof(*grown));
    if (!grown)
        return -ENOMEM;
    j->pieces = grown;
    for (uint32_t b = 0; b < s->n; b += c->blocks) /* rows innermost: the codes are in the cache then */
        for (uint32_t h = 0; h < j->kind.n_kv_heads; h += c->heads)
            for (uint32_t r = 0; r < s->n_rows; r += c->rows)
                j->pieces[j->n_pieces++] = (struct attend_piece){
                    .segment = segment,
                    .head0 = h,
                    .head1 = h + c->heads < j->kind.n_kv_heads ? h + c->heads : j->kind.n_kv_heads,
                    .block0 = b,
                    .block1 = b + c->blocks < s->n ? b + c->blocks : s->n,
                    .row0 = r,
                    .row1 = r + c->rows < s->n_rows ? r + c->rows : s->n_rows,
                };
    return 0;
}

/* Each member knows how many pieces it waits for. */
static void count_pieces(struct attend_job *j)
{
    for (uint32_t i = 0; i < j->n_pieces; i++) {
        const struct attend_piece *p = &j->pieces[i];
        const struct attend_segment *s = &j->segments[p->segment];
        uint32_t row = 0;

        for (uint32_t m = 0; m < s->n_members; m++) {
            struct attend_request *rq = j->members[j->order[s->member0 + m]];

            if (row < p->row1 && row + rq->n_rows > p->row0)
                rq->n_left++;
            row += rq->n_rows;
        }
    }
}

static int make_pieces(struct attend_job *j, double nsec_per_unit, uint64_t slice_usec)
{
    int r = 0;

    for (uint32_t i = 0; i < j->n_segments && r == 0; i++) {
        struct cut c = cut_of(j, &j->segments[i], nsec_per_unit, slice_usec);

        r = add_pieces(j, i, &c);
    }
    if (r == 0)
        count_pieces(j);
    j->n_left = j->n_pieces;
    return r;
}

/* ---- life ---- */

/* What each pays for: its rows' part of what it shares. And what it would have read by itself. */
static void share_costs(struct attend_job *j)
{
    const struct attend_kind *k = &j->kind;

    for (uint32_t i = 0; i < j->n_members; i++) {
        struct attend_request *rq = j->members[i];

        rq->n_together = j->n_members;
        rq->shared_cost = 0;
        j->wants_mass |= rq->block_lse != NULL;
    }
    for (uint32_t i = 0; i < j->n_segments; i++) {
        const struct attend_segment *s = &j->segments[i];
        double units = attend_units((uint64_t)s->n * k->space->block_tokens, k->n_kv_heads, s->n_rows, k->dim_k + k->params.dim_o);

        uint64_t bytes = 0;

        for (uint32_t b = s->block0; b < s->block0 + s->n; b++)
            if (j->blocks[b].payload)
                bytes += (uint64_t)(j->blocks[b].first ? k->part_first : k->part)->tile.bytes * k->n_kv_heads;
        for (uint32_t m = 0; m < s->n_members; m++) {
            struct attend_request *rq = j->members[j->order[s->member0 + m]];

            rq->shared_cost += units * rq->n_rows / s->n_rows;
            rq->needed_bytes += bytes;
        }
    }
}

static int make(struct attend_job *j, uint32_t n, double nsec_per_unit, uint64_t slice_usec)
{
    int r;

    j->order = malloc(n * sizeof(*j->order));
    j->segments = malloc(2 * (size_t)n * sizeof(*j->segments));
    j->head = malloc(j->kind.n_kv_heads * sizeof(*j->head));
    if (!j->order || !j->segments || !j->head)
        return -ENOMEM;
    for (uint32_t i = 0; i < n; i++)
        j->order[i] = i;
    add_segments(j, 0, n, 0);
    r = lease_all(j);
    if (r == 0)
        r = make_pieces(j, nsec_per_unit, slice_usec);
    if (r < 0)
        return r;
    share_costs(j);
    for (uint32_t i = 0; i < j->kind.n_kv_heads; i++)
        pthread_mutex_init(&j->head[i], NULL);
    j->ready = true;
    return 0;
}

int attend_job_create(struct attend_request **members, uint32_t n, double nsec_per_unit, uint64_t slice_usec,
                      struct attend_job **ret, uint32_t *ret_n)
{
    struct attend_tenant *t = members[0]->ring->tenant;
    struct attend_job *j;
    int r;

    n = choose_members(t, members, n);
    if (n == 0)
        return -EAGAIN;
    j = calloc(1, sizeof(*j));
    if (!j)
        return -ENOMEM;
    j->tenant = t;
    j->kind = members[0]->kind;
    j->n_members = n;
    memcpy(j->members, members, n * sizeof(*members));
    for (uint32_t i = 0; i < n; i++)
        j->n_rows[i] = members[i]->n_rows;
    r = make(j, n, nsec_per_unit, slice_usec);
    if (r < 0) {
        for (uint32_t i = 0; i < n; i++)
            members[i]->n_left = 0;
        attend_job_destroy(j);
        return r;
    }
    *ret = j;
    *ret_n = n;
    return 0;
}

struct attend_job *attend_job_destroy(struct attend_job *j)
{
    if (!j)
        return NULL;
    if (j->n_words)
        give_words(j);
    for (uint32_t i = 0; j->ready && i < j->kind.n_kv_heads; i++)
        pthread_mutex_destroy(&j->head[i]);
    free(j->head);
    free(j->order);
    free(j->segments);
    free(j->blocks);
    free(j->words);
    free(j->pieces);
    free(j);
    return NULL;
}
