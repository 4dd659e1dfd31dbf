//! How many connections fit on this machine, and which bound stops more.

use std::io;
use std::path::Path;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::sandbox::{HOST_STACK_BYTES, PoolSize, Requirements};

/// How many connections fit, by each bound.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// The bounds of this machine.
    pub bounds: Vec<Bound>,
    /// The bound if each guest opens as many files as it may.
    ///
    /// Only advice: few guests open any file, and thousands of connections must fit where they do
    /// not.
    pub all_open: Bound,
    mappings: Option<Mappings>,
}

/// A resource of this machine, and how many connections it suffices for.
#[derive(Clone, Debug, PartialEq)]
pub struct Bound {
    /// Name of the resource.
    pub name: &'static str,
    /// Number of connections that it suffices for.
    pub fits: usize,
    /// How to get more of it.
    pub fix: String,
}

/// Why a number of connections cannot be allowed.
#[derive(Debug, thiserror::Error)]
pub enum CapacityError {
    /// The operator asks for more connections than fit.
    #[error(
        "{asked} connections do not fit: the bound {bound} allows {fits}; ask for no more, or lift it with: {fix}"
    )]
    DoesNotFit {
        /// Number of connections that the operator asks for.
        asked: usize,
        /// Number of connections that fit.
        fits: usize,
        /// Name of the tightest bound.
        bound: &'static str,
        /// How to lift that bound.
        fix: String,
    },

    /// The kernel refuses to raise the soft limit on open files.
    #[error("cannot raise the limit on open files: {0}")]
    OpenFiles(#[source] io::Error),
}

/// The default number of connections at once, if that many fit.
///
/// Arbitrary: a default Linux can hold that many.
pub const DEFAULT_MAX_CONNECTIONS: usize = 10_000;

/// Open files beside connections and the files of guests.
///
/// Listeners, the reactor, granted directories.
const OTHER_FILES: u64 = 256;

/// Memory mappings beside those of sandboxes.
///
/// Libraries, thread stacks, the allocator, compiled code.
const OTHER_MAPPINGS: u64 = 1_000;

/// Memory mappings of a sandbox's stack: the stack and its guard.
const MAPPINGS_PER_STACK: u64 = 2;

/// Connections per spare stack, at most.
///
/// A guest that blocks in a call of the host needs a second stack.
const CONNECTIONS_PER_SPARE_STACK: u64 = 16;

/// Memory mappings of a linear memory with a copy-on-write image.
///
/// Its start, the image, the rest, and the guard.
const MAPPINGS_PER_MEMORY: u64 = 4;

/// The address space that a linear memory reserves, in bytes.
///
/// All that a 32-bit guest can address, so that most accesses need no bounds check, and a guard for
/// the other accesses.
const ADDRESSES_PER_MEMORY: u64 = (4 << 30) + (32 << 20);

/// The address space of everything else, in bytes.
///
/// The allocator and threads reserve generously.
const OTHER_ADDRESSES: u64 = 4 << 30;

/// The address space of a process, in bytes.
///
/// At least 47 bits on x86-64 and AArch64 Linux, less a share for everything else.
const ADDRESSES: u64 = (1 << 47) - (1 << 42);

/// Resources that one connection takes at most.
struct PerConnection {
    files: u64,
    /// Mappings of its linear memories.
    mappings: u64,
    addresses: u64,
}

impl PerConnection {
    fn new(requirements: &Requirements, stack: usize, files: usize) -> Self {
        let memories = u64::from(requirements.memories);
        let stack = stack.saturating_add(HOST_STACK_BYTES) as u64;
        Self {
            // The socket is one more.
            files: (files as u64).saturating_add(1),
            mappings: MAPPINGS_PER_MEMORY.saturating_mul(memories),
            addresses: stack
                .saturating_mul(2)
                .saturating_add(ADDRESSES_PER_MEMORY.saturating_mul(memories)),
        }
    }
}

/// Memory mappings that sandboxes may use.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Mappings {
    all_sandboxes: u64,
    memories_of_one: u64,
}

