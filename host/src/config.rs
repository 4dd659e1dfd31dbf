//! A config file: settings of the server, and a table for each service, in TOML.
//!
//! It knows no setting. Which keys there are it is told, and what their values mean is for whoever reads
//! the same settings on the command line: here they become what would stand there.

use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};

use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// A setting that there is.
#[derive(Clone, Debug, PartialEq)]
pub struct Key {
    /// As in the file.
    pub name: String,
    /// What values it takes.
    pub takes: Takes,
    /// Whether they are files.
    pub files: Files,
}

/// Whether values are files: those that are relative are so to the directory of the config file.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Files {
    /// They are not.
    None,
    /// They are.
    All,
    /// Those that follow `unix:` are.
    AfterUnix,
}

/// What values a setting takes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Takes {
    /// `true` or `false`.
    Switch,
    /// One.
    One,
    /// One, or several in an array.
    Many,
    /// The same, or a table of names and values.
    Pairs,
}

/// What a config file says.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct File {
    /// Settings of the server.
    pub server: Table,
    /// A table for each service, in their order.
    pub services: Vec<Table>,
}

/// Settings that belong together.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Table {
    /// Where it begins, from 1.
    pub line: usize,
    /// What is set, in the order of the file.
    pub settings: Vec<Setting>,
}

/// A key with its values.
#[derive(Clone, Debug, PartialEq)]
pub struct Setting {
    /// The key.
    pub key: String,
    /// Where it is, from 1.
    pub line: usize,
    /// The values, as they would be given to a flag. None for one that is switched on.
    pub values: Vec<String>,
}

/// What is wrong, and the fix.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mistake {
    /// Where, from 1.
    pub line: usize,
    /// What.
    pub text: String,
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.line, self.text)
    }
}

/// Everything that is wrong with a config file.
#[derive(Debug, thiserror::Error)]
#[error("{}", listed(.path, .mistakes))]
pub struct Mistakes {
    /// The file.
    pub path: PathBuf,
    /// In the order of their lines.
    pub mistakes: Vec<Mistake>,
}

fn listed(path: &Path, mistakes: &[Mistake]) -> String {
    let lines = mistakes.iter();
    lines
        .map(|mistake| format!("{}:{mistake}", path.display()))
        .collect::<Vec<_>>()
        .join("\n")
}

impl Table {
    /// The setting of this key.
    pub fn get(&self, key: &str) -> Option<&Setting> {
        self.settings.iter().find(|setting| setting.key == key)
    }

    /// Whether both say the same, wherever it stands, but for those keys.
    pub fn same_but(&self, other: &Self, keys: &[&str]) -> bool {
        let said = |table: &Self| {
            let settings = table.settings.iter();
            let mut said: Vec<_> = settings
                .filter(|setting| !keys.contains(&&*setting.key))
                .map(|setting| (setting.key.clone(), setting.values.clone()))
                .collect();
            said.sort();
            said
        };
        said(self) == said(other)
    }
}

