// A process that executes AMX-BF16's tile instructions, or AVX512-BF16's, on a processor without them comes in (by LD_PRELOAD);
// the same process with those instructions' results goes out, bit for bit as Intel's manual (SDM, volume 2) defines them.
//
//     cc -O2 -shared -fPIC -o emulate_bf16.so scripts/emulate_bf16.c
//     LD_PRELOAD=$PWD/emulate_bf16.so EMULATE_BF16_COUNT=1 PROGRAM
//
// What a processor lacks raises SIGILL; the handler performs it on the interrupted registers and steps over it. What the
// processor has never comes here. A mistake that faults on hardware (a wrong configuration, shapes that do not fit, tiles without
// the system's permission) is told, and aborts; the permission itself (arch_prctl) is granted here where the system has no
// tiles. EMULATE_BF16_COUNT=1 prints, at the end, how often each instruction was emulated.
#define _GNU_SOURCE
#include <cpuid.h>
#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

enum instruction {
    LDTILECFG, STTILECFG, TILERELEASE, TILEZERO, TILELOADD, TILELOADDT1, TILESTORED, TDPBF16PS,
    VDPBF16PS, VCVTNEPS2BF16, VCVTNE2PS2BF16, INSTRUCTIONS
};
static const char *const names[INSTRUCTIONS] = {
    "LDTILECFG", "STTILECFG", "TILERELEASE", "TILEZERO", "TILELOADD", "TILELOADDT1", "TILESTORED", "TDPBF16PS",
    "VDPBF16PS", "VCVTNEPS2BF16", "VCVTNE2PS2BF16"
};
static unsigned long counts[INSTRUCTIONS];

static void count(enum instruction which) { __atomic_fetch_add(&counts[which], 1, __ATOMIC_RELAXED); }

static _Noreturn void refuse(enum instruction which, const char *why) {
    dprintf(STDERR_FILENO, "emulate_bf16: %s: %s\n", names[which], why);
    abort();
}

// ---- Arithmetic ----

// bf16 arithmetic never looks at MXCSR: it rounds to nearest even, and takes and gives denormals as zeros (DAZ, FTZ). The return
// from the handler restores what the program had.
static void set_rounding(void) {
    uint32_t mxcsr = 0x9FC0;
    __asm__ volatile("ldmxcsr %0" : : "m"(mxcsr));
}

// a * b + c, rounded once. Of several NaNs a's comes out, else b's, else c's.
static inline float multiply_add(float a, float b, float c) {
    __asm__ volatile("vfmadd132ss %1, %2, %0" : "+x"(a) : "x"(b), "x"(c));
    return a;
}

static inline float add(float a, float b) {
    __asm__ volatile("addss %1, %0" : "+x"(a) : "x"(b));
    return a;
}

