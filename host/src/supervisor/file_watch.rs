//! Watches files, and reports a file once it has changed and is complete.

use std::collections::HashSet;
use std::ffi::OsString;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use notify::event::{AccessKind, AccessMode, ModifyKind};
use notify::{Event, EventKind, RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::time::timeout;

use crate::net::unix_path::directory_of;
use crate::sync::lock;

/// Time without a change before a file counts as complete.
const QUIET: Duration = Duration::from_millis(200);

/// Interval of looks at the files without an event. Few changes come without one: a link on the path
/// that leads elsewhere, or a network file system.
const POLL_INTERVAL: Duration = Duration::from_secs(1);

/// Device, inode, size and time of modification: they tell two contents apart without reading.
type Fingerprint = Option<(u64, u64, u64, i64, i64)>;

/// The files that are watched. Each has a label, which a change reports.
///
/// The kernel watches their directories: a rename over a file does not touch the file itself.
pub struct FileWatcher<T> {
    files: Vec<WatchedFile<T>>,
    watcher: RecommendedWatcher,
    events: UnboundedReceiver<Event>,
    /// Names of the files: events of other files in their directories are dropped.
    names: Arc<Mutex<HashSet<OsString>>>,
    directories: HashSet<PathBuf>,
}

/// A file cannot be watched.
#[derive(Debug, thiserror::Error)]
#[error("cannot watch {path:?}: {reason}")]
pub struct WatchError {
    /// The file.
    pub path: PathBuf,
    /// Why.
    pub reason: String,
}

impl WatchError {
    fn new(path: &Path, error: &notify::Error) -> Self {
        Self {
            path: path.into(),
            reason: error.to_string(),
        }
    }
}

struct WatchedFile<T> {
    label: T,
    path: PathBuf,
    /// The name in its path, and the name of the file that a link leads to.
    names: Vec<OsString>,
    /// Fingerprint of the content that was read last.
    known: Fingerprint,
    /// Latest fingerprint that differs from `known`, and when it was first seen.
    changed: Option<(Fingerprint, Instant)>,
    /// A process has written to the file and not closed it since.
    being_written: bool,
}

impl<T: Clone + PartialEq> FileWatcher<T> {
    /// Watches `files`, each with its label.
    ///
    /// # Errors
    ///
    /// Fails if the system has no more watches for this process.
    pub fn new(files: Vec<(T, PathBuf)>) -> Result<Self, WatchError> {
        let (sender, events) = unbounded_channel();
        let names = Arc::new(Mutex::new(HashSet::new()));
        let known_names = names.clone();
        let watcher = notify::recommended_watcher(move |event: notify::Result<Event>| {
            // A lost event is no loss: the next look at the files finds the change.
            let Ok(event) = event else { return };
            let name = event.paths.last().and_then(|path| path.file_name());
            if event.need_rescan() || name.is_some_and(|name| lock(&known_names).contains(name)) {
                // It fails once the watcher is gone.
                let _ = sender.send(event);
            }
        });
        let mut watcher = Self {
            files: Vec::new(),
            watcher: watcher.map_err(|error| WatchError::new(Path::new("."), &error))?,
            events,
            names,
            directories: HashSet::new(),
        };
        watcher.add(files)?;
        Ok(watcher)
    }

    /// Watches `files` as well.
    ///
    /// # Errors
    ///
    /// As [`Self::new`]. The same files are watched as before then.
    pub fn add(&mut self, files: Vec<(T, PathBuf)>) -> Result<(), WatchError> {
        let mut added = Vec::new();
        for (label, path) in files {
            let mut watched = self.files.iter();
            if watched.any(|file| file.label == label && file.path == path) {
                continue;
            }
            self.watch_directories(&path)
                .map_err(|error| WatchError::new(&path, &error))?;
            added.push(WatchedFile::new(label, path));
        }
        self.files.extend(added);
        self.update_names();
        Ok(())
    }

    fn update_names(&self) {
        let names = self.files.iter().flat_map(|file| file.names.clone());
        *lock(&self.names) = names.collect();
    }

    /// Stops watching all files but `files`.
    pub fn keep_only(&mut self, files: &[(T, PathBuf)]) {
        self.files.retain(|file| {
            let mut kept = files.iter();
            kept.any(|(label, path)| *label == file.label && *path == file.path)
        });
        self.update_names();
        let files = self.files.iter();
        let needed: HashSet<_> = files.flat_map(|file| directories(&file.path)).collect();
        let unneeded = |directory: &PathBuf| !needed.contains(directory);
        for directory in self.directories.extract_if(unneeded) {
            // The directory may be gone.
            let _ = self.watcher.unwatch(&directory);
        }
    }

    /// The labels of all files, changed or not.
    pub fn labels(&self) -> Vec<T> {
        let files = self.files.iter();
        files.map(|file| file.label.clone()).collect()
    }

    /// Waits until a file has changed and is complete, and returns its label.
    pub async fn next_change(&mut self) -> T {
        loop {
            let mut wait = POLL_INTERVAL;
            for index in 0..self.files.len() {
                let Some(remaining) = self.files[index].poll_quiet() else {
                    continue;
                };
                wait = wait.min(remaining);
                if remaining.is_zero() {
                    let path = self.files[index].path.clone();
                    // The path may lead through another directory by now.
                    let _ = self.watch_directories(&path);
                    return self.files[index].label.clone();
                }
            }
            if let Ok(Some(event)) = timeout(wait, self.events.recv()).await {
                self.apply_event(&event);
            }
            self.apply_pending_events();
        }
    }

    /// The labels of files that have changed and are complete now, without waiting for quiet.
    pub fn take_changed(&mut self) -> Vec<T> {
        self.apply_pending_events();
        let changed = self.files.iter_mut().filter_map(WatchedFile::take_change);
        changed.collect()
    }

    fn apply_pending_events(&mut self) {
        while let Ok(event) = self.events.try_recv() {
            self.apply_event(&event);
        }
    }

    fn apply_event(&mut self, event: &Event) {
        for file in &mut self.files {
            if let Some(progress) = WriteProgress::of(event, &file.names) {
                file.being_written = progress == WriteProgress::Writing;
            }
        }
    }

    fn watch_directories(&mut self, path: &Path) -> notify::Result<()> {
        for directory in directories(path) {
            self.watcher
                .watch(&directory, RecursiveMode::NonRecursive)?;
            self.directories.insert(directory);
        }
        Ok(())
    }
}

impl<T: Clone> WatchedFile<T> {
    fn new(label: T, path: PathBuf) -> Self {
        let real = std::fs::canonicalize(&path).ok();
        let names = [Some(&path), real.as_ref()].map(|path| path?.file_name());
        Self {
            label,
            names: names.into_iter().flatten().map(Into::into).collect(),
            known: fingerprint(&path),
            path,
            changed: None,
            being_written: false,
        }
    }

    /// The current fingerprint, if the file exists and has changed.
    fn new_fingerprint(&self) -> Option<Fingerprint> {
        let now = fingerprint(&self.path);
        (now.is_some() && now != self.known).then_some(now)
    }

    /// Remaining time of quiet after a change. Zero: the change is complete, and known from now on.
    fn poll_quiet(&mut self) -> Option<Duration> {
        let Some(now) = self.new_fingerprint() else {
            self.changed = None;
            return None;
        };
        match self.changed {
            Some((before, since)) if before == now => {
                let remaining = QUIET.saturating_sub(since.elapsed());
                // A file that is still open may be valid, and half old and half new.
                if remaining.is_zero() && self.being_written {
                    return None;
                }
                if remaining.is_zero() {
                    self.known = now;
                    self.changed = None;
                }
                Some(remaining)
            }
            _ => {
                self.changed = Some((now, Instant::now()));
                Some(QUIET)
            }
        }
    }

    /// The label, if the file has changed and no process is known to write to it.
    fn take_change(&mut self) -> Option<T> {
        self.known = self.new_fingerprint().filter(|_| !self.being_written)?;
        Some(self.label.clone())
    }
}

/// Progress of a writer, as an event reports it.
#[derive(Clone, Copy, Debug, PartialEq)]
enum WriteProgress {
    /// A process wrote to it.
    Writing,
    /// The writer closed it, or another file took its name.
    Complete,
}

impl WriteProgress {
    /// `None` for events about other names, and for events that change nothing.
    fn of(event: &Event, names: &[OsString]) -> Option<Self> {
        if event.need_rescan() {
            // Events were lost, perhaps the one about closing.
            return Some(Self::Complete);
        }
        let name = event.paths.last()?.file_name()?;
        names.iter().any(|other| other == name).then_some(())?;
        match event.kind {
            EventKind::Access(AccessKind::Close(AccessMode::Write)) => Some(Self::Complete),
            EventKind::Access(_) => None,
            EventKind::Modify(ModifyKind::Data(_)) => Some(Self::Writing),
            _ => Some(Self::Complete),
        }
    }
}

/// The directory in the path, and the directory of the file that a link leads to.
fn directories(path: &Path) -> Vec<PathBuf> {
    let named = directory_of(path).to_path_buf();
    let real = std::fs::canonicalize(path).ok();
    let real = real.as_deref().and_then(Path::parent);
    [named].into_iter().chain(real.map(Into::into)).collect()
}

fn fingerprint(path: &Path) -> Fingerprint {
    let metadata = std::fs::metadata(path).ok()?;
    Some((
        metadata.dev(),
        metadata.ino(),
        metadata.len(),
        metadata.mtime(),
        metadata.mtime_nsec(),
    ))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Write;

    use super::*;

    #[tokio::test]
    async fn a_changed_file_is_reported_once_and_others_are_not() {
        let directory = tempfile::tempdir().unwrap();
        let [one, two] = ["one", "two"].map(|name| directory.path().join(name));
        for path in [&one, &two] {
            fs::write(path, "first").unwrap();
        }
        let files = vec![("one", one.clone()), ("two", two)];
        let mut watcher = FileWatcher::new(files).unwrap();
        let replacement = directory.path().join("replacement");
        fs::write(&replacement, "second").unwrap();
        fs::rename(&replacement, &one).unwrap();
        assert_eq!(watcher.next_change().await, "one");
        assert!(watcher.take_changed().is_empty());
    }

    #[tokio::test]
    async fn a_file_that_is_being_written_is_not_complete() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        fs::write(&path, "first").unwrap();
        let mut watcher = FileWatcher::new(vec![((), path.clone())]).unwrap();
        let mut file = fs::OpenOptions::new().append(true).open(&path).unwrap();
        file.write_all(b"half").unwrap();
        let unfinished = timeout(2 * QUIET, watcher.next_change()).await;
        assert!(unfinished.is_err());
        file.write_all(b"whole").unwrap();
        drop(file);
        watcher.next_change().await;
    }

    #[tokio::test]
    async fn files_are_no_longer_watched_when_they_are_not_kept() {
        let directory = tempfile::tempdir().unwrap();
        let [one, two] = ["one", "two"].map(|name| directory.path().join(name));
        let files: Vec<_> = [&one, &two].map(|path| ((), path.clone())).into();
        let mut watcher = FileWatcher::new(files.clone()).unwrap();
        watcher.keep_only(&files[..1]);
        fs::write(&two, "new").unwrap();
        assert_eq!(watcher.labels().len(), 1);
        assert!(watcher.take_changed().is_empty());
    }
}
