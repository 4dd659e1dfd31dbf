//! Patterns of keys: `*`, `?`, `[a-z]`, `[^a]`, and `\` before what is meant as it is.

/// Whether all of `text` is as `pattern` says. In no more steps than the product of their lengths,
/// whatever the pattern.
pub(crate) fn matches(pattern: &[u8], text: &[u8]) -> bool {
    let (mut pattern, mut text) = (pattern, text);
    // Where the last star is, and what it may take one more of.
    let mut star: Option<(&[u8], &[u8])> = None;
    loop {
        if let [b'*', rest @ ..] = pattern {
            pattern = rest;
            star = Some((rest, text));
            continue;
        }
        let step = match (pattern, text) {
            ([], []) => return true,
            ([], _) | (_, []) => None,
            (_, [byte, ..]) => one(pattern, *byte),
        };
        if let Some(rest) = step {
            pattern = rest;
            text = &text[1..];
            continue;
        }
        match star {
            Some((after, [_, rest @ ..])) => {
                pattern = after;
                text = rest;
                star = Some((after, rest));
            }
            _ => return false,
        }
    }
}

/// What of a pattern is left when its first element is this byte, if it is.
fn one(pattern: &[u8], byte: u8) -> Option<&[u8]> {
    let (is, rest) = match pattern {
        [b'?', rest @ ..] => (true, rest),
        [b'[', b'^', class @ ..] => {
            let (is, rest) = in_class(class, byte);
            (!is, rest)
        }
        [b'[', class @ ..] => in_class(class, byte),
        [b'\\', escaped, rest @ ..] => (*escaped == byte, rest),
        [literal, rest @ ..] => (*literal == byte, rest),
        [] => return None,
    };
    is.then_some(rest)
}

/// Whether a byte is in a class, and what follows that.
fn in_class(class: &[u8], byte: u8) -> (bool, &[u8]) {
    let (mut class, mut is) = (class, false);
    loop {
        class = match class {
            // One that does not end goes to the end of the pattern.
            [] => return (is, class),
            [b']', rest @ ..] => return (is, rest),
            [b'\\', escaped, rest @ ..] => {
                is |= *escaped == byte;
                rest
            }
            [from, b'-', to, rest @ ..] => {
                is |= (*from.min(to)..=*from.max(to)).contains(&byte);
                rest
            }
            [literal, rest @ ..] => {
                is |= *literal == byte;
                rest
            }
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_are_those_of_redis() {
        for (pattern, yes, no) in [
            ("", &[""][..], &["a"][..]),
            ("*", &["", "a", "abc"], &[]),
            ("h?llo", &["hello", "hxllo"], &["hllo", "heello"]),
            (
                "h*llo",
                &["hllo", "heeeello", "hllollo"],
                &["hell", "hlloo"],
            ),
            ("h[ae]llo", &["hello", "hallo"], &["hillo", "h[ae]llo"]),
            ("h[^e]llo", &["hallo", "hbllo"], &["hello", "hllo"]),
            ("h[a-b]llo", &["hallo", "hbllo"], &["hcllo", "h-llo"]),
            ("h[b-a]llo", &["hallo"], &["hcllo"]),
            ("h[a", &["ha"], &["hb", "h"]),
            (r"h[\]]", &["h]"], &[r"h\"]),
            (r"a\*b", &["a*b"], &["axb"]),
            (r"a\", &[r"a\"], &["a"]),
            ("*a*b*", &["ab", "xaxbx"], &["ba", "a"]),
            ("a**b", &["ab", "axb"], &["a"]),
        ] {
            for (texts, expected) in [(yes, true), (no, false)] {
                for text in texts {
                    let is = matches(pattern.as_bytes(), text.as_bytes());
                    assert_eq!(is, expected, "{text:?} by {pattern:?}");
                }
            }
        }
    }

    #[test]
    fn a_pattern_of_many_stars_comes_to_an_end() {
        let pattern = b"a*".repeat(1000);
        let text = vec![b'a'; 10_000];
        assert!(matches(&pattern, &text));
        assert!(!matches(&[&pattern[..], b"b"].concat(), &text));
    }
}
