//! The commands and their answers.

use std::str;

use crate::glob;
use crate::protocol::{Answers, Error, MAX_BULK, Request, integer};
use crate::store::{Hash, List, MAX_USED, Set, Store, Text, Time, item_cost, request_cost};

const SYNTAX: Error = Error::Borrowed("ERR syntax error");
const NOT_INTEGER: Error = Error::Borrowed("ERR value is not an integer or out of range");
const NOT_POSITIVE: Error = Error::Borrowed("ERR value is out of range, must be positive");
const OUT_OF_MEMORY: Error =
    Error::Borrowed("OOM command not allowed when used memory > 'maxmemory'.");

/// The reported version of Redis. Clients derive the supported commands from it.
const VERSION: &str = "7.0.0";

/// The state of a connection between commands.
pub(crate) struct Session {
    pub(crate) store: Store,
    id: u64,
    name: Vec<u8>,
    /// Whether the client has sent QUIT.
    pub(crate) quit: bool,
}

type Outcome = Result<(), Error>;

struct Command {
    name: &'static str,
    /// The number of arguments including the name. A negative number is a minimum.
    arity: isize,
    kind: Kind,
    keys: Keys,
    run: fn(&mut Session, &Request, &mut Answers) -> Outcome,
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    /// Reads keys.
    Reads,
    /// Changes keys without using more memory.
    Writes,
    /// Changes keys and may use more memory.
    Grows,
    /// Uses no keys.
    Other,
}

/// The arguments that are keys.
#[derive(Clone, Copy)]
enum Keys {
    None,
    First,
    All,
    EverySecond,
}

/// All commands, sorted by name.
#[rustfmt::skip]
static COMMANDS: &[Command] = {
    use Keys::{All, EverySecond, First};
    use Kind::{Grows, Other, Reads, Writes};
    const fn command(
        name: &'static str, arity: isize, kind: Kind, keys: Keys,
        run: fn(&mut Session, &Request, &mut Answers) -> Outcome,
    ) -> Command {
        Command { name, arity, kind, keys, run }
    }
    &[
        command("append", 3, Grows, First, append),
        command("auth", -2, Other, Keys::None, auth),
        command("client", -2, Other, Keys::None, client),
        command("command", -1, Other, Keys::None, describe_commands),
        command("config", -2, Other, Keys::None, config),
        command("dbsize", 1, Reads, Keys::None, dbsize),
        command("decr", 2, Grows, First, |s, r, a| add(s, r, a, -1)),
        command("decrby", 3, Grows, First, decrby),
        command("del", -2, Writes, All, del),
        command("echo", 2, Other, Keys::None, echo),
        command("exists", -2, Reads, All, exists),
        command("expire", -3, Writes, First, |s, r, a| expire(s, r, a, 1000)),
        command("flushall", -1, Writes, Keys::None, flush),
        command("flushdb", -1, Writes, Keys::None, flush),
        command("get", 2, Reads, First, get),
        command("getdel", 2, Writes, First, getdel),
        command("hdel", -3, Writes, First, hdel),
        command("hello", -1, Other, Keys::None, hello),
        command("hexists", 3, Reads, First, hexists),
        command("hget", 3, Reads, First, hget),
        command("hgetall", 2, Reads, First, hgetall),
        command("hlen", 2, Reads, First, hlen),
        command("hset", -4, Grows, First, hset),
        command("incr", 2, Grows, First, |s, r, a| add(s, r, a, 1)),
        command("incrby", 3, Grows, First, incrby),
        command("info", -1, Other, Keys::None, info),
        command("keys", 2, Reads, Keys::None, keys),
        command("llen", 2, Reads, First, llen),
        command("lpop", -2, Writes, First, |s, r, a| pop(s, r, a, List::pop_front)),
        command("lpush", -3, Grows, First, |s, r, a| push(s, r, a, List::push_front)),
        command("lrange", 4, Reads, First, lrange),
        command("mget", -2, Reads, All, mget),
        command("mset", -3, Grows, EverySecond, mset),
        command("persist", 2, Writes, First, persist),
        command("pexpire", -3, Writes, First, |s, r, a| expire(s, r, a, 1)),
        command("ping", -1, Other, Keys::None, ping),
        command("pttl", 2, Reads, First, |s, r, a| ttl(s, r, a, |left| left)),
        command("quit", -1, Other, Keys::None, quit),
        command("rpop", -2, Writes, First, |s, r, a| pop(s, r, a, List::pop_back)),
        command("rpush", -3, Grows, First, |s, r, a| push(s, r, a, List::push_back)),
        command("sadd", -3, Grows, First, sadd),
        command("scard", 2, Reads, First, scard),
        command("select", 2, Other, Keys::None, select),
        command("set", -3, Grows, First, set),
        command("sismember", 3, Reads, First, sismember),
        command("smembers", 2, Reads, First, smembers),
        command("spop", -2, Writes, First, spop),
        command("srem", -3, Writes, First, srem),
        command("strlen", 2, Reads, First, strlen),
        command("ttl", 2, Reads, First, |s, r, a| ttl(s, r, a, |left| (left + 500) / 1000)),
        command("type", 2, Reads, First, type_name),
        command("unlink", -2, Writes, All, del),
    ]
};

