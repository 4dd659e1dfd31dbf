//! `compile`: compiles guests into the cache.

use std::io::{self, Write};
use std::process::ExitCode;

use super::cache;
use super::guest::compile_guest;
use crate::cli::CompileArgs;
use crate::exit::Failure;

/// Compiles all guests that the arguments name.
pub(crate) fn compile(args: CompileArgs) -> Result<ExitCode, Failure> {
    let (guests, settings, cache) = args.settings();
    let mut stdout = io::stdout().lock();
    for path in guests {
        let cache = cache::required(&cache)?;
        let (guest, _) = compile_guest(&settings, path.clone(), Some(cache))?;
        let result = match guest.was_compiled() {
            true => "compiled",
            false => "compiled before",
        };
        // The reader may close the pipe early.
        let _ = writeln!(stdout, "{}: {result} ({})", path.display(), guest.digest());
    }
    Ok(ExitCode::SUCCESS)
}
