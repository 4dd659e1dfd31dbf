//! When a file has changed.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures::{Stream, stream};
use notify::event::{AccessKind, AccessMode};
use notify::{Event, EventKind, RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use wasinetd::Error;

/// How long there has to be quiet after a change. Who writes a file does so in many steps.
const QUIET: Duration = Duration::from_millis(200);

/// What tells one content of a file from another, without reading it.
type Identity = Option<(u64, u64, u64, i64, i64)>;

/// An item each time that the file at `path` has changed and is quiet again.
///
/// Directories are watched, and not the file: whoever renames another one to its name, or changes a
/// link on the way to it, does not touch it.
///
/// # Errors
///
/// [`Error::Watch`] when the system has no more watches for us.
pub(super) fn changes(path: &Path) -> Result<impl Stream<Item = ()> + use<>, Error> {
    watch(path).map_err(|error| Error::Watch {
        path: path.into(),
        reason: error.to_string(),
    })
}

fn watch(path: &Path) -> notify::Result<impl Stream<Item = ()> + use<>> {
    let (sender, events) = unbounded_channel();
    let mut watcher = notify::recommended_watcher(move |event: notify::Result<Event>| {
        // What cannot be told may be a change.
        if event.map_or(true, |event| may_change(&event.kind)) {
            // It fails when nobody waits any more.
            let _ = sender.send(());
        }
    })?;
    watch_directories(&mut watcher, path)?;
    let watch = Watch {
        path: path.into(),
        known: identity(path),
        events,
        watcher,
    };
    Ok(stream::unfold(watch, |mut watch| async {
        watch.changed().await.then_some(((), watch))
    }))
}

struct Watch {
    path: PathBuf,
    known: Identity,
    events: UnboundedReceiver<()>,
    watcher: RecommendedWatcher,
}

impl Watch {
    /// False when there will be no more changes to hear of.
    async fn changed(&mut self) -> bool {
        loop {
            if self.events.recv().await.is_none() {
                return false;
            }
            while tokio::time::timeout(QUIET, self.events.recv())
                .await
                .is_ok()
            {}
            // A link may lead elsewhere now.
            let _ = watch_directories(&mut self.watcher, &self.path);
            let now = identity(&self.path);
            if now.is_some() && std::mem::replace(&mut self.known, now) != now {
                return true;
            }
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

/// Reading is no change; that someone who could write has closed a file may be the end of one.
fn may_change(kind: &EventKind) -> bool {
    match kind {
        EventKind::Access(AccessKind::Close(AccessMode::Write)) => true,
        EventKind::Access(_) => false,
        _ => true,
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
