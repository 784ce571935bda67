/* A guest's work while it is moved: memory changes at a given rate, and a clock ticks over a TCP stream.
 *
 * moving HOST PORT MEGABYTES_PER_SECOND MEGABYTES
 *
 * Each tick is 24 bytes, little-endian: its number, this guest's monotonic clock in nanoseconds, and a sum over all
 * pages that were written last, so that a page that was lost on the way shows. Built by benches/migration.py. */

#include <arpa/inet.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, SLICE_NS = 5000000, TICK_NS = 2000000 };

static uint64_t *memory;
static size_t pages;
static double pages_per_slice;
static volatile uint64_t bad;

static uint64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + t.tv_nsec;
}

static void sleep_until(uint64_t when) {
    struct timespec t = { when / 1000000000u, when % 1000000000u };
    clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL);
}

/* Every page holds what its round and number say; each visit looks before it writes. */
static void *dirty(void *unused) {
    uint64_t round = 0, next = now();
    size_t at = 0;
    double owed = 0;
    (void)unused;
    for (;;) {
        for (owed += pages_per_slice; owed >= 1; owed -= 1) {
            uint64_t *page = memory + at * (PAGE / 8);
            uint64_t before = round ? (round << 32) ^ at : 0, after = ((round + 1) << 32) ^ at;
            if (page[0] != before || page[PAGE / 8 - 1] != before)
                bad++;
            for (size_t i = 0; i < PAGE / 8; i += 8)
                page[i] = after;
            page[PAGE / 8 - 1] = after;
            if (++at == pages) {
                at = 0;
                round++;
            }
        }
        next += SLICE_NS;
        if (next < now())
            next = now();
        sleep_until(next);
    }
}

int main(int argc, char **argv) {
    struct sockaddr_in to = { .sin_family = AF_INET };
    if (argc != 5)
        return 2;
    to.sin_port = htons(atoi(argv[2]));
    inet_pton(AF_INET, argv[1], &to.sin_addr);
    pages = (size_t)atol(argv[4]) << 8;
    pages_per_slice = atof(argv[3]) * 256 * SLICE_NS / 1e9;
    memory = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    int stream = socket(AF_INET, SOCK_STREAM, 0);
    if (memory == MAP_FAILED || connect(stream, (struct sockaddr *)&to, sizeof to)) {
        perror("moving");
        return 1;
    }
    pthread_t thread;
    pthread_create(&thread, NULL, dirty, NULL);
    uint64_t next = now();
    for (uint64_t tick = 0;; tick++) {
        uint64_t record[3] = { tick, now(), bad };
        if (write(stream, record, sizeof record) != sizeof record)
            return 0;
        next += TICK_NS;
        if (next < now())
            next = now();
        sleep_until(next);
    }
}
