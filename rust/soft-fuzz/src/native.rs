//! The host's CPU as executor: sequences run in this process, at fixed addresses.
//!
//! `ostler_fuzz_enter` loads every register and jumps to the sequence; the jump at the sequence's
//! end leads to `ostler_fuzz_exit`, which stores them again. An exception becomes a signal on an
//! alternate stack; its handler copies the registers out of the signal frame and resumes in
//! `ostler_fuzz_recover`. A timer on this thread ends sequences that do not end by themselves.
//!
//! While a sequence runs, FS holds a random base: the handler must not use thread-local storage,
//! which it achieves by only copying memory.

use crate::layout::*;
use crate::subject;
use ostler_soft::host::vex::host_has_all;
use std::arch::global_asm;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The executor's own state at [`CONTEXT`]; the assembly below knows the offsets.
#[repr(C, align(64))]
struct Context {
    fx: [u8; 512],
    gpr: [u64; 16],
    rflags: u64,
    rip: u64,
    fs: u64,
    gs: u64,
    host_rsp: u64,
    host_fs: u64,
    host_gs: u64,
    exit: u64,
    active: u64,
    signal: u64,
    vector: u64,
    error: u64,
    address: u64,
    ticks: u64,
    mxcsr: u64,
    watched: u64,
    _reserved: u64,
    far: u64,
    ymm: [u8; YMM_BYTES],
    has_ymm: u64,
}

const _: () = assert!(std::mem::offset_of!(Context, exit) as u64 == EXIT_POINTER - CONTEXT);
const _: () = assert!(std::mem::offset_of!(Context, active) == 704);
const _: () = assert!(std::mem::offset_of!(Context, mxcsr) == 752);
const _: () = assert!(std::mem::offset_of!(Context, ymm) == 784);
const _: () = assert!(std::mem::offset_of!(Context, has_ymm) == 1040);
const _: () = assert!(std::mem::offset_of!(Context, far) as u64 == FAR_POINTER - CONTEXT);

global_asm!(
    ".globl ostler_fuzz_enter",
    "ostler_fuzz_enter:",
    "push rbx",
    "push rbp",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "sub rsp, 8",
    "mov [{c} + 672], rsp",
    "rdfsbase rax",
    "mov [{c} + 680], rax",
    "rdgsbase rax",
    "mov [{c} + 688], rax",
    "mov rax, [{c} + 656]",
    "wrfsbase rax",
    "mov rax, [{c} + 664]",
    "wrgsbase rax",
    "fxrstor64 [{c}]",
    "cmp qword ptr [{c} + 1040], 0",
    "je 2f",
    ".irp i, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15",
    "vinsertf128 ymm\\i, ymm\\i, xmmword ptr [{c} + 784 + 16 * \\i], 1",
    ".endr",
    "2:",
    "mov qword ptr [{c} + 704], 1",
    "push qword ptr [{c} + 640]",
    "popfq",
    "mov rax, [{c} + 512]",
    "mov rcx, [{c} + 520]",
    "mov rdx, [{c} + 528]",
    "mov rbx, [{c} + 536]",
    "mov rsp, [{c} + 544]",
    "mov rbp, [{c} + 552]",
    "mov rsi, [{c} + 560]",
    "mov rdi, [{c} + 568]",
    "mov r8, [{c} + 576]",
    "mov r9, [{c} + 584]",
    "mov r10, [{c} + 592]",
    "mov r11, [{c} + 600]",
    "mov r12, [{c} + 608]",
    "mov r13, [{c} + 616]",
    "mov r14, [{c} + 624]",
    "mov r15, [{c} + 632]",
    "jmp qword ptr [{c} + 648]",
    ".globl ostler_fuzz_exit",
    "ostler_fuzz_exit:",
    "mov [{c} + 512], rax",
    "mov [{c} + 520], rcx",
    "mov [{c} + 528], rdx",
    "mov [{c} + 536], rbx",
    "mov [{c} + 544], rsp",
    "mov [{c} + 552], rbp",
    "mov [{c} + 560], rsi",
    "mov [{c} + 568], rdi",
    "mov [{c} + 576], r8",
    "mov [{c} + 584], r9",
    "mov [{c} + 592], r10",
    "mov [{c} + 600], r11",
    "mov [{c} + 608], r12",
    "mov [{c} + 616], r13",
    "mov [{c} + 624], r14",
    "mov [{c} + 632], r15",
    "mov rsp, [{c} + 672]",
    "mov qword ptr [{c} + 704], 0",
    "pushfq",
    "pop qword ptr [{c} + 640]",
    "fxsave64 [{c}]",
    "cmp qword ptr [{c} + 1040], 0",
    "je 2f",
    ".irp i, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15",
    "vextractf128 xmmword ptr [{c} + 784 + 16 * \\i], ymm\\i, 1",
    ".endr",
    "2:",
    ".globl ostler_fuzz_recover",
    "ostler_fuzz_recover:",
    "push 0x202",
    "popfq",
    "rdfsbase rax",
    "mov [{c} + 656], rax",
    "rdgsbase rax",
    "mov [{c} + 664], rax",
    "mov rax, [{c} + 680]",
    "wrfsbase rax",
    "mov rax, [{c} + 688]",
    "wrgsbase rax",
    "cmp qword ptr [{c} + 1040], 0",
    "je 2f",
    "vzeroupper",
    "2:",
    "fninit",
    "ldmxcsr [{c} + 752]",
    "add rsp, 8",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop rbp",
    "pop rbx",
    "ret",
    c = const CONTEXT,
);

