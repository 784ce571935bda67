//! A virtual CPU as user space drives it: KVM_RUN with its shared page, and the requests.
//!
//! # One call of `run`
//! 1. The exit user space has just handled is completed: what it supplied goes to the instruction
//!    that waits for it. That instruction is executed again now if `run` is to return at once, as
//!    the state user space sees then must be that of a completed instruction.
//! 2. Writes that the interpreter has posted leave first, one exit each.
//! 3. The interpreter runs until it has an exit, is kicked, halts or waits for SIPI; the last two
//!    are slept through here.
//!
//! While the vCPU's thread is in guest code `in_guest` is set: only then may it touch guest memory,
//! and whoever changes memory waits for it (`peers`).

use crate::board::{Local, VcpuBoard};
use crate::clock::{lock, monotonic_ns};
use crate::cpu::lockstep::Lockstep;
use crate::cpu::run::RunEnd;
use crate::cpu::state::rflags;
use crate::cpu::translate::{Budget, HOT, MEMORY};
use crate::cpu::{attention, Board, Cpu, Exit};
use crate::ioctl::requests::*;
use crate::ioctl::{cpuid, events, int, msrs, regs, sregs, xstate, Answer};
use crate::rest::{Rest, Turn};
use crate::runpage::RunPage;
use kvm_bindings::*;
use std::sync::atomic::Ordering::*;
use std::sync::{Arc, Mutex};

pub(crate) use crate::runpage::RUN_PAGE_BYTES;

/// The environment variable that keeps a vCPU to the interpreter when it says `interp`, and has the
/// translator follow it when it says `lockstep`.
const ENGINE: &str = "OSTLER_ENGINE";

/// The environment variable with the MiB that a VM's translations may take.
const LIMIT: &str = "OSTLER_TRANSLATION_MIB";

fn memory() -> usize {
    let mib = std::env::var(LIMIT).ok().and_then(|text| text.parse::<usize>().ok());
    mib.and_then(|mib| mib.checked_mul(1 << 20)).map_or(MEMORY, |bytes| bytes.min(1 << 30))
}

/// What only one thread at a time may hold.
struct Core {
    cpu: Box<Cpu>,
    /// The read exit that user space is handling.
    waiting: Option<Exit>,
    /// The second engine behind `cpu`, where that is asked for.
    lockstep: Option<Box<Lockstep>>,
    /// It is to get a translator when it runs: by then it is known how many vCPUs share the memory for that.
    translate: bool,
    rest: Rest,
}

struct Inner {
    local: Arc<Local>,
    page: RunPage,
    core: Mutex<Core>,
}

/// A virtual CPU; clones are handles on the same one. Every method may be called from any thread;
/// requests wait while `run` runs, but for KVM_NMI.
#[derive(Clone)]
pub struct Vcpu {
    inner: Arc<Inner>,
}

impl Vcpu {
    pub(crate) fn new(local: Arc<Local>) -> Answer<Self> {
        let page = RunPage::new().ok_or(libc::ENOMEM)?;
        let id = local.peer.id;
        let engine = std::env::var_os(ENGINE).unwrap_or_default();
        let mut board: Box<dyn Board> = Box::new(VcpuBoard(local.clone()));
        let mut lockstep = None;
        if engine == "lockstep" {
            local.steal.frozen.store(true, Relaxed);
            let machine = local.machine.clone();
            let peek = Box::new(move |gpa, into: &mut [u8]| machine.slots().read(gpa, into));
            let (follower, recorder) = Lockstep::new(board, peek).ok_or(libc::ENOMEM)?;
            (lockstep, board) = (Some(follower), recorder);
        }
        let mut cpu = Cpu::new(id, local.machine.slots(), local.peer.shared.clone(), board);
        cpu.wait_sipi = local.lapic().is_some() && !local.machine.is_boot_vcpu(id);
        let translate = engine != "interp" && engine != "lockstep";
        let core = Mutex::new(Core { cpu, waiting: None, lockstep, translate, rest: Rest::new(monotonic_ns()) });
        Ok(Self { inner: Arc::new(Inner { local, page, core }) })
    }

    /// KVM_RUN: `Ok` with an exit in the page, `Err(EINTR)` when kicked.
    pub fn run(&self) -> Answer<()> {
        let inner = &*self.inner;
        let mut core = lock(&inner.core);
        if std::mem::take(&mut core.translate) {
            // Without memory for code the interpreter does it all.
            core.cpu.use_translator(HOT, Budget::share(memory(), inner.local.machine.peers.len()));
        }
        let inside = inner.local.peer.inside();
        let shutdown = inner.local.mce.take_shutdown().then_some(Exit::Shutdown);
        let exit = shutdown.or_else(|| inner.advance(&mut core));
        drop(inside);
        let result = match exit {
            Some(exit) => {
                core.cpu.counters.exits += 1;
                inner.page.fill(&exit);
                if matches!(exit, Exit::Io { write: None, .. } | Exit::Mmio { write: None, .. }) {
                    core.waiting = Some(exit);
                }
                Ok(())
            }
            None if inner.local.window_open.swap(false, Relaxed) => {
                inner.page.set_reason(KVM_EXIT_IRQ_WINDOW_OPEN);
                Ok(())
            }
            None => {
                inner.page.set_reason(KVM_EXIT_INTR);
                Err(libc::EINTR)
            }
        };
        core.cpu.publish_counters();
        inner.publish_state(&core.cpu);
        result
    }

