/* The start of a program on an emulated Cortex-M4 or M55 board: a vector table, and the floating-point unit switched on
   before newlib's own start (rdimon), which prints through the emulator. */
#include <stddef.h>
#include <stdint.h>

extern uint32_t stack_top[];
void _start(void);
void reset(void);
static void stop(void);

typedef struct {
    uint32_t *stack;
    void (*handlers[15])(void);
} vector_table;

__attribute__((section(".vectors"), used)) static const vector_table vectors = {
    stack_top, {reset, stop, stop, stop, stop, stop},
};

void reset(void)
{
    volatile uint32_t *access = (volatile uint32_t *)0xE000ED88u; /* CPACR: coprocessors 10 and 11 */
    *access |= 0xFu << 20;
    __asm volatile("dsb\n isb");
    _start();
}

static void stop(void)
{
    for (;;) {
    }
}

/* Memory for the files of main.c; the network needs none. newlib would take it from where the emulator has no room. */
void *_sbrk(ptrdiff_t bytes);
void *_sbrk(ptrdiff_t bytes)
{
    static uint64_t heap[1024];
    static ptrdiff_t used;
    void *given = (char *)heap + used;
    if (used + bytes > (ptrdiff_t)sizeof heap)
        return (void *)-1;
    used += bytes;
    return given;
}
