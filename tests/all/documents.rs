//! Checks of the documentation: links lead somewhere, named tests exist, and the language is plain.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use crate::harness::root;

/// The widest line of prose, in characters.
const WIDTH: usize = 100;

/// The longest that the map of the code may be, in lines.
const ARCHITECTURE_LINES: usize = 150;

/// Sentences of the private dialect that this project was once written in, in lower case.
const DIALECT: &[&str] = &[
    "whoever wishes it once more wishes for nothing more",
    "serves what is ready, and no more what is not among it",
    "is not to be let on before there is a place",
    "time without a sign of the client's system",
    "is set for the server itself waits for",
    "a tls handshake came to nothing",
    "its first certificate is none",
    "the end is told apart",
    "the_end_is_told_apart",
    "who_is_denied_is_reset_and_others_are_served",
];

/// Names that were replaced, wherever they stand.
const OLD_NAMES: &[&str] = &[
    "Gathered",
    "Joining",
    "SourcePlace",
    "Secured",
    "Cutoff",
    "AllMet",
    "Inherited",
    "Fleet",
    "Obeyed",
    "Operated",
    "turn_into",
    "make_way",
];

/// Names that were replaced in the host and are ordinary words elsewhere.
const OLD_DEFINITIONS: &[(&str, &[&str])] = &[
    (
        "struct",
        &[
            "Places",
            "Taken",
            "Door",
            "Port",
            "Accepting",
            "Front",
            "Listed",
            "Used",
            "Counts",
            "Measures",
            "Lane",
            "Pass",
            "Needs",
            "Room",
            "Checked",
            "Handover",
            "Met",
        ],
    ),
    ("enum", &["Channel"]),
    ("fn", &["agree", "meet", "introduce", "concerns"]),
    (
        "mod",
        &[
            "agree",
            "channel",
            "closing",
            "doors",
            "figures",
            "front",
            "places",
            "successor",
            "turns",
        ],
    ),
];

#[test]
fn every_test_that_the_threat_model_names_exists() {
    let names = shown_by(&read("docs/threat-model.md"));
    assert!(names.len() >= 50, "too few tests are named: {names:?}");
    let sources = Sources::of(&["tests/all", "host/src", "guest"]);
    let missing: Vec<_> = names.iter().filter(|name| !sources.contain(name)).collect();
    assert!(
        missing.is_empty(),
        "docs/threat-model.md names tests that are not there: {missing:#?}"
    );
}

#[test]
fn a_made_up_test_is_noticed() {
    let table = "| who | attempt | defence | shown by |\n| --- | --- | --- | --- |\n\
                 | guest | `x` | `--cpu-time` | `nobody_wrote_this`, `documents.rs`, `shown_by` |\n\
                 \n| other | table |\n";
    let names = shown_by(table);
    assert_eq!(names, ["nobody_wrote_this", "documents.rs", "shown_by"]);
    let sources = Sources::of(&["tests/all"]);
    let found: Vec<_> = names.iter().map(|name| sources.contain(name)).collect();
    assert_eq!(found, [false, true, true]);
    assert!(!sources.contain("nobody_wrote_this.rs"));
}

#[test]
#[should_panic(expected = "names no test")]
fn a_row_without_a_test_is_noticed() {
    shown_by("| shown by |\n| --- |\n| hope |\n");
}

#[test]
fn links_lead_to_files_and_headings() {
    let broken: Vec<_> = documents()
        .iter()
        .flat_map(|document| broken_links(document))
        .collect();
    assert!(broken.is_empty(), "broken links: {broken:#?}");
}

#[test]
fn broken_links_are_noticed() {
    let text = "[a](https://example.com) `[b](nowhere.md)` [c](#two-words--more)\n\
                ```\n[d](nowhere.md)\n```\n[e\nf](README.md#licence) ![g](g.svg) [h](#not-there)\n";
    assert_eq!(
        links(text),
        [
            "https://example.com",
            "#two-words--more",
            "README.md#licence",
            "g.svg",
            "#not-there"
        ]
    );
    assert_eq!(
        anchors("# Two words: `more`\n```\n# no heading\n```\n## Ctl, & more\n"),
        ["two-words-more", "ctl--more"].map(String::from).into()
    );
}