impl Plan {
    /// Reads the limits of this process and machine.
    ///
    /// Each guest has these `requirements`, `stack` bytes of stack, and may open `files` files.
    pub fn new(requirements: &Requirements, stack: usize, files: usize) -> Self {
        let per_connection = PerConnection::new(requirements, stack, files);
        let files = getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX);
        let addresses = getrlimit(Resource::As)
            .current
            .unwrap_or(u64::MAX)
            .min(ADDRESSES);
        Self::from_limits(&per_connection, files, max_map_count(), addresses)
    }

    fn from_limits(
        per_connection: &PerConnection,
        files: u64,
        mappings: Option<u64>,
        addresses: u64,
    ) -> Self {
        let to_usize = |n: u64| usize::try_from(n).unwrap_or(usize::MAX);
        let files_left = files.saturating_sub(OTHER_FILES);
        let addresses_left = addresses.saturating_sub(OTHER_ADDRESSES);
        let twice = |n: u64| n.saturating_mul(2);
        let mut bounds = vec![
            Bound {
                name: "open files (ulimit -Hn)",
                fits: to_usize(files_left),
                fix: format!("ulimit -Hn {} as root, or LimitNOFILE= in the systemd unit", twice(files)),
            },
            Bound {
                name: "address space",
                fits: to_usize(addresses_left / per_connection.addresses),
                fix: "ulimit -v unlimited; beyond the limit of the processor, use a guest with fewer memories".into(),
            },
        ];
        bounds.extend(mappings.map(|mappings| Bound {
            name: "memory mappings (vm.max_map_count)",
            fits: to_usize(connections_for_mappings(mappings, per_connection)),
            fix: format!("sysctl -w vm.max_map_count={}", twice(mappings)),
        }));
        let all_open = Bound {
            name: "open files (ulimit -Hn), if each guest opens as many as it may",
            fits: to_usize(files_left / per_connection.files),
            fix: format!(
                "ulimit -Hn {} as root, LimitNOFILE= in the systemd unit, or a lower max-open-files",
                twice(files)
            ),
        };
        let mappings = mappings.map(|mappings| Mappings {
            all_sandboxes: mappings.saturating_sub(OTHER_MAPPINGS),
            memories_of_one: per_connection.mappings,
        });
        Self {
            bounds,
            all_open,
            mappings,
        }
    }

    /// Adds the bound that the operator sets with `max-connections`, or its default.
    pub fn with_pool(mut self, max_connections: Option<usize>) -> Self {
        let fits = max_connections.unwrap_or(DEFAULT_MAX_CONNECTIONS);
        self.bounds.push(Bound {
            name: "pool (max-connections)",
            fits,
            fix: format!("raise max-connections to {}", fits.saturating_mul(2)),
        });
        self
    }

    /// The size of the pool for this number of connections.
    ///
    /// A guest that blocks in a call of the host leaves its stack there, and the host needs a
    /// second stack for that guest meanwhile. A guest without async functions blocks often. So the
    /// pool has two stacks for each connection, or as many as the mappings suffice for.
    pub fn pool_size(&self, connections: usize) -> PoolSize {
        let two_each = connections.saturating_mul(2);
        let stacks = self.mappings.map_or(two_each, |mappings| {
            let memories = mappings.memories_of_one.saturating_mul(connections as u64);
            let left = mappings.all_sandboxes.saturating_sub(memories) / MAPPINGS_PER_STACK;
            usize::try_from(left).unwrap_or(usize::MAX).min(two_each)
        });
        PoolSize {
            connections,
            stacks,
        }
    }

    /// The bound that allows the fewest connections.
    pub fn tightest(&self) -> &Bound {
        self.bounds
            .iter()
            .min_by_key(|bound| bound.fits)
            .expect("`from_limits` always adds two bounds")
    }

    /// The number of connections to allow at once.
    ///
    /// The number that the operator asks for, or the default as far as it fits.
    ///
    /// # Errors
    ///
    /// [`CapacityError::DoesNotFit`] if the operator asks for more than fit, so that the server
    /// fails at its start and not under load.
    pub fn max_connections(&self, asked: Option<usize>) -> Result<usize, CapacityError> {
        let tightest = self.tightest();
        match asked {
            Some(asked) if asked > tightest.fits => Err(CapacityError::DoesNotFit {
                asked,
                fits: tightest.fits,
                bound: tightest.name,
                fix: tightest.fix.clone(),
            }),
            None if tightest.fits == 0 => self.max_connections(Some(1)),
            Some(asked) => Ok(asked),
            None => Ok(DEFAULT_MAX_CONNECTIONS.min(tightest.fits)),
        }
    }
}

/// The number of connections that these memory mappings suffice for.
fn connections_for_mappings(mappings: u64, per_connection: &PerConnection) -> u64 {
    let stacks = MAPPINGS_PER_STACK * (CONNECTIONS_PER_SPARE_STACK + 1);
    let memories = per_connection
        .mappings
        .saturating_mul(CONNECTIONS_PER_SPARE_STACK);
    mappings
        .saturating_sub(OTHER_MAPPINGS)
        .saturating_mul(CONNECTIONS_PER_SPARE_STACK)
        / memories.saturating_add(stacks)
}

/// The memory that this process may use, in bytes.
///
/// The memory of the machine, or less if a control group limits it (cgroup v2, `memory.max`).
/// `usize::MAX` if neither can be read.
pub fn memory() -> usize {
    let machine = std::fs::read_to_string("/proc/meminfo")
        .ok()
        .and_then(|meminfo| mem_total(&meminfo));
    let groups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let groups = control_group(&groups).into_iter().flat_map(Path::ancestors);
    let limits = groups.filter_map(|group| {
        let group = group.strip_prefix("/").unwrap_or(group);
        let path = Path::new("/sys/fs/cgroup").join(group).join("memory.max");
        std::fs::read_to_string(path).ok()?.trim().parse().ok()
    });
    machine
        .into_iter()
        .chain(limits)
        .min()
        .unwrap_or(usize::MAX)
}

