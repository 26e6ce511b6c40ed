/* The least that a KVM hypervisor can do: the calls that mayfly makes too, in one thread, and nothing else. It loads
 * nothing: its guest is one `out` to COM1. What it takes from exec to that exit is the floor for `startup`.
 *
 * Build: cc -O2 -static -o floor floor.c */
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#define RAM (128ul << 20)

static int must(int result, const char *what) {
	if (result < 0) {
		perror(what);
		exit(1);
	}
	return result;
}

int main(void) {
	int kvm = must(open("/dev/kvm", O_RDWR | O_CLOEXEC), "open /dev/kvm");
	must(ioctl(kvm, KVM_GET_API_VERSION, 0), "version");
	struct {
		struct kvm_cpuid2 head;
		struct kvm_cpuid_entry2 entries[256];
	} cpuid = { .head.nent = 256 };
	must(ioctl(kvm, KVM_GET_SUPPORTED_CPUID, &cpuid), "supported cpuid");

	int vm = must(ioctl(kvm, KVM_CREATE_VM, 0), "create vm");
	must(ioctl(vm, KVM_SET_TSS_ADDR, 0xfffbd000ul), "tss");
	struct kvm_enable_cap split = { .cap = KVM_CAP_SPLIT_IRQCHIP, .args = { 24 } };
	must(ioctl(vm, KVM_ENABLE_CAP, &split), "split irqchip");
	uint8_t *ram = mmap(0, RAM, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	struct kvm_userspace_memory_region slot = { .memory_size = RAM, .userspace_addr = (uintptr_t)ram };
	must(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &slot), "slot");

	int vcpu = must(ioctl(vm, KVM_CREATE_VCPU, 0), "create vcpu");
	long size = must(ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), "mmap size");
	struct kvm_run *run = mmap(0, size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
	must(ioctl(vcpu, KVM_SET_CPUID2, &cpuid), "cpuid");

	/* Real mode at 0:1000 is enough for one instruction: mov dx, 0x3f8; mov al, '!'; out dx, al; hlt */
	memcpy(ram + 0x1000, "\xba\xf8\x03\xb0!\xee\xf4", 7);
	struct kvm_sregs sregs;
	must(ioctl(vcpu, KVM_GET_SREGS, &sregs), "get sregs");
	sregs.cs.base = sregs.cs.selector = 0;
	must(ioctl(vcpu, KVM_SET_SREGS, &sregs), "set sregs");
	struct kvm_regs regs = { .rip = 0x1000, .rflags = 2 };
	must(ioctl(vcpu, KVM_SET_REGS, &regs), "set regs");

	must(ioctl(vcpu, KVM_RUN, 0), "run");
	if (run->exit_reason != KVM_EXIT_IO || run->io.port != 0x3f8) {
		fprintf(stderr, "exit %u\n", run->exit_reason);
		return 1;
	}
	must(write(1, (char *)run + run->io.data_offset, 1), "write");
	return 0;
}
