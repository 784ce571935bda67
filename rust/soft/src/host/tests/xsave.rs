//! XSAVE images against the host's own instructions, and what the host cannot show.

use std::arch::asm;

use crate::host::fpstate::FpState;
use crate::host::fxsave::{BadImage, Format};
use crate::host::xsave::{area_bytes, in_use, xcr0_is_valid, xrstor, xsave, Restore, Save, AVX, SSE, X87};

const LONG: Format = Format { wide_pointers: true, sixteen_registers: true };
const LEGACY: Format = Format { wide_pointers: false, sixteen_registers: false };
const ALL: u64 = X87 | SSE | AVX;
const AREA: usize = 832;

#[repr(C, align(64))]
#[derive(Clone)]
struct Area([u8; 1024]);

impl Area {
    fn header(&self) -> [u64; 2] {
        [512, 520].map(|at| u64::from_le_bytes(self.0[at..at + 8].try_into().expect("eight bytes")))
    }

    fn set_header(&mut self, present: u64, compaction: u64) {
        self.0[512..520].copy_from_slice(&present.to_le_bytes());
        self.0[520..528].copy_from_slice(&compaction.to_le_bytes());
    }
}

/// Every component in use, distinct bytes.
fn sample() -> FpState {
    let mut state = FpState::initial();
    state.set_control_and_status(0x027F, 0x2841);
    state.set_ftw_abridged(0xE0);
    state.set_fip(0x0000_7FFF_1234_5678);
    state.set_mxcsr(0x9FC1);
    (0..8).for_each(|i| state.set_st(i, [i as u8 + 1; 10]));
    (0..16).for_each(|i| state.set_xmm(i, 0x1111_1111_1111_1111_1111 * (i as u128 + 1)));
    (0..16).for_each(|i| state.set_ymm_high(i, (0x77 * (i as u128 + 1)) << 100));
    state
}

macro_rules! on_host {
    ($save:literal, $load:expr, $load_mask:expr, $mask:expr, $area:expr) => {{
        let (mask, load_mask) = ($mask as u32, $load_mask as u32);
        let mut mxcsr = 0_u32;
        // SAFETY: both areas are 64-byte aligned and larger than x87, SSE and AVX need; all registers
        // that the loaded state changes are declared, x87 and MXCSR are put back.
        unsafe {
            asm!(
                "stmxcsr [{csr}]", "xrstor64 [{from}]", "mov eax, {mask:e}",
                concat!($save, " [{to}]"), "fninit", "vzeroupper", "ldmxcsr [{csr}]",
                csr = in(reg) &raw mut mxcsr, from = in(reg) &raw const $load, to = in(reg) &raw mut $area,
                mask = in(reg) mask, inout("eax") load_mask => _, in("edx") 0,
                out("ymm0") _, out("ymm1") _, out("ymm2") _, out("ymm3") _, out("ymm4") _, out("ymm5") _,
                out("ymm6") _, out("ymm7") _, out("ymm8") _, out("ymm9") _, out("ymm10") _, out("ymm11") _,
                out("ymm12") _, out("ymm13") _, out("ymm14") _, out("ymm15") _,
                out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
                out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _,
            );
        }
    }};
}

fn host_can() -> bool {
    std::is_x86_feature_detected!("avx") && std::is_x86_feature_detected!("xsavec")
}

/// The sample as a standard image with all components present.
fn full_image() -> Area {
    let mut area = Area([0; 1024]);
    area.0.copy_from_slice(sample().bytes());
    area.set_header(ALL, 0);
    area
}

#[test]
fn xsave_of_every_request_equals_the_hosts() {
    if !host_can() {
        return;
    }
    let load = full_image();
    for mask in 0..=ALL {
        let (mut host, mut guest) = (Area([0xA5; 1024]), Area([0xA5; 1024]));
        on_host!("xsave64", load, ALL, mask, host);
        xsave(&sample(), &mut guest.0, mask, LONG, Save::Plain);
        assert_eq!(masked(&guest), masked(&host), "XSAVE {mask}");

        let (mut host, mut guest) = (Area([0xA5; 1024]), Area([0xA5; 1024]));
        on_host!("xsavec64", load, ALL, mask, host);
        xsave(&sample(), &mut guest.0, mask, LONG, Save::Compacted);
        assert_eq!(masked(&guest), masked(&host), "XSAVEC {mask}");
    }
}

/// Without the MXCSR mask, which is the host's, and the bytes above ST registers.
fn masked(area: &Area) -> Vec<u8> {
    let mut bytes = area.0[..AREA + 64].to_vec();
    bytes[28..32].fill(0);
    bytes
}