fn find(name: &[u8]) -> Option<&'static Command> {
    let compare = |command: &Command| {
        let lower_case = name.iter().map(u8::to_ascii_lowercase);
        command.name.bytes().cmp(lower_case)
    };
    COMMANDS
        .binary_search_by(compare)
        .ok()
        .map(|n| &COMMANDS[n])
}

impl Session {
    pub(crate) fn new(id: u64) -> Self {
        Self {
            store: Store::default(),
            id,
            name: Vec::new(),
            quit: false,
        }
    }

    /// Executes one request and answers it.
    pub(crate) fn execute(&mut self, request: &Request, answers: &mut Answers) {
        let start = answers.bytes.len();
        if let Err(error) = self.try_execute(request, answers) {
            answers.bytes.truncate(start);
            answers.error(&error);
        }
    }

    fn try_execute(&mut self, request: &Request, answers: &mut Answers) -> Outcome {
        let command = find(&request[0]).ok_or_else(|| unknown(request))?;
        let arity = command.arity.unsigned_abs();
        if request.len() < arity || (command.arity > 0 && request.len() > arity) {
            return Err(wrong_number(command.name));
        }
        if command.kind == Kind::Grows && !self.store.has_room(request_cost(request.from(1))) {
            return Err(OUT_OF_MEMORY);
        }
        (command.run)(self, request, answers)
    }
}

fn unknown(request: &Request) -> Error {
    let cut = |bytes: &[u8]| String::from_utf8_lossy(&bytes[..bytes.len().min(128)]).into_owned();
    let name = cut(&request[0]);
    let mut arguments = String::new();
    for argument in request.from(1) {
        if arguments.len() >= 128 {
            break;
        }
        arguments += &format!("'{}' ", cut(argument));
    }
    format!("ERR unknown command '{name}', with args beginning with: {arguments}").into()
}

fn wrong_number(name: &str) -> Error {
    format!("ERR wrong number of arguments for '{name}' command").into()
}

fn unknown_subcommand(request: &Request) -> Error {
    let name = String::from_utf8_lossy(&request[0]).to_uppercase();
    let subcommand = &request[1][..request[1].len().min(128)];
    let subcommand = String::from_utf8_lossy(subcommand);
    format!("ERR unknown subcommand '{subcommand}'. Try {name} HELP.").into()
}

fn is(argument: &[u8], word: &str) -> bool {
    argument.eq_ignore_ascii_case(word.as_bytes())
}

fn number(argument: &[u8]) -> Result<i64, Error> {
    integer(argument).ok_or(NOT_INTEGER)
}

// Commands on the connection.

fn ping(_: &mut Session, request: &Request, answers: &mut Answers) -> Outcome {
    match request.len() {
        1 => answers.simple("PONG"),
        2 => answers.bulk(&request[1]),
        _ => return Err(wrong_number("ping")),
    }
    Ok(())
}

