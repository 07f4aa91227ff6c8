/* A plugin of QEMU that counts the instructions of the emulated program. It is written to version 1
   of the plugin API, that of QEMU 7.2; a release that has another one says so and loads nothing.

   The program marks a place by the system call getpriority(MARK, number), which does nothing else
   of use; at each mark the count so far is printed on stderr. With the argument out=FILE it goes
   there instead, and so does the count at each reading of the clock, with this machine's
   nanoseconds: a runtime that times its operators reads the clock around each of them. The
   prototypes are those of qemu-plugin.h, which distributions do not package. */
#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#define MARK 0x4d41524b
#define GETPRIORITY 141 /* aarch64 */
#define CLOCK_GETTIME 113

typedef uint64_t qemu_plugin_id_t;
struct qemu_plugin_tb;
enum qemu_plugin_cb_flags { QEMU_PLUGIN_CB_NO_REGS };

extern void qemu_plugin_register_vcpu_tb_trans_cb(
    qemu_plugin_id_t, void (*)(qemu_plugin_id_t, struct qemu_plugin_tb *));
extern void qemu_plugin_register_vcpu_tb_exec_cb(
    struct qemu_plugin_tb *, void (*)(unsigned, void *), enum qemu_plugin_cb_flags, void *);
extern size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
extern void qemu_plugin_register_vcpu_syscall_cb(
    qemu_plugin_id_t,
    void (*)(qemu_plugin_id_t, unsigned, int64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t,
             uint64_t, uint64_t, uint64_t));

__attribute__((visibility("default"))) int qemu_plugin_version = 1;
static uint64_t count;
static FILE *out;

/* Of the main thread alone: others of the program run by the clock, the more the slower this
   machine is. */
static void executed(unsigned cpu, void *instructions)
{
    if (cpu == 0)
        count += (uintptr_t)instructions;
}

static void translated(qemu_plugin_id_t id, struct qemu_plugin_tb *block)
{
    (void)id;
    qemu_plugin_register_vcpu_tb_exec_cb(block, executed, QEMU_PLUGIN_CB_NO_REGS,
                                         (void *)(uintptr_t)qemu_plugin_tb_n_insns(block));
}

static void called(qemu_plugin_id_t id, unsigned cpu, int64_t number, uint64_t a1, uint64_t a2,
                   uint64_t a3, uint64_t a4, uint64_t a5, uint64_t a6, uint64_t a7, uint64_t a8)
{
    (void)id, (void)a3, (void)a4, (void)a5, (void)a6, (void)a7, (void)a8;
    if (number == GETPRIORITY && (uint32_t)a1 == MARK) {
        FILE *told = out ? out : stderr;
        fprintf(told, "secateur:mark %" PRIu64 " %" PRIu64 "\n", a2, count);
        fflush(told);
    } else if (number == CLOCK_GETTIME && cpu == 0 && out) { /* of the main thread */
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        fprintf(out, "secateur:clock %" PRIu64 " %" PRIu64 "\n", count,
                (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec);
    }
}

__attribute__((visibility("default"))) int qemu_plugin_install(qemu_plugin_id_t id,
                                                               const void *info, int argc,
                                                               char **argv)
{
    (void)info;
    for (int each = 0; each < argc; each++)
        if (strncmp(argv[each], "out=", 4) == 0 && !(out = fopen(argv[each] + 4, "w")))
            return 1;
    qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
    qemu_plugin_register_vcpu_syscall_cb(id, called);
    return 0;
}
