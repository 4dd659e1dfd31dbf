//! How many sandboxes fit on this machine, and what is in the way of more.

use std::path::Path;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::Error;
use crate::sandbox::{HOST_STACK_BYTES, PoolSize, Requirements};

/// The connections that are allowed at once unless the operator says otherwise, as far as they
/// fit. Arbitrary: what a default Linux can hold.
pub const DEFAULT_MAX_CONNECTIONS: usize = 10_000;

/// Open files that are neither connections nor of guests: the listeners, the reactor, granted
/// directories.
const OTHER_FILES: u64 = 256;

/// Memory mappings that are not sandboxes': libraries, thread stacks, the allocator's, compiled
/// code.
const OTHER_MAPPINGS: u64 = 1_000;

/// Mappings of a sandbox's stack: the stack and its guard.
const MAPPINGS_PER_STACK: u64 = 2;

/// Of so many connections one at least may need a second stack at the same time.
const CONNECTIONS_PER_SPARE_STACK: u64 = 16;

/// Mappings of a linear memory with a copy-on-write image: its start, the image, the rest, and
/// what cannot be accessed.
const MAPPINGS_PER_MEMORY: u64 = 4;

/// The address space that a memory reserves: all that a 32-bit guest can address, so that most
/// accesses need no check, and a guard for the rest.
const ADDRESSES_PER_MEMORY: u64 = (4 << 30) + (32 << 20);

/// The address space that everything else takes: the allocator and threads reserve generously.
const OTHER_ADDRESSES: u64 = 4 << 30;

/// What user space can address on the processors we run on (x86-64 and AArch64 Linux: 47 bits at
/// least), less a share for everything else.
const ADDRESSES: u64 = (1 << 47) - (1 << 42);

/// One thing that there is only so much of.
#[derive(Clone, Debug, PartialEq)]
pub struct Bound {
    /// What it is.
    pub name: &'static str,
    /// How many connections it suffices for.
    pub fits: usize,
    /// How to have more of it.
    pub fix: String,
}

/// What one connection takes at most.
struct Each {
    files: u64,
    /// Mappings of its memories.
    mappings: u64,
    addresses: u64,
}

impl Each {
    fn new(needs: &Requirements, stack: usize, files: usize) -> Self {
        let memories = u64::from(needs.memories);
        let stack = stack.saturating_add(HOST_STACK_BYTES) as u64;
        Self {
            // The socket.
            files: (files as u64).saturating_add(1),
            mappings: MAPPINGS_PER_MEMORY.saturating_mul(memories),
            addresses: stack
                .saturating_mul(2)
                .saturating_add(ADDRESSES_PER_MEMORY.saturating_mul(memories)),
        }
    }
}

/// How many connections fit, by each bound.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// The bounds of this machine.
    pub bounds: Vec<Bound>,
    /// How many connections fit if each guest has as many files open as it may. Not a bound: few
    /// guests open any, and thousands of connections are to fit on a machine where they do not.
    pub all_open: Bound,
    /// The mappings for all sandboxes, and those of the memories of one.
    mappings: Option<(u64, u64)>,
}

