//! Finds the paths and child modules in the text of a file.

use std::iter::Peekable;
use std::vec::IntoIter;

use proc_macro2::{Delimiter, Group, LexError, TokenStream, TokenTree};

/// The content of one file, without items for tests.
pub(super) struct Scan {
    /// Modules that the file declares and that have files of their own.
    pub(super) children: Vec<String>,
    /// All paths, of `use` declarations and in code.
    pub(super) paths: Vec<RawPath>,
}

/// A path as it is written.
pub(super) struct RawPath {
    pub(super) line: usize,
    /// The inline modules around the path.
    pub(super) inline: Vec<String>,
    pub(super) names: Vec<String>,
}

type Tokens = Peekable<IntoIter<TokenTree>>;

fn tokens(stream: TokenStream) -> Tokens {
    stream
        .into_iter()
        .collect::<Vec<_>>()
        .into_iter()
        .peekable()
}

impl Scan {
    pub(super) fn new(text: &str) -> Result<Self, LexError> {
        let mut scan = Self {
            children: Vec::new(),
            paths: Vec::new(),
        };
        scan.stream(text.parse()?, &mut Vec::new());
        Ok(scan)
    }

    fn stream(&mut self, stream: TokenStream, inline: &mut Vec<String>) {
        let mut tokens = tokens(stream);
        // Whether the last token makes the next name a method, a field or the rest of a path.
        let mut continues = false;
        while let Some(token) = tokens.next() {
            let continued = std::mem::take(&mut continues);
            match token {
                TokenTree::Group(group) => self.stream(group.stream(), inline),
                TokenTree::Punct(punct) => match punct.as_char() {
                    '#' if next_is_test_attribute(&mut tokens) => skip_item(&mut tokens),
                    // Not `..` and not `:`.
                    '.' => continues = tokens.next_if(|token| is_punct(token, '.')).is_none(),
                    ':' => continues = tokens.next_if(|token| is_punct(token, ':')).is_some(),
                    _ => {}
                },
                TokenTree::Ident(ident) => match ident.to_string().as_str() {
                    "pub" => drop(tokens.next_if(is_parentheses)),
                    "mod" => self.module(&mut tokens, inline),
                    "use" => self.declaration(&mut tokens, inline),
                    name if !continued => {
                        let line = ident.span().start().line;
                        self.path(name.into(), line, &mut tokens, inline);
                    }
                    _ => {}
                },
                TokenTree::Literal(_) => {}
            }
        }
    }

    /// What follows `mod`.
    fn module(&mut self, tokens: &mut Tokens, inline: &mut Vec<String>) {
        let Some(TokenTree::Ident(name)) = tokens.next() else {
            return;
        };
        match tokens.next() {
            Some(TokenTree::Group(group)) => {
                inline.push(name.to_string());
                self.stream(group.stream(), inline);
                inline.pop();
            }
            _ => self.children.push(name.to_string()),
        }
    }

    /// What follows `use`.
    fn declaration(&mut self, tokens: &mut Tokens, inline: &[String]) {
        let mut tree = Vec::new();
        for token in tokens {
            match &token {
                // The captured lifetimes of an `impl Trait`: `use<'a>`.
                TokenTree::Punct(punct) if punct.as_char() == '<' && tree.is_empty() => return,
                TokenTree::Punct(punct) if punct.as_char() == ';' => break,
                _ => tree.push(token),
            }
        }
        self.use_tree(tree, &[], inline);
    }

    /// One or more trees of a `use` declaration, separated by commas.
    fn use_tree(&mut self, tree: Vec<TokenTree>, prefix: &[String], inline: &[String]) {
        for tree in tree.split(|token| is_punct(token, ',')) {
            let mut names = prefix.to_vec();
            let mut line = None;
            for token in tree {
                line = line.or(Some(token.span().start().line));
                match token {
                    // Another name for the import.
                    TokenTree::Ident(ident) if ident == "as" => break,
                    TokenTree::Ident(ident) if ident == "self" && !names.is_empty() => {}
                    TokenTree::Ident(ident) => names.push(ident.to_string()),
                    TokenTree::Group(group) => {
                        self.use_tree(group.stream().into_iter().collect(), &names, inline);
                        line = None;
                        names.clear();
                    }
                    _ => {}
                }
            }
            if let Some(line) = line.filter(|_| !names.is_empty()) {
                let inline = inline.to_vec();
                self.paths.push(RawPath {
                    line,
                    inline,
                    names,
                });
            }
        }
    }

    /// A path in code, if `first` is followed by `::`.
    fn path(&mut self, first: String, line: usize, tokens: &mut Tokens, inline: &[String]) {
        let mut names = vec![first];
        while tokens.next_if(|token| is_punct(token, ':')).is_some() {
            if tokens.next_if(|token| is_punct(token, ':')).is_none() {
                // The type of a variable or field, which may begin with a path.
                return;
            }
            match tokens.next_if(|token| matches!(token, TokenTree::Ident(_))) {
                Some(name) => names.push(name.to_string()),
                // A turbofish.
                None => break,
            }
        }
        if names.len() > 1 {
            let inline = inline.to_vec();
            self.paths.push(RawPath {
                line,
                inline,
                names,
            });
        }
    }
}

fn is_punct(token: &TokenTree, character: char) -> bool {
    matches!(token, TokenTree::Punct(punct) if punct.as_char() == character)
}

fn is_parentheses(token: &TokenTree) -> bool {
    matches!(token, TokenTree::Group(group) if group.delimiter() == Delimiter::Parenthesis)
}

fn is_test_attribute(attribute: &Group) -> bool {
    attribute.stream().to_string().replace(' ', "") == "cfg(test)"
}

/// Whether `#` is followed by `[cfg(test)]`, which is consumed then.
fn next_is_test_attribute(tokens: &mut Tokens) -> bool {
    let attribute = tokens
        .next_if(|token| matches!(token, TokenTree::Group(group) if is_test_attribute(group)));
    attribute.is_some()
}

/// Skips further attributes and the item that they belong to.
fn skip_item(tokens: &mut Tokens) {
    for token in tokens {
        let ends = match &token {
            TokenTree::Group(group) => group.delimiter() == Delimiter::Brace,
            _ => is_punct(&token, ';'),
        };
        if ends {
            return;
        }
    }
}
