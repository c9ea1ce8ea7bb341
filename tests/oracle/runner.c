/*
 * Executes a list of mm operations on the real kernel inside one arena and prints the arena's state after each.
 *
 * The process holds a KVM VM, so that the kernel registers a real MMU notifier on its mm; the kvm_* tracepoints report
 * each call of it. Lines written to the trace marker say during which operation a call was made.
 *
 * usage: runner BASE PAGES TRACE_FOLDER MODES DISK_FILE SHM_FILE [HUGETLB_FILE]      MODES: of the letters t (huge pages allowed),
 *        s (settle: wait for the disk and empty all page batches between operations), u (two userfaultfds),
 *        b (bad calls: no privileges, no random addresses; first prints the layout of everything but the arena), or -
 * stdin:  OPERATION ARGUMENT...          (hexadecimal; nX: X bytes above the first break; @X: above the last address that
 *         the kernel chose for an mmap; tX, wX: more than was mapped at the start, of all and of data)
 * stdout: NUMBER ERRNO RESULT V mapping... R resident H huge S swapped P free,reserved huge pages of the pool
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <linux/userfaultfd.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/personality.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096UL
#define PAGES_MAX 65536
#define KVM_CREATE_VM 0xAE01
#define NO_FILE 4
#define ARGUMENTS_MAX 6
#define SYS_MSEAL 462
#define MEMLOCK_MAX (8UL << 20)
#define SYMBOLS "n@tw"

#define PM_PRESENT (1ULL << 63)
#define PM_SWAPPED (1ULL << 62)

/* linux/fs.h, for the C libraries that do not know it yet */
struct scan_region {
	uint64_t start, end, categories;
};
struct scan_arg {
	uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
	uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};
#define SCAN_IOCTL _IOWR('f', 16, struct scan_arg)
#define SCAN_PRESENT (1 << 3)
#define SCAN_HUGE (1 << 6)

struct move_arg {
	uint64_t dst, src, len, mode;
	int64_t move;
};
#define MOVE_IOCTL _IOWR(0xAA, 0x05, struct move_arg)
#define UFFDS 2

static int uffds[UFFDS];
static unsigned long base;
static long pages;
static int marker, pagemap, files[NO_FILE];
static pid_t child = -1;
static int child_pipe[2];
static sigjmp_buf fault;
static unsigned long first_break, chosen, first_total, first_data;
static int asking[2], answering[2];

static void on_fault(int number)
{
	siglongjmp(fault, number);
}

static void mark(const char *side, long number)
{
	char text[64];
	int length = snprintf(text, sizeof text, "%s %ld", side, number);
	if (write(marker, text, length) < 0)
		perror("marker");
}

/* What the arena looks like. */

static void print_mappings(void)
{
	char line[512], prot[5];
	unsigned long start, end, offset, inode;
	unsigned int major, minor;
	FILE *maps = fopen("/proc/self/maps", "r");

	printf(" V");
	while (fgets(line, sizeof line, maps)) {
		if (sscanf(line, "%lx-%lx %4s %lx %x:%x %lu", &start, &end, prot, &offset, &major, &minor, &inode) < 7)
			continue;
		if (end > base && start < base + pages * PAGE)
			printf(" %lx-%lx,%s,%lx,%lu", start, end, prot, offset, inode);
	}
	fclose(maps);
}

static void print_ranges(const char *title, const uint64_t *entry, uint64_t bit)
{
	const char *between = "";

	printf(" %s ", title);
	for (long i = 0, j; i < pages; i = j + 1) {
		for (j = i; j < pages && entry[j] & bit; j++)
			;
		if (j > i) {
			printf("%s%ld-%ld", between, i, j);
			between = ",";
		}
	}
	if (!*between)
		printf("-");
}

static void print_huge(void)
{
	static struct scan_region found[PAGES_MAX / 512];
	struct scan_arg arg = {
		.size = sizeof arg, .start = base, .end = base + pages * PAGE,
		.vec = (uintptr_t)found, .vec_len = PAGES_MAX / 512,
		.category_mask = SCAN_HUGE | SCAN_PRESENT, .return_mask = SCAN_HUGE,
	};
	int count = ioctl(pagemap, SCAN_IOCTL, &arg);

	printf(" H ");
	if (count < 0)
		perror("PAGEMAP_SCAN");
	for (int i = 0; i < count; i++)
		printf("%s%ld-%ld", i ? "," : "", (long)((found[i].start - base) / PAGE), (long)((found[i].end - base) / PAGE));
	if (count <= 0)
		printf("-");
}

