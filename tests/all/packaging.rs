//! What packages are made of.

use std::process::Command;

use crate::harness::{run, wasinetd};

fn completions(shell: &str) -> String {
    let output = run(wasinetd().args(["completions", shell]));
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).expect("it is text")
}

#[test]
fn bash_completes_commands_flags_and_values() {
    let directory = tempfile::tempdir().unwrap();
    let script = directory.path().join("wasinetd");
    std::fs::write(&script, completions("bash")).unwrap();
    let complete = |words: &[&str]| -> Vec<String> {
        let last = words.len() - 1;
        let mut bash = Command::new("bash");
        bash.args([
            "--norc",
            "-c",
            // As bash itself calls it.
            r#"source "$1"; shift
            function=$(complete -p wasinetd | sed 's/.*-F \([^ ]*\).*/\1/')
            COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMP_LINE="$*" COMP_POINT=${#COMP_LINE}
            "$function" wasinetd "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
            printf '%s\n' "${COMPREPLY[@]}""#,
            "bash",
        ]);
        assert!(last > 0);
        let output = run(bash.arg(&script).args(words));
        assert!(output.status.success(), "{output:?}");
        let text = String::from_utf8(output.stdout).unwrap();
        text.lines().map(str::to_owned).collect()
    };
    assert_eq!(complete(&["wasinetd", "ser"]), ["serve"]);
    assert_eq!(
        complete(&["wasinetd", "serve", "--drain-t"]),
        ["--drain-timeout"]
    );
    assert_eq!(
        complete(&["wasinetd", "serve", "--log-format", ""]),
        ["text", "json"]
    );
    assert_eq!(complete(&["wasinetd", "ctl", "roll"]), ["rollback"]);
}

#[test]
fn every_shell_has_completions() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = completions(shell);
        for word in ["serve", "completions", "rollback", "drain-timeout"] {
            assert!(script.contains(word), "{shell}: {word}");
        }
    }
    let output = run(wasinetd().args(["completions", "csh"]));
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(64), "{said}");
    assert!(said.contains("zsh"), "{said}");
}
