/* Framing of the attach socket (SOCK_SEQPACKET, one frame a packet, descriptors beside it by SCM_RIGHTS).
 *
 * | offset | bytes | field      | meaning                                                                       |
 * |      0 |     4 | magic      | "KVD1" (0x3144564b)                                                           |
 * |      4 |     2 | version    | 1                                                                             |
 * |      6 |     2 | type       | enum frame_type; a reply has FRAME_REPLY set, an error reply is FRAME_ERROR   |
 * |      8 |     4 | request_id | chosen by the asker, not 0; the reply repeats it                              |
 * |     12 |     4 | length     | bytes of the body that follows                                                |
 * |     16 |     2 | n_fds      | descriptors that came with it                                                 |
 * |     18 |     2 | flags      | zero; a receiver refuses bits that it does not know                           |
 * |     20 |     4 | reserved   | zero                                                                          |
 * Little-endian. The body is a protobuf message of kvd.proto: the one that the type names.
 * A packet that is short, long, of another version or with another number of descriptors than n_fds says is refused whole;
 * its descriptors are closed.
 *
 * Any thread. Includes: the C library only. */
#ifndef KVD_PROTO_FRAME_H
#define KVD_PROTO_FRAME_H

#include <assert.h>
#include <stddef.h>
#include <stdint.h>

#define FRAME_MAGIC 0x3144564bu
#define FRAME_VERSION 1u
#define FRAME_HEADER_BYTES 24u
#define FRAME_BODY_MAX (96u * 1024u)
#define FRAME_MAX (FRAME_HEADER_BYTES + FRAME_BODY_MAX)
#define FRAME_FDS_MAX 4u
#define FRAME_REPLY 0x8000u

enum frame_type {
    FRAME_HELLO = 1,
    FRAME_PING = 2,
    FRAME_SPACE_OPEN = 3,
    FRAME_SPACE_CLOSE = 4,
    FRAME_SLAB_GET = 5,
    FRAME_STAGING_ADD = 6,
    FRAME_STAGING_DROP = 7,
    FRAME_PUBLISH = 8,
    FRAME_FLIGHT_BEGIN = 9,
    FRAME_FLIGHT_WAIT = 10,
    FRAME_FLIGHT_END = 11,
    FRAME_ATTEND_ADD = 12,
    /* admin */
    FRAME_STATS = 32,
    FRAME_LIST = 33,
    FRAME_SHOW = 34,
    FRAME_EVICT = 35,
    FRAME_PIN = 36,
    FRAME_VERIFY = 37,
    FRAME_DRAIN = 38,
    FRAME_CONFIG = 39,
    FRAME_ERROR = 0x7fff, /* with FRAME_REPLY: body is kvd.v1.Error */
};

struct frame_header {
    uint32_t magic;
    uint16_t version;
    uint16_t type;
    uint32_t request_id;
    uint32_t length;
    uint16_t n_fds;
    uint16_t flags;
    uint32_t reserved;
};
static_assert(sizeof(struct frame_header) == FRAME_HEADER_BYTES, "frame header");

/* Writes the header's wire bytes. */
void frame_header_pack(uint8_t wire[FRAME_HEADER_BYTES], uint16_t type, uint32_t request_id, uint32_t length,
                       uint16_t n_fds);

/* Checks a whole packet of n bytes that came with n_fds descriptors. ret_body points into packet.
 * Errors: -EBADMSG with ret_reason (a constant string: what was wrong and what is allowed), -EPROTONOSUPPORT (version);
 * on -EPROTONOSUPPORT and later errors ret_header is filled as far as it could be read so that the asker can be answered. */
int frame_parse(const uint8_t *packet, size_t n, size_t n_fds, struct frame_header *ret_header,
                const uint8_t **ret_body, const char **ret_reason);

/* Sends header and body as one packet with n_fds descriptors (kept by the caller), never raising SIGPIPE.
 * flags: MSG_DONTWAIT or 0. Errors: -errno of sendmsg (-EAGAIN: nothing was sent), -EMSGSIZE, -EINVAL (too many descriptors). */
int frame_send(int fd, uint16_t type, uint32_t request_id, const void *body, size_t n, const int *fds, size_t n_fds,
               int flags);

/* Receives one packet into buf (FRAME_MAX bytes are enough). ret_fds has room for FRAME_FDS_MAX, close-on-exec, owned by the
 * caller. ret_n is 0 at the end of the stream, and for an empty packet, whose descriptors are closed. Errors: -errno of recvmsg; -EMSGSIZE (packet or descriptors cut: what did arrive
 * is closed). Retries EINTR. */
int frame_recv(int fd, uint8_t *buf, size_t buf_bytes, int flags, size_t *ret_n, int ret_fds[FRAME_FDS_MAX],
               size_t *ret_n_fds);

#endif
