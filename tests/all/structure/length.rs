//! The length of functions.

use proc_macro2::{Delimiter, TokenStream, TokenTree};

use super::sources::Sources;

/// What stands above a function that is long for a reason.
const REASON: &str = "// long: ";

struct Function {
    name: String,
    /// The line of `fn`.
    line: usize,
    /// The lines from `fn` to the closing brace.
    lines: usize,
}

/// Describes the functions that have more than `most` lines without a reason.
pub(super) fn long_functions(sources: &Sources, most: usize) -> Vec<String> {
    let mut problems = Vec::new();
    for (file, text) in sources {
        let stream = text
            .parse()
            .unwrap_or_else(|error| panic!("{file}: {error}"));
        let mut functions = Vec::new();
        find_functions(stream, &mut functions);
        let lines: Vec<&str> = text.lines().collect();
        for function in functions {
            if function.lines > most && !has_reason(&lines[..function.line - 1]) {
                let Function { name, line, lines } = function;
                problems.push(format!("{file}:{line}: {name} has {lines} lines"));
            }
        }
    }
    problems
}

fn find_functions(stream: TokenStream, functions: &mut Vec<Function>) {
    let tokens: Vec<TokenTree> = stream.into_iter().collect();
    for (n, token) in tokens.iter().enumerate() {
        match token {
            TokenTree::Ident(ident) if ident == "fn" => {
                // In the type of a pointer, no name follows.
                let Some(TokenTree::Ident(name)) = tokens.get(n + 1) else {
                    continue;
                };
                let line = ident.span().start().line;
                if let Some(end) = end_of_body(&tokens[n..]) {
                    functions.push(Function {
                        name: name.to_string(),
                        line,
                        lines: end - line + 1,
                    });
                }
            }
            TokenTree::Group(group) => find_functions(group.stream(), functions),
            _ => {}
        }
    }
}

/// The line of the closing brace, if the function has a body.
fn end_of_body(tokens: &[TokenTree]) -> Option<usize> {
    tokens.iter().find_map(|token| match token {
        TokenTree::Punct(punct) if punct.as_char() == ';' => Some(None),
        TokenTree::Group(group) if group.delimiter() == Delimiter::Brace => {
            Some(Some(group.span_close().end().line))
        }
        _ => None,
    })?
}

/// Whether the comments right above a function contain a reason.
fn has_reason(lines_above: &[&str]) -> bool {
    lines_above
        .iter()
        .rev()
        .map(|line| line.trim())
        .take_while(|line| !line.is_empty() && !line.ends_with(['}', ';', '{']))
        .any(|line| line.starts_with(REASON))
}
