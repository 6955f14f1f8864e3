/* Names the CPUs on which products of tiles run fastest just now.
 *
 *     cc -O2 -march=sapphirerapids -o probe probe.c
 *     ./probe 2          writes e.g. 3,11 to stdout, and all CPUs' TFLOP/s to stderr
 *
 * A virtual machine does not see who has the other thread of a core. While that is busy, a loop over tile
 * products takes twice the time. Linux and AMX-BF16; takes a tenth of a second a CPU.
 */

#define _GNU_SOURCE
#include <immintrin.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { MAX_CPUS = 1024, ROUNDS = 3, PRODUCTS = 1000 };

struct shapes {
    unsigned char palette, start_row, reserved[14];
    unsigned short row_bytes[16];
    unsigned char n_rows[16];
} __attribute__((aligned(64)));

static unsigned char tiles[3][1024] __attribute__((aligned(64)));

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

/* TFLOP/s of a CPU, 0 where this process may not run on it. */
static double rate(int cpu) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    if (sched_setaffinity(0, sizeof set, &set) != 0)
        return 0;
    struct shapes shapes = {.palette = 1};
    for (int i = 0; i < 4; i++) {
        shapes.row_bytes[i] = 64;
        shapes.n_rows[i] = 16;
    }
    _tile_loadconfig(&shapes);
    _tile_zero(0);
    _tile_zero(1);
    double begun = seconds(), taken;
    long n = 0;
    do {
        for (int i = 0; i < PRODUCTS; i += 2) {
            _tile_loadd(2, tiles[0], 64);
            _tile_loadd(3, tiles[1], 64);
            _tile_dpbf16ps(0, 2, 3);
            _tile_zero(3);
            _tile_loadd(3, tiles[2], 64);
            _tile_dpbf16ps(1, 2, 3);
            _tile_zero(2);
            _tile_zero(3);
        }
        n += PRODUCTS;
        taken = seconds() - begun;
    } while (taken < 0.03);
    _tile_release();
    return n * (2.0 * 16 * 16 * 32) / taken / 1e12;
}

int main(int argc, char **argv) {
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    int n_wanted = argc > 1 ? atoi(argv[1]) : 2;
    int n_cpus = sysconf(_SC_NPROCESSORS_CONF);
    if (n_cpus > MAX_CPUS)
        n_cpus = MAX_CPUS;
    if (syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) != 0) {
        fprintf(stderr, "no AMX here\n");
        return 1;
    }
    static double least[MAX_CPUS];
    for (int round = 0; round < ROUNDS; round++)
        for (int cpu = 0; cpu < n_cpus; cpu++) {
            double now = rate(cpu);
            if (round == 0 || now < least[cpu])
                least[cpu] = now;
        }
    for (int i = 0; i < n_cpus; i++) {
        int best = 0;
        for (int cpu = 1; cpu < n_cpus; cpu++)
            if (least[cpu] > least[best])
                best = cpu;
        if (least[best] <= 0)
            break;
        if (i < n_wanted)
            printf(i == 0 ? "%d" : ",%d", best);
        fprintf(stderr, "%d: %.2f  ", best, least[best]);
        least[best] = 0;
    }
    printf("\n");
    fprintf(stderr, "TFLOP/s\n");
    return 0;
}
