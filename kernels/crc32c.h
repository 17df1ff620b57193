/* CRC32C (Castagnoli, reflected polynomial 0x82f63b78, initial value and final xor all ones), as iSCSI and ext4 use it:
 * crc of "123456789" is 0xe3069283.
 *
 * Incremental: crc(crc(0, a), b) = crc(0, a then b). The bytes may change meanwhile (shared memory): then the result is the
 * CRC of some mix. Any thread, no state. */
#ifndef KVD_KERNELS_CRC32C_H
#define KVD_KERNELS_CRC32C_H

#include <stddef.h>
#include <stdint.h>

#include "kernels/cpu.h"

typedef uint32_t (*crc32c_fn)(uint32_t crc, const void *data, size_t n);

/* The fastest for these features; NULL: the table. */
crc32c_fn crc32c_choose(const struct cpu_features *cpu);

uint32_t crc32c_table(uint32_t crc, const void *data, size_t n);
uint32_t crc32c_sse42(uint32_t crc, const void *data, size_t n); /* needs sse42 and pclmul */

#endif
