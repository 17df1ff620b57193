/* Free words of the worker's lease table: a lock-free stack in private memory.
 *
 *   head  | 32 bits: changes | 32 bits: first free word + 1, 0 = none |        next[i]: the word below word i, + 1
 *
 * A run of words is taken and given with one compare-and-swap. The count of changes in the head makes a swap fail if
 * anybody took or gave in between (a word that left and came back would else be taken with a stale next). 2^32
 * changes within one reader's few instructions are not possible.
 *
 * Any thread, no system call, never waits for another thread that was stopped. */
#ifndef KVD_LEASE_H
#define KVD_LEASE_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

struct lease_stack {
    _Atomic uint64_t head;
    _Atomic uint32_t *next;
    uint32_t n;
};

/* KVD_OK or KVD_E_NOMEM; all n words are free. */
int lease_stack_init(struct lease_stack *stack, uint32_t n);
void lease_stack_deinit(struct lease_stack *stack);

/* Takes up to n words into ret_words; returns how many. */
size_t lease_take(struct lease_stack *stack, uint32_t *ret_words, size_t n);
/* Gives n words back. */
void lease_give(struct lease_stack *stack, const uint32_t *words, size_t n);

#endif
