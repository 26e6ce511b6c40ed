// Guests of a few instructions, for what needs exact control. Each is position independent and stays within what
// every KVM runs, also one that emulates ring 0: mov, arithmetic, jumps, in, out, lidt, hlt.
//
// They are entered by the Linux 64-bit protocol (long mode, identity mapping, rsi = zero page), `pvh` by PVH
// (32-bit protected mode, ebx = start info). None uses a stack.

// The archive that `mod.rs` reads: name, zero, padding to 8, length of the code, code, padding to 8.
.macro guest name
    .balign 8
    .asciz "\name"
    .balign 8
    .quad \name\()_end - \name\()_code
\name\()_code:
.endm

.macro end name
\name\()_end:
.endm

// Ends the run through the debug-exit port, with the value of one byte.
.macro quit value
    mov al, \value
    out 0xf4, al
9:  hlt
    jmp 9b
.endm

// Writes the text at rsi, up to its zero, to a port.
.macro say port
    mov edx, \port
8:  mov al, [rsi]
    test al, al
    jz 9f
    out dx, al
    inc rsi
    jmp 8b
9:
.endm

// Writes rax as 16 hexadecimal digits and a line feed to COM1.
.macro hex
    mov rbx, rax
    mov ecx, 16
    mov edx, 0x3f8
7:  mov rax, rbx
    shr rax, 60
    shl rbx, 4
    add al, 48
    cmp al, 58
    jb 8f
    add al, 39
8:  out dx, al
    dec ecx
    jnz 7b
    mov al, 10
    out dx, al
.endm

.pushsection .rodata.mayfly_guests, "a"
.balign 8
.globl mayfly_guests
mayfly_guests:

// Says where it is and powers off with 0.
.code64
guest hello
    lea rsi, [rip + hello_text]
    say 0x3f8
    quit 0
hello_text: .asciz "hello from ring 0\n"
end hello

// The least a guest can do: one exit.
guest tiny
    quit 0
end tiny

// Ends a line on COM1 with its first instructions, so that the line goes out at once, then ends: for the stopwatch.
guest line
    mov al, 10
    mov edx, 0x3f8
    out dx, al
    quit 0
end line

// The same with a byte that ends no line.
guest mark
    mov al, 33
    mov edx, 0x3f8
    out dx, al
    quit 0
end mark

// Marks its first instruction on COM1, then sleeps: for the scales.
guest rest
    mov al, 33
    mov edx, 0x3f8
    out dx, al
2:  hlt
    jmp 2b
end rest

// Leaves by the debug-exit port with 42.
guest leave
    quit 42
end leave

// Leaves by the other debug-exit port with 43.
guest leave_501
    mov al, 43
    mov edx, 0x501
    out dx, al
2:  hlt
    jmp 2b
end leave_501

// Says the command line; without a set-up header in the zero page it leaves with 9.
guest cmdline
    cmp dword ptr [rsi + 0x202], 0x53726448
    jne 2f
    mov esi, dword ptr [rsi + 0x228]
    say 0x3f8
    quit 0
2:  quit 9
end cmdline

// Says the bytes of the initial RAM disk.
guest initrd
    mov ecx, dword ptr [rsi + 0x21c]
    mov esi, dword ptr [rsi + 0x218]
    mov edx, 0x3f8
2:  test ecx, ecx
    jz 3f
    mov al, [rsi]
    out dx, al
    inc rsi
    dec ecx
    jmp 2b
3:  quit 0
end initrd

// Adds up the usable memory in the e820 map and says it.
guest memory
    movzx ecx, byte ptr [rsi + 0x1e8]
    add rsi, 0x2d0
    xor rax, rax
2:  test ecx, ecx
    jz 4f
    cmp dword ptr [rsi + 16], 1
    jne 3f
    add rax, qword ptr [rsi + 8]
3:  add rsi, 20
    dec ecx
    jmp 2b
4:  hex
    quit 0
end memory