fn echo(_: &mut Session, request: &Request, answers: &mut Answers) -> Outcome {
    answers.bulk(&request[1]);
    Ok(())
}

fn quit(session: &mut Session, _: &Request, answers: &mut Answers) -> Outcome {
    session.quit = true;
    answers.ok();
    Ok(())
}

fn select(_: &mut Session, request: &Request, answers: &mut Answers) -> Outcome {
    match number(&request[1])? {
        0 => answers.ok(),
        _ => return Err("ERR DB index is out of range".into()),
    }
    Ok(())
}

fn auth(_: &mut Session, _: &Request, _: &mut Answers) -> Outcome {
    Err(
        "ERR AUTH <password> called without any password configured for the default user. Are you \
         sure your configuration is correct?"
            .into(),
    )
}

fn hello(session: &mut Session, request: &Request, answers: &mut Answers) -> Outcome {
    if request.len() > 1 {
        match integer(&request[1]) {
            None => return Err("ERR Protocol version is not an integer or out of range".into()),
            Some(2) => {}
            Some(_) => return Err("NOPROTO unsupported protocol version".into()),
        }
    }
    let mut name = None;
    let mut options = request.from(2);
    while let Some(option) = options.next() {
        match (option, options.next()) {
            (option, Some(value)) if is(option, "setname") => name = Some(client_name(value)?),
            (option, Some(_)) if is(option, "auth") => return auth(session, request, answers),
            _ => {
                let option = String::from_utf8_lossy(&option[..option.len().min(128)]);
                return Err(format!("ERR Syntax error in HELLO option '{option}'").into());
            }
        }
    }
    session.name = name.unwrap_or(std::mem::take(&mut session.name));
    answers.array(14);
    for (key, value) in [("server", "redis"), ("version", VERSION)] {
        answers.bulk(key.as_bytes());
        answers.bulk(value.as_bytes());
    }
    for (key, value) in [("proto", 2), ("id", session.id as i64)] {
        answers.bulk(key.as_bytes());
        answers.integer(value);
    }
    for (key, value) in [("mode", "standalone"), ("role", "master")] {
        answers.bulk(key.as_bytes());
        answers.bulk(value.as_bytes());
    }
    answers.bulk(b"modules");
    answers.array(0);
    Ok(())
}

fn client_name(name: &[u8]) -> Result<Vec<u8>, Error> {
    match name.iter().all(|byte| (b'!'..=b'~').contains(byte)) {
        true => Ok(name.into()),
        false => {
            Err("ERR Client names cannot contain spaces, newlines or special characters.".into())
        }
    }
}

fn client(session: &mut Session, request: &Request, answers: &mut Answers) -> Outcome {
    match (&request[1], request.len()) {
        (subcommand, 2) if is(subcommand, "id") => answers.integer(session.id as i64),
        (subcommand, 2) if is(subcommand, "getname") => {
            answers.bulk_or_null(Some(&session.name[..]).filter(|name| !name.is_empty()));
        }
        (subcommand, 3) if is(subcommand, "setname") => {
            session.name = client_name(&request[2])?;
            answers.ok();
        }
        // Clients report their library and its version. The guest does not use them.
        (subcommand, 4) if is(subcommand, "setinfo") => answers.ok(),
        _ => return Err(unknown_subcommand(request)),
    }
    Ok(())
}