extern "C" {
    fn ostler_fuzz_enter();
    fn ostler_fuzz_exit();
    fn ostler_fuzz_recover();
}

/// Timer ticks of [`TICK_NS`] that a sequence may take. Microseconds would do, but on a crowded virtual machine stores into
/// code that runs have been seen to cost so much that a short sequence took 300 ms of CPU time.
const PATIENCE: u64 = 150;
const TICK_NS: i64 = 20_000_000;
/// `gregs` indices in Linux's signal frame, in the order of the GPR encoding.
const GREGS: [i32; 16] = [
    libc::REG_RAX,
    libc::REG_RCX,
    libc::REG_RDX,
    libc::REG_RBX,
    libc::REG_RSP,
    libc::REG_RBP,
    libc::REG_RSI,
    libc::REG_RDI,
    libc::REG_R8,
    libc::REG_R9,
    libc::REG_R10,
    libc::REG_R11,
    libc::REG_R12,
    libc::REG_R13,
    libc::REG_R14,
    libc::REG_R15,
];
const SIGNALS: [i32; 5] = [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL, libc::SIGTRAP];

fn context() -> *mut Context {
    CONTEXT as *mut Context
}

extern "C" fn on_signal(signal: i32, _: *mut libc::siginfo_t, frame: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid frame, CONTEXT is mapped before the handler is installed.
    unsafe {
        let c = &mut *context();
        let m = &mut (*(frame as *mut libc::ucontext_t)).uc_mcontext;
        if signal == libc::SIGALRM {
            c.ticks += 1;
            if c.active == 0 && c.watched != 0 && c.ticks > PATIENCE {
                (*(c.watched as *const AtomicU32)).fetch_or(subject::WATCHDOG, Ordering::SeqCst);
            }
            if c.active == 0 || c.ticks < PATIENCE {
                return;
            }
        } else if c.active == 0 {
            // Not a sequence's doing: let it kill the process where it happened.
            libc::signal(signal, libc::SIG_DFL);
            return;
        }
        for (slot, &register) in c.gpr.iter_mut().zip(&GREGS) {
            *slot = m.gregs[register as usize] as u64;
        }
        c.rip = m.gregs[libc::REG_RIP as usize] as u64;
        c.rflags = m.gregs[libc::REG_EFL as usize] as u64;
        std::ptr::copy_nonoverlapping(m.fpregs as *const u8, c.fx.as_mut_ptr(), fx::END);
        upper_halves(m.fpregs as *const u8, &mut c.ymm);
        c.signal = signal as u64;
        c.vector = m.gregs[libc::REG_TRAPNO as usize] as u64;
        c.error = m.gregs[libc::REG_ERR as usize] as u64;
        c.address = m.gregs[libc::REG_CR2 as usize] as u64;
        c.active = 0;
        m.gregs[libc::REG_RIP as usize] = ostler_fuzz_recover as *const () as i64;
        m.gregs[libc::REG_RSP as usize] = c.host_rsp as i64;
        m.gregs[libc::REG_EFL as usize] = 0x202;
        let selectors = &mut m.gregs[libc::REG_CSGSFS as usize];
        *selectors = *selectors & !0xffff | CS64 as i64;
    }
}

