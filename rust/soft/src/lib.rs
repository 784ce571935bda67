//! Ostler's software CPU: what Linux's KVM does inside the kernel, done in user space.
//!
//! A `System` plays `/dev/kvm`, a `Vm` a VM file descriptor, a `Vcpu` a vCPU's: the same
//! requests on the same structures (Documentation/virt/kvm/api.rst). Inside, `cpu` interprets
//! x86-64, `mem` holds the memory slots, `irqchip` the interrupt controllers and timers, and
//! `host` runs SIMD and x87 instructions on the host's own units.
//!
//! Nothing here knows of Python; `rust/soft-py` is the shell that does.

mod board;
pub mod clock;
pub mod counters;
pub mod cpu;
pub mod host;
mod hypercalls;
mod ioctl;
mod ioeventfd;
pub mod irqchip;
mod mce;
pub mod mem;
mod peers;
mod rest;
mod runpage;
mod steal;
pub mod system;
pub mod vcpu;
pub mod vm;

pub use ioctl::requests;
pub use system::System;
pub use vcpu::Vcpu;
pub use vm::Vm;