/// COMMAND.
fn describe_commands(_: &mut Session, request: &Request, answers: &mut Answers) -> Outcome {
    let describe = |command: &Command, answers: &mut Answers| {
        answers.array(6);
        answers.bulk(command.name.as_bytes());
        answers.integer(command.arity as i64);
        let flags: &[&str] = match command.kind {
            Kind::Reads => &["readonly"],
            Kind::Writes => &["write"],
            Kind::Grows => &["write", "denyoom"],
            Kind::Other => &[],
        };
        answers.array(flags.len());
        flags.iter().for_each(|flag| answers.simple(flag));
        let (first, last, step) = match command.keys {
            Keys::None => (0, 0, 0),
            Keys::First => (1, 1, 1),
            Keys::All => (1, -1, 1),
            Keys::EverySecond => (1, -1, 2),
        };
        answers.integer(first);
        answers.integer(last);
        answers.integer(step);
    };
    if request.len() == 1 {
        answers.array(COMMANDS.len());
        COMMANDS
            .iter()
            .for_each(|command| describe(command, answers));
    } else if is(&request[1], "count") {
        answers.count(COMMANDS.len());
    } else if is(&request[1], "info") {
        // The limit bounds the answer. A longer list of names has to contain duplicates.
        let names = request.from(2).take(COMMANDS.len());
        answers.array(names.clone().count());
        for name in names {
            match find(name) {
                Some(command) => describe(command, answers),
                None => answers.null(),
            }
        }
    } else {
        // DOCS is not supported. redis-cli falls back to its own documentation after this error.
        return Err(unknown_subcommand(request));
    }
    Ok(())
}

fn config(_: &mut Session, request: &Request, answers: &mut Answers) -> Outcome {
    if !is(&request[1], "get") {
        return Err(unknown_subcommand(request));
    }
    if request.len() < 3 {
        return Err(wrong_number("config|get"));
    }
    let max_memory = MAX_USED.to_string();
    let max_bulk = MAX_BULK.to_string();
    let parameters = [
        ("appendonly", "no"),
        ("databases", "1"),
        ("maxmemory", &max_memory),
        ("maxmemory-policy", "noeviction"),
        ("proto-max-bulk-len", &max_bulk),
        ("save", ""),
    ];
    let matching = parameters.iter().filter(|(name, _)| {
        request
            .from(2)
            .any(|pattern| glob::matches(&pattern.to_ascii_lowercase(), name.as_bytes()))
    });
    let texts = matching.flat_map(|(name, value)| [name, value]);
    answers.bulks(texts.map(|text| Some(text.as_bytes())))
}

fn info(session: &mut Session, request: &Request, answers: &mut Answers) -> Outcome {
    let includes = |section| {
        let mut requested = request.from(1).peekable();
        requested.peek().is_none()
            || requested.any(|name| {
                [section, "all", "default", "everything"]
                    .iter()
                    .any(|word| is(name, word))
            })
    };
    let mut text = String::new();
    if includes("server") {
        text += &format!("# Server\r\nredis_version:{VERSION}\r\nredis_mode:standalone\r\n\r\n");
    }
    if includes("clients") {
        text += "# Clients\r\nconnected_clients:1\r\n\r\n";
    }
    if includes("memory") {
        let used = session.store.used();
        text += &format!("# Memory\r\nused_memory:{used}\r\nmaxmemory:{MAX_USED}\r\n\r\n");
    }
    if includes("keyspace") {
        text += "# Keyspace\r\n";
        let keys = session.store.keys().count();
        if keys > 0 {
            let expiring = session.store.expiring();
            text += &format!("db0:keys={keys},expires={expiring},avg_ttl=0\r\n");
        }
    }
    answers.bulk(text.as_bytes());
    Ok(())
}

// Commands on keys.

fn del(session: &mut Session, request: &Request, answers: &mut Answers) -> Outcome {
    let removed = request.from(1).filter(|key| session.store.remove(key));
    answers.count(removed.count());
    Ok(())
}

fn exists(session: &mut Session, request: &Request, answers: &mut Answers) -> Outcome {
    let existing = request
        .from(1)
        .filter(|key| session.store.value(key).is_some());
    answers.count(existing.count());
    Ok(())
}

/// TYPE.
fn type_name(session: &mut Session, request: &Request, answers: &mut Answers) -> Outcome {
    let value = session.store.value(&request[1]);
    answers.simple(value.map_or("none", |value| value.type_name()));
    Ok(())
}

fn keys(session: &mut Session, request: &Request, answers: &mut Answers) -> Outcome {
    let keys = session.store.keys();
    answers.bulks(keys.filter(|key| glob::matches(&request[1], key)).map(Some))
}

