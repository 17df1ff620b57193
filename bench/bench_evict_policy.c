/* What one turn of a full cache costs in the eviction policy: victim, evicted, insert of a new id, park and unpark of a
 * parent, and a hit on a random id, by the number of ids. The limit is what the machine takes for the random cache
 * lines that a turn cannot do without: the node of the hit id, the victim's, its neighbour's, and the ghost's bucket at
 * evicted() and at insert(). Small tables lie in the processor's caches, where that limit is next to nothing and the
 * instructions themselves count. */
#include "bench/bench.h"
#include "store/policy.h"

#define TURN_LINES 5.0

static void measure(const struct policy_ops *ops, uint32_t n, size_t n_turns)
{
    size_t bytes = (size_t)n * POLICY_BYTES_PER_ID + 4096;
    void *lines = bench_alloc(bytes);
    uint64_t rng = 1, serial, begun, steps;
    double ns, line_ns;
    struct policy *p;
    char name[64];
    uint32_t v;

    memset(lines, 0, bytes);
    if (ops->create(n, &p) < 0) {
        fprintf(stderr, "bench_evict_policy: no memory for %u ids\n", n);
        exit(1);
    }
    for (serial = 0; serial < n; serial++) {
        uint64_t key = serial;

        ops->insert(p, (uint32_t)serial, bench_random(&key));
    }
    for (uint32_t i = 0; i < n; i++) /* out of the order of ids, as after a long life */
        ops->hit(p, (uint32_t)(bench_random(&rng) % n));
    for (int measured = 0; measured < 2; measured++) {
        size_t turns = measured ? n_turns : n; /* every id has been replaced about once before */

        begun = bench_nsec();
        steps = p->n_steps;
        for (size_t i = 0; i < turns; i++) {
            uint64_t key = serial++;

            if (ops->victim(p, &v) < 0)
                abort();
            ops->evicted(p, v);
            ops->insert(p, v, bench_random(&key));
            ops->park(p, v);
            ops->unpark(p, v);
            ops->hit(p, (uint32_t)(bench_random(&rng) % n));
        }
        ns = (double)(bench_nsec() - begun) / (double)turns;
        steps = p->n_steps - steps;
    }
    line_ns = bench_random_lines(lines, bytes, 1000000, 1, 3);
    snprintf(name, sizeof(name), "%s ids=%u", ops->name, n);
    bench_line("evict_policy", name, ns, "ns", TURN_LINES * line_ns,
               "five dependent random lines of the same memory, at most 1 where it is larger than the caches");
    snprintf(name, sizeof(name), "%s ids=%u steps", ops->name, n);
    bench_line("evict_policy", name, (double)steps / (double)n_turns, "steps", 6.0 * POLICY_STEPS_PER_CALL,
               "the bound for the calls of a turn, at most 1");
    ops->destroy(p);
    free(lines);
}

int main(void)
{
    const struct policy_ops *ops;

    for (size_t i = 0; (ops = policy_at(i)); i++)
        for (uint32_t n = 10000; n <= 10000000; n *= 10)
            measure(ops, n, 1000000);
    return 0;
}
