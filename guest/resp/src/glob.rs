//! Glob patterns of keys: `*`, `?`, `[a-z]`, `[^a]`, and `\` to escape a character.

/// Whether `pattern` matches the whole of `text`.
///
/// Takes at most as many steps as the product of both lengths.
pub(crate) fn matches(pattern: &[u8], text: &[u8]) -> bool {
    let (mut pattern, mut text) = (pattern, text);
    // The pattern after the last star, and the text from which that star may match one more byte.
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
            (_, [byte, ..]) => match_byte(pattern, *byte),
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

/// Matches `byte` with the first element of `pattern`, and returns the rest of the pattern.
fn match_byte(pattern: &[u8], byte: u8) -> Option<&[u8]> {
    let (matches, rest) = match pattern {
        [b'?', rest @ ..] => (true, rest),
        [b'[', b'^', class @ ..] => {
            let (contains, rest) = match_class(class, byte);
            (!contains, rest)
        }
        [b'[', class @ ..] => match_class(class, byte),
        [b'\\', escaped, rest @ ..] => (*escaped == byte, rest),
        [literal, rest @ ..] => (*literal == byte, rest),
        [] => return None,
    };
    matches.then_some(rest)
}

/// Whether a character class contains `byte`, and the pattern after the class.
fn match_class(class: &[u8], byte: u8) -> (bool, &[u8]) {
    let (mut class, mut contains) = (class, false);
    loop {
        class = match class {
            // A class without `]` extends to the end of the pattern.
            [] => return (contains, class),
            [b']', rest @ ..] => return (contains, rest),
            [b'\\', escaped, rest @ ..] => {
                contains |= *escaped == byte;
                rest
            }
            [from, b'-', to, rest @ ..] => {
                contains |= (*from.min(to)..=*from.max(to)).contains(&byte);
                rest
            }
            [literal, rest @ ..] => {
                contains |= *literal == byte;
                rest
            }
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_as_in_redis() {
        for (pattern, matching, others) in [
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
            for (texts, expected) in [(matching, true), (others, false)] {
                for text in texts {
                    let result = matches(pattern.as_bytes(), text.as_bytes());
                    assert_eq!(result, expected, "{text:?} by {pattern:?}");
                }
            }
        }
    }

    #[test]
    fn patterns_of_many_stars_take_bounded_time() {
        let pattern = b"a*".repeat(1000);
        let text = vec![b'a'; 10_000];
        assert!(matches(&pattern, &text));
        assert!(!matches(&[&pattern[..], b"b"].concat(), &text));
    }
}