#[test]
fn every_decision_is_listed() {
    let listed: HashSet<_> = links(&read("docs/decisions/README.md"))
        .into_iter()
        .collect();
    for page in files(&root().join("docs/decisions")) {
        let name = file_name(&page);
        assert!(
            name == "README.md" || listed.contains(&name),
            "docs/decisions/README.md does not list {name}"
        );
    }
}

#[test]
fn the_architecture_fits_on_a_few_screens_and_names_files_that_exist() {
    let text = read("ARCHITECTURE.md");
    let lines = text.lines().count();
    assert!(
        lines <= ARCHITECTURE_LINES,
        "ARCHITECTURE.md has {lines} lines, more than {ARCHITECTURE_LINES}"
    );
    let missing: Vec<_> = code_spans(&text)
        .into_iter()
        .filter(|span| span.ends_with('/') || span.ends_with(".rs"))
        .filter(|path| !root().join(path).exists() && !root().join("host/src").join(path).exists())
        .collect();
    assert!(
        missing.is_empty(),
        "ARCHITECTURE.md names files that are not there: {missing:#?}"
    );
}

#[test]
fn the_guest_of_the_readme_is_one_that_compiles() {
    let text = read("README.md");
    let guest = text.split("```rust\n").nth(1);
    let guest = guest.and_then(|rest| rest.split("```").next());
    let guest = guest.expect("README.md shows a guest");
    // The examples there are compiled as documentation tests.
    let sdk: String = read("guest/sdk/src/lib.rs")
        .lines()
        .filter_map(|line| line.strip_prefix("//!"))
        .map(|line| format!("{}\n", line.strip_prefix(' ').unwrap_or(line)))
        .collect();
    assert!(
        sdk.contains(guest),
        "the guest of README.md is no example of guest/sdk:\n{guest}"
    );
}

#[test]
fn prose_is_wrapped() {
    let wide: Vec<_> = documents()
        .iter()
        .flat_map(|document| {
            let text = fs::read_to_string(document).expect("documents are text");
            let lines = wide_lines(&text).into_iter();
            let lines: Vec<_> = lines
                .map(|line| format!("{}:{line}", document.display()))
                .collect();
            lines
        })
        .collect();
    assert!(
        wide.is_empty(),
        "lines of more than {WIDTH} characters: {wide:#?}"
    );
}

#[test]
fn wide_prose_is_noticed_and_tables_and_code_are_not() {
    let wide = "word ".repeat(21);
    let link = format!("- [{}](x)", "x".repeat(WIDTH));
    let text = format!("{wide}\n| {wide}\n    {wide}\n```\n{wide}\n```\n# {wide}\n{link}\n{wide}");
    assert_eq!(wide_lines(&text), [1, 9]);
}

#[test]
fn the_language_is_plain() {
    let places = ["host", "guest", "tests", "docs"];
    let found: Vec<_> = places
        .iter()
        .flat_map(|place| files(&root().join(place)))
        .chain(documents())
        // This file has the words to look for.
        .filter(|path| file_name(path) != "documents.rs")
        .filter_map(|path| fs::read_to_string(&path).ok().map(|text| (path, text)))
        .flat_map(|(path, text)| {
            let is_host = path.starts_with(root().join("host/src"));
            let words = old_words(&text, is_host).into_iter();
            let words: Vec<_> = words
                .map(|word| format!("{}: {word}", path.display()))
                .collect();
            words
        })
        .collect();
    assert!(found.is_empty(), "old words: {found:#?}");
}

