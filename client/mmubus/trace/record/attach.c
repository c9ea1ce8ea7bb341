/*
 * Loaded into every process of a recorded program (LD_PRELOAD). At the start of each address space, which is after exec and
 * after fork, it
 *
 *   1. opens a KVM virtual machine if it is asked to: the kernel then registers a real MMU notifier on this address space,
 *      and its tracepoints report every notification;
 *   2. writes down which mappings and pages exist at that moment, from /proc/self/smaps and /proc/self/pagemap;
 *   3. leaves a mark in the recording that names the file: in the kernel's trace, or as a system call that strace shows.
 *
 * MMUBUS_RECORD_DIR: where the files go. MMUBUS_RECORD_MARKER: the trace_marker, or nothing for strace.
 * MMUBUS_RECORD_KVM: 1 to open a virtual machine.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

#define PAGE_BYTES 4096ul
#define BATCH 1024
#define TASK_BITS 47
#define KVM_CREATE_VM 0xAE01 /* _IO(KVMIO, 1) */
#define FIRST_HIDDEN_FD 900  /* out of the way of programs that count on low numbers */
#define MARK 0x6d6d7562      /* "mmub": no prctl has this number */

/* Bits of a pagemap entry, Documentation/admin-guide/mm/pagemap.rst. */
#define PM_PRESENT (1ull << 63)
#define PM_FILE (1ull << 61)
#define PM_EXCLUSIVE (1ull << 56)

static char kind_of(uint64_t entry)
{
	if (!(entry & PM_PRESENT))
		return '-';
	if (entry & PM_FILE)
		return 'f';
	return entry & PM_EXCLUSIVE ? 'a' : 's';
}

/* One line "P first end kind" for each run of pages that are alike. */
static void write_pages(FILE *out, int pagemap, unsigned long start, unsigned long end)
{
	static uint64_t entries[BATCH];
	unsigned long pages = (end - start) / PAGE_BYTES, first = 0;
	char kind = '-';

	for (unsigned long page = 0; page < pages;) {
		unsigned long want = pages - page < BATCH ? pages - page : BATCH;
		ssize_t got = pread(pagemap, entries, want * sizeof(*entries),
				    (off_t)((start / PAGE_BYTES + page) * sizeof(*entries)));

		if (got <= 0)
			break;
		for (ssize_t i = 0; i < got / (ssize_t)sizeof(*entries); i++, page++) {
			char now = kind_of(entries[i]);

			if (now == kind)
				continue;
			if (kind != '-')
				fprintf(out, "P %lu %lu %c\n", first, page, kind);
			first = page;
			kind = now;
		}
	}
	if (kind != '-')
		fprintf(out, "P %lu %lu %c\n", first, pages, kind);
}

static void write_snapshot(const char *path)
{
	static char line[2 * PATH_MAX], buffer[1 << 16];
	int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
	int pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	FILE *out = fd < 0 ? NULL : fdopen(fd, "w");
	FILE *maps = fopen("/proc/self/smaps", "re");

	if (out)
		setvbuf(out, buffer, _IOFBF, sizeof(buffer));
	while (out && maps && fgets(line, sizeof(line), maps)) {
		unsigned long start, end;
		int is_mapping = sscanf(line, "%lx-%lx ", &start, &end) == 2;

		if (is_mapping)
			fputs(line, out);
		if (is_mapping && !(start >> TASK_BITS) && pagemap >= 0)
			write_pages(out, pagemap, start, end);
		if (!strncmp(line, "VmFlags:", 8))
			fprintf(out, "F%s", line + 8);
	}
	if (maps)
		fclose(maps);
	if (out)
		fclose(out);
	if (pagemap >= 0)
		close(pagemap);
}

static void become_a_secondary_mmu(void)
{
	int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	int vm = kvm < 0 ? -1 : ioctl(kvm, KVM_CREATE_VM, 0ul);

	if (vm >= 0) {
		fcntl(vm, F_DUPFD_CLOEXEC, FIRST_HIDDEN_FD); /* never closed: it lasts as long as the address space */
		close(vm);
	}
	if (kvm >= 0)
		close(kvm);
}

static void begin(const char *why)
{
	const char *directory = getenv("MMUBUS_RECORD_DIR"), *marker = getenv("MMUBUS_RECORD_MARKER");
	const char *kvm = getenv("MMUBUS_RECORD_KVM");
	char path[PATH_MAX];
	struct timespec now;
	unsigned long number; /* tells the images apart that one process runs one after another */

	if (!directory)
		return;
	clock_gettime(CLOCK_MONOTONIC, &now);
	number = (unsigned long)now.tv_sec * 1000000000ul + (unsigned long)now.tv_nsec;
	if (kvm && *kvm == '1')
		become_a_secondary_mmu();
	snprintf(path, sizeof(path), "%s/%d.%s.%lu", directory, (int)getpid(), why, number);
	write_snapshot(path);
	if (marker && *marker) {
		int fd = open(marker, O_WRONLY | O_CLOEXEC);

		if (fd >= 0) {
			dprintf(fd, "MMUBUS %d %s %lu", (int)getpid(), why, number);
			close(fd);
		}
	} else {
		prctl(MARK, (unsigned long)getpid(), (unsigned long)(*why == 'f'), number, 0ul);
	}
}

static void after_fork(void)
{
	begin("fork");
}

__attribute__((constructor)) static void after_exec(void)
{
	begin("exec");
	pthread_atfork(NULL, NULL, after_fork);
}
