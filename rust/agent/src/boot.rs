//! x
pub fn run() -> ! {
    loop {}
}
