#include "kvd_lease.h"

#include <stdlib.h>

#include "kvd.h"

static uint64_t successor(uint64_t head, uint32_t first)
{
    return ((head >> 32) + 1) << 32 | first;
}

int lease_stack_init(struct lease_stack *stack, uint32_t n)
{
    stack->next = calloc(n ? n : 1, sizeof(*stack->next));
    if (!stack->next)
        return KVD_E_NOMEM;
    stack->n = n;
    /* Word 0 on top: leases fill the table from its start, which the daemon reads most often. */
    for (uint32_t i = 0; i < n; i++)
        atomic_init(&stack->next[i], i + 1 < n ? i + 2 : 0);
    atomic_init(&stack->head, n ? 1 : 0);
    return 0;
}

void lease_stack_deinit(struct lease_stack *stack)
{
    free((void *)stack->next);
    *stack = (struct lease_stack){0};
}

size_t lease_take(struct lease_stack *stack, uint32_t *ret_words, size_t n)
{
    /* acquire: the next words of who gave them (release in lease_give()). */
    uint64_t head = atomic_load_explicit(&stack->head, memory_order_acquire);
    size_t got;

    do {
        uint32_t word = (uint32_t)head;

        for (got = 0; got < n && word != 0; got++) {
            ret_words[got] = word - 1;
            /* May be of a later state: then the swap fails. */
            word = atomic_load_explicit(&stack->next[word - 1], memory_order_relaxed);
        }
        if (got == 0)
            return 0;
        if (atomic_compare_exchange_weak_explicit(&stack->head, &head, successor(head, word), memory_order_acquire,
                                                  memory_order_acquire))
            return got;
    } while (1);
}

void lease_give(struct lease_stack *stack, const uint32_t *words, size_t n)
{
    uint64_t head = atomic_load_explicit(&stack->head, memory_order_relaxed);

    if (n == 0)
        return;
    for (size_t i = 0; i + 1 < n; i++)
        atomic_store_explicit(&stack->next[words[i]], words[i + 1] + 1, memory_order_relaxed);
    do
        atomic_store_explicit(&stack->next[words[n - 1]], (uint32_t)head, memory_order_relaxed);
    while (!atomic_compare_exchange_weak_explicit(&stack->head, &head, successor(head, words[0] + 1),
                                                  memory_order_release, memory_order_relaxed));
}
