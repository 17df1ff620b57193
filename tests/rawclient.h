/* The attach socket by hand: for tests that say what libkvd never would. Blocking, with a timeout of 10 s a reply. */
#ifndef KVD_TESTS_RAWCLIENT_H
#define KVD_TESTS_RAWCLIENT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "proto/frame.h"
#include "proto/kvd.pb-c.h"
#include "proto/lookup.h"

struct raw_reply {
    uint16_t type;      /* FRAME_ERROR: error says why */
    uint32_t request_id;
    uint8_t body[FRAME_BODY_MAX];
    size_t n;
    int fds[FRAME_FDS_MAX];
    size_t n_fds;
    uint32_t error;     /* enum kvd_error; 0 if this is no error reply */
    char reason[512];   /* "reason; allowed" */
};

struct raw {
    int fd;
    uint32_t next_id;
    struct raw_reply reply;  /* the last one */
    int page_fd, index_fd;   /* after raw_hello() */
    uint64_t page_bytes, index_bytes, worker;
    void *page, *index;      /* mapped: page writable, index read-only */
    struct lookup_view view;
};

/* Nothing is open: raw_close() is right from here on. */
void raw_init(struct raw *r);
/* Connects only. Returns 0 or -errno. */
int raw_connect(struct raw *r, const char *path);
void raw_close(struct raw *r);
/* Sends one frame, borrowed descriptors. -errno. */
int raw_send(struct raw *r, uint16_t type, const void *body, size_t n, const int *fds, size_t n_fds);
/* Any bytes as one packet. */
int raw_send_bytes(struct raw *r, const void *bytes, size_t n, const int *fds, size_t n_fds);
/* Next frame from the daemon. 1: got one; 0: the daemon has closed; -ETIMEDOUT. */
int raw_receive(struct raw *r);
/* Sends a message and awaits its reply. Returns as raw_receive(). */
int raw_ask(struct raw *r, uint16_t type, const ProtobufCMessage *message, const int *fds, size_t n_fds);
/* Attaches as an ordinary worker and maps what it is given. Returns 0, or the error code of the refusal. */
int raw_hello(struct raw *r, const char *name);
/* Opens a small space (model names it): 1 layer, 1 head, dim 64, blocks of 16, raw. Returns its id, 0 on an error. */
uint32_t raw_space(struct raw *r, const char *model, uint8_t ret_fingerprint[32]);
/* A sealed memfd of bytes, mapped at *ret_map unless NULL. */
int raw_memfd(uint64_t bytes, unsigned seals, void **ret_map);
/* Adds it as staging. Returns the staging's id, or 0 on an error. */
uint32_t raw_staging(struct raw *r, int fd, uint64_t bytes);
/* Publishes one block of the small space at an offset of the staging. Returns its status, or -error of the whole request. */
int raw_publish(struct raw *r, uint32_t space, uint32_t staging, const uint8_t *parent, size_t n_parent,
                const uint32_t *tokens, size_t n_tokens, uint64_t offset);

enum { RAW_BLOCK_TOKENS = 16, RAW_BLOCK_BYTES = 2 * 16 * 64 * 2 };

#endif