static long pool_pages(const char *which)
{
	char path[100];
	long pages = 0;

	snprintf(path, sizeof path, "/sys/kernel/mm/hugepages/hugepages-2048kB/%s_hugepages", which);
	FILE *file = fopen(path, "r");
	if (!file || fscanf(file, "%ld", &pages) != 1)
		perror(path);
	fclose(file);
	return pages;
}

static void print_state(void)
{
	static uint64_t entry[PAGES_MAX];

	memset(entry, 0, pages * sizeof *entry);
	if (pread(pagemap, entry, pages * sizeof *entry, base / PAGE * sizeof *entry) < 0)
		perror("pagemap");
	print_mappings();
	print_ranges("R", entry, PM_PRESENT);
	print_huge();
	print_ranges("S", entry, PM_SWAPPED);
	printf(" P %ld,%ld", pool_pages("free"), pool_pages("resv"));
}

/* Between two operations: nothing may depend on how fast a disk is or on which processor a page's batch is waiting. */

static int disks_busy(void)
{
	char path[300];
	unsigned long reads, writes, busy = 0;
	DIR *folder = opendir("/sys/block");

	for (struct dirent *disk; (disk = readdir(folder));) {
		snprintf(path, sizeof path, "/sys/block/%s/inflight", disk->d_name);
		FILE *inflight = fopen(path, "r");
		if (!inflight)
			continue;
		if (fscanf(inflight, "%lu %lu", &reads, &writes) == 2)
			busy += reads + writes;
		fclose(inflight);
	}
	closedir(folder);
	return busy != 0;
}

static void empty_page_batches(void)
{
	static char here[PAGE] __attribute__((aligned(PAGE))) = "a page of our own";
	void *page = here;
	int node = 0, status;

	/* move_pages(2) empties the batches of every processor before it looks at the first page */
	syscall(SYS_move_pages, 0, 1UL, &page, &node, &status, 2 /* MPOL_MF_MOVE */);
}

static void settle(void)
{
	for (int i = 0; i < 20000 && disks_busy(); i++)
		usleep(50);
	empty_page_batches();
}

/* The operations. */

static long access_pages(unsigned long start, unsigned long length, int writes, char value)
{
	for (volatile unsigned long at = start; at < start + length; at += PAGE) {
		int number = sigsetjmp(fault, 1);
		if (number) {
			errno = number == SIGSEGV ? EFAULT : ENXIO;
			return -1;
		}
		if (writes)
			*(volatile char *)at = value;
		else
			(void)*(volatile char *)at;
	}
	return 0;
}

static long fork_child(void)
{
	char end;

	if (child > 0) {
		errno = EBUSY;
		return -1;
	}
	fflush(stdout);
	if (pipe(child_pipe) || (child = fork()) < 0)
		return -1;
	if (!child) {
		close(child_pipe[1]);
		_exit(read(child_pipe[0], &end, 1) != 0);
	}
	close(child_pipe[0]);
	return 0;
}

static long reap_child(void)
{
	if (child < 0) {
		errno = ECHILD;
		return -1;
	}
	close(child_pipe[1]);
	waitpid(child, NULL, 0);
	child = -1;
	return 0;
}

/* khugepaged sleeps for ever; a write to the setting wakes it for one pass over everything. */

#define SETTINGS "/sys/kernel/mm/transparent_hugepage/khugepaged/"

static long number_in(const char *path, const char *field)
{
	char line[256];
	long value = -1;
	FILE *file = fopen(path, "r");

	while (value < 0 && fgets(line, sizeof line, file))
		if (!strncmp(line, field, strlen(field)))
			value = atol(line + strlen(field));
	fclose(file);
	return value;
}

static long khugepaged_pass(void)
{
	char status[64], line[256];
	long scans = number_in(SETTINGS "full_scans", ""), calm = 0;
	int pid = atoi(getenv("KHUGEPAGED"));

	snprintf(status, sizeof status, "/proc/%d/status", pid);
	long slept = number_in(status, "voluntary_ctxt_switches:");
	FILE *setting = fopen(SETTINGS "scan_sleep_millisecs", "w");
	fprintf(setting, "1000000000");
	fclose(setting);
	for (int i = 0; i < 60000 && calm < 4; i++) {
		int asleep = 0;
		FILE *file = fopen(status, "r");
		while (fgets(line, sizeof line, file))
			asleep |= !strncmp(line, "State:\tS", 8);
		fclose(file);
		int done = number_in(SETTINGS "full_scans", "") > scans && number_in(status, "voluntary_ctxt_switches:") > slept;
		calm = asleep && done ? calm + 1 : 0;
		usleep(1000);
	}
	if (calm < 4)
		errno = ETIME;
	return calm < 4 ? -1 : 0;
}

