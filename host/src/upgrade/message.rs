//! Messages between the two processes of an upgrade.
//!
//! The parent describes each descriptor by one line of the variable [`VARIABLE`]. The child answers on a
//! pipe with [`Ready`]. Releases of wasinetd upgrade to each other, so this format only grows.

use std::fmt;
use std::os::fd::RawFd;
use std::path::PathBuf;

use crate::net::{FileIdentity, ListenAddress};

/// Environment variable with the descriptions of all inherited descriptors.
pub const VARIABLE: &str = "WASINETD_INHERITED";

/// Kind of a descriptor, and what the child has to know about it.
#[derive(Clone, Debug, PartialEq)]
pub enum Description {
    /// A listening socket of a service.
    Listener {
        /// Name of the service.
        service: String,
        /// The file of a Unix socket.
        file: Option<FileIdentity>,
        /// The address as the service asked for it. `None` if this release does not understand it.
        asked: Option<ListenAddress>,
    },
    /// The component of a guest, as a file in memory.
    Guest {
        /// Name of the service.
        service: String,
        /// Path of the file that the guest came from.
        path: PathBuf,
    },
    /// The listening socket of the admin API.
    Admin {
        /// The file of a Unix socket.
        file: Option<FileIdentity>,
    },
    /// The pipe for [`Ready`].
    Ready,
}

/// A descriptor and its description: `listen=5:SERVICE FILE ADDRESS`, `guest=6:SERVICE PATH`,
/// `admin=7:FILE`, `ready=8:`. `FILE` is `-` without a file; names of services have no spaces.
#[derive(Clone, Debug, PartialEq)]
pub struct Line {
    /// Number of the descriptor, the same in both processes.
    pub fd: RawFd,
    /// Its description.
    pub description: Description,
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let fd = self.fd;
        let text = match &self.description {
            Description::Listener {
                service,
                file,
                asked,
            } => {
                let asked = asked.as_ref().map(ToString::to_string).unwrap_or_default();
                format!("listen={fd}:{service} {} {asked}", file_text(*file))
            }
            Description::Guest { service, path } => {
                format!("guest={fd}:{service} {}", path.display())
            }
            Description::Admin { file } => format!("admin={fd}:{}", file_text(*file)),
            Description::Ready => format!("ready={fd}:"),
        };
        // A path with a newline must not end the line. The child then reads that file again.
        f.write_str(&text.replace('\n', " "))
    }
}

fn file_text(file: Option<FileIdentity>) -> String {
    file.map_or_else(|| "-".into(), |file| file.to_string())
}

/// Text of [`VARIABLE`].
pub fn encode(lines: &[Line]) -> String {
    let lines: Vec<_> = lines.iter().map(ToString::to_string).collect();
    lines.join("\n")
}

/// The lines in the text of [`VARIABLE`]. Skips what this release does not understand.
pub fn decode(text: &str) -> Vec<Line> {
    text.lines().filter_map(decode_line).collect()
}

fn decode_line(line: &str) -> Option<Line> {
    let (kind, rest) = line.split_once('=')?;
    let (fd, text) = rest.split_once(':').unwrap_or((rest, ""));
    let (service, details) = text.split_once(' ').unwrap_or((text, ""));
    let description = match kind {
        "listen" => {
            let (file, asked) = details.split_once(' ').unwrap_or((details, ""));
            Description::Listener {
                service: service.into(),
                file: file.parse().ok(),
                asked: asked.parse().ok(),
            }
        }
        "guest" => Description::Guest {
            service: service.into(),
            path: details.into(),
        },
        "admin" => Description::Admin {
            file: text.parse().ok(),
        },
        "ready" => Description::Ready,
        _ => return None,
    };
    let fd = fd.parse().ok()?;
    Some(Line { fd, description })
}

/// The child serves: `1`, then ` FD` for each inherited socket that it does not use.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Ready {
    /// Sockets that the child does not use. The parent accepts their last clients and closes them.
    pub unused: Vec<RawFd>,
}

impl fmt::Display for Ready {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("1")?;
        self.unused.iter().try_for_each(|fd| write!(f, " {fd}"))
    }
}

impl Ready {
    /// Parses what a child wrote before it closed the pipe. `None` if it does not serve.
    pub fn parse(text: &str) -> Option<Self> {
        let unused = text.strip_prefix('1')?;
        Some(Self {
            unused: unused.split(' ').filter_map(|fd| fd.parse().ok()).collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_descriptions_survive_the_way_to_the_child() {
        let file = Some("1,2,3".parse().unwrap());
        let listener = |fd, service: &str, file, asked: &str| Line {
            fd,
            description: Description::Listener {
                service: service.into(),
                file,
                asked: Some(asked.parse().unwrap()),
            },
        };
        let line = |fd, description| Line { fd, description };
        let lines = [
            listener(5, "web", None, "127.0.0.1:0"),
            listener(6, "web", file, "unix:/run/a b.sock"),
            listener(7, "web", None, "fd:name"),
            line(
                8,
                Description::Guest {
                    service: "web".into(),
                    path: "/guests/a b.wasm".into(),
                },
            ),
            line(9, Description::Admin { file }),
            line(10, Description::Admin { file: None }),
            line(11, Description::Ready),
        ];
        assert_eq!(decode(&encode(&lines)), lines);
    }

    #[test]
    fn lines_of_other_releases_are_skipped() {
        let text = "new=5:x\nlisten=x:a - 127.0.0.1:1\nlisten=6:a - sctp:1\n\nready=7:";
        let lines = decode(text);
        assert_eq!(lines.len(), 2, "{lines:?}");
        let Description::Listener { asked, .. } = &lines[0].description else {
            panic!("{lines:?}")
        };
        assert_eq!((lines[0].fd, asked), (6, &None));
        assert_eq!(lines[1].description, Description::Ready);
    }

    #[test]
    fn a_path_with_a_newline_does_not_forge_a_line() {
        let guest = Line {
            fd: 5,
            description: Description::Guest {
                service: "a".into(),
                path: "/x\nready=3:".into(),
            },
        };
        assert_eq!(decode(&encode(&[guest])).len(), 1);
    }

    #[test]
    fn the_answer_names_unused_sockets() {
        for unused in [vec![], vec![5], vec![5, 17]] {
            let ready = Ready { unused };
            assert_eq!(Ready::parse(&ready.to_string()), Some(ready));
        }
        assert_eq!(Ready::parse(""), None);
        assert_eq!(Ready::parse("0 5"), None);
    }
}