fn dbsize(session: &mut Session, _: &Request, answers: &mut Answers) -> Outcome {
    answers.count(session.store.keys().count());
    Ok(())
}

fn flush(session: &mut Session, request: &Request, answers: &mut Answers) -> Outcome {
    let is_valid = match request.len() {
        1 => true,
        2 => is(&request[1], "sync") || is(&request[1], "async"),
        _ => false,
    };
    if !is_valid {
        return Err(SYNTAX);
    }
    session.store.clear();
    answers.ok();
    Ok(())
}

/// The time `amount` units of `unit` milliseconds after `start`.
fn deadline(amount: i64, unit: i64, start: Time, command: &[u8]) -> Result<Time, Error> {
    amount
        .checked_mul(unit)
        .and_then(|amount| amount.checked_add(start))
        .ok_or_else(|| {
            let command = String::from_utf8_lossy(command).to_lowercase();
            format!("ERR invalid expire time in '{command}' command").into()
        })
}

fn expire(session: &mut Session, request: &Request, answers: &mut Answers, unit: i64) -> Outcome {
    let amount = number(&request[2])?;
    let (mut nx, mut xx, mut gt, mut lt) = (false, false, false, false);
    for option in request.from(3) {
        match option {
            _ if is(option, "nx") => nx = true,
            _ if is(option, "xx") => xx = true,
            _ if is(option, "gt") => gt = true,
            _ if is(option, "lt") => lt = true,
            _ => {
                let option = String::from_utf8_lossy(&option[..option.len().min(128)]);
                return Err(format!("ERR Unsupported option {option}").into());
            }
        }
    }
    if nx && (xx || gt || lt) {
        return Err("ERR NX and XX, GT or LT options at the same time are not compatible".into());
    }
    if gt && lt {
        return Err("ERR GT and LT options at the same time are not compatible".into());
    }
    let now = session.store.now();
    let time = deadline(amount, unit, now, &request[0])?;
    let Some(expires) = session.store.expires(&request[1]) else {
        answers.integer(0);
        return Ok(());
    };
    // For GT and LT, a key without expiry counts as expiring last.
    let refused = match expires {
        None => xx || gt,
        Some(old) => nx || (gt && time <= old) || (lt && time >= old),
    };
    if !refused {
        session.store.set_expires(&request[1], Some(time));
        if time <= now {
            session.store.remove(&request[1]);
        }
    }
    answers.integer((!refused).into());
    Ok(())
}

fn persist(session: &mut Session, request: &Request, answers: &mut Answers) -> Outcome {
    let expires = session.store.expires(&request[1]);
    session.store.set_expires(&request[1], None);
    answers.integer(expires.flatten().is_some().into());
    Ok(())
}

fn ttl(
    session: &mut Session,
    request: &Request,
    answers: &mut Answers,
    unit: fn(Time) -> i64,
) -> Outcome {
    let now = session.store.now();
    answers.integer(match session.store.expires(&request[1]) {
        None => -2,
        Some(None) => -1,
        Some(Some(time)) => unit(time - now),
    });
    Ok(())
}

// Commands on strings.

fn get(session: &mut Session, request: &Request, answers: &mut Answers) -> Outcome {
    let text = session.store.get::<Text>(&request[1])?;
    answers.bulk_or_null(text.map(Vec::as_slice));
    Ok(())
}

fn getdel(session: &mut Session, request: &Request, answers: &mut Answers) -> Outcome {
    get(session, request, answers)?;
    session.store.remove(&request[1]);
    Ok(())
}