/* userfaultfd: accesses that somebody would have to resolve fail with SIGBUS. */

static int open_uffd(void)
{
	int fd = syscall(SYS_userfaultfd, O_CLOEXEC);
	struct uffdio_api api = { .api = UFFD_API, .features = UFFD_FEATURE_SIGBUS };

	if (fd < 0 || ioctl(fd, UFFDIO_API, &api))
		perror("userfaultfd");
	return fd;
}

static int uffd_of(unsigned long number)
{
	return number && number <= UFFDS ? uffds[number - 1] : -1;
}

static long uffd_register(const unsigned long *a)
{
	struct uffdio_register arg = { .range = { a[0], a[1] }, .mode = a[2] };

	return ioctl(uffd_of(a[3]), UFFDIO_REGISTER, &arg);
}

static long uffd_unregister(const unsigned long *a)
{
	struct uffdio_range arg = { a[0], a[1] };

	return ioctl(uffd_of(a[2]), UFFDIO_UNREGISTER, &arg);
}

static long uffd_writeprotect(const unsigned long *a)
{
	struct uffdio_writeprotect arg = { .range = { a[0], a[1] }, .mode = a[2] };

	return ioctl(uffd_of(a[3]), UFFDIO_WRITEPROTECT, &arg);
}

/* How many bytes were moved, if any were. */
static long uffd_move(const unsigned long *a)
{
	struct move_arg arg = { .dst = a[0], .src = a[1], .len = a[2], .mode = a[3] };
	long result = ioctl(uffd_of(a[4]), MOVE_IOCTL, &arg);

	return arg.move > 0 ? arg.move : result;
}

/* Memory policies; a mask of nodes is one word. */

#define MASK_BITS 65 /* the kernel counts one too many */
#define HOME_NODE 450 /* SYS_set_mempolicy_home_node, for the C libraries that do not know it yet */

static long get_mempolicy(const unsigned long *a)
{
	int mode = 0;
	unsigned long nodes[16] = { 0 };
	long result = syscall(SYS_get_mempolicy, &mode, nodes, 8 * sizeof nodes, a[0], a[1]);

	return result < 0 ? result : (long)(nodes[0] << 16 | (mode & 0xffff));
}

/* process_madvise of this process by another one, which has lived since before the arena. */

struct advice {
	unsigned long argument[ARGUMENTS_MAX];
	int count;
};

static void advise_parent(void)
{
	struct advice ask;
	int parent = syscall(SYS_pidfd_open, getppid(), 0);

	while (read(asking[0], &ask, sizeof ask) == sizeof ask) {
		struct iovec ranges[2] = {
			{ (void *)ask.argument[2], ask.argument[3] },
			{ (void *)ask.argument[4], ask.argument[5] },
		};
		long result[2];
		result[0] = syscall(SYS_process_madvise, parent, ranges, (ask.count - 2L) / 2, ask.argument[0], ask.argument[1]);
		result[1] = errno;
		if (write(answering[1], result, sizeof result) < 0)
			break;
	}
	_exit(0);
}

static long process_madvise_by_other(const unsigned long *a, int count)
{
	struct advice ask = { .count = count };
	long result[2] = { -1, EIO };

	memcpy(ask.argument, a, sizeof ask.argument);
	if (write(asking[1], &ask, sizeof ask) < 0 || read(answering[0], result, sizeof result) < 0)
		perror("process_madvise");
	errno = result[1];
	return result[0];
}

/* Soft limits only: without privileges they can be raised again. */
static long limit(unsigned long resource, unsigned long bytes)
{
	struct rlimit now;

	if (getrlimit(resource, &now))
		return -1;
	now.rlim_cur = bytes;
	return setrlimit(resource, &now);
}

static int file_of(unsigned long number)
{
	return number < NO_FILE ? files[number] : -1;
}

