//! Keys and values, with a limit on the memory that they use.

use std::collections::{HashMap, VecDeque};

use indexmap::{IndexMap, IndexSet};

use crate::protocol::Error;

/// The limit of the store in bytes, counted by [`key_cost`] and [`item_cost`].
///
/// A full store, its growing tables, a request and the answers together fit into a sandbox of 64
/// MiB.
pub(crate) const MAX_USED: usize = 16 * 1024 * 1024;

const WRONG_TYPE: &str = "WRONGTYPE Operation against a key holding the wrong kind of value";

/// Milliseconds since 1970.
pub(crate) type Time = i64;

pub(crate) type Text = Vec<u8>;
pub(crate) type List = VecDeque<Vec<u8>>;
/// Boxed because most values are strings, and a larger variant would enlarge every table entry.
pub(crate) type Set = Box<IndexSet<Vec<u8>>>;
/// Boxed for the same reason as [`Set`].
pub(crate) type Hash = Box<IndexMap<Vec<u8>, Vec<u8>>>;

/// The memory that a key uses beside its value, in bytes.
fn key_cost(key: &[u8]) -> usize {
    // While the table grows, the key has an entry in the old and in the new one.
    192 + key.len()
}

/// The memory of a list or set element, or of a field or value of a hash, in bytes.
pub(crate) fn item_cost(item: &[u8]) -> usize {
    64 + item.len()
}

/// The most memory that a command with these arguments adds, in bytes.
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

/// A type of values.
pub(crate) trait Kind: Default {
    fn from_value(value: &Value) -> Option<&Self>;
    fn from_value_mut(value: &mut Value) -> Option<&mut Self>;
    fn into_value(self) -> Value;
    /// Whether a key with this value is removed: a collection without elements.
    fn is_gone(&self) -> bool;
    /// The memory of the value in bytes, if it can be computed without visiting elements.
    fn known_cost(&self) -> Option<usize> {
        None
    }
    /// Frees the memory of removed elements if it is most of the capacity.
    fn trim(&mut self) {}
}

impl Kind for Text {
    fn from_value(value: &Value) -> Option<&Self> {
        match value {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    fn from_value_mut(value: &mut Value) -> Option<&mut Self> {
        match value {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    fn into_value(self) -> Value {
        Value::Text(self)
    }

    fn is_gone(&self) -> bool {
        // Redis keeps empty strings.
        false
    }

    fn known_cost(&self) -> Option<usize> {
        // The capacity is the memory in use, unlike the length.
        Some(self.capacity())
    }
}

macro_rules! collection {
    ($type:ident) => {
        impl Kind for $type {
            fn from_value(value: &Value) -> Option<&Self> {
                match value {
                    Value::$type(collection) => Some(collection),
                    _ => None,
                }
            }

            fn from_value_mut(value: &mut Value) -> Option<&mut Self> {
                match value {
                    Value::$type(collection) => Some(collection),
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
                // The cost counts elements, so unused capacity would not be counted.
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
    /// The memory of the value, in bytes.
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
    /// The current time. Keys that have expired by then count as removed.
    now: Time,
    /// A lower bound of all expiry times, so that a full store need not be searched at each
    /// command.
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

    /// The memory in use, in bytes. At most [`MAX_USED`].
    pub(crate) fn used(&self) -> usize {
        self.used
    }

    /// Whether `cost` more bytes fit into the store.
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

    /// The value of a key. Fails if the value has another type.
    pub(crate) fn get<K: Kind>(&self, key: &[u8]) -> Result<Option<&K>, Error> {
        match self.value(key) {
            None => Ok(None),
            Some(value) => match K::from_value(value) {
                Some(value) => Ok(Some(value)),
                None => Err(WRONG_TYPE.into()),
            },
        }
    }

    /// Changes the value of a key with `change`.
    ///
    /// `change` updates the cost of the value in its second argument. A missing key starts with an
    /// empty value. A key whose collection becomes empty is removed.
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
        let entry = self.entries.get_mut(key).expect("the key is live");
        let old_cost = entry.cost;
        let value = K::from_value_mut(&mut entry.value).ok_or(WRONG_TYPE)?;
        let result = change(value, &mut entry.cost);
        value.trim();
        entry.cost = value.known_cost().unwrap_or(entry.cost);
        self.used = self.used - old_cost + entry.cost;
        if value.is_gone() {
            self.remove(key);
        }
        result
    }

    /// Sets a key to a string and replaces any old value.
    pub(crate) fn set(&mut self, key: &[u8], text: &[u8], expires: Option<Time>) {
        self.note_expiry(expires);
        match self.entries.get_mut(key) {
            // The common case, a new string of the same length, reuses the key and the memory.
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

    /// Removes a key and returns whether it existed.
    pub(crate) fn remove(&mut self, key: &[u8]) -> bool {
        let Some(entry) = self.entries.remove(key) else {
            return false;
        };
        self.used -= key_cost(key) + entry.cost;
        entry.is_live(self.now)
    }

    /// The expiry time of a key, if the key exists and if it expires.
    pub(crate) fn expires(&self, key: &[u8]) -> Option<Option<Time>> {
        let entry = self.entries.get(key)?;
        entry.is_live(self.now).then_some(entry.expires)
    }

    /// Sets or removes the expiry time of a key.
    pub(crate) fn set_expires(&mut self, key: &[u8], expires: Option<Time>) {
        self.note_expiry(expires);
        if let Some(entry) = self.live(key) {
            entry.expires = expires;
        }
    }

    fn note_expiry(&mut self, expires: Option<Time>) {
        self.next_expiry = self.next_expiry.min(expires.unwrap_or(Time::MAX));
    }

    /// All keys that have not expired.
    pub(crate) fn keys(&mut self) -> impl Iterator<Item = &[u8]> + Clone {
        self.remove_expired();
        self.entries.keys().map(Vec::as_slice)
    }

    /// The number of keys with an expiry time.
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
            let is_live = entry.is_live(now);
            if is_live {
                *next = (*next).min(entry.expires.unwrap_or(Time::MAX));
            } else {
                *used -= key_cost(key) + entry.cost;
            }
            is_live
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn removing_all_keys_frees_all_memory() {
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
    fn a_collection_that_shrinks_frees_capacity() {
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
    fn keys_expire() {
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
