//! Config files: settings of the server, and one table for each service, in TOML.
//!
//! This module knows no single setting. The caller names the keys, and the values come out as they
//! would stand on a command line, whose parser gives them their meaning.

use std::fmt;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// A key that a table may have.
#[derive(Clone, Debug, PartialEq)]
pub struct Key {
    /// Name of the key.
    pub name: String,
    /// Kind of its values.
    pub kind: ValueKind,
    /// Values that are paths.
    pub paths: PathRule,
}

/// Which values are paths. Relative paths start at the directory of the config file.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum PathRule {
    /// No value is a path.
    None,
    /// Each value is a path.
    All,
    /// A value that starts with `unix:` has a path after it.
    AfterUnix,
}

/// Kind of the values of a key.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum ValueKind {
    /// `true` or `false`.
    Switch,
    /// One value.
    One,
    /// One value, or several in an array.
    Many,
    /// One value, several in an array, or a table of names and values.
    Pairs,
}

/// Content of a config file.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ConfigFile {
    /// Settings of the server.
    pub server: Table,
    /// One table for each service, in their order.
    pub services: Vec<Table>,
}

/// The settings of the server, or of one service.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Table {
    /// First line, from 1.
    pub line: usize,
    /// The settings, in the order of the file.
    pub settings: Vec<Setting>,
}

/// A key with its values.
#[derive(Clone, Debug, PartialEq)]
pub struct Setting {
    /// The key.
    pub key: String,
    /// Its line, from 1.
    pub line: usize,
    /// The values, as a flag would take them. Empty for a switch that is on.
    pub values: Vec<String>,
}

/// A config file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read {path:?}: {source}; name a file that wasinetd can read")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },

    /// The file has mistakes.
    #[error(transparent)]
    Mistakes(#[from] Mistakes),
}

/// A mistake in a config file, and the fix.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mistake {
    /// Line, from 1.
    pub line: usize,
    /// The mistake and the fix.
    pub text: String,
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.line, self.text)
    }
}

/// All mistakes in a config file.
#[derive(Debug, thiserror::Error)]
#[error("{}", listed(.path, .mistakes))]
pub struct Mistakes {
    /// The file.
    pub path: PathBuf,
    /// The mistakes, in the order of their lines.
    pub mistakes: Vec<Mistake>,
}

impl Mistakes {
    /// The mistakes of the file at `path`, in the order of their lines.
    pub fn new(path: &Path, mut mistakes: Vec<Mistake>) -> Self {
        mistakes.sort();
        Self {
            path: path.into(),
            mistakes,
        }
    }
}

fn listed(path: &Path, mistakes: &[Mistake]) -> String {
    let lines = mistakes.iter();
    lines
        .map(|mistake| format!("{}:{mistake}", path.display()))
        .collect::<Vec<_>>()
        .join("\n")
}

impl Table {
    /// The setting with this key.
    pub fn get(&self, key: &str) -> Option<&Setting> {
        self.settings.iter().find(|setting| setting.key == key)
    }
}

/// Parses the text of a config file in the directory `base`.
///
/// `server` and `service` are the keys that the server and a service may have. A mistake does not stop
/// the parser: it returns everything it could read, and all mistakes.
pub fn parse(
    text: &str,
    base: &Path,
    server: &[Key],
    service: &[Key],
) -> (ConfigFile, Vec<Mistake>) {
    let (root, errors) = DeTable::parse_recoverable(text);
    let mut reader = Reader {
        text,
        base,
        mistakes: Vec::new(),
    };
    for error in errors {
        let line = error.span().map_or(1, |span| reader.line(&span));
        let message = error.message().trim().replace('\n', " ");
        reader.mistakes.push(Mistake {
            line,
            text: format!("not valid TOML: {message}"),
        });
    }
    let mut file = ConfigFile::default();
    let mut others = Vec::new();
    for (key, value) in root.get_ref() {
        match key.get_ref().as_ref() {
            "service" => file.services = reader.services(value, service),
            _ => others.push((key, value)),
        }
    }
    file.server = reader.table(1, others.into_iter(), server, "the server");
    reader.mistakes.sort();
    (file, reader.mistakes)
}

struct Reader<'a> {
    text: &'a str,
    base: &'a Path,
    mistakes: Vec<Mistake>,
}

type Pair<'t, 'i> = (
    &'t Spanned<std::borrow::Cow<'i, str>>,
    &'t Spanned<DeValue<'i>>,
);