fn set(session: &mut Session, request: &Request, answers: &mut Answers) -> Outcome {
    let (mut nx, mut xx, mut return_old, mut keep_ttl) = (false, false, false, false);
    let mut expires = None;
    let now = session.store.now();
    let mut options = request.from(3);
    while let Some(option) = options.next() {
        // The unit in milliseconds, and the time that it counts from.
        let time = match option {
            _ if is(option, "nx") && !xx => {
                nx = true;
                continue;
            }
            _ if is(option, "xx") && !nx => {
                xx = true;
                continue;
            }
            _ if is(option, "get") => {
                return_old = true;
                continue;
            }
            _ if is(option, "keepttl") && expires.is_none() => {
                keep_ttl = true;
                continue;
            }
            _ if is(option, "ex") => (1000, now),
            _ if is(option, "px") => (1, now),
            _ if is(option, "exat") => (1000, 0),
            _ if is(option, "pxat") => (1, 0),
            _ => return Err(SYNTAX),
        };
        let amount = options.next().ok_or(SYNTAX)?;
        if keep_ttl || expires.is_some() {
            return Err(SYNTAX);
        }
        expires = Some((amount, time));
    }
    let mut expires = match expires {
        None => None,
        Some((amount, (unit, start))) => {
            let amount = number(amount)?;
            if amount <= 0 {
                return Err("ERR invalid expire time in 'set' command".into());
            }
            Some(deadline(amount, unit, start, b"set")?)
        }
    };
    let (key, value) = (&request[1], &request[2]);
    if return_old {
        get(session, request, answers)?;
    }
    let exists = session.store.value(key).is_some();
    if (nx && exists) || (xx && !exists) {
        if !return_old {
            answers.null();
        }
        return Ok(());
    }
    if keep_ttl {
        expires = session.store.expires(key).flatten();
    }
    session.store.set(key, value, expires);
    if !return_old {
        answers.ok();
    }
    Ok(())
}

fn mget(session: &mut Session, request: &Request, answers: &mut Answers) -> Outcome {
    // A value of another type counts as missing.
    let text = |key| session.store.get::<Text>(key).ok().flatten();
    answers.bulks(request.from(1).map(|key| text(key).map(Vec::as_slice)))
}

fn mset(session: &mut Session, request: &Request, answers: &mut Answers) -> Outcome {
    if request.len().is_multiple_of(2) {
        return Err(wrong_number("mset"));
    }
    for n in (1..request.len()).step_by(2) {
        session.store.set(&request[n], &request[n + 1], None);
    }
    answers.ok();
    Ok(())
}

fn append(session: &mut Session, request: &Request, answers: &mut Answers) -> Outcome {
    let added = &request[2];
    let length = session.store.change(&request[1], |text: &mut Text, _| {
        if text.len() + added.len() > MAX_BULK {
            return Err("ERR string exceeds maximum allowed size (proto-max-bulk-len)".into());
        }
        text.extend_from_slice(added);
        Ok(text.len())
    })?;
    answers.count(length);
    Ok(())
}

fn strlen(session: &mut Session, request: &Request, answers: &mut Answers) -> Outcome {
    let text = session.store.get::<Text>(&request[1])?;
    answers.count(text.map_or(0, Vec::len));
    Ok(())
}

fn add(session: &mut Session, request: &Request, answers: &mut Answers, by: i64) -> Outcome {
    let exists = session.store.value(&request[1]).is_some();
    let sum = session.store.change(&request[1], |text: &mut Text, _| {
        let old = if exists { number(text)? } else { 0 };
        let sum = old
            .checked_add(by)
            .ok_or("ERR increment or decrement would overflow")?;
        text.clear();
        text.extend_from_slice(sum.to_string().as_bytes());
        Ok(sum)
    })?;
    answers.integer(sum);
    Ok(())
}

fn incrby(session: &mut Session, request: &Request, answers: &mut Answers) -> Outcome {
    add(session, request, answers, number(&request[2])?)
}

fn decrby(session: &mut Session, request: &Request, answers: &mut Answers) -> Outcome {
    let by = number(&request[2])?
        .checked_neg()
        .ok_or("ERR decrement would overflow")?;
    add(session, request, answers, by)
}

// Commands on lists.

fn push(
    session: &mut Session,
    request: &Request,
    answers: &mut Answers,
    push: fn(&mut List, Vec<u8>),
) -> Outcome {
    let length = session.store.change(&request[1], |list: &mut List, cost| {
        for item in request.from(2) {
            *cost += item_cost(item);
            push(list, item.into());
        }
        Ok(list.len())
    })?;
    answers.count(length);
    Ok(())
}