#[test]
fn xrstor_of_every_request_equals_the_hosts() {
    if !host_can() {
        return;
    }
    for compaction in [0, 1 << 63 | ALL] {
        for (mask, present) in (0..=ALL).flat_map(|mask| (0..=ALL).map(move |present| (mask, present))) {
            let mut image = full_image();
            image.set_header(present, compaction);
            image.0[528..576].fill(0);
            let mut host = Area([0; 1024]);
            // What is not requested keeps its values, which here are those the compiler left; so only
            // requested components compare.
            on_host!("xsave64", image, mask, mask, host);
            let mut state = sample();
            xrstor(&mut state, &image.0, mask, ALL, LONG, Restore::User).expect("a valid image");
            let mut guest = Area([0; 1024]);
            xsave(&state, &mut guest.0, mask, LONG, Save::Plain);
            guest.set_header(0, 0);
            host.set_header(0, 0);
            if compaction != 0 && mask & SSE == 0 || mask & (SSE | AVX) == 0 {
                host.0[24..28].copy_from_slice(&guest.0[24..28]);
            }
            assert_eq!(masked(&guest), masked(&host), "XRSTOR {mask} of {present}, XCOMP_BV {compaction:x}");
        }
    }
}

#[test]
fn in_use_of_the_initial_state_is_nothing() {
    assert_eq!(in_use(&FpState::initial()), 0);
    assert_eq!(in_use(&sample()), ALL);
}

#[test]
fn xsaveopt_of_an_initial_component_leaves_memory_alone_and_clears_its_bit() {
    let mut image = Area([0xA5; 1024]);
    image.set_header(ALL, 0);
    let mut state = FpState::initial();
    state.set_xmm(3, 1);

    let written = xsave(&state, &mut image.0, ALL, LONG, Save::Optimized);

    assert_eq!(image.header()[0], SSE);
    assert_eq!(written.parts(), [24..32, 160..416, 512..520]);
    assert!(image.0[..24].iter().chain(&image.0[576..]).all(|&byte| byte == 0xA5));
}

#[test]
fn xsave_outside_long_mode_writes_eight_registers() {
    let mut image = Area([0xA5; 1024]);

    let written = xsave(&sample(), &mut image.0, ALL, LEGACY, Save::Plain);

    assert_eq!(written.parts(), [0..24, 24..32, 32..160, 160..288, 512..520, 576..704]);
}

#[test]
fn xsavec_with_changed_mxcsr_saves_sse_even_if_registers_are_zero() {
    let mut image = Area([0; 1024]);
    let mut state = FpState::initial();
    state.set_mxcsr(0x1FA0);

    xsave(&state, &mut image.0, ALL, LONG, Save::Compacted);

    assert_eq!(image.header(), [SSE, 1 << 63 | ALL]);
}

#[test]
fn xrstor_of_a_bad_image_is_refused_and_loads_nothing() {
    let good = full_image();
    let bad = |change: &dyn Fn(&mut Area)| {
        let mut image = good.clone();
        image.0[528..576].fill(0);
        change(&mut image);
        image
    };
    let cases = [
        ("component not enabled", bad(&|i| i.set_header(ALL | 1 << 9, 0)), Restore::User),
        ("standard with XCOMP_BV", bad(&|i| i.set_header(ALL, 1)), Restore::User),
        ("standard with byte 16", bad(&|i| i.0[528] = 1), Restore::User),
        ("reserved MXCSR bit", bad(&|i| i.0[26] = 1), Restore::User),
        ("present, not in the layout", bad(&|i| i.set_header(ALL, 1 << 63 | SSE)), Restore::User),
        ("layout not enabled", bad(&|i| i.set_header(0, 1 << 63 | 1 << 9)), Restore::User),
        ("compacted with byte 63", bad(&|i| (i.set_header(ALL, 1 << 63 | ALL), i.0[575] = 1).0), Restore::User),
        ("XRSTORS of the standard format", bad(&|_| ()), Restore::Supervisor),
    ];
    for (what, image, restore) in cases {
        let mut state = FpState::initial();

        assert_eq!(xrstor(&mut state, &image.0, ALL, ALL, LONG, restore), Err(BadImage), "{what}");

        assert_eq!(state.bytes(), FpState::initial().bytes(), "{what}");
    }
}

#[test]
fn area_bytes_follows_the_enabled_components() {
    assert_eq!(area_bytes(X87 | SSE, false), 576);
    assert_eq!(area_bytes(ALL, false), 832);
    assert_eq!(area_bytes(ALL, true), 832);
}

#[test]
fn xcr0_needs_x87_and_sse_below_avx() {
    let valid = [0, 1, 3, 7, 5, 9].map(|value| xcr0_is_valid(value, ALL));

    assert_eq!(valid, [false, true, true, true, false, false]);
    assert!(!xcr0_is_valid(7, X87 | SSE));
}