static long map(const unsigned long *a)
{
	long result = syscall(SYS_mmap, a[0], a[1], a[2], a[3], file_of(a[4]), a[5]);

	if (result != -1 && !(a[3] & (MAP_FIXED | MAP_FIXED_NOREPLACE)))
		chosen = result;
	return result;
}

static long execute(const char *op, const unsigned long *a, int count, long number)
{
	if (!strcmp(op, "mmap"))
		return map(a);
	if (!strcmp(op, "munmap"))
		return munmap((void *)a[0], a[1]);
	if (!strcmp(op, "mprotect"))
		return syscall(SYS_mprotect, a[0], a[1], a[2]);
	if (!strcmp(op, "madvise"))
		return syscall(SYS_madvise, a[0], a[1], a[2]);
	if (!strcmp(op, "process_madvise"))
		return process_madvise_by_other(a, count);
	if (!strcmp(op, "mremap"))
		return syscall(SYS_mremap, a[0], a[1], a[2], a[3], a[4]);
	if (!strcmp(op, "msync"))
		return msync((void *)a[0], a[1], a[2]);
	if (!strcmp(op, "fsync"))
		return fsync(file_of(a[0]));
	if (!strcmp(op, "ftruncate"))
		return ftruncate(file_of(a[0]), a[1]);
	if (!strcmp(op, "punch"))
		return fallocate(file_of(a[0]), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, a[1], a[2]);
	if (!strcmp(op, "mlock"))
		return mlock((void *)a[0], a[1]);
	if (!strcmp(op, "munlock"))
		return munlock((void *)a[0], a[1]);
	if (!strcmp(op, "mlock2"))
		return syscall(SYS_mlock2, a[0], a[1], a[2]);
	if (!strcmp(op, "mlockall"))
		return syscall(SYS_mlockall, a[0]);
	if (!strcmp(op, "munlockall"))
		return munlockall();
	if (!strcmp(op, "mseal"))
		return syscall(SYS_MSEAL, a[0], a[1], a[2]);
	if (!strcmp(op, "brk"))
		return syscall(SYS_brk, a[0]);
	if (!strcmp(op, "setrlimit"))
		return limit(a[0], a[1]);
	if (!strcmp(op, "remap_file_pages"))
		return count == 3 ? syscall(SYS_remap_file_pages, a[0], a[1], 0, a[2], 0)
				  : syscall(SYS_remap_file_pages, a[0], a[1], a[2], a[3], a[4]);
	if (!strcmp(op, "read") || !strcmp(op, "write"))
		return access_pages(a[0], a[1], *op == 'w', (char)(number + 1));
	if (!strcmp(op, "uffd_register"))
		return uffd_register(a);
	if (!strcmp(op, "uffd_unregister"))
		return uffd_unregister(a);
	if (!strcmp(op, "uffd_writeprotect"))
		return uffd_writeprotect(a);
	if (!strcmp(op, "uffd_move"))
		return uffd_move(a);
	if (!strcmp(op, "mbind"))
		return syscall(SYS_mbind, a[0], a[1], a[2], a + 3, MASK_BITS, a[4]);
	if (!strcmp(op, "set_mempolicy"))
		return syscall(SYS_set_mempolicy, a[0], a + 1, MASK_BITS);
	if (!strcmp(op, "get_mempolicy"))
		return get_mempolicy(a);
	if (!strcmp(op, "set_mempolicy_home_node"))
		return syscall(HOME_NODE, a[0], a[1], a[2], a[3]);
	if (!strcmp(op, "migrate_pages"))
		return syscall(SYS_migrate_pages, 0, MASK_BITS, a, a + 1);
	if (!strcmp(op, "fork"))
		return fork_child();
	if (!strcmp(op, "khugepaged_scan"))
		return khugepaged_pass();
	if (!strcmp(op, "reap"))
		return reap_child();
	errno = ENOSYS;
	return -1;
}

static int attach(int files_nr, char **argument)
{
	char path[256];
	int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	struct sigaction action = { .sa_handler = on_fault, .sa_flags = SA_NODEFER };

	if (ioctl(kvm, KVM_CREATE_VM, 0) < 0) {
		perror("kvm");
		return -1;
	}
	snprintf(path, sizeof path, "%s/trace_marker", argument[3]);
	marker = open(path, O_WRONLY);
	pagemap = open("/proc/self/pagemap", O_RDONLY);
	for (int i = 0; i < NO_FILE; i++)
		files[i] = i < files_nr ? open(argument[5 + i], O_RDWR) : -1;
	for (int i = 0; i < UFFDS; i++)
		uffds[i] = strchr(argument[4], 'u') ? open_uffd() : -1;
	sigaction(SIGSEGV, &action, 0);
	sigaction(SIGBUS, &action, 0);
	return 0;
}

