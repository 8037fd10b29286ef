/* A link between two network namespaces: delay, rate and loss, for kernels without netem.
 *
 *     link NAMESPACE_A NAMESPACE_B ROUND_TRIP_MS MBIT_PER_S LOSS_PERCENT
 *
 * Makes a TUN device "link0" in each namespace and carries packets between them: each direction serialises at the
 * rate, keeps a tail-drop queue of one bandwidth-delay product (at least 200 packets), loses packets at random, and
 * delivers after half the round trip. Real TCP of the kernel runs over it. Ends on SIGTERM.
 *
 * A wire does not wait for a core: it runs at real-time priority, else a busy machine makes it slower than it says. It
 * looks once every TICK (a wake-up for each packet would cost a whole core); a packet counts as come, and as due, in the
 * middle of a tick, so that the delay is right in the mean.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <poll.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

#define SLOTS 65536
#define TICK 250000LL /* ns */
#define IDLE 100000000LL
#define LARGEST 1600

struct packet { int64_t due; int length; char data[LARGEST]; };
struct direction { struct packet *ring; unsigned head, tail; int64_t free_at; };

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static int tun_in(const char *name) {
    char path[256];
    snprintf(path, sizeof path, "/run/netns/%s", name);
    int space = open(path, O_RDONLY), tun;
    struct ifreq request = {.ifr_flags = IFF_TUN | IFF_NO_PI};
    strcpy(request.ifr_name, "link0");
    if (space < 0 || setns(space, CLONE_NEWNET) || (tun = open("/dev/net/tun", O_RDWR | O_NONBLOCK)) < 0 ||
        ioctl(tun, TUNSETIFF, &request)) {
        perror(name);
        exit(1);
    }
    close(space);
    return tun;
}

int main(int count, char **words) {
    if (count != 6) return 2;
    int tun[2] = {tun_in(words[1]), tun_in(words[2])};
    int64_t delay = atof(words[3]) * 1e6 / 2;
    double ns_per_byte = 8e3 / atof(words[4]);
    double loss = atof(words[5]) / 100;
    int64_t deepest = 2 * delay > 200 * 1500 * ns_per_byte ? 2 * delay : 200 * 1500 * ns_per_byte;
    struct direction way[2];
    memset(way, 0, sizeof way);
    for (int i = 0; i < 2; i++) way[i].ring = malloc(sizeof(struct packet) * SLOTS);
    srand48(1);
    struct sched_param first = {.sched_priority = 10};
    if (sched_setscheduler(0, SCHED_FIFO, &first)) perror("real-time priority");
    puts("ready");
    fflush(stdout);
    for (;;) {
        int64_t now = now_ns(), middle = TICK / 2, next = now + 10 * IDLE;
        for (int i = 0; i < 2; i++) {
            struct direction *d = &way[i];
            for (int n = 0; n < 256; n++) { /* take what came in */
                unsigned following = (d->head + 1) % SLOTS;
                struct packet *p = &d->ring[d->head];
                int length = read(tun[i], p->data, LARGEST);
                if (length <= 0) break;
                if (drand48() < loss || following == d->tail) continue;
                if (d->free_at < now - middle) d->free_at = now - middle;
                if (d->free_at - (now - middle) > deepest) continue; /* the queue is full */
                d->free_at += length * ns_per_byte;
                p->due = d->free_at + delay;
                p->length = length;
                d->head = following;
            }
            while (d->tail != d->head && d->ring[d->tail].due <= now + middle) { /* deliver what is due */
                struct packet *p = &d->ring[d->tail];
                if (write(tun[1 - i], p->data, p->length) < 0) { /* the receiver's queue is full: lost */ }
                d->tail = (d->tail + 1) % SLOTS;
            }
            if (d->tail != d->head && d->ring[d->tail].due < next) next = d->ring[d->tail].due;
        }
        if (next - now > IDLE) {
            struct pollfd polled[2] = {{tun[0], POLLIN, 0}, {tun[1], POLLIN, 0}};
            poll(polled, 2, IDLE / 1000000);
        } else {
            struct timespec tick = {0, TICK};
            nanosleep(&tick, NULL);
        }
    }
}