static inline float widen(uint16_t bf16) {
    uint32_t bits = (uint32_t)bf16 << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

// The nearest bf16, ties to even; denormals become zeros, NaNs quiet ones.
static uint16_t narrow(uint32_t bits) {
    uint32_t exponent = bits >> 23 & 0xFF;
    if (exponent == 0) return bits >> 16 & 0x8000;
    if (exponent == 0xFF) return bits >> 16 | ((bits & 0x7FFFFF) ? 0x40 : 0);
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}

// ---- The interrupted registers ----

// Where the parts of the vector registers lie in the area that XSAVE wrote: numbers of CPUID's leaf 0xD.
enum part { XMM = 1, YMM_HIGH = 2, MASKS = 5, ZMM_HIGH = 6, ZMM_16_TO_31 = 7, PARTS };
static struct { uint32_t offset, size; } parts[PARTS];

static void read_part(const ucontext_t *context, enum part part, size_t at, void *data, size_t size) {
    const uint8_t *area = (const uint8_t *)context->uc_mcontext.fpregs;
    uint64_t present; // a part that is all zeros may not have been written
    memcpy(&present, area + 512, 8);
    if (present >> part & 1) memcpy(data, area + parts[part].offset + at, size);
    else memset(data, 0, size);
}

static void write_part(ucontext_t *context, enum part part, size_t at, const void *data, size_t size) {
    uint8_t *area = (uint8_t *)context->uc_mcontext.fpregs;
    uint64_t present;
    memcpy(&present, area + 512, 8);
    if (!(present >> part & 1)) memset(area + parts[part].offset, 0, parts[part].size);
    present |= 1ull << part;
    memcpy(area + 512, &present, 8);
    memcpy(area + parts[part].offset + at, data, size);
}

static void read_vector(const ucontext_t *context, int number, void *data) {
    uint8_t *bytes = data;
    if (number >= 16) {
        read_part(context, ZMM_16_TO_31, (number - 16) * 64, bytes, 64);
        return;
    }
    read_part(context, XMM, number * 16, bytes, 16);
    read_part(context, YMM_HIGH, number * 16, bytes + 16, 16);
    read_part(context, ZMM_HIGH, number * 32, bytes + 32, 32);
}

static void write_vector(ucontext_t *context, int number, const void *data) {
    const uint8_t *bytes = data;
    if (number >= 16) {
        write_part(context, ZMM_16_TO_31, (number - 16) * 64, bytes, 64);
        return;
    }
    write_part(context, XMM, number * 16, bytes, 16);
    write_part(context, YMM_HIGH, number * 16, bytes + 16, 16);
    write_part(context, ZMM_HIGH, number * 32, bytes + 32, 32);
}

// Whether the area holds all parts: it does where the system has AVX-512 switched on.
static bool has_vectors(const ucontext_t *context) {
    const uint64_t wanted = 1 << XMM | 1 << YMM_HIGH | 1 << MASKS | 1 << ZMM_HIGH | 1 << ZMM_16_TO_31;
    struct _fpx_sw_bytes written;
    if (!context->uc_mcontext.fpregs) return false;
    memcpy(&written, (const uint8_t *)context->uc_mcontext.fpregs + 464, sizeof written);
    return written.magic1 == FP_XSTATE_MAGIC1 && (written.xstate_bv & wanted) == wanted;
}

static uint64_t general(const ucontext_t *context, int number) {
    static const uint8_t places[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                       REG_R8, REG_R9, REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    return context->uc_mcontext.gregs[places[number]];
}

// A memory operand: its address (for tiles that of row 0), what the index adds (for tiles the stride), and the byte behind it.
struct memory { uint64_t address, index; bool has_sib; const uint8_t *end; };

// Decodes the operand whose ModRM byte is `code`. `x` and `b` are the prefix's bits above the index's and the base's, 0 or 8; a
// displacement of one byte counts in `unit` bytes.
static struct memory decode_memory(const ucontext_t *context, const uint8_t *code, int x, int b, int unit) {
    struct memory operand = {0, 0, false, code + 1};
    int mode = code[0] >> 6, base = code[0] & 7;
    if (base == 4) {
        uint8_t sib = *operand.end++;
        int index = (sib >> 3 & 7) | x;
        operand.has_sib = true;
        if (index != 4) operand.index = general(context, index) << (sib >> 6);
        base = sib & 7;
    }
    bool without_base = mode == 0 && base == 5;
    if (!without_base) operand.address = general(context, base | b);
    if (mode == 1) {
        operand.address += (int64_t)(int8_t)*operand.end++ * unit;
    } else if (mode == 2 || without_base) {
        int32_t displacement;
        memcpy(&displacement, operand.end, 4);
        operand.end += 4;
        operand.address += (int64_t)displacement;
        if (without_base && !operand.has_sib) operand.address += (uint64_t)operand.end; // relative to the next instruction
    }
    return operand;
}

// ---- Tiles ----

// The only palette has eight tiles of up to 16 rows of 64 bytes. Each thread has its own, as on hardware.
struct tiles {
    bool configured;
    uint8_t start_row;
    struct { uint16_t row_bytes; uint8_t rows; uint8_t data[16][64]; } tile[8];
};
static __thread struct tiles tiles __attribute__((tls_model("initial-exec")));

static enum { UNASKED, EMULATED, NATIVE } permission;

static void load_configuration(const uint8_t *memory) {
    struct tiles next = {.configured = memory[0] == 1};
    if (memory[0] > 1) refuse(LDTILECFG, "no such palette");
    if (next.configured) {
        next.start_row = memory[1];
        for (int at = 2; at < 64; at++) {
            bool reserved = at < 16 || (at >= 32 && at < 48) || at >= 56;
            if (reserved && memory[at]) refuse(LDTILECFG, "a reserved byte is not zero");
        }
        for (int n = 0; n < 8; n++) {
            uint16_t row_bytes = memory[16 + 2 * n] | memory[17 + 2 * n] << 8;
            uint8_t rows = memory[48 + n];
            if (row_bytes > 64) refuse(LDTILECFG, "a tile's row has more than 64 bytes");
            if (rows > 16) refuse(LDTILECFG, "a tile has more than 16 rows");
            if (!rows != !row_bytes) refuse(LDTILECFG, "a tile has rows without bytes, or bytes without rows");
            next.tile[n].row_bytes = row_bytes;
            next.tile[n].rows = rows;
        }
    }
    tiles = next;
}

static void store_configuration(uint8_t *memory) {
    memset(memory, 0, 64);
    if (!tiles.configured) return;
    memory[0] = 1;
    memory[1] = tiles.start_row;
    for (int n = 0; n < 8; n++) {
        memory[16 + 2 * n] = tiles.tile[n].row_bytes; // at most 64: the higher byte is zero
        memory[48 + n] = tiles.tile[n].rows;
    }
}

static void check_tile(enum instruction which, int n) {
    if (!tiles.configured) refuse(which, "tiles are not configured");
    if (!tiles.tile[n].rows) refuse(which, "the configuration leaves a tile out");
    if (which != TILEZERO && tiles.tile[n].row_bytes % 4) refuse(which, "a tile's row is not of whole elements of 4 bytes");
}

// Rows below start_row are there already: hardware sets it where a page fault stopped the instruction.
static void move_tile(enum instruction which, int n, const struct memory *operand) {
    check_tile(which, n);
    size_t row_bytes = tiles.tile[n].row_bytes;
    if (tiles.start_row >= tiles.tile[n].rows) refuse(which, "start_row is beyond the tile's rows");
    for (int row = tiles.start_row; row < 16; row++) {
        uint8_t *data = tiles.tile[n].data[row], *memory = (uint8_t *)(operand->address + row * operand->index);
        bool inside = row < tiles.tile[n].rows;
        if (which == TILESTORED) {
            if (inside) memcpy(memory, data, row_bytes);
        } else {
            memset(data, 0, 64);
            if (inside) memcpy(data, memory, row_bytes);
        }
    }
    tiles.start_row = 0;
}

// c[m][n] += the sum over k of a[m][2k] * b[k][2n] + a[m][2k+1] * b[k][2n+1]. The manual sums the even products and the
// odd ones apart, each from zero by fused multiply-adds, then adds the two sums, then adds that to c.
static void multiply_tiles(int c, int a, int b) {
    check_tile(TDPBF16PS, c);
    check_tile(TDPBF16PS, a);
    check_tile(TDPBF16PS, b);
    int rows = tiles.tile[c].rows, pairs = tiles.tile[a].row_bytes / 4, columns = tiles.tile[c].row_bytes / 4;
    if (c == a || c == b || a == b) refuse(TDPBF16PS, "its three tiles are not three");
    if (tiles.tile[a].rows != rows) refuse(TDPBF16PS, "A has not as many rows as C");
    if (tiles.tile[b].rows != pairs) refuse(TDPBF16PS, "B has not as many rows as A has pairs in a row");
    if (tiles.tile[b].row_bytes != columns * 4) refuse(TDPBF16PS, "B's rows are not of as many bytes as C's");
    set_rounding();
    for (int m = 0; m < 16; m++) {
        uint16_t left[32], right[32];
        float even[16] = {0}, odd[16] = {0}, sums[16] = {0};
        memcpy(left, tiles.tile[a].data[m], 64);
        for (int k = 0; m < rows && k < pairs; k++) {
            memcpy(right, tiles.tile[b].data[k], 64);
            for (int n = 0; n < columns; n++) {
                even[n] = multiply_add(widen(left[2 * k]), widen(right[2 * n]), even[n]);
                odd[n] = multiply_add(widen(left[2 * k + 1]), widen(right[2 * n + 1]), odd[n]);
            }
        }
        if (m < rows) memcpy(sums, tiles.tile[c].data[m], columns * 4);
        for (int n = 0; m < rows && n < columns; n++) sums[n] = add(sums[n], add(even[n], odd[n]));
        memcpy(tiles.tile[c].data[m], sums, 64);
    }
    tiles.start_row = 0;
}

// Performs the instruction at `code` if it is one of the tiles', and gives the byte behind it; else NULL.
static const uint8_t *perform_tiles(const ucontext_t *context, const uint8_t *code) {
    enum { NONE, P66, PF3, PF2 }; // the prefixes, as VEX encodes them
    uint8_t prefix = code[2] & 3, opcode = code[3], modrm = code[4], wide_or_long = code[2] & 0x84;
    bool is_register = modrm >> 6 == 3;
    int reg = modrm >> 3 & 7, rm = modrm & 7, second = ~code[2] >> 3 & 15;
    int x = ~code[1] >> 3 & 8, b = ~code[1] >> 2 & 8;
    // Map 0F38; there are no tiles above 7.
    if ((code[1] & 0x9F) != 0x82 || wide_or_long || second > 7 || (is_register && b)) return NULL;
    if (second && opcode != 0x5C) return NULL;

    enum instruction which;
    if (opcode == 0x49 && !is_register && reg == 0 && prefix == NONE) which = LDTILECFG;
    else if (opcode == 0x49 && !is_register && reg == 0 && prefix == P66) which = STTILECFG;
    else if (opcode == 0x49 && modrm == 0xC0 && prefix == NONE) which = TILERELEASE;
    else if (opcode == 0x49 && is_register && rm == 0 && prefix == PF2) which = TILEZERO;
    else if (opcode == 0x4B && !is_register && prefix == PF2) which = TILELOADD;
    else if (opcode == 0x4B && !is_register && prefix == P66) which = TILELOADDT1;
    else if (opcode == 0x4B && !is_register && prefix == PF3) which = TILESTORED;
    else if (opcode == 0x5C && is_register && prefix == PF3) which = TDPBF16PS;
    else return NULL;
    // The processor has tiles: this is a fault of its own.
    if (permission == NATIVE) return NULL;
    if (permission == UNASKED) refuse(which, "the process has not asked for the permission to use tiles (arch_prctl)");

    struct memory operand = {.end = code + 5};
    if (!is_register) operand = decode_memory(context, code + 4, x, b, 1);
    uint8_t *memory = (uint8_t *)(operand.address + operand.index);
    switch (which) {
    case LDTILECFG: load_configuration(memory); break;
    case STTILECFG: store_configuration(memory); break;
    case TILERELEASE: tiles = (struct tiles){0}; break;
    case TILEZERO:
        check_tile(which, reg);
        memset(tiles.tile[reg].data, 0, sizeof tiles.tile[reg].data);
        tiles.start_row = 0;
        break;
    case TDPBF16PS: multiply_tiles(reg, rm, second); break;
    default:
        if (!operand.has_sib) return NULL;
        move_tile(which, reg, &operand);
    }
    count(which);
    return operand.end;
}

// ---- Vectors ----

// Performs the instruction at `code` if it is one of AVX512-BF16's, and gives the byte behind it; else NULL.
static const uint8_t *perform_vectors(ucontext_t *context, const uint8_t *code) {
    enum { PF3 = 2, PF2 = 3 };
    uint8_t p0 = code[1], p1 = code[2], p2 = code[3], opcode = code[4], modrm = code[5], prefix = p1 & 3;
    int reg = (modrm >> 3 & 7) | (~p0 >> 4 & 8) | (~p0 & 16), second = (~p1 >> 3 & 15) | (~p2 << 1 & 16);
    int x = ~p0 >> 3 & 8, b = ~p0 >> 2 & 8, mask_number = p2 & 7, size = 16 << (p2 >> 5 & 3);
    bool zeroing = p2 >> 7, broadcast = p2 >> 4 & 1, is_register = modrm >> 6 == 3;
    // Map 0F38, W0, a length that there is.
    if ((p0 & 15) != 2 || (p1 & 0x84) != 4 || size > 64) return NULL;
    if ((zeroing && !mask_number) || (broadcast && is_register)) return NULL;

    enum instruction which;
    if (opcode == 0x52 && prefix == PF3) which = VDPBF16PS;
    else if (opcode == 0x72 && prefix == PF3 && second == 0) which = VCVTNEPS2BF16;
    else if (opcode == 0x72 && prefix == PF2) which = VCVTNE2PS2BF16;
    else return NULL;
    if (!has_vectors(context)) return NULL;

    uint64_t mask = ~0ull;
    if (mask_number) read_part(context, MASKS, mask_number * 8, &mask, 8);
    uint32_t other[16] = {0}, old[16], first[16], results[16] = {0}; // `other` is the operand that may lie in memory
    int lanes = size / 4;
    const uint8_t *end = code + 6;
    if (is_register) {
        read_vector(context, (modrm & 7) | b | x << 1, other);
    } else {
        struct memory operand = decode_memory(context, code + 5, x, b, broadcast ? 4 : size);
        end = operand.end;
        for (int i = 0; i < lanes; i++) {
            // What is masked out is not read, but by VCVTNE2PS2BF16, which reads all.
            if (which != VCVTNE2PS2BF16 && !(mask >> i & 1)) continue;
            memcpy(&other[i], (const uint8_t *)(operand.address + operand.index) + (broadcast ? 0 : 4 * i), 4);
        }
    }
    read_vector(context, reg, old);
    read_vector(context, second, first);

    if (which == VDPBF16PS) {
        set_rounding();
        for (int i = 0; i < lanes; i++) {
            if (mask >> i & 1) {
                // The manual adds the higher product first, then the lower one, each by a fused multiply-add.
                float sum;
                memcpy(&sum, &old[i], 4);
                sum = multiply_add(widen(first[i] >> 16), widen(other[i] >> 16), sum);
                sum = multiply_add(widen(first[i]), widen(other[i]), sum);
                memcpy(&results[i], &sum, 4);
            } else if (!zeroing) {
                results[i] = old[i];
            }
        }
    } else {
        int words = which == VCVTNE2PS2BF16 ? 2 * lanes : lanes;
        uint16_t kept[32], converted[32] = {0};
        memcpy(kept, old, 64);
        for (int i = 0; i < words; i++) {
            if (mask >> i & 1) converted[i] = narrow(i < lanes ? other[i] : first[i - lanes]);
            else if (!zeroing) converted[i] = kept[i];
        }
        memcpy(results, converted, 64);
    }
    write_vector(context, reg, results);
    count(which);
    return end;
}

// ---- The process ----

static void on_illegal_instruction(int number, siginfo_t *info, void *data) {
    (void)info;
    ucontext_t *context = data;
    const uint8_t *code = (const uint8_t *)context->uc_mcontext.gregs[REG_RIP], *end = NULL;
    if (code[0] == 0xC4) end = perform_tiles(context, code);
    else if (code[0] == 0x62) end = perform_vectors(context, code);
    if (end) context->uc_mcontext.gregs[REG_RIP] = (greg_t)end;
    else signal(number, SIG_DFL); // executed again, it ends the process where it stands
}

static long call_system(long number, const long arguments[6]) {
    long result;
    register long fourth __asm__("r10") = arguments[3], fifth __asm__("r8") = arguments[4], sixth __asm__("r9") = arguments[5];
    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(number), "D"(arguments[0]), "S"(arguments[1]), "d"(arguments[2]), "r"(fourth), "r"(fifth), "r"(sixth)
                     : "rcx", "r11", "memory");
    if (number == SYS_arch_prctl && arguments[0] == 0x1023 && arguments[1] == 18) { // ARCH_REQ_XCOMP_PERM, XTILEDATA
        permission = result == 0 ? NATIVE : EMULATED;
        result = 0;
    }
    if (result < 0 && result > -4096) {
        errno = (int)-result;
        return -1;
    }
    return result;
}

long syscall(long number, ...) {
    long arguments[6];
    va_list list;
    va_start(list, number);
    for (int i = 0; i < 6; i++) arguments[i] = va_arg(list, long);
    va_end(list);
    return call_system(number, arguments);
}

int arch_prctl(int code, unsigned long address) {
    return (int)call_system(SYS_arch_prctl, (long[6]){code, (long)address});
}

__attribute__((constructor)) static void begin(void) {
    for (int part = YMM_HIGH; part < PARTS; part++) {
        uint32_t unused;
        __cpuid_count(0xD, part, parts[part].size, parts[part].offset, unused, unused);
    }
    parts[XMM].offset = 160; // as FXSAVE has it
    parts[XMM].size = 256;
    // On the thread's own stack: Rust's for signals is too small for AVX-512's registers and a handler.
    struct sigaction action = {.sa_sigaction = on_illegal_instruction, .sa_flags = SA_SIGINFO};
    sigaction(SIGILL, &action, NULL);
}

__attribute__((destructor)) static void end(void) {
    const char *wanted = getenv("EMULATE_BF16_COUNT");
    for (int i = 0; wanted && !strcmp(wanted, "1") && i < INSTRUCTIONS; i++)
        if (counts[i]) dprintf(STDERR_FILENO, "emulate_bf16: %s: %lu\n", names[i], counts[i]);
}
