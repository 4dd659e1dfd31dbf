//! Keys and their values, bounded in all that they take of memory.

use std::collections::{HashMap, VecDeque};

use indexmap::{IndexMap, IndexSet};

use crate::protocol::Error;

/// The most that the store has, counted by [`key_cost`] and [`item_cost`]. With what its tables take while they
/// grow, a request and the answers, this stays within a sandbox of 64 MiB.
pub(crate) const MAX_USED: usize = 16 * 1024 * 1024;

const WRONG_TYPE: &str = "WRONGTYPE Operation against a key holding the wrong kind of value";

/// Milliseconds since 1970.
pub(crate) type Time = i64;

pub(crate) type Text = Vec<u8>;
pub(crate) type List = VecDeque<Vec<u8>>;
/// Boxed, as the next: most values are strings, and a table has the size of its largest.
pub(crate) type Set = Box<IndexSet<Vec<u8>>>;
pub(crate) type Hash = Box<IndexMap<Vec<u8>, Vec<u8>>>;

/// What a key counts for, beside its value.
fn key_cost(key: &[u8]) -> usize {
    // Its place in a table that has just grown, beside the one from which it grew.
    192 + key.len()
}

/// What an element of a list, set or hash counts for, and a name or a value there each.
pub(crate) fn item_cost(item: &[u8]) -> usize {
    64 + item.len()
}

/// What a command with these arguments may add to what is used, at most.
pub(crate) fn request_cost<'a>(arguments: impl Iterator<Item = &'a [u8]>) -> usize {
    arguments.map(key_cost).sum()
}

pub(crate) enum Value {
    Text(Text),
    List(List),
    Set(Set),
    Hash(Hash),
}

impl Value {
    pub(crate) fn type_name(&self) -> &'static str {
        match self {
            Self::Text(_) => "string",
            Self::List(_) => "list",
            Self::Set(_) => "set",
            Self::Hash(_) => "hash",
        }
    }
}

/// One of the types of values.
pub(crate) trait Kind: Default {
    fn of(value: &Value) -> Option<&Self>;
    fn of_mut(value: &mut Value) -> Option<&mut Self>;
    fn into_value(self) -> Value;
    /// Whether a key with it is none.
    fn is_gone(&self) -> bool;
    /// What it counts for, if that is known by a look at it.
    fn known_cost(&self) -> Option<usize> {
        None
    }
    /// Gives back what it had for elements that are gone, if that is most of it.
    fn trim(&mut self) {}
}

