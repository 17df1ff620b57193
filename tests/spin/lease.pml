/* Lease against eviction against death, on a machine with store buffers.
 *
 * A worker leases an entry of the mapped index without a system call; the daemon evicts and reuses entries without a
 * lock; each may die between any two instructions. This model is the protocol of proto/lookup.h (worker) and of the
 * cache in store/ (daemon):
 *
 *   worker                                     daemon
 *     1  g = gen: even, else miss                1  gen = g | 1
 *        key is the one wanted, else miss        2  full fence
 *     2  lease word = (entry, g)                 3  reads the lease words of all workers that it does not know dead
 *     3  full fence                                 one is (entry, g):  gen = g, the entry lives on
 *     4  gen is g still, else clears the            none:               writes the next payload, key, gen = g + 2
 *        word: miss
 *     5  reads the payload: the lease holds
 *     6  lease word = 0 (release)
 *
 * Memory: x86's total store order. A store goes into its processor's buffer (STORE_BUFFER deep, first in first out) and
 * reaches memory some time later, even if the process has been killed meanwhile; a full fence waits until the buffer is
 * empty. Loads read memory: nobody here loads a word that it stores itself, so there is nothing to forward.
 *
 * The first daemon may be killed anywhere: what it shared stays as it is, workers go on reading it, and attach to the
 * second daemon, which has memory of its own, whenever they notice.
 *
 * Checked (all runs are finite, so what holds at their end is reached always):
 *   L1  No store to a payload reaches memory while a living worker holds a lease on it.
 *   L2  A worker that holds a lease reads the payload of the key that it wanted, all of it, and twice the same.
 *   L3  When all workers are dead or done, the entry can be evicted: no lease outlives its worker.
 *   L4  Nobody waits for ever: every end is a proper one.
 *
 * Each of these switches breaks the protocol at one place; every one must lead to an error (tests/test_spin.sh):
 *   NO_FENCE_WORKER NO_FENCE_DAEMON NO_RECHECK NO_KEY_CHECK EARLY_RELEASE NO_SCAN NO_HANGUP KEY_AFTER_GEN
 * These show that the interesting states are reached, by an error there: a lease from the second daemon, a lease that
 * stops an eviction:
 *   REACH_LEASE REACH_KEPT */

#ifndef WORKERS
#define WORKERS 1 /* or 2 */
#endif
#ifndef TRIES
#define TRIES 2 /* leases that each worker asks for */
#endif
#ifndef EVICTIONS
#define EVICTIONS 2 /* that each daemon tries before the last one */
#endif
#ifndef STORE_BUFFER
#define STORE_BUFFER 2
#endif

/* RESTART: the first daemon may be killed too. */

/* Shared words of one daemon: one entry with its payload of two words, and a page with one lease word for each worker.
 * A payload's words say which key they belong to. */
#define GEN 0
#define KEY 1
#define PAY0 2
#define PAY1 3
#define LEASE 4
#define WORDS (LEASE + WORKERS)
#define AT(daemon, word) ((daemon) * WORDS + (word))

byte mem[2 * WORDS];

/* The first processors run a worker each, the last two the daemons. */
#define CPU_DAEMON WORKERS
chan buffer[WORKERS + 2] = [STORE_BUFFER] of { byte, byte };

#define STORE(cpu, daemon, word, value) buffer[cpu] ! AT(daemon, word), value
#define FENCE(cpu) empty(buffer[cpu])

/* What the model knows and the processes do not. */
bool dead[WORKERS];  /* killed */
bool done[WORKERS];  /* will not touch memory again: dead or at its end */
byte holds[WORKERS]; /* 1 + daemon whose entry it holds a lease on; 0: none */
bool daemon_dead;    /* the first one */
bool second_up;

#define HELD_BY(w, daemon) (holds[w] == 1 + (daemon) && !dead[w])
#if WORKERS == 2
#define HELD(daemon) (HELD_BY(0, daemon) || HELD_BY(1, daemon))
#define ALL_QUIET (done[0] && done[1] && empty(buffer[0]) && empty(buffer[1]))
#else
#define HELD(daemon) HELD_BY(0, daemon)
#define ALL_QUIET (done[0] && empty(buffer[0]))
#endif

proctype processor(byte cpu)
{
    byte at, value;

end:
    do
    :: atomic {
           buffer[cpu] ? at, value ->
           assert(!((at == AT(0, PAY0) || at == AT(0, PAY1)) && HELD(0))); /* L1 */
           assert(!((at == AT(1, PAY0) || at == AT(1, PAY1)) && HELD(1)));
           mem[at] = value;
           at = 0;
           value = 0
       }
    od
}