/// The optional count argument.
fn optional_count(request: &Request) -> Result<Option<usize>, Error> {
    match request.len() {
        2 => Ok(None),
        3 => {
            let count = integer(&request[2]).and_then(|count| usize::try_from(count).ok());
            count.map(Some).ok_or(NOT_POSITIVE)
        }
        _ => Err(SYNTAX),
    }
}

fn pop(
    session: &mut Session,
    request: &Request,
    answers: &mut Answers,
    pop: fn(&mut List) -> Option<Vec<u8>>,
) -> Outcome {
    let name = if is(&request[0], "lpop") {
        "lpop"
    } else {
        "rpop"
    };
    if request.len() > 3 {
        return Err(wrong_number(name));
    }
    let count = optional_count(request)?;
    let list = session.store.get::<List>(&request[1])?;
    let Some(list) = list else {
        match count {
            None => answers.null(),
            Some(_) => answers.null_array(),
        }
        return Ok(());
    };
    // The answer is written before the items are removed, because it may be too long.
    let items = list.iter().map(|item| Some(item.as_slice()));
    match (count, name) {
        (None, "lpop") => answers.bulk_or_null(items.clone().next().flatten()),
        (None, _) => answers.bulk_or_null(items.clone().next_back().flatten()),
        (Some(count), "lpop") => answers.bulks(items.take(count))?,
        (Some(count), _) => answers.bulks(items.rev().take(count))?,
    }
    session.store.change(&request[1], |list: &mut List, cost| {
        for item in (0..count.unwrap_or(1)).map_while(|_| pop(list)) {
            *cost -= item_cost(&item);
        }
        Ok(())
    })
}

fn lrange(session: &mut Session, request: &Request, answers: &mut Answers) -> Outcome {
    let (start, stop) = (number(&request[2])?, number(&request[3])?);
    let list = session.store.get::<List>(&request[1])?;
    let length = list.map_or(0, List::len);
    // Negative indices count from the end.
    let index = |n: i64| match n {
        0.. => n,
        _ => n.saturating_add(length as i64),
    };
    let start = index(start).max(0) as usize;
    let end = (index(stop).saturating_add(1).max(0) as usize).min(length);
    let items = list
        .filter(|_| start < end)
        .map(|list| list.range(start..end));
    answers.bulks(
        items
            .into_iter()
            .flatten()
            .map(|item| Some(item.as_slice())),
    )
}

fn llen(session: &mut Session, request: &Request, answers: &mut Answers) -> Outcome {
    let list = session.store.get::<List>(&request[1])?;
    answers.count(list.map_or(0, List::len));
    Ok(())
}

// Commands on sets.

fn sadd(session: &mut Session, request: &Request, answers: &mut Answers) -> Outcome {
    let added = session.store.change(&request[1], |set: &mut Set, cost| {
        let mut added = 0;
        for item in request.from(2) {
            if set.insert(item.into()) {
                *cost += item_cost(item);
                added += 1;
            }
        }
        Ok(added)
    })?;
    answers.count(added);
    Ok(())
}

fn srem(session: &mut Session, request: &Request, answers: &mut Answers) -> Outcome {
    let removed = session.store.change(&request[1], |set: &mut Set, cost| {
        let removed = request.from(2).filter(|item| set.swap_remove(*item));
        Ok(removed.map(|item| *cost -= item_cost(item)).count())
    })?;
    answers.count(removed);
    Ok(())
}

fn spop(session: &mut Session, request: &Request, answers: &mut Answers) -> Outcome {
    let count = optional_count(request)?;
    if session.store.get::<Set>(&request[1])?.is_none() {
        match count {
            None => answers.null(),
            Some(_) => answers.array(0),
        }
        return Ok(());
    }
    session.store.change(&request[1], |set: &mut Set, cost| {
        // Random items are moved to the end. The answer is written before they are removed, because
        // it may be too long.
        let length = set.len();
        let remaining = length - count.unwrap_or(1).min(length);
        for end in (remaining..length).rev() {
            set.swap_indices(fastrand::usize(..=end), end);
        }
        let drawn = set.as_slice().get_range(remaining..).into_iter().flatten();
        match count {
            None => drawn.for_each(|item| answers.bulk(item)),
            Some(_) => answers.bulks(drawn.map(|item| Some(item.as_slice())))?,
        }
        for item in (remaining..length).filter_map(|_| set.pop()) {
            *cost -= item_cost(&item);
        }
        Ok(())
    })
}

