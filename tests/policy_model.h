/* The eviction policies again, written for reading and not for speed: queues are arrays that are shifted, counts are
 * counted. What check_policy compares the real ones with. */
#ifndef KVD_TESTS_POLICY_MODEL_H
#define KVD_TESTS_POLICY_MODEL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum model_state { MODEL_ABSENT, MODEL_EVICTABLE, MODEL_PARKED, MODEL_PENDING };

struct model_id {
    enum model_state state;
    int queue; /* 0 small (or LRU's only one), 1 main, 2 resting */
    unsigned freq;
    uint32_t fp;
};

struct model_list { /* [0] leaves first */
    uint32_t *v;
    size_t n;
};

struct model {
    bool s3;
    uint32_t n_max;
    struct model_id *ids;
    struct model_list q[3];
    struct model_list *ghost; /* a list of fingerprints for each bucket, and when each was added */
    struct model_list *ghost_when;
    uint32_t n_buckets, n_evicted;
};

void model_init(struct model *m, bool s3, uint32_t n_max);
void model_deinit(struct model *m);
void model_insert(struct model *m, uint32_t id, uint64_t key_hash);
void model_hit(struct model *m, uint32_t id);
void model_remove(struct model *m, uint32_t id);
void model_park(struct model *m, uint32_t id);
void model_unpark(struct model *m, uint32_t id);
bool model_victim(struct model *m, uint32_t *ret_id);
void model_evicted(struct model *m, uint32_t id);
void model_keep(struct model *m, uint32_t id);
uint32_t model_count(const struct model *m, enum model_state state);

#endif
