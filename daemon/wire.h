/* Messages out of frames, without an allocation a message.
 *
 * One region, taken once, holds the message that is being handled: wire_unpack() forgets the one before. So what a frame can make
 * the daemon allocate is bounded by the region (rule I7), and by nothing that the frame says.
 *
 * Loop thread only. Includes: protobuf-c. */
#ifndef KVD_DAEMON_WIRE_H
#define KVD_DAEMON_WIRE_H

#include <stddef.h>
#include <stdint.h>

#include <protobuf-c/protobuf-c.h>

/* A frame's body of 96 KiB that is nothing but empty sub-messages, 2 bytes each, becomes about 8 MiB. */
#define WIRE_BYTES (UINT64_C(16) << 20)

struct wire {
    ProtobufCAllocator allocator;
    uint8_t *base;
    size_t used, high;
};

/* -ENOMEM. The region is address space until it is used. */
int wire_init(struct wire *wire);
void wire_deinit(struct wire *wire);

/* The message, valid until the next call. NULL: not a message of this type. */
void *wire_unpack(struct wire *wire, const ProtobufCMessageDescriptor *type, const uint8_t *body, size_t n);

#endif
