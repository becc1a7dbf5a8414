//! The commands that `execute` can run: those that both kinds of store have, with the same answers.

use super::Error;

/// A command, and what must be known of it before it is run.
#[derive(Debug)]
pub struct Command {
    /// In upper case.
    pub name: &'static str,
    /// Which arguments are keys.
    pub keys: Keys,
    /// Whether it may change something.
    pub writes: bool,
    /// Whether it answers what is kept, which may be of any size.
    pub answers_content: bool,
    arguments: Arguments,
}

/// Which arguments are keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keys {
    /// The first.
    First,
    /// All of them.
    All,
}

/// How many arguments a command takes, its keys among them.
#[derive(Clone, Copy, Debug)]
enum Arguments {
    Exactly(usize),
    AtLeast(usize),
    /// A key, then pairs, at least one.
    KeyAndPairs,
}

use Arguments::{AtLeast, Exactly, KeyAndPairs};
use Keys::{All, First};

/// In the order of their names.
const COMMANDS: &[Command] = &[
    write("APPEND", First, Exactly(2)),
    write("DECR", First, Exactly(1)),
    write("DECRBY", First, Exactly(2)),
    read("EXISTS", All, AtLeast(1)),
    write("EXPIRE", First, Exactly(2)),
    content(write("GETDEL", First, Exactly(1))),
    content(read("GETRANGE", First, Exactly(3))),
    content(write("GETSET", First, Exactly(2))),
    write("HDEL", First, AtLeast(2)),
    content(read("HGET", First, Exactly(2))),
    content(read("HGETALL", First, Exactly(1))),
    write("HSET", First, KeyAndPairs),
    write("INCR", First, Exactly(1)),
    INCRBY,
    content(read("MGET", All, AtLeast(1))),
    write("PERSIST", First, Exactly(1)),
    write("PEXPIRE", First, Exactly(2)),
    read("PTTL", First, Exactly(1)),
    write("SADD", First, AtLeast(2)),
    write("SETNX", First, Exactly(2)),
    read("SISMEMBER", First, Exactly(2)),
    content(read("SMEMBERS", First, Exactly(1))),
    write("SREM", First, AtLeast(2)),
    read("STRLEN", First, Exactly(1)),
    read("TTL", First, Exactly(1)),
    read("TYPE", First, Exactly(1)),
];

/// The command that `increment` is.
pub(super) const INCRBY: Command = write("INCRBY", First, Exactly(2));

/// The command of that name, in whatever case.
pub fn lookup(name: &str) -> Option<&'static Command> {
    COMMANDS
        .iter()
        .find(|command| command.name.eq_ignore_ascii_case(name))
}

/// Where a command of the table stands in it, or [`INCRBY`].
pub(super) fn index(command: &Command) -> usize {
    let at = COMMANDS.iter().position(|c| c.name == command.name);
    at.unwrap_or(COMMANDS.len())
}

/// All names, for messages.
pub fn names() -> impl Iterator<Item = &'static str> {
    COMMANDS.iter().map(|command| command.name)
}

impl Command {
    /// The keys among the arguments.
    pub fn keys<'a>(&self, arguments: &'a [Vec<u8>]) -> &'a [Vec<u8>] {
        match self.keys {
            First => arguments.get(..1).unwrap_or_default(),
            All => arguments,
        }
    }

    /// The command on a key, with as many arguments as it needs.
    pub(super) fn example(&self, key: &[u8]) -> Vec<Vec<u8>> {
        let arguments = match self.arguments {
            Exactly(count) | AtLeast(count) => count,
            KeyAndPairs => 3,
        };
        let mut words = vec![b"1".to_vec(); arguments + 1];
        words[0] = self.name.as_bytes().to_vec();
        words[1] = key.to_vec();
        words
    }

    /// Refuses a wrong number of arguments, in Redis's words.
    pub fn check(&self, arguments: &[Vec<u8>]) -> Result<(), Error> {
        let fine = match self.arguments {
            Exactly(count) => arguments.len() == count,
            AtLeast(count) => arguments.len() >= count,
            KeyAndPairs => arguments.len() >= 3 && arguments.len() % 2 == 1,
        };
        if fine {
            return Ok(());
        }
        let name = self.name.to_ascii_lowercase();
        Err(Error::Server(format!(
            "ERR wrong number of arguments for '{name}' command"
        )))
    }
}

const fn read(name: &'static str, keys: Keys, arguments: Arguments) -> Command {
    Command {
        name,
        keys,
        writes: false,
        answers_content: false,
        arguments,
    }
}

const fn content(command: Command) -> Command {
    Command {
        answers_content: true,
        ..command
    }
}

const fn write(name: &'static str, keys: Keys, arguments: Arguments) -> Command {
    Command {
        writes: true,
        ..read(name, keys, arguments)
    }
}