#[test]
fn old_words_are_noticed_and_ordinary_ones_are_not() {
    let sentence = "/// Waits. Whoever wishes it once\n    /// more wishes for nothing more.\n";
    assert_eq!(old_words(sentence, false), [DIALECT[0]]);
    let name = "let fleet = Fleet::new(InheritedFds::take(), \"WASINETD_INHERITED\");";
    assert_eq!(old_words(name, false), ["Fleet"]);
    let definitions = "pub(crate) mod doors;\nstruct Room {}\nfn meet() {}";
    assert_eq!(
        old_words(definitions, true),
        ["struct Room", "fn meet", "mod doors"]
    );
    assert!(old_words(definitions, false).is_empty());
    assert!(old_words("struct Roomy; fn meets() {}", true).is_empty());
}

/// The pages that people read.
fn documents() -> Vec<PathBuf> {
    let top = [
        "README.md",
        "ARCHITECTURE.md",
        "SECURITY.md",
        "CHANGELOG.md",
        "tests/bench/RESULTS.md",
    ];
    let pages = files(&root().join("docs"));
    top.iter()
        .map(|name| root().join(name))
        .chain(pages.into_iter().filter(|page| has_extension(page, "md")))
        .collect()
}

fn read(name: &str) -> String {
    let path = root().join(name);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// All files beneath a directory, except for what was built there.
fn files(directory: &Path) -> Vec<PathBuf> {
    let entries =
        fs::read_dir(directory).unwrap_or_else(|error| panic!("{}: {error}", directory.display()));
    entries
        .map(|entry| entry.expect("the directory can be read").path())
        .filter(|path| file_name(path) != "target")
        .flat_map(|path| match path.is_dir() {
            true => files(&path),
            false => vec![path],
        })
        .collect()
}

fn file_name(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default();
    name.to_string_lossy().into_owned()
}

fn has_extension(path: &Path, extension: &str) -> bool {
    path.extension().is_some_and(|found| found == extension)
}

/// The functions and the files of some directories.
struct Sources {
    functions: HashSet<String>,
    files: HashSet<String>,
}

impl Sources {
    fn of(directories: &[&str]) -> Self {
        let (mut functions, mut names) = (HashSet::new(), HashSet::new());
        let all = directories
            .iter()
            .flat_map(|name| files(&root().join(name)));
        for path in all.filter(|path| has_extension(path, "rs")) {
            let text = fs::read_to_string(&path).expect("sources are text");
            functions.extend(definitions(&text, "fn"));
            names.insert(file_name(&path));
        }
        Self {
            functions,
            files: names,
        }
    }

    /// Whether there is a function of this name, or a file if it ends in `.rs`.
    fn contain(&self, name: &str) -> bool {
        match name.ends_with(".rs") {
            true => self.files.contains(name),
            false => self.functions.contains(name),
        }
    }
}

/// The names that follow a keyword.
fn definitions(text: &str, keyword: &str) -> HashSet<String> {
    let mut words = text.split(|c: char| !is_of_word(c) && c != ' ');
    let mut names = HashSet::new();
    for piece in &mut words {
        let mut piece = piece.split_whitespace();
        while let Some(word) = piece.next() {
            if word == keyword {
                names.extend(piece.next().map(String::from));
            }
        }
    }
    names
}

fn is_of_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// The names in backticks in the last column of all tables that say by what something is shown.
fn shown_by(text: &str) -> Vec<String> {
    let mut names = Vec::new();
    let mut is_inside = false;
    for line in text.lines() {
        let cells: Vec<_> = line.split('|').map(str::trim).collect();
        let last = match cells[..] {
            ["", .., last, ""] => last,
            _ => {
                is_inside = false;
                continue;
            }
        };
        match last {
            "shown by" => is_inside = true,
            "---" => {}
            _ if is_inside => {
                let shown = code_spans(last);
                assert!(!shown.is_empty(), "this row names no test: {line}");
                names.extend(shown);
            }
            _ => {}
        }
    }
    names
}

/// What stands between backticks, outside of blocks of code.
fn code_spans(text: &str) -> Vec<String> {
    let prose = without_blocks(text);
    prose.split('`').skip(1).step_by(2).map(words).collect()
}

/// The text with single spaces between its words.
fn words(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn without_blocks(text: &str) -> String {
    let mut is_code = false;
    let lines = text.lines().filter(|line| {
        let is_fence = line.trim_start().starts_with("```");
        is_code ^= is_fence;
        !is_code && !is_fence
    });
    lines.map(|line| format!("{line}\n")).collect()
}

/// The targets of all links outside of code.
fn links(text: &str) -> Vec<String> {
    let prose = without_blocks(text);
    // Code spans may have links in them that are none, and links may have code spans.
    let prose: String = prose
        .split('`')
        .enumerate()
        .map(|(n, piece)| if n % 2 == 0 { piece } else { "" })
        .collect();
    let targets = prose.split("](").skip(1);
    targets
        .filter_map(|rest| rest.split_once(')'))
        .map(|(target, _)| target.to_string())
        .collect()
}

/// The relative links of a document that lead nowhere.
fn broken_links(document: &Path) -> Vec<String> {
    let text = fs::read_to_string(document).expect("documents are text");
    let directory = document.parent().unwrap_or(Path::new(""));
    let is_broken = |link: &String| {
        if link.contains("://") || link.starts_with("mailto:") {
            return false;
        }
        let (path, anchor) = link.split_once('#').unwrap_or((link, ""));
        let target = match path {
            "" => document.to_path_buf(),
            path => directory.join(path),
        };
        let has_anchor = || {
            let text = fs::read_to_string(&target).unwrap_or_default();
            anchors(&text).contains(anchor)
        };
        !target.exists() || !(anchor.is_empty() || has_anchor())
    };
    links(&text)
        .into_iter()
        .filter(is_broken)
        .map(|link| format!("{}: {link}", document.display()))
        .collect()
}

/// The anchors that GitHub and Forgejo give to the headings of a document.
fn anchors(text: &str) -> HashSet<String> {
    let headings = without_blocks(text);
    let headings = headings.lines().filter(|line| line.starts_with('#'));
    headings
        .map(|line| {
            let title = line.trim_start_matches('#').trim().to_lowercase();
            let kept = title
                .chars()
                .filter(|c| is_of_word(*c) || matches!(c, ' ' | '-'));
            kept.collect::<String>().replace(' ', "-")
        })
        .collect()
}

/// The numbers of lines of prose that are too wide, from 1.
fn wide_lines(text: &str) -> Vec<usize> {
    let mut is_code = false;
    let mut wide = Vec::new();
    for (n, line) in text.lines().enumerate() {
        let is_fence = line.trim_start().starts_with("```");
        is_code ^= is_fence;
        let is_prose = !is_code && !is_fence && !line.starts_with(['|', '#', '<']);
        let is_indented = line.starts_with("    ") && !line.trim_start().starts_with('-');
        // A link cannot be broken.
        let text = line.trim_start().trim_start_matches("- ");
        if is_prose && !is_indented && line.chars().count() > WIDTH && text.contains(' ') {
            wide.push(n + 1);
        }
    }
    wide
}

/// The sentences and names of the old language in a text.
fn old_words(text: &str, is_host: bool) -> Vec<String> {
    let lines = text.lines().map(|line| {
        let line = line.trim_start().trim_end_matches('\\');
        line.trim_start_matches(['/', '!', '#', '*', '"'])
    });
    let prose = words(&lines.collect::<Vec<_>>().join(" ")).to_lowercase();
    let sentences = DIALECT.iter().filter(|sentence| prose.contains(*sentence));
    let mut found: Vec<_> = sentences.map(|sentence| sentence.to_string()).collect();
    let identifiers: HashSet<_> = text.split(|c| !is_of_word(c)).collect();
    let names = OLD_NAMES.iter().filter(|name| identifiers.contains(*name));
    found.extend(names.map(|name| name.to_string()));
    if is_host {
        for (keyword, names) in OLD_DEFINITIONS {
            let defined = definitions(text, keyword);
            let names = names.iter().filter(|name| defined.contains(**name));
            found.extend(names.map(|name| format!("{keyword} {name}")));
        }
    }
    found
}