impl Reader<'_> {
    fn line(&self, span: &Range<usize>) -> usize {
        let before = &self.text.as_bytes()[..span.start.min(self.text.len())];
        1 + before.iter().filter(|byte| **byte == b'\n').count()
    }

    fn wrong(&mut self, line: usize, text: String) {
        self.mistakes.push(Mistake { line, text });
    }

    fn services(&mut self, value: &Spanned<DeValue<'_>>, keys: &[Key]) -> Vec<Table> {
        let line = self.line(&value.span());
        let Some(services) = value.get_ref().as_array() else {
            let text =
                "service: a server may have several; write [[service]], with two brackets each";
            self.wrong(line, text.into());
            return Vec::new();
        };
        let mut tables = Vec::new();
        for service in services.iter() {
            let line = self.line(&service.span());
            match service.get_ref().as_table() {
                Some(table) => tables.push(self.table(line, table.iter(), keys, "a service")),
                None => self.wrong(
                    line,
                    "service: each service is a table; write [[service]]".into(),
                ),
            }
        }
        tables
    }

    fn table<'t, 'i: 't>(
        &mut self,
        line: usize,
        pairs: impl Iterator<Item = Pair<'t, 'i>>,
        keys: &[Key],
        owner: &str,
    ) -> Table {
        let mut settings = Vec::new();
        for (name, value) in pairs {
            let line = self.line(&name.span());
            let name = name.get_ref();
            let Some(key) = keys.iter().find(|key| key.name == **name) else {
                self.wrong(line, unknown(name, keys, owner));
                continue;
            };
            match self.values(value.get_ref(), key) {
                Ok(None) => {}
                Ok(Some(values)) => settings.push(Setting {
                    key: key.name.clone(),
                    line,
                    values,
                }),
                Err(wants) => {
                    let span = value.span();
                    let written = self.text.get(span).unwrap_or_default();
                    let first = written.lines().next().unwrap_or_default();
                    self.wrong(line, format!("{name} = {first}: {wants}"));
                }
            }
        }
        // The parser sorts keys by name. Restore the order of the file.
        settings.sort_by_key(|setting| setting.line);
        Table { line, settings }
    }

    /// Values as a flag kind them, or `None` for a switch that is off.
    ///
    /// # Errors
    ///
    /// Says what to write instead.
    fn values(&self, value: &DeValue<'_>, key: &Key) -> Result<Option<Vec<String>>, &'static str> {
        let beside = |path: &str| self.base.join(path).display().to_string();
        let path = |value: String| match (key.paths, value.strip_prefix("unix:")) {
            (PathRule::All, _) if value != "off" => beside(&value),
            (PathRule::AfterUnix, Some(path)) if !path.is_empty() && !path.starts_with('@') => {
                format!("unix:{}", beside(path))
            }
            _ => value,
        };
        match (key.kind, value) {
            (ValueKind::Switch, DeValue::Boolean(on)) => Ok(on.then(Vec::new)),
            (ValueKind::Switch, _) => Err("write true or false"),
            // Empty: as if the key were not set.
            (ValueKind::Many | ValueKind::Pairs, DeValue::Array(values)) if values.is_empty() => {
                Ok(None)
            }
            (ValueKind::Pairs, DeValue::Table(pairs)) if pairs.is_empty() => Ok(None),
            (ValueKind::Many | ValueKind::Pairs, DeValue::Array(values)) => {
                let values = values.iter().map(|value| scalar(value.get_ref()).map(path));
                let values: Option<Vec<_>> = values.collect();
                values
                    .map(Some)
                    .ok_or("write strings or numbers in the array")
            }
            (ValueKind::Pairs, DeValue::Table(pairs)) => {
                let pairs = pairs.iter().map(|(name, value)| {
                    Some(format!("{}={}", name.get_ref(), scalar(value.get_ref())?))
                });
                let pairs: Option<Vec<_>> = pairs.collect();
                pairs.map(Some).ok_or("write a string for each name")
            }
            (ValueKind::Many | ValueKind::Pairs, value) => match scalar(value) {
                Some(value) => Ok(Some(vec![path(value)])),
                None => Err("write a string, or several in an array"),
            },
            (ValueKind::One, value) => match scalar(value) {
                Some(value) => Ok(Some(vec![path(value)])),
                None => Err("write one string or number"),
            },
        }
    }
}

/// A string or a decimal integer.
fn scalar(value: &DeValue<'_>) -> Option<String> {
    match value {
        DeValue::String(text) => Some(text.to_string()),
        DeValue::Integer(number) if number.radix() == 10 => Some(number.as_str().replace('_', "")),
        _ => None,
    }
}