proctype worker(byte w)
{
    byte n, daemon, want, g;

    {
        do
        :: n < TRIES ->
            atomic {
                n++;
                if /* notices that the daemon is gone, now or later */
                :: daemon == 0 && second_up -> daemon = 1
                :: true
                fi;
                if
                :: want = 1
                :: want = 2
                fi
            };
            g = mem[AT(daemon, GEN)];
            if
            :: g % 2 == 1 || g == 0 -> goto next
            :: else
            fi;
#ifndef NO_KEY_CHECK
            if
            :: mem[AT(daemon, KEY)] != want -> goto next
            :: else
            fi;
#endif
            STORE(w, daemon, LEASE + w, g);
#ifndef NO_FENCE_WORKER
            FENCE(w);
#endif
            if
#ifndef NO_RECHECK
            :: atomic { mem[AT(daemon, GEN)] == g -> holds[w] = 1 + daemon };
#else
            :: atomic { true -> holds[w] = 1 + daemon };
#endif
#ifdef EARLY_RELEASE
                STORE(w, daemon, LEASE + w, 0);
#endif
#ifdef REACH_LEASE
                assert(daemon == 0);
#endif
                assert(mem[AT(daemon, PAY0)] == want); /* L2 */
                assert(mem[AT(daemon, PAY1)] == want);
                assert(mem[AT(daemon, PAY0)] == want);
                holds[w] = 0
            :: else
            fi;
            STORE(w, daemon, LEASE + w, 0);
next:
            atomic {
                g = 0;
                want = 0
            }
        :: else -> break
        od
    } unless { dead[w] };
    atomic { /* nothing that is not needed tells two states apart */
        holds[w] = 0;
        n = 0;
        daemon = 0;
        want = 0;
        g = 0;
        done[w] = true
    }
}

/* One eviction of the entry whose generation is g; then its reuse for the other key. */
inline evict()
{
    STORE(cpu, self, GEN, g + 1);
#ifndef NO_FENCE_DAEMON
    FENCE(cpu);
#endif
    found = false;
#ifndef NO_SCAN
    found = found || (!gone[0] && mem[AT(self, LEASE + 0)] == g);
#if WORKERS == 2
    found = found || (!gone[1] && mem[AT(self, LEASE + 1)] == g);
#endif
#endif
    if
    :: found ->
#ifdef REACH_KEPT
        assert(false);
#endif
        STORE(cpu, self, GEN, g)
    :: else ->
        atomic {
            key = 3 - key;
            found = false
        };
        publish()
    fi
}

inline publish()
{
    STORE(cpu, self, PAY0, key);
    STORE(cpu, self, PAY1, key);
#ifdef KEY_AFTER_GEN
    STORE(cpu, self, GEN, g + 2);
    STORE(cpu, self, KEY, key);
#else
    STORE(cpu, self, KEY, key);
    STORE(cpu, self, GEN, g + 2);
#endif
    g = g + 2
}

/* The hang-up of a worker may be noticed at any time after its death. */
inline notice()
{
    atomic {
#ifndef NO_HANGUP
        if
        :: dead[0] -> gone[0] = true
        :: true
        fi;
#if WORKERS == 2
        if
        :: dead[1] -> gone[1] = true
        :: true
        fi;
#endif
        skip
#else
        skip
#endif
    }
}

proctype daemon(byte self)
{
    byte cpu, n, g, key = 1;
    bool found, gone[WORKERS];

    {
        cpu = CPU_DAEMON + self;
        publish();
        do
        :: n < EVICTIONS ->
            n++;
            notice();
            evict()
        :: else -> break
        od;
        /* The end: the hang-ups have arrived and what was stored has reached memory. */
        atomic {
            ALL_QUIET;
#ifndef NO_HANGUP
            gone[0] = dead[0];
#if WORKERS == 2
            gone[1] = dead[1];
#endif
#endif
            n = g
        };
        evict();
        assert(g == n + 2) /* L3 */
    } unless { self == 0 && daemon_dead };
    atomic {
        n = 0;
        g = 0;
        key = 0;
        found = false;
        gone[0] = false;
#if WORKERS == 2
        gone[1] = false;
#endif
        if
        :: self == 0 && daemon_dead ->
            second_up = true;
            run daemon(1)
        :: else
        fi
    }
}

/* Kills any of them, or none, at any time. */
proctype fate()
{
    do
    :: atomic { !dead[0] && !done[0] -> dead[0] = true }
#if WORKERS == 2
    :: atomic { !dead[1] && !done[1] -> dead[1] = true }
#endif
#ifdef RESTART
    :: atomic { !daemon_dead -> daemon_dead = true }
#endif
    :: break
    od
}

init {
    atomic {
        byte i;

        for (i : 0 .. WORKERS - 1) {
            run processor(i);
            run worker(i)
        }
        run processor(CPU_DAEMON);
#ifdef RESTART
        run processor(CPU_DAEMON + 1);
#endif
        run daemon(0);
        run fate()
    }
}