    /// `struct kvm_run` and the port-data page behind it: address and bytes. They live as long as
    /// any handle on this vCPU.
    pub fn run_page(&self) -> (*mut u8, usize) {
        (self.inner.page.address(), RUN_PAGE_BYTES)
    }

    /// Makes the running `run`, or else the next, return EINTR.
    pub fn kick(&self) {
        self.inner.local.peer.kick();
    }

    /// Instructions retired since the vCPU was made; waits for a running `run`.
    pub fn instructions(&self) -> u64 {
        lock(&self.inner.core).cpu.retired
    }

    /// One request; `arg` holds its structure and is updated in place. Errors are errno values.
    pub fn ioctl(&self, request: u32, arg: &mut [u8]) -> Answer {
        let inner = &*self.inner;
        let local = &*inner.local;
        // Does not wait for a running vCPU: it is meant for one.
        if request == KVM_NMI {
            local.raise_nmi();
            return Ok(0);
        }
        let mut core = lock(&inner.core);
        // Requests that look into guest memory (page tables) are "in the guest" meanwhile.
        let _inside = local.peer.inside();
        if local.peer.shared.attention.load(SeqCst) & attention::SLOTS != 0 {
            core.cpu.take_slots();
        }
        inner.answer(&mut core, request, arg)
    }
}

impl Inner {
    /// Runs until there is an exit; `None` when `run` is to return without one.
    fn advance(&self, core: &mut Core) -> Option<Exit> {
        let peer = &self.local.peer;
        self.enter(core);
        let at_once = self.page.immediate_exit();
        if core.cpu.io.in_progress() && (at_once || peer.kick_waits()) {
            if let Some(exit) = self.finish_instruction(core) {
                return Some(exit);
            }
        }
        loop {
            let kicked = peer.take_kick();
            if let Some(write) = core.cpu.io.queue.pop_front() {
                if kicked {
                    peer.kick();
                }
                if let Some(lockstep) = &mut core.lockstep {
                    lockstep.handed_out(write);
                }
                return Some(write);
            }
            if kicked || at_once || self.local.window_open.load(Relaxed) {
                return None;
            }
            if peer.clock_stale.swap(false, SeqCst) {
                self.local.publish_clock();
                if let (Some(lockstep), Some((gpa, size))) = (&mut core.lockstep, self.local.clock_page()) {
                    lockstep.host_wrote(gpa, size);
                }
            }
            let end = match &mut core.lockstep {
                Some(lockstep) => lockstep.run(&mut core.cpu),
                None => core.cpu.run(),
            };
            match end {
                RunEnd::Exit(exit) => return Some(self.leave(&mut core.cpu, exit)),
                RunEnd::Kicked => {}
                RunEnd::Halted if peer.unhalted.swap(false, SeqCst) => core.cpu.halted = false,
                RunEnd::Halted | RunEnd::WaitSipi => self.sleep(core),
            }
        }
    }

    /// Sleeps until there is something to do, and gives memory back when there has not been for a while.
    fn sleep(&self, core: &mut Core) {
        let wanted = attention::IRQ | attention::EVENT | attention::KICK;
        loop {
            let now_ns = monotonic_ns();
            match core.rest.halts(now_ns, core.cpu.retired) {
                Some(Turn::Rest) if core.lockstep.is_none() => core.cpu.rest(),
                Some(Turn::Stir) => core.cpu.stir(),
                _ => core.cpu.rest_on(),
            }
            if self.local.peer.sleep_until(wanted, core.rest.patience(now_ns)) {
                return;
            }
        }
    }

    /// Step 1 of the file's head, and what user space asks through the page.
    fn enter(&self, core: &mut Core) {
        let cpu = &mut core.cpu;
        if cpu.shared.attention.load(SeqCst) & attention::SLOTS != 0 {
            cpu.take_slots();
        }
        if let Some(exit) = core.waiting.take() {
            let value = self.page.answer(&exit);
            cpu.io.complete(value);
            if let Some(lockstep) = &mut core.lockstep {
                lockstep.complete(value);
            }
        }
        if self.local.lapic().is_none() {
            self.local.set_cr8(self.page.cr8());
            let wanted = self.page.request_interrupt_window();
            self.local.window_wanted.store(wanted, Relaxed);
            if wanted {
                cpu.shared.raise(attention::IRQ);
            }
        }
    }

    /// Executes the instruction whose reads are answered, and no other.
    fn finish_instruction(&self, core: &mut Core) -> Option<Exit> {
        let cpu = &mut core.cpu;
        let end = match &mut core.lockstep {
            Some(lockstep) => lockstep.step(cpu),
            None => cpu.step(),
        };
        match end {
            None => {
                cpu.io.retire();
                None
            }
            Some(RunEnd::Exit(exit)) => Some(self.leave(cpu, exit)),
            Some(_) => None,
        }
    }