/// Upper halves of the YMM registers from a signal frame's image: behind an XSAVE header, where the kernel's words in the
/// legacy area's unused part say that there is one.
unsafe fn upper_halves(image: *const u8, into: &mut [u8; YMM_BYTES]) {
    const MAGIC: (usize, u32) = (464, 0x4650_5853);
    const XSTATE_BV: usize = 512;
    const AVX: u8 = 4;
    const YMM: usize = 576;
    // SAFETY: the legacy area is there always, the rest where the kernel says so.
    unsafe {
        let extended = (image.add(MAGIC.0) as *const u32).read_unaligned() == MAGIC.1;
        if extended && *image.add(XSTATE_BV) & AVX != 0 {
            std::ptr::copy_nonoverlapping(image.add(YMM), into.as_mut_ptr(), YMM_BYTES);
        } else {
            into.fill(0);
        }
    }
}

/// Has the watchdog raise [`subject::WATCHDOG`] there when the interpreter does not come back.
pub fn watch(attention: &AtomicU32) {
    // SAFETY: only `Native`, which maps the context, hands out work to the interpreter's executor;
    // the handler reads single words.
    unsafe {
        (*context()).ticks = 0;
        (*context()).watched = attention as *const AtomicU32 as u64;
    }
}

/// Ends what [`watch`] began.
pub fn unwatch() {
    // SAFETY: as watch().
    unsafe { (*context()).watched = 0 };
}

/// What keeps this host from running sequences natively, if anything does.
pub fn obstacle() -> Option<&'static str> {
    const HWCAP2_FSGSBASE: u64 = 2;
    // SAFETY: getauxval has no preconditions.
    if unsafe { libc::getauxval(libc::AT_HWCAP2) } & HWCAP2_FSGSBASE == 0 {
        return Some("the host's kernel does not let programs write FS and GS bases");
    }
    None
}

static IN_USE: Mutex<()> = Mutex::new(());

/// The native executor. Its addresses are fixed, so there is one per process at a time.
pub struct Native {
    code: *mut u8,
    placed: (usize, usize),
    timer: libc::timer_t,
    _alternate_stack: Box<[u8]>,
    _only_one: MutexGuard<'static, ()>,
}

fn map(address: u64, size: usize, protection: i32) -> Result<*mut u8, String> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_POPULATE | libc::MAP_FIXED_NOREPLACE;
    // SAFETY: NOREPLACE keeps existing mappings.
    let at = unsafe { libc::mmap(address as *mut _, size, protection, flags, -1, 0) };
    if at != libc::MAP_FAILED {
        return Ok(at as *mut u8);
    }
    let error = std::io::Error::last_os_error();
    // With an executor gone and made anew (tests), its mappings are still there.
    match error.raw_os_error() {
        Some(libc::EEXIST) => Ok(address as *mut u8),
        _ => Err(format!("cannot map {size:#x} bytes at {address:#x}: {error}")),
    }
}

impl Native {
    /// Maps the areas and installs the signal handlers on this thread.
    pub fn new() -> Result<Self, String> {
        if let Some(obstacle) = obstacle() {
            return Err(obstacle.to_owned());
        }
        let only_one = IN_USE.lock().unwrap_or_else(PoisonError::into_inner);
        let rw = libc::PROT_READ | libc::PROT_WRITE;
        map(CONTEXT, 4096, rw)?;
        map(DATA, DATA_BYTES, rw)?;
        map(STACK, STACK_BYTES, rw)?;
        let page = map(READ_ONLY, READ_ONLY_BYTES, rw)?;
        let contents = read_only_page();
        let code = map_code()?;
        map(PATCH, PATCH_BYTES, rw | libc::PROT_EXEC)?;
        // SAFETY: the page was just mapped (or is ours and gets its protection back).
        unsafe {
            libc::mprotect(page as *mut _, READ_ONLY_BYTES, rw);
            std::ptr::copy_nonoverlapping(contents.as_ptr(), page, READ_ONLY_BYTES);
            libc::mprotect(page as *mut _, READ_ONLY_BYTES, libc::PROT_READ);
            std::ptr::write_bytes(code, 0xcc, CODE_BYTES);
            let stubs = stubs();
            code.add((STUBS - CODE) as usize).copy_from_nonoverlapping(stubs.as_ptr(), stubs.len());
            (*context()).exit = ostler_fuzz_exit as *const () as u64;
            (*context()).mxcsr = 0x1f80;
            (*context()).has_ymm = host_has_all() as u64;
        }
        let alternate_stack = install_handlers()?;
        let timer = start_timer()?;
        Ok(Self { code, placed: (0, 0), timer, _alternate_stack: alternate_stack, _only_one: only_one })
    }

