//! When a file has changed.

use std::ffi::OsString;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures::{Stream, stream};
use notify::event::{AccessKind, AccessMode, ModifyKind};
use notify::{Event, EventKind, RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::time::{sleep, timeout};
use wasinetd::Error;

/// For how long a file has to be the same before it is taken for whole.
const QUIET: Duration = Duration::from_millis(200);

/// How often it is looked at without an event. What no event tells of is rare: a link to a directory
/// on the way that leads elsewhere, a file system of another machine.
const WITHOUT_EVENT: Duration = Duration::from_secs(1);

/// What tells one content of a file from another, without reading it.
type Identity = Option<(u64, u64, u64, i64, i64)>;

/// An item each time that the file at `path` has changed and is whole.
///
/// The directory is watched, and not the file: whoever renames another one to its name does not touch
/// it.
///
/// # Errors
///
/// [`Error::Watch`] when the system has no more watches for us.
pub(super) fn changes(path: &Path) -> Result<impl Stream<Item = ()> + use<>, Error> {
    let watch = Watch::new(path).map_err(|error| Error::Watch {
        path: path.into(),
        reason: error.to_string(),
    })?;
    Ok(stream::unfold(watch, |mut watch| async {
        watch.changed().await;
        Some(((), watch))
    }))
}

/// An item each time that one of the files has changed and is whole.
///
/// # Errors
///
/// [`Error::Watch`] when the system has no more watches for us.
pub(super) fn all_changes(paths: &[PathBuf]) -> Result<impl Stream<Item = ()> + use<>, Error> {
    let each = paths.iter().map(|path| Ok(Box::pin(changes(path)?)));
    let each: Vec<_> = each.collect::<Result<_, Error>>()?;
    Ok(stream::select_all(each))
}

struct Watch {
    path: PathBuf,
    known: Identity,
    /// Somebody has written to the file in place, and not closed it since.
    being_written: bool,
    events: UnboundedReceiver<Seen>,
    watcher: RecommendedWatcher,
}

impl Watch {
    fn new(path: &Path) -> notify::Result<Self> {
        let (sender, events) = unbounded_channel();
        let real = std::fs::canonicalize(path).ok();
        let names = [Some(path), real.as_deref()].map(|path| path?.file_name());
        let names: Vec<OsString> = names.into_iter().flatten().map(Into::into).collect();
        let mut watcher = notify::recommended_watcher(move |event: notify::Result<Event>| {
            // Of an event that cannot be told, a look at the file tells.
            if let Some(seen) = event.ok().and_then(|event| Seen::of(&event, &names)) {
                // It fails when nobody waits any more.
                let _ = sender.send(seen);
            }
        })?;
        watch_directories(&mut watcher, path)?;
        Ok(Self {
            path: path.into(),
            known: identity(path),
            being_written: false,
            events,
            watcher,
        })
    }

    async fn changed(&mut self) {
        loop {
            if let Ok(Some(seen)) = timeout(WITHOUT_EVENT, self.events.recv()).await {
                self.note(seen);
            }
            let now = identity(&self.path);
            if now.is_none() || now == self.known {
                continue;
            }
            sleep(QUIET).await;
            while let Ok(seen) = self.events.try_recv() {
                self.note(seen);
            }
            // What is being written may be valid and still be half of one version and half of another.
            if !self.being_written && identity(&self.path) == now {
                self.known = now;
                // Where its directory is another one by now, that is the one to watch.
                let _ = watch_directories(&mut self.watcher, &self.path);
                return;
            }
        }
    }

    fn note(&mut self, seen: Seen) {
        self.being_written = seen == Seen::Written;
    }
}

/// What was seen of the file.
#[derive(Clone, Copy, PartialEq)]
enum Seen {
    /// Something was written to it.
    Written,
    /// Whoever could write to it has closed it, or another one has its name now.
    Whole,
}

impl Seen {
    /// None of what is about files of other names, or changes nothing, such as reading.
    fn of(event: &Event, names: &[OsString]) -> Option<Self> {
        if event.need_rescan() {
            // Some were lost, the one that says that it was closed perhaps.
            return Some(Self::Whole);
        }
        let name = event.paths.last()?.file_name()?;
        names.iter().any(|other| other == name).then_some(())?;
        match event.kind {
            EventKind::Access(AccessKind::Close(AccessMode::Write)) => Some(Self::Whole),
            EventKind::Access(_) => None,
            EventKind::Modify(ModifyKind::Data(_)) => Some(Self::Written),
            _ => Some(Self::Whole),
        }
    }
}

/// Watches the directory that has the file's name, and the one that has the file.
fn watch_directories(watcher: &mut RecommendedWatcher, path: &Path) -> notify::Result<()> {
    let named = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty());
    watcher.watch(named.unwrap_or(Path::new(".")), RecursiveMode::NonRecursive)?;
    let real = std::fs::canonicalize(path).ok();
    match real.as_deref().and_then(Path::parent) {
        Some(real) => watcher.watch(real, RecursiveMode::NonRecursive),
        None => Ok(()),
    }
}

fn identity(path: &Path) -> Identity {
    let found = std::fs::metadata(path).ok()?;
    Some((
        found.dev(),
        found.ino(),
        found.len(),
        found.mtime(),
        found.mtime_nsec(),
    ))
}
