//! What can go wrong in the interrupt hardware's interface, and the errno KVM has for it.

use super::lapic::InvalidState;

/// Why a request to the interrupt hardware was refused.
#[derive(Debug, thiserror::Error)]
pub enum IrqError {
    /// A vCPU with this id exists.
    #[error("vCPU {0} already has a local APIC")]
    VcpuExists(u32),
    /// The id is beyond what KVM allows.
    #[error("vCPU id {0} is above the limit of 4095")]
    VcpuIdTooLarge(u32),
    /// A routing entry or table that KVM refuses.
    #[error("GSI routing entry for GSI {gsi}: {reason}")]
    Routing {
        /// The entry's GSI.
        gsi: u32,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// An irqfd request that cannot be served.
    #[error("irqfd for file descriptor {fd}: {reason}")]
    Irqfd {
        /// The descriptor as given.
        fd: i32,
        /// What is wrong with it.
        reason: &'static str,
        /// KVM's error number for it.
        errno: i32,
    },
    /// The host refused a resource.
    #[error("irqfd: the host refused {what}: {source}")]
    Host {
        /// What was asked for.
        what: &'static str,
        /// Why it was refused.
        source: std::io::Error,
    },
    /// The PIT exists already, or does not exist yet.
    #[error("the PIT {0}")]
    Pit(&'static str),
    /// KVM_HC_SEND_IPI with an ICR it does not take.
    #[error("KVM_HC_SEND_IPI with ICR {0:#x}: logical destinations and shorthands are not possible")]
    PvIpi(u32),
    /// A saved state that no chip can be in.
    #[error("saved state of the {chip}: {reason}")]
    InvalidState {
        /// Which chip's.
        chip: &'static str,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A local APIC's saved state that it cannot be in.
    #[error(transparent)]
    InvalidLapicState(#[from] InvalidState),
}

impl IrqError {
    /// The error number KVM returns in this case.
    pub fn errno(&self) -> i32 {
        match self {
            Self::VcpuExists(_) => libc::EEXIST,
            Self::VcpuIdTooLarge(_) | Self::Routing { .. } | Self::PvIpi(_) => libc::EINVAL,
            Self::InvalidState { .. } | Self::InvalidLapicState(_) => libc::EINVAL,
            Self::Irqfd { errno, .. } => *errno,
            Self::Host { source, .. } => source.raw_os_error().unwrap_or(libc::ENOMEM),
            Self::Pit("already exists") => libc::EEXIST,
            Self::Pit(_) => libc::ENXIO,
        }
    }
}