    /// Runs a case from its start.
    pub fn run(&mut self, case: &Case, memory: &Memory, outcome: &mut Outcome) {
        self.place(case);
        // SAFETY: the areas are mapped; the assembly keeps the ABI's promises; what the sequence does
        // beyond its areas faults.
        unsafe {
            (DATA as *mut u8).copy_from_nonoverlapping(memory.data.as_ptr(), DATA_BYTES);
            (STACK as *mut u8).copy_from_nonoverlapping(memory.stack.as_ptr(), STACK_BYTES);
            let c = &mut *context();
            c.fx[..fx::END].copy_from_slice(&case.state.fx);
            c.ymm = case.state.ymm;
            c.gpr = case.state.gpr;
            (c.rflags, c.rip) = (case.state.rflags, case.state.rip);
            (c.fs, c.gs) = (case.state.fs, case.state.gs);
            (c.signal, c.ticks) = (0, 0);
            if case.bits == 32 {
                c.far = case.state.rip | (CS32 as u64) << 32;
                c.rip = STUBS + 16;
                set_data_segments(0x2b);
            }
            ostler_fuzz_enter();
            if case.bits == 32 {
                set_data_segments(0);
            }
            outcome.memory.data.as_mut_ptr().copy_from_nonoverlapping(DATA as *const u8, DATA_BYTES);
            outcome.memory.stack.as_mut_ptr().copy_from_nonoverlapping(STACK as *const u8, STACK_BYTES);
        }
        // SAFETY: the sequence is over; nothing else writes the context.
        let c = unsafe { &*context() };
        outcome.state.fx.copy_from_slice(&c.fx[..fx::END]);
        outcome.state.ymm = c.ymm;
        outcome.code.clear();
        if case.changes() {
            let size = case.image().len();
            // SAFETY: where the case was placed.
            outcome.code.extend_from_slice(unsafe { std::slice::from_raw_parts(case.state.rip as *const u8, size) });
        }
        outcome.state.gpr = c.gpr;
        (outcome.state.rflags, outcome.state.fs, outcome.state.gs) = (c.rflags, c.fs, c.gs);
        (outcome.end, outcome.state.rip) = match c.signal as i32 {
            0 => (End::Done, case.end()),
            libc::SIGALRM => (End::Limit, c.rip),
            _ => (fault(c), c.rip),
        };
        outcome.state.normalise(case.bits);
    }

    /// Puts the code in its place and INT3 where the code before it was.
    fn place(&mut self, case: &Case) {
        let image = case.image();
        // SAFETY: within the writable view of the code area, where a case was placed before.
        unsafe { std::ptr::write_bytes(self.code.add(self.placed.0), 0xcc, self.placed.1) };
        if case.changes() {
            self.placed = (0, 0);
            return Self::place_changing(case, &image);
        }
        let at = (case.state.rip - CODE) as usize;
        assert!(at + image.len() <= (STUBS - CODE) as usize, "the sequence does not fit the code area");
        // SAFETY: within the writable view of the code area, as just asserted.
        unsafe { self.code.add(at).copy_from_nonoverlapping(image.as_ptr(), image.len()) };
        self.placed = (at, image.len());
    }

    /// The same where the sequence may write to its code.
    fn place_changing(case: &Case, image: &[u8]) {
        let at = (case.state.rip - PATCH) as usize;
        assert!(at + image.len() <= PATCH_BYTES, "the sequence does not fit its area");
        // SAFETY: within the area, which is writable.
        unsafe {
            std::ptr::write_bytes(PATCH as *mut u8, 0xcc, PATCH_BYTES);
            (case.state.rip as *mut u8).copy_from_nonoverlapping(image.as_ptr(), image.len());
        }
    }
}

