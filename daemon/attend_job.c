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

/* Pieces are numbered and not listed: a request of a few megabytes may have a hundred millions of them. */

static uint32_t parts(uint32_t n, uint32_t each)
{
    return (n + each - 1) / each;
}

/* How a segment is cut: so that a piece takes about a slice. */
static void cut(const struct attend_job *j, struct attend_segment *s, double nsec_per_unit, uint64_t slice_usec)
{
    const struct attend_kind *k = &j->kind;
    uint32_t rows = parts(s->n_rows, parts(s->n_rows, ATTEND_ROWS_MAX)), heads = 1, blocks = s->n;
    double slice = (double)slice_usec * 1000,
           head = attend_units((uint64_t)s->n * k->space->block_tokens, 1, rows, k->dim_k + k->params.dim_o) * nsec_per_unit;

    if (head > slice) {
        double n = head / slice;

        blocks = parts(s->n, n < s->n ? (uint32_t)n + 1 : s->n);
    } else {
        heads = head * k->n_kv_heads <= slice ? k->n_kv_heads : (uint32_t)(slice / head);
    }
    s->piece_heads = heads;
    s->piece_blocks = blocks < ATTEND_PIECE_BLOCKS_MAX ? blocks : ATTEND_PIECE_BLOCKS_MAX;
    s->piece_rows = rows;
}

/* Pieces of a segment for one run of rows. */
static uint64_t runs_of(const struct attend_job *j, const struct attend_segment *s)
{
    return (uint64_t)parts(s->n, s->piece_blocks) * parts(j->kind.n_kv_heads, s->piece_heads);
}

/* How many of its pieces from number `from` on have some of the rows [row, row + n). */
static uint64_t pieces_of(const struct attend_job *j, const struct attend_segment *s, uint64_t from, uint32_t row, uint32_t n)
{
    uint32_t each = parts(s->n_rows, s->piece_rows), first = row / s->piece_rows, end = (row + n - 1) / s->piece_rows + 1;
    uint32_t at = (uint32_t)(from % each), begun = at < first ? end - first : at < end ? end - at : 0;

    return from < s->n_pieces ? (runs_of(j, s) - from / each - 1) * (end - first) + begun : 0;
}

static void make_pieces(struct attend_job *j, double nsec_per_unit, uint64_t slice_usec)
{
    for (uint32_t i = 0; i < j->n_segments; i++) {
        struct attend_segment *s = &j->segments[i];
        uint32_t row = 0;

        cut(j, s, nsec_per_unit, slice_usec);
        s->piece0 = j->n_pieces;
        s->n_pieces = runs_of(j, s) * parts(s->n_rows, s->piece_rows);
        j->n_pieces += s->n_pieces;
        for (uint32_t m = 0; m < s->n_members; m++) { /* each knows how many it waits for */
            struct attend_request *rq = j->members[j->order[s->member0 + m]];

            rq->n_left += pieces_of(j, s, 0, row, rq->n_rows);
            row += rq->n_rows;
        }
    }
    j->n_left = j->n_pieces;
}

struct attend_piece attend_job_next(struct attend_job *j)
{
    const struct attend_segment *s = &j->segments[j->next_segment];
    uint64_t n = j->next_piece++, run;
    uint32_t b, h, r;

    while (n - s->piece0 >= s->n_pieces) {
        j->next_segment++;
        s++;
    }
    n -= s->piece0;
    run = n / parts(s->n_rows, s->piece_rows);
    r = (uint32_t)(n % parts(s->n_rows, s->piece_rows)) * s->piece_rows; /* innermost: the codes are in the cache then */
    h = (uint32_t)(run % parts(j->kind.n_kv_heads, s->piece_heads)) * s->piece_heads;
    b = (uint32_t)(run / parts(j->kind.n_kv_heads, s->piece_heads)) * s->piece_blocks;
    return (struct attend_piece){
        .segment = j->next_segment,
        .head0 = h,
        .head1 = s->piece_heads < j->kind.n_kv_heads - h ? h + s->piece_heads : j->kind.n_kv_heads,
        .block0 = b,
        .block1 = s->piece_blocks < s->n - b ? b + s->piece_blocks : s->n,
        .row0 = r,
        .row1 = s->piece_rows < s->n_rows - r ? r + s->piece_rows : s->n_rows,
    };
}

void attend_job_skip(struct attend_job *j, const struct attend_piece *p)
{
    const struct attend_segment *s = &j->segments[p->segment];
    uint64_t from = j->next_piece - s->piece0;

    if (j->next_segment != p->segment || from >= s->n_pieces)
        return;
    for (int take = 0; take < 2; take++) {
        uint32_t row = 0;

        for (uint32_t m = 0; m < s->n_members; m++) {
            uint32_t number = j->order[s->member0 + m];
            uint64_t n = pieces_of(j, s, from, row, j->n_rows[number]);

            row += j->n_rows[number];
            if (n == 0) /* it may have been answered */
                continue;
            if (take)
                j->members[number]->n_left -= n;
            else if (!atomic_load_explicit(&j->members[number]->reason, memory_order_relaxed))
                return;
        }
    }
    j->n_left -= s->n_pieces - from;
    j->next_piece = s->piece0 + s->n_pieces;
}

/* ---- life ---- */

/* What each pays for: its rows' part of what it shares. And what it would have read by itself. */
static void share_costs(struct attend_job *j)
{
    const struct attend_kind *k = &j->kind;

    for (uint32_t i = 0; i < j->n_members; i++) {
        struct attend_request *rq = j->members[i];

        rq->n_together = j->n_members;
        rq->shared_cost = rq->read_cost;
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
    if (r < 0)
        return r;
    make_pieces(j, nsec_per_unit, slice_usec);
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
    free(j);
    return NULL;
}