fn unknown(name: &str, keys: &[Key], owner: &str) -> String {
    /// Least similarity (1 is equal) of a key that is offered instead. Arbitrary: a letter or two.
    const SIMILAR: f64 = 0.7;
    let nearest = keys
        .iter()
        .map(|key| (strsim::jaro(&key.name, name), key))
        .max_by(|one, other| one.0.total_cmp(&other.0));
    match nearest {
        Some((similarity, key)) if similarity > SIMILAR => {
            format!(
                "{name} is no setting of {owner}; did you mean {}?",
                key.name
            )
        }
        _ => format!("{name} is no setting of {owner}; `wasinetd serve --help` lists all settings"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys() -> Vec<Key> {
        let key = |name: &str, kind, paths| Key {
            name: name.into(),
            kind,
            paths,
        };
        vec![
            key("guest", ValueKind::One, PathRule::All),
            key("idle-timeout", ValueKind::One, PathRule::None),
            key("listen", ValueKind::Many, PathRule::AfterUnix),
            key("watch", ValueKind::Switch, PathRule::None),
            key("env", ValueKind::Pairs, PathRule::None),
        ]
    }

    fn parse_all(text: &str) -> (ConfigFile, Vec<String>) {
        let (file, mistakes) = parse(text, Path::new("/etc/w"), &keys(), &keys());
        let mistakes = mistakes.iter().map(Mistake::to_string).collect();
        (file, mistakes)
    }

    #[test]
    fn values_come_out_as_a_flag_takes_them() {
        let (file, mistakes) = parse_all(
            "idle-timeout = 5_0\n[[service]]\nguest = 'g.wasm'\nlisten = ['a', 1]\nwatch = true\n[[service]]\nwatch = false\nguest = '/g'\nlisten = 'b'\nenv = { A = 'b', C = 1 }\n[[service]]\nlisten = ['unix:a', 'unix:/a', 'unix:@a', 'fd:a']\n[[service]]\nlisten = []\nenv = {}\n",
        );
        assert_eq!(mistakes, [""; 0]);
        assert_eq!(file.server.get("idle-timeout").unwrap().values, ["50"]);
        let [one, two, three, four] = &file.services[..] else {
            panic!("{file:?}")
        };
        assert_eq!((one.line, two.line), (2, 6));
        assert_eq!(one.get("guest").unwrap().values, ["/etc/w/g.wasm"]);
        assert_eq!(one.get("listen").unwrap().values, ["a", "1"]);
        assert_eq!(one.get("watch").unwrap().values, [""; 0]);
        assert_eq!(two.get("watch"), None);
        assert_eq!(two.get("guest").unwrap().values, ["/g"]);
        assert_eq!(two.get("env").unwrap().values, ["A=b", "C=1"]);
        assert_eq!(two.get("env").unwrap().line, 10);
        assert_eq!(
            three.get("listen").unwrap().values,
            ["unix:/etc/w/a", "unix:/a", "unix:@a", "fd:a"]
        );
        assert_eq!(four.settings, []);
    }

    #[test]
    fn all_mistakes_are_reported_at_once() {
        let (_, mistakes) = parse_all(
            "idle-timout = '5s'\n[[service]]\nguest = ['a']\nzzz = 1\nwatch = 'yes'\nlisten = [[]]\nenv = 1.5\n",
        );
        assert_eq!(
            mistakes,
            [
                "1: idle-timout is no setting of the server; did you mean idle-timeout?",
                "3: guest = ['a']: write one string or number",
                "4: zzz is no setting of a service; `wasinetd serve --help` lists all settings",
                "5: watch = 'yes': write true or false",
                "6: listen = [[]]: write strings or numbers in the array",
                "7: env = 1.5: write a string, or several in an array",
            ]
        );
        let (_, mistakes) = parse_all("[service]\nguest = 'g'\n");
        assert_eq!(mistakes.len(), 1);
        assert!(mistakes[0].contains("[[service]]"), "{mistakes:?}");
        let (_, mistakes) = parse_all("a = \nlisten = 'x'\nlisten = 'y'\n[[service\n");
        assert!(mistakes.len() >= 2, "{mistakes:?}");
        assert!(mistakes[0].starts_with("1: "), "{mistakes:?}");
    }

    #[test]
    fn no_text_makes_the_parser_panic() {
        bolero::check!()
            .with_type::<String>()
            .for_each(|text| drop(parse_all(text)));
    }
}