// Writes 256 KiB to COM1, 64 to a line, as fast as it can, and never asks whether there is room.
guest flood
    mov ebx, 0x40000
    mov edx, 0x3f8
2:  mov eax, ebx
    and eax, 63
    add al, 48
    cmp al, 48
    jne 3f
    mov al, 10
3:  out dx, al
    dec ebx
    jnz 2b
    quit 0
end flood

// Raises DTR and RTS, as a driver does that listens, then answers each byte on COM1 with the same byte; after a `q` it
// leaves with 7.
guest echo
    mov al, 3
    mov edx, 0x3fc
    out dx, al
    lea rsi, [rip + echo_text]
    say 0x3f8
2:  mov edx, 0x3fd
    in al, dx
    test al, 1
    jz 2b
    mov edx, 0x3f8
    in al, dx
    out dx, al
    cmp al, 113
    jne 2b
    quit 7
echo_text: .asciz "ready\n"
end echo

// Writes to the two debug consoles.
guest debugcon
    lea rsi, [rip + debugcon_text]
    say 0xe9
    lea rsi, [rip + debugcon_text]
    say 0x402
    quit 0
debugcon_text: .asciz "on the debug console\n"
end debugcon

// An exception with no table to look it up in: the processor shuts down.
guest triple
    lidt [rip + triple_table]
    ud2
triple_table: .quad 0, 0
end triple

// Pulls the reset line through the keyboard controller.
guest reset
    mov al, 0xfe
    out 0x64, al
2:  hlt
    jmp 2b
end reset

// Says that it lives, then pulls the reset line.
guest again
    lea rsi, [rip + again_text]
    say 0x3f8
    mov al, 0xfe
    out 0x64, al
2:  hlt
    jmp 2b
again_text: .asciz "alive\n"
end again

// Says on the pvpanic port that it panicked.
guest panic
    mov al, 1
    mov edx, 0x505
    out dx, al
2:  hlt
    jmp 2b
end panic

// Sleeps for ever with interrupts off.
guest sleep
    cli
2:  hlt
    jmp 2b
end sleep

// Runs for ever.
guest spin
2:  jmp 2b
end spin

// Reads every port, at every width. One that no chip has reads as ones; if not, it leaves with 8.
guest ports
    xor edx, edx
2:  in al, dx
    in ax, dx
    in eax, dx
    inc dx
    jnz 2b
    mov edx, 0x99
    in al, dx
    cmp al, 0xff
    jne 3f
    quit 0
3:  quit 8
end ports

// Powers off by ACPI: RSDP, XSDT, FADT, then the sleep control register or, on hardware that is not reduced, PM1a.
// Leaves with 11 if there is no FADT.
guest poweroff
    mov rsi, qword ptr [rsi + 0x70]
    mov rsi, qword ptr [rsi + 24]
    mov ecx, dword ptr [rsi + 4]
    sub ecx, 36
    shr ecx, 3
    add rsi, 36
2:  test ecx, ecx
    jz 4f
    mov rdi, qword ptr [rsi]
    cmp dword ptr [rdi], 0x50434146
    je 3f
    add rsi, 8
    dec ecx
    jmp 2b
3:  mov rdx, qword ptr [rdi + 248]
    mov al, 0x34
    test edx, edx
    jnz 5f
    mov edx, dword ptr [rdi + 64]
    mov eax, 0x3400
    out dx, ax
    jmp 6f
5:  out dx, al
6:  hlt
    jmp 6b
4:  quit 11
end poweroff

// Entered by PVH: says the command line; without the magic number in the start info it leaves with 10.
.code32
guest pvh
    cmp dword ptr [ebx], 0x336ec578
    jne 4f
    mov esi, dword ptr [ebx + 24]
    mov edx, 0x3f8
2:  mov al, byte ptr [esi]
    test al, al
    jz 3f
    out dx, al
    inc esi
    jmp 2b
3:  quit 0
4:  quit 10
end pvh
.code64

.balign 8
.globl mayfly_guests_end
mayfly_guests_end:
.popsection