impl Kind for Text {
    fn of(value: &Value) -> Option<&Self> {
        match value {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    fn of_mut(value: &mut Value) -> Option<&mut Self> {
        match value {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    fn into_value(self) -> Value {
        Value::Text(self)
    }

    fn is_gone(&self) -> bool {
        // An empty string is a value.
        false
    }

    fn known_cost(&self) -> Option<usize> {
        // What it has grown to, and not what it has.
        Some(self.capacity())
    }
}

macro_rules! collection {
    ($type:ident) => {
        impl Kind for $type {
            fn of(value: &Value) -> Option<&Self> {
                match value {
                    Value::$type(it) => Some(it),
                    _ => None,
                }
            }

            fn of_mut(value: &mut Value) -> Option<&mut Self> {
                match value {
                    Value::$type(it) => Some(it),
                    _ => None,
                }
            }

            fn into_value(self) -> Value {
                Value::$type(self)
            }

            fn is_gone(&self) -> bool {
                self.is_empty()
            }

            fn trim(&mut self) {
                // Many that were large once would take more than they count for.
                if self.len() < self.capacity() / 4 {
                    self.shrink_to(2 * self.len());
                }
            }
        }
    };
}

collection!(List);
collection!(Set);
collection!(Hash);

struct Entry {
    value: Value,
    expires: Option<Time>,
    /// What the value counts for.
    cost: usize,
}

impl Entry {
    fn is_live(&self, now: Time) -> bool {
        self.expires.is_none_or(|time| time > now)
    }
}

/// The keys of one connection.
pub(crate) struct Store {
    entries: HashMap<Vec<u8>, Entry>,
    used: usize,
    /// Keys whose time is up by now are gone.
    now: Time,
    /// No key expires before this. A full store is not searched for some at each command.
    next_expiry: Time,
}

impl Default for Store {
    fn default() -> Self {
        Self {
            entries: HashMap::new(),
            used: 0,
            now: 0,
            next_expiry: Time::MAX,
        }
    }
}

impl Store {
    pub(crate) fn set_now(&mut self, now: Time) {
        self.now = now;
    }

    pub(crate) fn now(&self) -> Time {
        self.now
    }

    /// What is used of [`MAX_USED`].
    pub(crate) fn used(&self) -> usize {
        self.used
    }

    /// Whether there is room for so much more.
    pub(crate) fn has_room(&mut self, cost: usize) -> bool {
        if self.used + cost > MAX_USED {
            self.remove_expired();
        }
        self.used + cost <= MAX_USED
    }

    /// The value of a key.
    pub(crate) fn value(&self, key: &[u8]) -> Option<&Value> {
        let entry = self.entries.get(key)?;
        entry.is_live(self.now).then_some(&entry.value)
    }

    /// The value of a key, if it has one of this type.
    pub(crate) fn get<K: Kind>(&self, key: &[u8]) -> Result<Option<&K>, Error> {
        match self.value(key) {
            None => Ok(None),
            Some(value) => match K::of(value) {
                Some(value) => Ok(Some(value)),
                None => Err(WRONG_TYPE.into()),
            },
        }
    }

    /// Changes the value of a key by `change`, which counts in its second argument what the value
    /// costs. A key that is not there begins with an empty value, and one of which nothing is left ends.
    pub(crate) fn change<K: Kind, R>(
        &mut self,
        key: &[u8],
        change: impl FnOnce(&mut K, &mut usize) -> Result<R, Error>,
    ) -> Result<R, Error> {
        if self.live(key).is_none() {
            let mut value = K::default();
            let mut cost = 0;
            let result = change(&mut value, &mut cost)?;
            if !value.is_gone() {
                self.insert(key, value, cost, None);
            }
            return Ok(result);
        }
        let entry = self.entries.get_mut(key).expect("it is live");
        let before = entry.cost;
        let value = K::of_mut(&mut entry.value).ok_or(WRONG_TYPE)?;
        let result = change(value, &mut entry.cost);
        value.trim();
        entry.cost = value.known_cost().unwrap_or(entry.cost);
        self.used = self.used - before + entry.cost;
        if value.is_gone() {
            self.remove(key);
        }
        result
    }

    /// Gives a key a string, in place of whatever it had.
    pub(crate) fn set(&mut self, key: &[u8], text: &[u8], expires: Option<Time>) {
        self.note_expiry(expires);
        match self.entries.get_mut(key) {
            // The usual change of a value: no new key, no new memory.
            Some(Entry {
                value: Value::Text(old),
                expires: old_expires,
                ..
            }) if old.capacity() == text.len() => {
                old.clear();
                old.extend_from_slice(text);
                *old_expires = expires;
            }
            _ => {
                self.remove(key);
                self.insert(key, text.to_vec(), 0, expires);
            }
        }
    }

    fn insert<K: Kind>(&mut self, key: &[u8], value: K, cost: usize, expires: Option<Time>) {
        let cost = value.known_cost().unwrap_or(cost);
        self.used += key_cost(key) + cost;
        let value = value.into_value();
        let entry = Entry {
            value,
            expires,
            cost,
        };
        self.entries.insert(key.to_vec(), entry);
    }

    /// Removes a key, and returns whether it was there.
    pub(crate) fn remove(&mut self, key: &[u8]) -> bool {
        let Some(entry) = self.entries.remove(key) else {
            return false;
        };
        self.used -= key_cost(key) + entry.cost;
        entry.is_live(self.now)
    }

    /// When the time of a key is up, if ever, of one that is there.
    pub(crate) fn expires(&self, key: &[u8]) -> Option<Option<Time>> {
        let entry = self.entries.get(key)?;
        entry.is_live(self.now).then_some(entry.expires)
    }

    /// Changes that.
    pub(crate) fn set_expires(&mut self, key: &[u8], expires: Option<Time>) {
        self.note_expiry(expires);
        if let Some(entry) = self.live(key) {
            entry.expires = expires;
        }
    }

    fn note_expiry(&mut self, expires: Option<Time>) {
        self.next_expiry = self.next_expiry.min(expires.unwrap_or(Time::MAX));
    }

    /// All keys that are there.
    pub(crate) fn keys(&mut self) -> impl Iterator<Item = &[u8]> + Clone {
        self.remove_expired();
        self.entries.keys().map(Vec::as_slice)
    }

    /// How many of them will expire.
    pub(crate) fn expiring(&self) -> usize {
        let entries = self.entries.values();
        entries.filter(|entry| entry.expires.is_some()).count()
    }

    pub(crate) fn clear(&mut self) {
        *self = Self {
            now: self.now,
            ..Self::default()
        };
    }

    fn live(&mut self, key: &[u8]) -> Option<&mut Entry> {
        let now = self.now;
        let entry = self.entries.get(key)?;
        if !entry.is_live(now) {
            self.remove(key);
            return None;
        }
        self.entries.get_mut(key)
    }

    fn remove_expired(&mut self) {
        if self.next_expiry > self.now {
            return;
        }
        let (now, used, next) = (self.now, &mut self.used, &mut self.next_expiry);
        *next = Time::MAX;
        self.entries.retain(|key, entry| {
            let stays = entry.is_live(now);
            if stays {
                *next = (*next).min(entry.expires.unwrap_or(Time::MAX));
            } else {
                *used -= key_cost(key) + entry.cost;
            }
            stays
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_that_was_used_is_given_back() {
        let mut store = Store::default();
        store.set(b"text", b"value", None);
        store.set(b"text", b"other", Some(5));
        store.set(b"text", b"a longer one", None);
        let push = |list: &mut List, cost: &mut usize| {
            list.push_back(b"item".into());
            *cost += item_cost(b"item");
            Ok(())
        };
        store.change(b"list", push).unwrap();
        store.change(b"list", push).unwrap();
        store.change(b"text", push).unwrap_err();
        store
            .change(b"text", |text: &mut Text, _| {
                text.extend([0; 100]);
                Ok(())
            })
            .unwrap();
        assert!(store.used() >= 2 * 192 + 112 + 2 * 68);
        let pop = |list: &mut List, cost: &mut usize| {
            *cost -= item_cost(&list.pop_back().unwrap());
            Ok(())
        };
        store.change(b"list", pop).unwrap();
        store.change(b"list", pop).unwrap();
        assert!(store.value(b"list").is_none());
        assert!(store.remove(b"text") && !store.remove(b"text"));
        assert_eq!(store.used(), 0);
    }

    #[test]
    fn what_was_large_once_is_small_again() {
        let mut store = Store::default();
        let push = |list: &mut List, _: &mut usize| {
            list.extend(vec![Vec::new(); 10_000]);
            Ok(())
        };
        store.change(b"list", push).unwrap();
        let truncate = |list: &mut List, _: &mut usize| {
            list.truncate(1);
            Ok(())
        };
        store.change(b"list", truncate).unwrap();
        let list = store.get::<List>(b"list").unwrap().unwrap();
        assert!(list.capacity() < 100, "{}", list.capacity());
    }

    #[test]
    fn a_key_ends_when_its_time_is_up() {
        let mut store = Store::default();
        for (key, expires) in [
            (b"a", Some(10)),
            (b"b", Some(10)),
            (b"c", Some(11)),
            (b"d", None),
        ] {
            store.set(key, b"", expires);
        }
        store.set_now(9);
        assert_eq!(store.keys().count(), 4);
        store.set_now(10);
        assert!(!store.remove(b"a"));
        assert!(store.get::<Text>(b"b").unwrap().is_none());
        assert_eq!((store.keys().count(), store.expiring()), (2, 1));
        store.set_now(11);
        let cost = MAX_USED - store.used();
        assert!(store.has_room(cost + 1) && !store.has_room(MAX_USED));
        assert_eq!(store.used(), key_cost(b"d"));
    }
}
