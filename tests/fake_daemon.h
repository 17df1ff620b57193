/* A daemon's outside: a thread that speaks the attach socket's protocol over an index and slabs that the test made
 * by hand, tells the truth or lies as told, and dies when told. What libkvd does can be tested with it without any
 * of the real daemon's policy, and in states that the real one never shows.
 *
 * A fake serves one tenant. fake_add() and fake_retire() are called by the test while no publish runs (the index has
 * one writer at a time). Failures of the fake itself end the test. */
#ifndef KVD_TESTS_FAKE_DAEMON_H
#define KVD_TESTS_FAKE_DAEMON_H

#include <stdbool.h>
#include <stdint.h>

#include "proto/frame.h"
#include "store/index.h"

enum fake_lie {
    FAKE_HONEST = 0,
    FAKE_SILENT,       /* no reply */
    FAKE_HANGUP,       /* closes the connection */
    FAKE_GARBAGE,      /* a packet of random bytes */
    FAKE_SHORT_FRAME,  /* half a header */
    FAKE_WRONG_TYPE,   /* reply to another request type */
    FAKE_WRONG_ID,     /* reply to a request that nobody made, then silence */
    FAKE_BROKEN_BODY,  /* a body that is no message */
    FAKE_EXTRA_FD,     /* one descriptor too many */
    FAKE_NO_FDS,       /* none where some are due */
    FAKE_ERROR,        /* KVD_E_DRAINING with a reason */
    FAKE_ERROR_EMPTY,  /* an error without a code */
    FAKE_UNSEALED,     /* descriptors of memory that may shrink */
    FAKE_SHORT_MEMORY, /* announces more bytes than the memory has */
    FAKE_BAD_INDEX,    /* an index whose header lies about its sizes */
    FAKE_BAD_PAGE,     /* the same for the page */
    FAKE_OLD_VERSION,  /* another version of the messages */
    FAKE_LIES
};

struct fake_options {
    const char *socket_path;
    uint32_t n_entries;          /* 0: 4096 */
    uint32_t n_leases;           /* of a page; 0: 1024 */
    uint64_t slab_bytes;         /* 0: 4 MiB */
    uint32_t publish_max_blocks; /* 0: 64 */
    uint64_t staging_max_bytes;  /* 0: 64 MiB */
};

struct fake;

struct fake *fake_start(const struct fake_options *options);
/* graceful: marks the index closed first; else the thread just ends, as if killed. */
struct fake *fake_stop(struct fake *fake, bool graceful);

/* How requests of this type are answered from now on. */
void fake_lie(struct fake *fake, enum frame_type type, enum fake_lie lie);
/* Requests of this type seen so far. */
uint64_t fake_count(const struct fake *fake, enum frame_type type);
/* Delay of replies to this type. */
void fake_delay(struct fake *fake, enum frame_type type, unsigned msec);

/* The id that the only space opened so far has: 1. */
enum { FAKE_SPACE = 1 };

/* Puts a payload of n bytes under key; returns the entry. crc 0: the right one. */
uint32_t fake_add(struct fake *fake, const uint8_t key[32], uint8_t group, uint8_t flags, const void *payload,
                  uint32_t n, uint32_t crc);
/* Retires an entry by the daemon's protocol. False: some worker holds it, nothing was changed. */
bool fake_retire(struct fake *fake, uint32_t entry);
/* Words in use in all lease tables. */
uint64_t fake_leases(struct fake *fake);
/* Sum of the pages' hit logs. */
uint64_t fake_logged(struct fake *fake);
/* Cuts all workers off, as the daemon does: revoked, and the connection closed. */
void fake_revoke(struct fake *fake);
/* Retires a slab's number and gives it to fresh memory (its blocks must be gone). */
void fake_replace_slab(struct fake *fake, uint32_t slab);
struct index *fake_index(struct fake *fake);

#endif