/// The control group in the text of `/proc/PID/cgroup` (cgroups(7)).
fn control_group(cgroup: &str) -> Option<&Path> {
    let line = cgroup.lines().find_map(|line| line.strip_prefix("0::"));
    line.map(Path::new)
}

/// The value of `MemTotal` in the text of `/proc/meminfo` (proc(5)), in bytes.
fn mem_total(meminfo: &str) -> Option<usize> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: usize = line.split_whitespace().next()?.parse().ok()?;
    kib.checked_mul(1024)
}

/// The memory mappings that the kernel allows a process. None if the kernel does not say.
fn max_map_count() -> Option<u64> {
    std::fs::read_to_string("/proc/sys/vm/max_map_count")
        .ok()?
        .trim()
        .parse()
        .ok()
}

/// Raises the soft limit on open files to the hard limit.
///
/// The soft limit, often 1024, protects programs that use `select` (setrlimit(2)). This program
/// does not.
///
/// # Errors
///
/// [`CapacityError::OpenFiles`] if the kernel refuses. It has no reason to.
pub fn raise_open_files() -> Result<(), CapacityError> {
    let limit = getrlimit(Resource::Nofile);
    setrlimit(
        Resource::Nofile,
        Rlimit {
            current: limit.maximum,
            ..limit
        },
    )
    .map_err(|error| CapacityError::OpenFiles(error.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE_MEMORY: Requirements = Requirements {
        component_instances: 1,
        core_instances: 3,
        memories: 1,
        memory_bytes: 1 << 20,
        tables: 2,
        table_elements: 100,
    };

    fn plan(files: u64, mappings: u64, addresses: u64) -> Plan {
        let per_connection = PerConnection::new(&ONE_MEMORY, 512 << 10, 0);
        Plan::from_limits(&per_connection, files, Some(mappings), addresses)
    }

    #[test]
    fn files_that_guests_may_open_are_counted() {
        let three_files = PerConnection::new(&ONE_MEMORY, 512 << 10, 3);
        let plan = Plan::from_limits(&three_files, OTHER_FILES + 40, None, ADDRESSES);
        assert_eq!((plan.tightest().fits, plan.all_open.fits), (40, 10));
        let no_files = PerConnection::new(&ONE_MEMORY, 512 << 10, 0);
        let plan = Plan::from_limits(&no_files, OTHER_FILES + 40, None, ADDRESSES);
        assert_eq!(plan.all_open.fits, 40);
    }

    #[test]
    fn the_pool_has_spare_stacks() {
        let plenty = plan(1 << 20, 1 << 30, ADDRESSES).pool_size(100);
        assert_eq!((plenty.connections, plenty.stacks), (100, 200));
        let tight = plan(1 << 20, 65_530, ADDRESSES);
        let connections = tight.tightest().fits;
        let size = tight.pool_size(connections);
        assert!(size.stacks > connections + connections / 17, "{size:?}");
        assert!(size.stacks < 2 * connections);
        assert!(2 * size.stacks + 4 * connections <= 65_530 - 1_000);
    }

    #[test]
    fn memory_is_read_in_bytes() {
        let meminfo = "MemTotal:       24689764 kB\nMemFree:        1 kB\n";
        assert_eq!(mem_total(meminfo), Some(24_689_764 * 1024));
        assert_eq!(mem_total("MemFree: 1 kB"), None);
        assert!(memory() > 1 << 20);
        let nested = "1:name=systemd:/x\n0::/system.slice/wasinetd.service\n";
        assert_eq!(
            control_group(nested),
            Some(Path::new("/system.slice/wasinetd.service"))
        );
        assert_eq!(control_group("1:memory:/x"), None);
    }

    #[test]
    fn the_tightest_bound_is_named() {
        let files = plan(1024, 1 << 30, ADDRESSES);
        assert_eq!(files.tightest().name, "open files (ulimit -Hn)");
        assert_eq!(files.tightest().fits, 768);
        let mappings = plan(1 << 20, 65_530, ADDRESSES);
        assert_eq!(
            mappings.tightest().name,
            "memory mappings (vm.max_map_count)"
        );
        assert!(mappings.tightest().fits >= DEFAULT_MAX_CONNECTIONS);
        assert_eq!(
            plan(1 << 20, 1 << 30, 1 << 40).tightest().name,
            "address space"
        );
    }

    #[test]
    fn more_connections_than_fit_are_refused() {
        let plan = plan(1024, 1 << 30, ADDRESSES);
        assert_eq!(plan.max_connections(Some(768)).unwrap(), 768);
        assert_eq!(plan.max_connections(None).unwrap(), 768);
        let error = plan.max_connections(Some(769)).unwrap_err();
        assert!(matches!(
            error,
            CapacityError::DoesNotFit {
                asked: 769,
                fits: 768,
                ..
            }
        ));
        assert!(error.to_string().contains("769 connections do not fit"));
    }
}
