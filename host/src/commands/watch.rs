//! When files have changed.

use std::collections::HashSet;
use std::ffi::OsString;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use notify::event::{AccessKind, AccessMode, ModifyKind};
use notify::{Event, EventKind, RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::time::timeout;
use wasinetd::Error;

/// For how long a file has to be the same before it is taken for whole.
const QUIET: Duration = Duration::from_millis(200);

/// How often it is looked at without an event. What no event tells of is rare: a link to a directory
/// on the way that leads elsewhere, a file system of another machine.
const WITHOUT_EVENT: Duration = Duration::from_secs(1);

/// What tells one content of a file from another, without reading it.
type Identity = Option<(u64, u64, u64, i64, i64)>;

/// Files that are watched, each for what its change means.
///
/// It is their directories that are watched: whoever renames another file to the name of one does not touch
/// that.
pub(super) struct FileWatcher<T> {
    files: Vec<WatchedFile<T>>,
    watcher: RecommendedWatcher,
    events: UnboundedReceiver<Event>,
    /// What the files are called: of others in their directories nothing is to be heard.
    names: Arc<Mutex<HashSet<OsString>>>,
    directories: HashSet<PathBuf>,
}

struct WatchedFile<T> {
    meaning: T,
    path: PathBuf,
    /// What it is called by its path, and by itself.
    names: Vec<OsString>,
    /// As it was when it was read last.
    known: Identity,
    /// As it is since then.
    changed: Option<(Identity, Instant)>,
    /// Somebody has written to it in place, and not closed it since.
    being_written: bool,
}

impl<T: Clone + PartialEq> FileWatcher<T> {
    /// Watches `files`.
    ///
    /// # Errors
    ///
    /// [`Error::Watch`] when the system has no more watches for us.
    pub(super) fn new(files: Vec<(T, PathBuf)>) -> Result<Self, Error> {
        let (sender, events) = unbounded_channel();
        let names = Arc::new(Mutex::new(HashSet::new()));
        let of_files = names.clone();
        let watcher = notify::recommended_watcher(move |event: notify::Result<Event>| {
            // Of an event that cannot be told, a look at the files tells.
            let Ok(event) = event else { return };
            let name = event.paths.last().and_then(|path| path.file_name());
            if event.need_rescan() || name.is_some_and(|name| lock(&of_files).contains(name)) {
                // It fails when nobody waits any more.
                let _ = sender.send(event);
            }
        });
        let mut watched = Self {
            files: Vec::new(),
            watcher: watcher.map_err(|error| cannot_watch(Path::new("."), &error))?,
            events,
            names,
            directories: HashSet::new(),
        };
        watched.add(files)?;
        Ok(watched)
    }

    /// Watches `files` as well.
    ///
    /// # Errors
    ///
    /// As for [`Self::new`]. The same files are watched as before.
    pub(super) fn add(&mut self, files: Vec<(T, PathBuf)>) -> Result<(), Error> {
        let mut new = Vec::new();
        for (meaning, path) in files {
            let mut old = self.files.iter();
            if old.any(|file| file.meaning == meaning && file.path == path) {
                continue;
            }
            self.watch_directories(&path)
                .map_err(|error| cannot_watch(&path, &error))?;
            new.push(WatchedFile::new(meaning, path));
        }
        self.files.extend(new);
        self.name();
        Ok(())
    }

    fn name(&self) {
        let names = self.files.iter().flat_map(|file| file.names.clone());
        *lock(&self.names) = names.collect();
    }

    /// Of what is watched, only these files are from now on.
    pub(super) fn keep(&mut self, files: &[(T, PathBuf)]) {
        self.files.retain(|file| {
            let mut files = files.iter();
            files.any(|(meaning, path)| *meaning == file.meaning && *path == file.path)
        });
        self.name();
        let files = self.files.iter();
        let wanted: HashSet<_> = files.flat_map(|file| directories(&file.path)).collect();
        for directory in self.directories.extract_if(|one| !wanted.contains(one)) {
            // It is gone, perhaps.
            let _ = self.watcher.unwatch(&directory);
        }
    }

    /// What the changes of all files mean, whether they have changed or not.
    pub(super) fn all(&self) -> Vec<T> {
        let files = self.files.iter();
        files.map(|file| file.meaning.clone()).collect()
    }

    /// What the next change means: that a file is another one, and whole.
    pub(super) async fn next(&mut self) -> T {
        loop {
            let mut waits = WITHOUT_EVENT;
            for n in 0..self.files.len() {
                if let Some(left) = self.files[n].look() {
                    waits = waits.min(left);
                    if left.is_zero() {
                        let path = self.files[n].path.clone();
                        // Where its directory is another one by now, that is the one to watch.
                        let _ = self.watch_directories(&path);
                        return self.files[n].meaning.clone();
                    }
                }
            }
            if let Ok(Some(event)) = timeout(waits, self.events.recv()).await {
                self.note(&event);
            }
            self.note_all();
        }
    }

    /// What those changes mean that would be told of when it has been quiet for long enough.
    pub(super) fn changed_by_now(&mut self) -> Vec<T> {
        self.note_all();
        let changed = self.files.iter_mut().filter_map(WatchedFile::take);
        changed.collect()
    }

    fn note_all(&mut self) {
        while let Ok(event) = self.events.try_recv() {
            self.note(&event);
        }
    }

    fn note(&mut self, event: &Event) {
        for file in &mut self.files {
            if let Some(seen) = Seen::of(event, &file.names) {
                file.being_written = seen == Seen::Written;
            }
        }
    }

    /// Watches the directory that has the file's name, and the one that has the file.
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
    fn new(meaning: T, path: PathBuf) -> Self {
        let real = std::fs::canonicalize(&path).ok();
        let names = [Some(&path), real.as_ref()].map(|path| path?.file_name());
        Self {
            meaning,
            names: names.into_iter().flatten().map(Into::into).collect(),
            known: identity(&path),
            path,
            changed: None,
            being_written: false,
        }
    }

    /// What it is now, if it is there, and another one than it was.
    fn other(&self) -> Option<Identity> {
        let now = identity(&self.path);
        (now.is_some() && now != self.known).then_some(now)
    }

    /// How long it is to be quiet yet if it has changed: not at all, and it is known then.
    fn look(&mut self) -> Option<Duration> {
        let Some(now) = self.other() else {
            self.changed = None;
            return None;
        };
        match self.changed {
            Some((then, since)) if then == now => {
                let left = QUIET.saturating_sub(since.elapsed());
                // What is being written may be valid and still be half of one version and half of another.
                if left.is_zero() && self.being_written {
                    return None;
                }
                if left.is_zero() {
                    self.known = now;
                    self.changed = None;
                }
                Some(left)
            }
            _ => {
                self.changed = Some((now, Instant::now()));
                Some(QUIET)
            }
        }
    }

    /// What its change means, if it has changed and is whole as far as can be told.
    fn take(&mut self) -> Option<T> {
        self.known = self.other().filter(|_| !self.being_written)?;
        Some(self.meaning.clone())
    }
}

fn lock(names: &Mutex<HashSet<OsString>>) -> MutexGuard<'_, HashSet<OsString>> {
    names.lock().unwrap_or_else(PoisonError::into_inner)
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

/// The directory that has the file's name, and the one that has the file.
fn directories(path: &Path) -> Vec<PathBuf> {
    let named = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty());
    let named = named.unwrap_or(Path::new(".")).to_path_buf();
    let real = std::fs::canonicalize(path).ok();
    let real = real.as_deref().and_then(Path::parent);
    [named].into_iter().chain(real.map(Into::into)).collect()
}

fn cannot_watch(path: &Path, error: &notify::Error) -> Error {
    Error::Watch {
        path: path.into(),
        reason: error.to_string(),
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