fn scard(session: &mut Session, request: &Request, answers: &mut Answers) -> Outcome {
    let set = session.store.get::<Set>(&request[1])?;
    answers.count(set.map_or(0, |set| set.len()));
    Ok(())
}

fn smembers(session: &mut Session, request: &Request, answers: &mut Answers) -> Outcome {
    let set = session.store.get::<Set>(&request[1])?;
    let items = set.into_iter().flat_map(|set| set.iter());
    answers.bulks(items.map(|item| Some(item.as_slice())))
}

fn sismember(session: &mut Session, request: &Request, answers: &mut Answers) -> Outcome {
    let set = session.store.get::<Set>(&request[1])?;
    let contains = set.is_some_and(|set| set.contains(&request[2]));
    answers.integer(contains.into());
    Ok(())
}

// Commands on hashes.

fn hset(session: &mut Session, request: &Request, answers: &mut Answers) -> Outcome {
    if !request.len().is_multiple_of(2) {
        return Err(wrong_number("hset"));
    }
    let added = session.store.change(&request[1], |hash: &mut Hash, cost| {
        let mut added = 0;
        for n in (2..request.len()).step_by(2) {
            let (field, value) = (&request[n], &request[n + 1]);
            *cost += item_cost(value);
            match hash.insert(field.into(), value.into()) {
                Some(old) => *cost -= item_cost(&old),
                None => {
                    *cost += item_cost(field);
                    added += 1;
                }
            }
        }
        Ok(added)
    })?;
    answers.count(added);
    Ok(())
}

fn hdel(session: &mut Session, request: &Request, answers: &mut Answers) -> Outcome {
    let removed = session.store.change(&request[1], |hash: &mut Hash, cost| {
        let removed = request
            .from(2)
            .filter_map(|field| hash.swap_remove_entry(field));
        let removed = removed.map(|(field, old)| *cost -= item_cost(&field) + item_cost(&old));
        Ok(removed.count())
    })?;
    answers.count(removed);
    Ok(())
}

fn hget(session: &mut Session, request: &Request, answers: &mut Answers) -> Outcome {
    let hash = session.store.get::<Hash>(&request[1])?;
    let value = hash.and_then(|hash| hash.get(&request[2]));
    answers.bulk_or_null(value.map(Vec::as_slice));
    Ok(())
}

fn hexists(session: &mut Session, request: &Request, answers: &mut Answers) -> Outcome {
    let hash = session.store.get::<Hash>(&request[1])?;
    let contains = hash.is_some_and(|hash| hash.contains_key(&request[2]));
    answers.integer(contains.into());
    Ok(())
}

fn hgetall(session: &mut Session, request: &Request, answers: &mut Answers) -> Outcome {
    let hash = session.store.get::<Hash>(&request[1])?;
    let pairs = hash.into_iter().flat_map(|hash| hash.iter());
    let texts = pairs.flat_map(|(field, value)| [field, value]);
    answers.bulks(texts.map(|text| Some(text.as_slice())))
}

fn hlen(session: &mut Session, request: &Request, answers: &mut Answers) -> Outcome {
    let hash = session.store.get::<Hash>(&request[1])?;
    answers.count(hash.map_or(0, |hash| hash.len()));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_is_found_in_upper_and_lower_case() {
        for command in COMMANDS {
            for name in [command.name.to_owned(), command.name.to_uppercase()] {
                let found = find(name.as_bytes()).expect("the commands are sorted by name");
                assert_eq!(found.name, command.name);
            }
        }
        for name in ["", "ge", "gett", "get ", "zadd"] {
            assert!(find(name.as_bytes()).is_none(), "for {name:?}");
        }
    }
}
