//! What the engine did: plain numbers that a vCPU counts for itself and publishes now and then, so that
//! anyone may read them while it runs.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

macro_rules! counters {
    ($($(#[doc = $text:literal])+ $name:ident,)+) => {
        /// One vCPU's own numbers.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct Counters {
            $($(#[doc = $text])+ pub $name: u64,)+
        }

        /// The same as others read them: as they were when the vCPU last looked up.
        #[derive(Debug, Default)]
        pub struct Published {
            $($name: AtomicU64,)+
        }

        impl Counters {
            /// Names and values, in the order of declaration.
            pub fn named(&self) -> impl Iterator<Item = (&'static str, u64)> {
                [$((stringify!($name), self.$name),)+].into_iter()
            }
        }

        impl Published {
            /// Shows these.
            pub fn set(&self, counters: &Counters) {
                $(self.$name.store(counters.$name, Relaxed);)+
            }

            /// Adds what is shown to `sum`.
            pub fn add_to(&self, sum: &mut Counters) {
                $(sum.$name += self.$name.load(Relaxed);)+
            }
        }
    };
}

counters! {
    /// Instructions retired.
    instructions,
    /// Blocks decoded.
    blocks,
    /// Blocks translated.
    translations,
    /// Bytes of translated code, all that was ever made.
    code_bytes,
    /// Times everything translated was dropped.
    flushes,
    /// Times translated code was entered.
    entries,
    /// Accesses and fetches that the TLB did not know.
    tlb_misses,
    /// Times the addresses that code is found by became void.
    epochs,
    /// Stores that changed decoded code.
    invalidations,
    /// Returns to user space.
    exits,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_counters_published_add_up_by_name() {
        let (one, other) = (Published::default(), Published::default());
        one.set(&Counters { exits: 3, ..Counters::default() });
        other.set(&Counters { exits: 4, blocks: 1, ..Counters::default() });
        let mut sum = Counters::default();
        one.add_to(&mut sum);
        other.add_to(&mut sum);
        assert_eq!(sum.named().filter(|(_, value)| *value != 0).collect::<Vec<_>>(), [("blocks", 1), ("exits", 7)]);
    }
}
