//! Counters of enums whose variants have names, such as the outcomes of connections.

use std::fmt;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicU64, Ordering};

use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;

/// An enum whose variants have names. Declare one with [`named_enum!`](crate::named_enum).
pub trait Named: Copy + 'static {
    /// All variants in the order of their declaration.
    const ALL: &'static [Self];

    /// Position of this variant in [`Self::ALL`].
    fn index(self) -> usize;

    /// Name of this variant, as metrics and log lines show it.
    fn name(self) -> &'static str;
}

/// Declares an enum with a name for each variant, its [`Named`] implementation and its `COUNT`.
///
/// ```
/// wasinetd::named_enum! {
///     /// How a request ended.
///     pub enum Outcome {
///         /// In order.
///         Ok => "ok",
///         /// The client left early.
///         ClientGone => "client_gone",
///     }
/// }
/// use wasinetd::telemetry::counters::Named;
///
/// assert_eq!(Outcome::COUNT, 2);
/// assert_eq!(Outcome::ClientGone.name(), "client_gone");
/// ```
#[macro_export]
macro_rules! named_enum {
    (
        $(#[$attribute:meta])*
        $visibility:vis enum $enum:ident {
            $($(#[$variant_attribute:meta])* $variant:ident => $name:literal,)+
        }
    ) => {
        $(#[$attribute])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        $visibility enum $enum {
            $($(#[$variant_attribute])* $variant,)+
        }

        impl $enum {
            /// Number of variants.
            $visibility const COUNT: usize = <Self as $crate::telemetry::counters::Named>::ALL.len();
        }

        impl $crate::telemetry::counters::Named for $enum {
            const ALL: &'static [Self] = &[$(Self::$variant,)+];

            fn index(self) -> usize {
                self as usize
            }

            fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)+
                }
            }
        }
    };
}

/// One atomic counter for each variant of `E`. `N` is its `COUNT`.
pub struct Counters<E, const N: usize> {
    counts: [AtomicU64; N],
    of: PhantomData<fn(E)>,
}

impl<E: Named, const N: usize> Counters<E, N> {
    /// Counters at zero.
    pub const fn new() -> Self {
        const { assert!(E::ALL.len() == N, "one counter for each variant") };
        Self {
            counts: [const { AtomicU64::new(0) }; N],
            of: PhantomData,
        }
    }

    /// Adds one to the counter of `variant`.
    pub fn add(&self, variant: E) {
        self.counts[variant.index()].fetch_add(1, Ordering::Relaxed);
    }

    /// The count of `variant`.
    pub fn get(&self, variant: E) -> u64 {
        self.counts[variant.index()].load(Ordering::Relaxed)
    }

    /// All counts, in the order of [`Named::ALL`].
    pub fn all(&self) -> [u64; N] {
        std::array::from_fn(|index| self.counts[index].load(Ordering::Relaxed))
    }

    /// Writes one counter family, with the name of each variant as the value of `label`.
    ///
    /// # Errors
    ///
    /// Fails if the encoder cannot write.
    pub fn encode(
        &self,
        encoder: &mut DescriptorEncoder,
        metric: &str,
        help: &str,
        label: &str,
    ) -> fmt::Result {
        let mut family = encoder.encode_descriptor(metric, help, None, MetricType::Counter)?;
        for &variant in E::ALL {
            let count = ConstCounter::new(self.get(variant));
            count.encode(family.encode_family(&[(label, variant.name())])?)?;
        }
        Ok(())
    }
}

impl<E: Named, const N: usize> Default for Counters<E, N> {
    fn default() -> Self {
        Self::new()
    }
}

impl<E: Named, const N: usize> fmt::Debug for Counters<E, N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counts = E::ALL
            .iter()
            .map(|&variant| (variant.name(), self.get(variant)));
        f.debug_map().entries(counts).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    named_enum! {
        enum Colour {
            Red => "red",
            Green => "green",
        }
    }

    #[test]
    fn each_variant_has_a_counter_of_its_own() {
        let counters = Counters::<Colour, { Colour::COUNT }>::new();
        counters.add(Colour::Green);
        counters.add(Colour::Green);
        counters.add(Colour::Red);
        assert_eq!(counters.all(), [1, 2]);
        assert_eq!(counters.get(Colour::Green), 2);
        assert_eq!(format!("{counters:?}"), r#"{"red": 1, "green": 2}"#);
    }
}