impl Plan {
    /// Reads the limits of this process and machine, for guests with such `needs` and `stack` bytes of
    /// stack, each of which can have so many `files` open.
    pub fn new(needs: &Requirements, stack: usize, files: usize) -> Self {
        let each = Each::new(needs, stack, files);
        let files = getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX);
        let addresses = getrlimit(Resource::As)
            .current
            .unwrap_or(u64::MAX)
            .min(ADDRESSES);
        Self::from_limits(&each, files, max_map_count(), addresses)
    }

    fn from_limits(each: &Each, files: u64, mappings: Option<u64>, addresses: u64) -> Self {
        let fits = |n: u64| usize::try_from(n).unwrap_or(usize::MAX);
        let twice = |now: u64| now.saturating_mul(2);
        let mut bounds = vec![
            Bound {
                name: "open files (ulimit -Hn)",
                fits: fits(files.saturating_sub(OTHER_FILES)),
                fix: format!("ulimit -Hn {} as root, or LimitNOFILE= in the systemd unit", twice(files)),
            },
            Bound {
                name: "address space",
                fits: fits(addresses.saturating_sub(OTHER_ADDRESSES) / each.addresses),
                fix: "ulimit -v unlimited; beyond the processor's own limit, use a guest with fewer memories".into(),
            },
        ];
        bounds.extend(mappings.map(|mappings| Bound {
            name: "memory mappings (vm.max_map_count)",
            fits: fits(mappings_fit(mappings, each)),
            fix: format!("sysctl -w vm.max_map_count={}", twice(mappings)),
        }));
        let all_open = Bound {
            name: "open files (ulimit -Hn), if each guest opens as many as it may",
            fits: fits(files.saturating_sub(OTHER_FILES) / each.files),
            fix: format!(
                "ulimit -Hn {} as root, LimitNOFILE= in the systemd unit, or a lower --max-open-files",
                twice(files)
            ),
        };
        let mappings = mappings.map(|mappings| {
            let sandboxes = mappings.saturating_sub(OTHER_MAPPINGS);
            (sandboxes, each.mappings)
        });
        Self {
            bounds,
            all_open,
            mappings,
        }
    }

    /// Adds the bound that the operator chooses: what `--max-connections` is, or would be.
    pub fn with_pool(mut self, max_connections: Option<usize>) -> Self {
        let fits = max_connections.unwrap_or(DEFAULT_MAX_CONNECTIONS);
        self.bounds.push(Bound {
            name: "pool (--max-connections)",
            fits,
            fix: format!(
                "wasinetd serve --max-connections {}",
                fits.saturating_mul(2)
            ),
        });
        self
    }

    /// The room to make for so many connections.
    ///
    /// A guest that blocks in a call of the host, as one without async functions does and ours do for
    /// a moment, leaves its stack there, and what the host does for it meanwhile takes a second one.
    /// So there are two for each connection, or as many as the mappings suffice for.
    pub fn room(&self, connections: usize) -> PoolSize {
        let all = connections.saturating_mul(2);
        let stacks = self.mappings.map_or(all, |(sandboxes, of_memories)| {
            let memories = of_memories.saturating_mul(connections as u64);
            let left = sandboxes.saturating_sub(memories) / MAPPINGS_PER_STACK;
            usize::try_from(left).unwrap_or(usize::MAX).min(all)
        });
        PoolSize {
            connections,
            stacks,
        }
    }

    /// The bound that is met first.
    pub fn tightest(&self) -> &Bound {
        self.bounds
            .iter()
            .min_by_key(|bound| bound.fits)
            .expect("there are always some")
    }

    /// The connections to allow at once: as many as are asked for, or as many as fit of the
    /// default.
    ///
    /// # Errors
    ///
    /// [`Error::Capacity`] when more are asked for than fit: met at start, not in mid-flight.
    pub fn max_connections(&self, asked: Option<usize>) -> Result<usize, Error> {
        let tightest = self.tightest();
        match asked {
            Some(asked) if asked > tightest.fits => Err(Error::Capacity {
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

/// How many connections so many mappings suffice for, with some stacks to spare.
fn mappings_fit(mappings: u64, each: &Each) -> u64 {
    let stacks = MAPPINGS_PER_STACK * (CONNECTIONS_PER_SPARE_STACK + 1);
    let memories = each.mappings.saturating_mul(CONNECTIONS_PER_SPARE_STACK);
    mappings
        .saturating_sub(OTHER_MAPPINGS)
        .saturating_mul(CONNECTIONS_PER_SPARE_STACK)
        / memories.saturating_add(stacks)
}

/// The memory that this process may use, in bytes: what the machine has, or less where a control
/// group says so (cgroup v2, `memory.max`). The largest number where neither can be read.
pub fn memory() -> usize {
    let machine = std::fs::read_to_string("/proc/meminfo")
        .ok()
        .and_then(|meminfo| mem_total(&meminfo));
    let groups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let groups = group(&groups).into_iter().flat_map(Path::ancestors);
    let most = groups.filter_map(|group| {
        let group = group.strip_prefix("/").unwrap_or(group);
        let path = Path::new("/sys/fs/cgroup").join(group).join("memory.max");
        std::fs::read_to_string(path).ok()?.trim().parse().ok()
    });
    machine.into_iter().chain(most).min().unwrap_or(usize::MAX)
}

/// The control group of a process, of what `/proc/PID/cgroup` says (cgroups(7)).
fn group(cgroup: &str) -> Option<&Path> {
    let line = cgroup.lines().find_map(|line| line.strip_prefix("0::"));
    line.map(Path::new)
}

/// The figure of `MemTotal` (proc(5)), in bytes.
fn mem_total(meminfo: &str) -> Option<usize> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: usize = line.split_whitespace().next()?.parse().ok()?;
    kib.checked_mul(1024)
}

/// The mappings that the kernel lets a process have. None where the kernel does not say.
fn max_map_count() -> Option<u64> {
    std::fs::read_to_string("/proc/sys/vm/max_map_count")
        .ok()?
        .trim()
        .parse()
        .ok()
}

/// Lets this process have as many files open as it may: the soft limit, often 1024, is there for
/// programs that use `select`.
///
/// # Errors
///
/// [`Error::Internal`] when the system refuses, which it has no reason to.
pub fn raise_open_files() -> Result<(), Error> {
    let limit = getrlimit(Resource::Nofile);
    setrlimit(
        Resource::Nofile,
        Rlimit {
            current: limit.maximum,
            ..limit
        },
    )
    .map_err(|error| Error::internal("raising the limit on open files", error))
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
        let each = Each::new(&ONE_MEMORY, 512 << 10, 0);
        Plan::from_limits(&each, files, Some(mappings), addresses)
    }

    #[test]
    fn files_that_guests_may_open_are_counted() {
        let each = Each::new(&ONE_MEMORY, 512 << 10, 3);
        let plan = Plan::from_limits(&each, OTHER_FILES + 40, None, ADDRESSES);
        assert_eq!((plan.tightest().fits, plan.all_open.fits), (40, 10));
        let none = Each::new(&ONE_MEMORY, 512 << 10, 0);
        let plan = Plan::from_limits(&none, OTHER_FILES + 40, None, ADDRESSES);
        assert_eq!(plan.all_open.fits, 40);
    }

    #[test]
    fn there_are_stacks_to_spare() {
        let plenty = plan(1 << 20, 1 << 30, ADDRESSES).room(100);
        assert_eq!((plenty.connections, plenty.stacks), (100, 200));
        let tight = plan(1 << 20, 65_530, ADDRESSES);
        let most = tight.tightest().fits;
        let room = tight.room(most);
        assert!(room.stacks > most + most / 17, "{room:?} of {most}");
        assert!(room.stacks < 2 * most);
        // All of them fit.
        assert!(2 * room.stacks + 4 * most <= 65_530 - 1_000);
    }

    #[test]
    fn memory_is_read_in_bytes() {
        let meminfo = "MemTotal:       24689764 kB\nMemFree:        1 kB\n";
        assert_eq!(mem_total(meminfo), Some(24_689_764 * 1024));
        assert_eq!(mem_total("MemFree: 1 kB"), None);
        assert!(memory() > 1 << 20);
        let nested = "1:name=systemd:/x\n0::/system.slice/wasinetd.service\n";
        assert_eq!(
            group(nested),
            Some(Path::new("/system.slice/wasinetd.service"))
        );
        assert_eq!(group("1:memory:/x"), None);
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
    fn what_fits_is_given_and_what_does_not_is_refused() {
        let plan = plan(1024, 1 << 30, ADDRESSES);
        assert_eq!(plan.max_connections(Some(768)).unwrap(), 768);
        assert_eq!(plan.max_connections(None).unwrap(), 768);
        let error = plan.max_connections(Some(769)).unwrap_err();
        assert_eq!(error.exit_code(), 78);
        assert!(
            error
                .to_string()
                .contains("--max-connections 769 does not fit")
        );
    }
}