/* Bad calls: the same addresses each time, and no privileges. Everything that is mapped is said first. */

static void same_addresses(char **argument)
{
	if (personality(0xffffffff) & ADDR_NO_RANDOMIZE)
		return;
	personality(ADDR_NO_RANDOMIZE);
	execv(argument[0], argument);
	perror("exec");
}

static void drop_privileges(void)
{
	struct rlimit lock = { MEMLOCK_MAX, MEMLOCK_MAX };
	struct __user_cap_header_struct header = { _LINUX_CAPABILITY_VERSION_3, 0 };
	struct __user_cap_data_struct none[2] = { { 0 } };

	if (setrlimit(RLIMIT_MEMLOCK, &lock) || syscall(SYS_capset, &header, none))
		perror("privileges");
}

static void print_layout(void)
{
	char line[512];
	FILE *maps = fopen("/proc/self/maps", "r");

	while (fgets(line, sizeof line, maps))
		if (strtoul(line, 0, 16) < 1UL << 47)
			printf("M %s", line);
	fclose(maps);
	FILE *status = fopen("/proc/self/status", "r");
	while (fgets(line, sizeof line, status)) {
		sscanf(line, "VmSize: %lu", &first_total);
		sscanf(line, "VmData: %lu", &first_data);
	}
	fclose(status);
	first_total <<= 10;
	first_data <<= 10;
}

static void prepare_bad_calls(void)
{
	unsigned long start_brk = 0;
	pid_t parent = getpid(), other;
	FILE *stat = fopen("/proc/self/stat", "r");

	for (int i = 1; i < 47; i++)
		if (fscanf(stat, "%*s") < 0)
			perror("stat");
	if (fscanf(stat, "%lu", &start_brk) != 1 || pipe(asking) || pipe(answering))
		perror("stat");
	fclose(stat);
	fflush(stdout);
	other = fork();
	if (!other) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		if (getppid() == parent)
			advise_parent();
		_exit(0);
	}
	first_break = (unsigned long)sbrk(0);
	drop_privileges();
	print_layout();
	printf("L %d %lx %lx %lx %lx\n", other, start_brk, first_break, first_total, first_data);
	fflush(stdout);
}

static int parse(char *line, char *op, unsigned long *a)
{
	int count = 0;
	char *word = strtok(line, " \n");

	if (!word)
		return -1;
	snprintf(op, 32, "%s", word);
	for (; count < ARGUMENTS_MAX && (word = strtok(NULL, " \n")); count++) {
		const char *from = strchr(SYMBOLS, *word);
		unsigned long value[] = { first_break, chosen, first_total, first_data };
		a[count] = (from ? value[from - SYMBOLS] : 0) + strtoul(from ? word + 1 : word, 0, 16);
	}
	return count;
}

int main(int count, char **argument)
{
	char line[512], op[32];

	if (count < 7 || count > 8)
		return 2;
	base = strtoul(argument[1], 0, 16);
	pages = atol(argument[2]);
	int huge = strchr(argument[4], 't') != NULL, settled = strchr(argument[4], 's') != NULL;
	int bad = strchr(argument[4], 'b') != NULL;
	if (bad)
		same_addresses(argument);
	if (pages > PAGES_MAX || attach(count - 5, argument))
		return 1;
	if (!huge)
		prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0);
	setvbuf(stdout, malloc(bad ? 1 << 19 : 1 << 22), _IOFBF, bad ? 1 << 19 : 1 << 22);
	if (bad)
		prepare_bad_calls();

	for (long number = 0; fgets(line, sizeof line, stdin); number++) {
		unsigned long a[ARGUMENTS_MAX] = { 0 };
		int given = parse(line, op, a);
		if (given < 0)
			continue;
		if (settled)
			settle();
		mark("B", number);
		errno = 0;
		long result = execute(op, a, given, number);
		int failure = result == -1 ? errno : 0;
		mark("E", number);
		printf("%ld %d %lx", number, failure, result);
		print_state();
		printf("\n");
	}
	if (child > 0)
		reap_child();
	fflush(stdout);
	return 0;
}