/// DS and ES, which 64-bit code ignores.
unsafe fn set_data_segments(selector: u16) {
    // SAFETY: 0 and Linux's user data segment can always be loaded.
    unsafe {
        std::arch::asm!("mov ds, {0:e}", "mov es, {0:e}", in(reg) selector as u32, options(nostack, preserves_flags))
    };
}

impl Drop for Native {
    fn drop(&mut self) {
        // SAFETY: the timer and the stack are ours. The mappings stay: the next executor takes them over.
        unsafe {
            libc::timer_delete(self.timer);
            let none = libc::stack_t { ss_sp: std::ptr::null_mut(), ss_flags: libc::SS_DISABLE, ss_size: 0 };
            libc::sigaltstack(&none, std::ptr::null_mut());
        }
    }
}

fn fault(c: &Context) -> End {
    let vector = c.vector as u8;
    let with_error = matches!(vector, 8 | 10..=14 | 17);
    let error = if with_error { c.error as u32 } else { 0 };
    End::fault(vector, error, if vector == 14 { c.address } else { 0 })
}

/// The code area twice: executable at its address, writable somewhere else.
fn map_code() -> Result<*mut u8, String> {
    // SAFETY: plain system calls; MAP_FIXED replaces at most an earlier executor's code area.
    unsafe {
        let fd = libc::memfd_create(c"ostler-fuzz-code".as_ptr(), libc::MFD_CLOEXEC);
        if fd < 0 || libc::ftruncate(fd, CODE_BYTES as i64) != 0 {
            return Err(format!("cannot make the code area: {}", std::io::Error::last_os_error()));
        }
        let flags = libc::MAP_SHARED | libc::MAP_POPULATE;
        let rw = libc::PROT_READ | libc::PROT_WRITE;
        let writable = libc::mmap(std::ptr::null_mut(), CODE_BYTES, rw, flags, fd, 0);
        let rx = libc::PROT_READ | libc::PROT_EXEC;
        let at = libc::mmap(CODE as *mut _, CODE_BYTES, rx, flags | libc::MAP_FIXED, fd, 0);
        libc::close(fd);
        if writable == libc::MAP_FAILED || at == libc::MAP_FAILED {
            return Err(format!("cannot map the code area: {}", std::io::Error::last_os_error()));
        }
        Ok(writable as *mut u8)
    }
}

fn install_handlers() -> Result<Box<[u8]>, String> {
    let mut stack = vec![0u8; 256 * 1024].into_boxed_slice();
    // SAFETY: the stack outlives its registration (it is kept in `Native`), the handler keeps to
    // what signal handlers may do.
    unsafe {
        let alternate = libc::stack_t { ss_sp: stack.as_mut_ptr() as *mut _, ss_flags: 0, ss_size: stack.len() };
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_signal as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
        let mut failed = libc::sigaltstack(&alternate, std::ptr::null_mut()) != 0;
        for signal in SIGNALS.into_iter().chain([libc::SIGALRM]) {
            failed |= libc::sigaction(signal, &action, std::ptr::null_mut()) != 0;
        }
        if failed {
            return Err(format!("cannot install signal handlers: {}", std::io::Error::last_os_error()));
        }
    }
    Ok(stack)
}

/// A periodic SIGALRM for this thread alone, by its own time: others may keep the host busy.
fn start_timer() -> Result<libc::timer_t, String> {
    // SAFETY: all structures are initialised, the timer id is written by the call.
    unsafe {
        let mut event: libc::sigevent = std::mem::zeroed();
        event.sigev_notify = libc::SIGEV_THREAD_ID;
        event.sigev_signo = libc::SIGALRM;
        event.sigev_notify_thread_id = libc::gettid();
        let mut timer: libc::timer_t = std::ptr::null_mut();
        let tick = libc::timespec { tv_sec: 0, tv_nsec: TICK_NS };
        let period = libc::itimerspec { it_interval: tick, it_value: tick };
        if libc::timer_create(libc::CLOCK_THREAD_CPUTIME_ID, &mut event, &mut timer) != 0
            || libc::timer_settime(timer, 0, &period, std::ptr::null_mut()) != 0
        {
            return Err(format!("cannot start the watchdog: {}", std::io::Error::last_os_error()));
        }
        Ok(timer)
    }
}