    fn leave(&self, cpu: &mut Cpu, exit: Exit) -> Exit {
        if exit == Exit::Hlt {
            // User space waits for the interrupt; entered again, the CPU goes on after HLT.
            cpu.halted = false;
        }
        exit
    }

    /// What `kvm_run` says after every exit.
    fn publish_state(&self, cpu: &Cpu) {
        let interruptible = cpu.sys_flags as u64 & rflags::IF != 0;
        let ready = self.local.lapic().is_some()
            || interruptible && cpu.shadow == 0 && cpu.pending.interrupt.is_none() && cpu.pending.exception.is_none();
        self.page.publish(interruptible, ready, self.local.cr8(), self.local.apic_base());
    }

    fn answer(&self, core: &mut Core, request: u32, arg: &mut [u8]) -> Answer {
        let local = &*self.local;
        let cpu = &mut *core.cpu;
        match request {
            KVM_GET_REGS => regs::get_regs(cpu, arg),
            KVM_SET_REGS => {
                core.waiting = None;
                regs::set_regs(cpu, arg)?;
                self.reset_ends_halt(&mut core.cpu)
            }
            KVM_GET_SREGS => sregs::get_sregs(cpu, local, arg),
            KVM_SET_SREGS => {
                sregs::set_sregs(cpu, local, arg)?;
                self.reset_ends_halt(&mut core.cpu)
            }
            KVM_GET_SREGS2 => sregs::get_sregs2(cpu, local, arg),
            KVM_SET_SREGS2 => {
                sregs::set_sregs2(cpu, local, arg)?;
                self.reset_ends_halt(&mut core.cpu)
            }
            KVM_GET_FPU => xstate::get_fpu(cpu, arg),
            KVM_SET_FPU => xstate::set_fpu(cpu, arg),
            KVM_GET_XSAVE | KVM_GET_XSAVE2 => xstate::get_xsave(cpu, arg),
            KVM_SET_XSAVE => xstate::set_xsave(cpu, arg),
            KVM_GET_XCRS => xstate::get_xcrs(cpu, arg),
            KVM_SET_XCRS => xstate::set_xcrs(cpu, arg),
            KVM_GET_MSRS => msrs::get(cpu, arg),
            KVM_SET_MSRS => msrs::set(cpu, local, arg),
            KVM_GET_DEBUGREGS => regs::get_debugregs(cpu, arg),
            KVM_SET_DEBUGREGS => regs::set_debugregs(cpu, arg),
            KVM_SET_GUEST_DEBUG => regs::set_guest_debug(cpu, arg),
            KVM_TRANSLATE => regs::translate(cpu, arg),
            KVM_GET_VCPU_EVENTS => events::get_events(cpu, local, arg),
            KVM_SET_VCPU_EVENTS => events::set_events(cpu, local, arg),
            KVM_GET_MP_STATE => events::get_mp_state(cpu, local, arg),
            KVM_SET_MP_STATE => events::set_mp_state(cpu, local, arg),
            KVM_INTERRUPT => events::interrupt(cpu, local, arg),
            KVM_GET_CPUID2 => cpuid::get(cpu, arg),
            KVM_SET_CPUID2 => {
                let bits = cpuid::set(cpu, arg)?;
                local.follow_cpuid(bits, &cpu.cpuid);
                Ok(0)
            }
            KVM_GET_LAPIC => crate::ioctl::put(arg, &local.lapic().ok_or(libc::EINVAL)?.state()),
            KVM_SET_LAPIC => {
                let page = crate::ioctl::get(arg)?;
                local.lapic().ok_or(libc::EINVAL)?.set_state(&page).map_err(|_| libc::EINVAL)?;
                local.peer.raise(attention::IRQ | attention::EVENT);
                Ok(0)
            }
            KVM_GET_TSC_KHZ => Ok(local.peer.tsc.khz() as i64),
            KVM_SET_TSC_KHZ => self.set_tsc_khz(int(arg)?),
            KVM_X86_SETUP_MCE => local.mce.set_up(crate::ioctl::get(arg)?),
            KVM_X86_SET_MCE => local.mce.raise(cpu, arg),
            KVM_KVMCLOCK_CTRL if local.note_stopped() => Ok(0),
            // Signals are not how this engine is interrupted: `kick` is.
            KVM_SET_SIGNAL_MASK => Ok(0),
            _ => Err(libc::EINVAL),
        }
    }

    fn reset_ends_halt(&self, cpu: &mut Cpu) -> Answer {
        if self.local.machine.is_boot_vcpu(self.local.peer.id) && sregs::looks_reset(cpu) {
            cpu.halted = false;
        }
        Ok(0)
    }

    /// 0 asks for the host's own frequency.
    fn set_tsc_khz(&self, khz: u64) -> Answer {
        let khz = u32::try_from(khz).map_err(|_| libc::EINVAL)?;
        let tsc = &self.local.peer.tsc;
        let khz = if khz == 0 { tsc.host_khz() } else { khz };
        self.local.change_tsc(|peer| peer.tsc.set_khz(khz));
        Ok(0)
    }
}