/// Reads the text of a config file in the directory `base`, with such keys for the server and for a
/// service. What is wrong with it does not keep the rest from being read.
pub fn read(text: &str, base: &Path, server: &[Key], service: &[Key]) -> (File, Vec<Mistake>) {
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
            text: format!("this is not TOML: {message}"),
        });
    }
    let mut file = File::default();
    let mut others = Vec::new();
    for (key, value) in root.get_ref() {
        match key.get_ref().as_ref() {
            "service" => file.services = reader.services(value, service),
            _ => others.push((key, value)),
        }
    }
    file.server = reader.table(1, others.into_iter(), server, "of the server");
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
            let text = "service: there may be several; write [[service]], with two brackets each";
            self.wrong(line, text.into());
            return Vec::new();
        };
        let mut tables = Vec::new();
        for service in services.iter() {
            let line = self.line(&service.span());
            match service.get_ref().as_table() {
                Some(table) => tables.push(self.table(line, table.iter(), keys, "of a service")),
                None => self.wrong(line, "service: each is a table; write [[service]]".into()),
            }
        }
        tables
    }

    fn table<'t, 'i: 't>(
        &mut self,
        line: usize,
        pairs: impl Iterator<Item = Pair<'t, 'i>>,
        keys: &[Key],
        whose: &str,
    ) -> Table {
        let mut settings = Vec::new();
        for (name, value) in pairs {
            let line = self.line(&name.span());
            let name = name.get_ref();
            let Some(key) = keys.iter().find(|key| key.name == **name) else {
                self.wrong(line, unknown(name, keys, whose));
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
        // The parser has them in the order of their names.
        settings.sort_by_key(|setting| setting.line);
        Table { line, settings }
    }

    /// The values as a flag takes them, or None for a switch that is off; or what is wanted instead.
    fn values(&self, value: &DeValue<'_>, key: &Key) -> Result<Option<Vec<String>>, &'static str> {
        let beside = |path: &str| self.base.join(path).display().to_string();
        let path = |value: String| match (key.files, value.strip_prefix("unix:")) {
            (Files::All, _) if value != "off" => beside(&value),
            (Files::AfterUnix, Some(path)) if !path.is_empty() && !path.starts_with('@') => {
                format!("unix:{}", beside(path))
            }
            _ => value,
        };
        match (key.takes, value) {
            (Takes::Switch, DeValue::Boolean(on)) => Ok(on.then(Vec::new)),
            (Takes::Switch, _) => Err("write true or false"),
            // None of them, as if nothing were said.
            (Takes::Many | Takes::Pairs, DeValue::Array(values)) if values.is_empty() => Ok(None),
            (Takes::Pairs, DeValue::Table(pairs)) if pairs.is_empty() => Ok(None),
            (Takes::Many | Takes::Pairs, DeValue::Array(values)) => {
                let values = values.iter().map(|value| one(value.get_ref()).map(path));
                let values: Option<Vec<_>> = values.collect();
                values
                    .map(Some)
                    .ok_or("write texts or numbers in the array")
            }
            (Takes::Pairs, DeValue::Table(pairs)) => {
                let pairs = pairs.iter().map(|(name, value)| {
                    Some(format!("{}={}", name.get_ref(), one(value.get_ref())?))
                });
                let pairs: Option<Vec<_>> = pairs.collect();
                pairs.map(Some).ok_or("write a text for each name")
            }
            (Takes::Many | Takes::Pairs, value) => match one(value) {
                Some(value) => Ok(Some(vec![path(value)])),
                None => Err("write a text, or several in an array"),
            },
            (Takes::One, value) => match one(value) {
                Some(value) => Ok(Some(vec![path(value)])),
                None => Err("write one text or number"),
            },
        }
    }
}

/// A text or a whole number.
fn one(value: &DeValue<'_>) -> Option<String> {
    match value {
        DeValue::String(text) => Some(text.to_string()),
        DeValue::Integer(number) if number.radix() == 10 => Some(number.as_str().replace('_', "")),
        _ => None,
    }
}

fn unknown(name: &str, keys: &[Key], whose: &str) -> String {
    /// How alike two keys have to be, of 1, for one to be meant by the other. Arbitrary: a letter or two.
    const ALIKE: f64 = 0.7;
    let nearest = keys
        .iter()
        .map(|key| (strsim::jaro(&key.name, name), key))
        .max_by(|one, other| one.0.total_cmp(&other.0));
    match nearest {
        Some((alike, key)) if alike > ALIKE => {
            format!("{name} is no setting {whose}; {} is", key.name)
        }
        _ => format!("{name} is no setting {whose}; `wasinetd serve --help` has them all"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys() -> Vec<Key> {
        let key = |name: &str, takes, files| Key {
            name: name.into(),
            takes,
            files,
        };
        vec![
            key("guest", Takes::One, Files::All),
            key("idle-timeout", Takes::One, Files::None),
            key("listen", Takes::Many, Files::AfterUnix),
            key("watch", Takes::Switch, Files::None),
            key("env", Takes::Pairs, Files::None),
        ]
    }

    fn read_all(text: &str) -> (File, Vec<String>) {
        let (file, mistakes) = read(text, Path::new("/etc/w"), &keys(), &keys());
        let mistakes = mistakes.iter().map(Mistake::to_string).collect();
        (file, mistakes)
    }

    #[test]
    fn values_are_what_a_flag_takes() {
        let (file, mistakes) = read_all(
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
    fn all_mistakes_are_told_at_once() {
        let (_, mistakes) = read_all(
            "idle-timout = '5s'\n[[service]]\nguest = ['a']\nzzz = 1\nwatch = 'yes'\nlisten = [[]]\nenv = 1.5\n",
        );
        assert_eq!(
            mistakes,
            [
                "1: idle-timout is no setting of the server; idle-timeout is",
                "3: guest = ['a']: write one text or number",
                "4: zzz is no setting of a service; `wasinetd serve --help` has them all",
                "5: watch = 'yes': write true or false",
                "6: listen = [[]]: write texts or numbers in the array",
                "7: env = 1.5: write a text, or several in an array",
            ]
        );
        let (_, mistakes) = read_all("[service]\nguest = 'g'\n");
        assert_eq!(mistakes.len(), 1);
        assert!(mistakes[0].contains("[[service]]"), "{mistakes:?}");
        let (_, mistakes) = read_all("a = \nlisten = 'x'\nlisten = 'y'\n[[service\n");
        assert!(mistakes.len() >= 2, "{mistakes:?}");
        assert!(mistakes[0].starts_with("1: "), "{mistakes:?}");
    }

    #[test]
    fn tables_are_compared_by_what_they_say() {
        let table = |text: &str| read_all(text).0.server;
        let one = table("listen = 'a'\nguest = 'g'\n");
        let moved = table("\nguest = 'g'\nlisten = ['a']\n");
        assert!(one.same_but(&moved, &[]));
        let other = table("listen = 'b'\nguest = 'g'\n");
        assert!(!one.same_but(&other, &["guest"]));
        assert!(one.same_but(&other, &["listen"]));
    }

    #[test]
    fn whatever_the_text_it_is_read_without_a_panic() {
        bolero::check!()
            .with_type::<String>()
            .for_each(|text| drop(read_all(text)));
    }
}
